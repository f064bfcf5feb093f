# SPDX-License-Identifier: Apache-2.0
"""What a kind of damage to a checkpoint is, and how the files of the sound model are rewritten."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARDS = (
    "bf16/model-00001-of-00003.safetensors",
    "bf16/model-00002-of-00003.safetensors",
    "bf16/model-00003-of-00003.safetensors",
    "fp8/model.safetensors",
    "gptq/model.safetensors",
)
INDEX = "bf16/model.safetensors.index.json"
CONFIGS = ("bf16/config.json", "fp8/config.json", "gptq/config.json")
SOURCES = ("bf16", "fp8", "gptq")
OTHER = "other"
"""Beside the sources: the same model with every tensor's data inverted, and so another model."""

Damage = Callable[[random.Random, Path, int], None]
"""Called with (its own random numbers, the folder of the sources, the number of the case)."""

SWAPPED = "a shard of another model with the same header; without checksums nothing tells"
PERMUTED = "offsets of two equal tensors exchanged: a sound file of another model"


@dataclass(frozen=True)
class Kind:
    """A kind of damage.

    Attributes:
        cases: how many are made.
        untellable: why a header cannot tell it, where that is so; else loading other values
            than the sound model's without a finding is a defect.
        moment: for files changed while they are read: before ``check`` reads the routers, or before
            ("load") or amid ("middle") the loader's reads; or "composed", when the plan has been
            composed into the folder ``mixed``, before an engine starts on that.
    """

    name: str
    cases: int
    damage: Damage
    untellable: str = ""
    moment: str = ""


Adder = Callable[..., Callable[[Damage], Damage]]


def adding_to(kinds: list[Kind]) -> Adder:
    """Return a decorator ``kind(cases, untellable, moment)`` that adds a function to a list."""

    def kind(cases: int, untellable: str = "", moment: str = "") -> Callable[[Damage], Damage]:
        def add(damage: Damage) -> Damage:
            name = damage.__name__.replace("_", " ")
            kinds.append(Kind(name, cases, damage, untellable, moment))
            return damage

        return add

    return kind


# How files are read and written here. Every write makes a new file: the old one may be shared.


def put(file: Path, raw: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(raw)


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return (header, data) of a sound safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(file: Path, header: Any, data: bytes) -> None:
    """Write a safetensors file; a header may be text, bytes, or a list of (key, value)."""
    if isinstance(header, list):
        header = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in header) + "}"
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    raw = text if isinstance(text, bytes) else text.encode()
    put(file, len(raw).to_bytes(8, "little") + raw + data)


def tensors(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def edit_entry(rng: random.Random, folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Apply ``edit`` to the entry of one tensor of one shard."""
    file = folder / rng.choice(SHARDS)
    header, data = split(file)
    edit(header[rng.choice(tensors(header))])
    join(file, header, data)


def edit_json(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    put(file, json.dumps(content).encode())


def renamed(rng: random.Random, folder: Path, rename: Callable[[str], str]) -> None:
    file = folder / rng.choice(SHARDS)
    header, data = split(file)
    victim = rng.choice(tensors(header))
    join(file, [(rename(k) if k == victim else k, v) for k, v in header.items()], data)
