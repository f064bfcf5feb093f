# SPDX-License-Identifier: Apache-2.0
"""The files in which the steps of scripts/gpu_suite.sh keep what they found."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Results:
    """One step's file: loaded if it is of the same key, written after every change."""

    def __init__(self, folder: Path, step: str, key: dict[str, Any], again: bool = False) -> None:
        self.file = folder / f"{step}.json"
        self.data: dict[str, Any] = {"step": step, "key": key, "complete": False, "cases": {}}
        if self.file.exists() and not again:
            held = json.loads(self.file.read_text())
            if held.get("key") == key:
                self.data = held

    @property
    def cases(self) -> dict[str, Any]:
        cases: dict[str, Any] = self.data["cases"]
        return cases

    def save(self, **more: Any) -> None:
        self.data |= more
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.file.with_suffix(".tmp")
        whole.write_text(json.dumps(self.data, indent=1) + "\n")
        whole.replace(self.file)
