# SPDX-License-Identifier: Apache-2.0
"""Damage done after compose: to the sources that it links to, and to the directory it wrote.

All of it is tried in whole engines, which start on the directory ``mixed``.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

from corruption.files import changes
from corruption.kinds import (
    INDEX,
    OTHER,
    SHARDS,
    SWAPPED,
    Kind,
    adding_to,
    edit_json,
    put,
)

REPLACED = "a whole model in another's place; without checksums nothing tells"

COMPOSED_KINDS: list[Kind] = [
    Kind(f"{what} after compose", 1, damage, REPLACED if "another" in what else "", "composed")
    for what, damage in changes()
]
kind = adding_to(COMPOSED_KINDS)

MIXED = "mixed"
CONFIG, PLAN_FILE = f"{MIXED}/config.json", f"{MIXED}/mixprec_plan.yaml"
KEPT = f"{MIXED}/sources/bf16/mixprec_headers"


@kind(5, untellable=SWAPPED, moment="composed")
def one_shard_is_another_models(rng: random.Random, folder: Path, number: int) -> None:
    put(folder / SHARDS[number], (folder.parent / OTHER / SHARDS[number]).read_bytes())


@kind(1, moment="composed")
def shards_exchanged_after_compose(rng: random.Random, folder: Path, number: int) -> None:
    one, other = (folder / shard for shard in SHARDS[1:3])
    one_raw, other_raw = one.read_bytes(), other.read_bytes()
    put(one, other_raw)
    put(other, one_raw)


@kind(4, moment="composed")
def composed_link_leads_astray(rng: random.Random, folder: Path, number: int) -> None:
    link = folder / MIXED / "sources" / SHARDS[1]
    link.unlink()
    if number == 0:
        link.symlink_to(link.name)
    elif number == 1:
        link.symlink_to(folder / SHARDS[2])
    elif number == 2:
        link.symlink_to("/dev/zero")
    else:
        os.mkfifo(link)


@kind(1, moment="composed")
def composed_source_is_a_link_cycle(rng: random.Random, folder: Path, number: int) -> None:
    source = folder / MIXED / "sources" / "fp8"
    source.rename(source.with_name("moved"))
    source.symlink_to(source)


@kind(3, moment="composed")
def composed_file_cut_short(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / (CONFIG, PLAN_FILE, KEPT)[number]
    os.truncate(file, file.stat().st_size // 2)


@kind(2, moment="composed")
def composed_file_removed(rng: random.Random, folder: Path, number: int) -> None:
    (folder / (PLAN_FILE, KEPT)[number]).unlink()


@kind(8, moment="composed")
def kept_headers_bytes_flipped(rng: random.Random, folder: Path, number: int) -> None:
    raw = bytearray((folder / KEPT).read_bytes())
    raw[rng.randrange(len(raw))] ^= rng.randint(1, 255)
    put(folder / KEPT, bytes(raw))


@kind(1, moment="composed")
def kept_offsets_exchanged(rng: random.Random, folder: Path, number: int) -> None:
    """Of two tensors of one shape, in the kept copy of a header only."""
    lines = (folder / KEPT).read_bytes().split(b"\n")
    header = json.loads(lines[1])
    one, other = (
        header[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"] for expert in (6, 7)
    )
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    lines[1] = text.ljust(len(lines[1]))
    put(folder / KEPT, b"\n".join(lines))


@kind(1, moment="composed")
def composed_index_names_other_shards(rng: random.Random, folder: Path, number: int) -> None:
    def edit(index: dict[str, Any]) -> None:
        shards = sorted(set(index["weight_map"].values()))
        after = dict(zip(shards, shards[1:] + shards[:1], strict=True))
        index["weight_map"] = {name: after[shard] for name, shard in index["weight_map"].items()}

    edit_json(folder / MIXED / "sources" / INDEX, edit)


@kind(4, moment="composed")
def composed_config_changed(rng: random.Random, folder: Path, number: int) -> None:
    change = (
        {"hidden_size": 512},
        {"num_experts_per_tok": 2},
        {"architectures": ["LlamaForCausalLM"]},
        {"rope_parameters": {"rope_type": "no such type"}},
    )[number]
    edit_json(folder / CONFIG, lambda config: config.update(change))


@kind(1, moment="composed")
def composed_quantizer_changed(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / MIXED / "sources" / "fp8" / "config.json"
    edit_json(file, lambda c: c["quantization_config"].update(weight_block_size=[64, 128]))


@kind(1, "a rotary base of another model: no tensor shows it", moment="composed")
def composed_rotary_base_changed(rng: random.Random, folder: Path, number: int) -> None:
    edit_json(folder / CONFIG, lambda config: config["rope_parameters"].update(rope_theta=1000.0))


@kind(1, moment="composed")
def composed_plan_edited(rng: random.Random, folder: Path, number: int) -> None:
    text = (folder / PLAN_FILE).read_text()
    put(folder / PLAN_FILE, text.replace("experts.{0-2}", "experts.{0-1}").encode())


@kind(1, moment="composed")
def touched_after_compose(rng: random.Random, folder: Path, number: int) -> None:
    for shard in SHARDS:
        os.utime(folder / shard)
