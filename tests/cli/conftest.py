# SPDX-License-Identifier: Apache-2.0
"""Runs commands in this process, on the random MoE that auto-round and transformers exported."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_mixprec.cli import main

MODELS = Path(__file__).parents[1] / "fixtures" / "random-moe"

Write = Callable[..., Path]


@dataclass(frozen=True)
class Result:
    """What one command printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def known_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on every machine."""
    monkeypatch.setenv("VLLM_MIXPREC_PLATFORM", "cpu-avx512")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run_command(*argv: str | Path) -> Result:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as exit_:  # argparse: usage and --help
            assert isinstance(exit_.code, int)
            code = exit_.code
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run_command


@pytest.fixture
def write_plan(tmp_path: Path) -> Write:
    """Write a plan over the fixture's checkpoints with some rules, each (match, source)."""

    def write(*rules: tuple[str, str], **sources: str | Path) -> Path:
        paths = {"bf16": MODELS / "bf16", "fp8": MODELS / "fp8", "int4": MODELS / "gptq"} | sources
        content = {
            "version": 1,
            "base": "bf16",
            "sources": {name: {"path": str(path)} for name, path in paths.items()},
            "rules": [{"match": match, "source": source} for match, source in rules],
        }
        file = tmp_path / "plan.yaml"
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
        return file

    return write


@pytest.fixture
def mixed_plan(write_plan: Write) -> Path:
    """Attention in fp8, four of eight experts in int4, the others in bf16."""
    return write_plan(
        ("model.layers.*.self_attn.*_proj", "fp8"), ("model.layers.*.mlp.experts.{0-3}", "int4")
    )
