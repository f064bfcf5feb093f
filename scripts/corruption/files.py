# SPDX-License-Identifier: Apache-2.0
"""Damage to whole files: cut, exchanged, linked astray, of absurd size, changed while read."""

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corruption.kinds import (
    CONFIGS,
    INDEX,
    OTHER,
    SHARDS,
    SOURCES,
    SWAPPED,
    Damage,
    Kind,
    adding_to,
    edit_json,
    join,
    put,
    split,
    tensors,
)

FILE_KINDS: list[Kind] = []
kind = adding_to(FILE_KINDS)


# Files that end too early.


@functools.cache
def boundaries(folder: Path) -> list[tuple[str, int]]:
    """Every boundary of every file of a sound folder: of headers, tensors and JSON tokens."""
    found: list[tuple[str, int]] = []
    for shard in SHARDS:
        header, data = split(folder / shard)
        size = (folder / shard).stat().st_size
        begin = size - len(data)
        ends = {0, 1, 7, 8, 9, begin // 2, begin - 1, begin, begin + 1, size - 1}
        for name in tensors(header):
            start, end = (begin + offset for offset in header[name]["data_offsets"])
            ends |= {start, start + 1, end - 1, end}
        found += [(shard, end) for end in sorted(ends) if end < size]
    for file in (INDEX, *CONFIGS):
        raw = (folder / file).read_bytes()
        found += [(file, i) for i, byte in enumerate(raw.rstrip()) if byte in b'{}[],:"']
    return found


@kind(110)
def truncated(rng: random.Random, folder: Path, number: int) -> None:
    found = boundaries(folder.parent / "sound")
    name, end = found[(number * 7919) % len(found)]
    put(folder / name, (folder / name).read_bytes()[:end])


# Indexes and configs.


@kind(40)
def index_lies(rng: random.Random, folder: Path, number: int) -> None:
    def edit(index: dict[str, Any]) -> None:
        mapped = index["weight_map"]
        name, shard = rng.choice(list(mapped.items()))
        other = rng.choice([s for s in set(mapped.values()) if s != shard])
        ways: list[Callable[[], Any]] = [
            lambda: mapped.update({name: other}),
            lambda: mapped.pop(name),
            lambda: mapped.update({name + "x": shard}),
            lambda: mapped.update({name: "../fp8/model.safetensors"}),
            lambda: mapped.update({name: "/etc/passwd.safetensors"}),
            lambda: mapped.update({name: "config.json"}),
            lambda: mapped.update({name: "a" * 300 + ".safetensors"}),
            lambda: mapped.update({name: "a\0b.safetensors"}),
            lambda: mapped.update({name: None}),
            lambda: mapped.update({name: 1}),
            lambda: mapped.update({name: [shard]}),
            lambda: mapped.update({n: shard for n in mapped}),
            lambda: mapped.update({n: other if s == shard else s for n, s in mapped.items()}),
            lambda: mapped.clear(),
            lambda: index.pop("weight_map"),
            lambda: index.update(weight_map=[name]),
            lambda: index.update(weight_map={n: "missing.safetensors" for n in mapped}),
            lambda: mapped.update({"": shard}),
            lambda: mapped.update({name: "\ud800.safetensors"}),
            lambda: mapped.update({name: "./" + shard}),
        ]
        ways[number % len(ways)]()

    edit_json(folder / INDEX, edit)


@kind(60)
def config_lies(rng: random.Random, folder: Path, number: int) -> None:
    """In what headers can contradict: counts, sizes, the quantiser's settings; and in types."""
    source = SOURCES[number % 3]

    def edit(config: dict[str, Any]) -> None:
        counts = ["num_hidden_layers", "num_experts", "num_local_experts", "hidden_size"]
        counts += ["moe_intermediate_size", "num_attention_heads", "num_key_value_heads"]
        counts += ["head_dim", "vocab_size"]
        key = rng.choice([key for key in counts if key in config])
        settings = config.get("quantization_config", {})
        wrong: list[Any] = [0, -1, 1, 10**9, 10**30, 1.5, "2", [], {}]
        ways: list[Callable[[], Any]] = [
            lambda: config.update({key: config[key] * 2}),
            lambda: config.update({key: rng.choice(wrong)}),
            lambda: config.update(
                architectures=rng.choice([None, [], ["Other"], 1, "\ud800", [1]])
            ),
            lambda: config.update(quantization_config=rng.choice([None, [], 1, "gptq", {}])),
            lambda: config.update(text_config=rng.choice([{}, [], 1, None])),
            lambda: settings.update(
                {rng.choice(["bits", "group_size", "weight_block_size"]): rng.choice(wrong)}
            ),
            lambda: settings.update(quant_method=rng.choice(["awq", "fp8", "", 1, None])),
            lambda: settings.update(
                dynamic=rng.choice([{"+:(a+)+": {"bits": 8}}, [], {"(": {"a": 1}}])
            ),
            lambda: config.update(mlp_only_layers=rng.choice([[10**9], "x", {}, [[]]])),
            lambda: config.update(decoder_sparse_step=rng.choice([0, -1, 2, "1"])),
        ]
        rng.choice(ways)()

    edit_json(folder / source / "config.json", edit)


# Shards of other models.


@kind(12)
def shards_exchanged(rng: random.Random, folder: Path, number: int) -> None:
    """Between the models of the plan, or within one."""
    one, other = (folder / shard for shard in rng.sample(SHARDS, 2))
    one_raw, other_raw = one.read_bytes(), other.read_bytes()
    put(one, other_raw)
    put(other, one_raw)


@kind(5, untellable=SWAPPED)
def shard_of_a_model_with_equal_headers(rng: random.Random, folder: Path, number: int) -> None:
    put(folder / SHARDS[number], (folder.parent / OTHER / SHARDS[number]).read_bytes())


# Links.


@kind(24)
def link_leads_astray(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / [rng.choice(SHARDS), INDEX, rng.choice(CONFIGS)][number % 3]
    to = number // 3 % 8
    file.unlink()
    if to == 0:
        file.symlink_to(file.name)
    elif to == 1:  # a cycle of two
        loop = file.with_name("loop")
        loop.symlink_to(file)
        file.symlink_to(loop)
    elif to == 2:
        file.symlink_to(file.parent)
    elif to == 3:
        file.symlink_to("/dev/zero")
    elif to == 4:
        file.symlink_to("/dev/null")
    elif to == 5:
        os.mkfifo(file)
    elif to == 6:
        file.symlink_to("gone")
    else:
        file.mkdir()


@kind(6)
def source_is_a_link_cycle(rng: random.Random, folder: Path, number: int) -> None:
    source = folder / SOURCES[number % 3]
    source.rename(folder / "moved")
    if number < 3:
        source.symlink_to(source)
    else:  # a directory that holds itself, beside sound files
        (folder / "moved").rename(source)
        (source / "more.safetensors").symlink_to(source)


# Sizes.


@kind(20)
def json_is_a_bomb(rng: random.Random, folder: Path, number: int) -> None:
    nested = ["[" * 5_000_000, '{"a":' * 1_000_000, "[" * 100_000 + "]" * 100_000]
    dense = ["[" + "[]," * 4_000_000 + "[]]", "[" + "{}," * 4_000_000 + "{}]"]
    long = ["[" + "1," * 4_000_000 + "1]", '["' + "a" * 30_000_000 + '"]', "9" * 1_000_000]
    bombs = nested + dense + long
    bomb = bombs[number % len(bombs)]
    bomb = f'{{"x": {bomb}}}' if number % 2 else bomb
    if number % 3 == 0:
        join(folder / rng.choice(SHARDS), bomb, b"")
    else:
        put(folder / [INDEX, rng.choice(CONFIGS)][number % 3 - 1], bomb.encode())


@kind(8)
def file_is_huge(rng: random.Random, folder: Path, number: int) -> None:
    """Sparse files of up to a terabyte."""
    file = folder / [SHARDS[3], INDEX, CONFIGS[0], CONFIGS[2]][number % 4]
    raw = file.read_bytes()
    put(file, raw if number < 4 else b"")
    os.truncate(file, rng.choice([2**31, 2**33, 2**40]))


# Files that change while they are read.


def changes() -> Iterator[tuple[str, Damage]]:
    """Yield what may befall all shards of a model that is in use, each with its name."""

    def another(rng: random.Random, folder: Path, number: int) -> None:
        for shard in SHARDS:
            _replace(folder / shard, (folder.parent / OTHER / shard).read_bytes())

    def itself(rng: random.Random, folder: Path, number: int) -> None:
        for shard in SHARDS:
            _replace(folder / shard, (folder / shard).read_bytes())

    def written(rng: random.Random, folder: Path, number: int) -> None:
        for shard in SHARDS:
            size = (folder / shard).stat().st_size
            with open(folder / shard, "r+b") as file:
                file.seek(size // 2)
                file.write(bytes(size - size // 2))

    def shortened(rng: random.Random, folder: Path, number: int) -> None:
        for shard in SHARDS:
            os.truncate(folder / shard, (folder / shard).stat().st_size // (number + 2))

    def removed(rng: random.Random, folder: Path, number: int) -> None:
        for shard in SHARDS:
            (folder / shard).unlink(missing_ok=True)

    yield "replaced by another model's", another
    yield "replaced by itself", itself
    yield "overwritten", written
    yield "cut short", shortened
    yield "removed", removed


def _replace(file: Path, raw: bytes) -> None:
    fresh = file.with_name("fresh")
    fresh.write_bytes(raw)
    os.replace(fresh, file)


for _moment, _when in (
    ("check", "in check"),
    ("load", "before loading"),
    ("middle", "amid loading"),
):
    for _what, _change in changes():
        FILE_KINDS.append(Kind(f"{_what} {_when}", 2, _change, moment=_moment))
