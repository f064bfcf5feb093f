# SPDX-License-Identifier: Apache-2.0
"""Damage to the headers of safetensors files."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corruption.kinds import (
    INDEX,
    PERMUTED,
    SHARDS,
    Kind,
    adding_to,
    edit_entry,
    join,
    put,
    renamed,
    split,
    tensors,
)

HEADER_KINDS: list[Kind] = []
kind = adding_to(HEADER_KINDS)


@kind(120)
def header_bytes_flipped(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / rng.choice(SHARDS)
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(8, 8 + length)] ^= rng.randint(1, 255)
    put(file, bytes(raw))


@kind(30)
def header_length_lies(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / rng.choice(SHARDS)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    lies = [0, 1, 2, length - 1, length + 1, len(raw), len(raw) - 8, 10**8, 10**8 + 1, 2**31]
    lies += [2**32 + length, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
    lie = lies[number] if number < len(lies) else length ^ (1 << rng.randrange(64))
    put(file, lie.to_bytes(8, "little") + raw[8:])


@kind(40)
def offsets_lie(rng: random.Random, folder: Path, number: int) -> None:
    def edit(entry: dict[str, Any]) -> None:
        start, end = entry["data_offsets"]
        far = rng.choice([1, 2, 64, end - start, 2**20])
        entry["data_offsets"] = [
            [start + far, end],
            [start, end + far],
            [start + far, end + far],
            [start - far, end - far],
            [end, start],
            [-start - 1, end],
            [start, start],
            [float(start), float(end)],
            [str(start), str(end)],
            [start],
            [start, end, end],
            None,
            {"start": start, "end": end},
            [True, end],
            [[start], end],
        ][number % 15]

    edit_entry(rng, folder, edit)


@kind(20)
def offsets_are_huge(rng: random.Random, folder: Path, number: int) -> None:
    def edit(entry: dict[str, Any]) -> None:
        start, end = entry["data_offsets"]
        huge = rng.choice([2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30])
        entry["data_offsets"] = rng.choice(
            [[huge, huge + end - start], [start, huge], [huge, end], [-huge, end]]
        )

    edit_entry(rng, folder, edit)


@kind(12, untellable=PERMUTED)
def offsets_exchanged(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / rng.choice(SHARDS)
    header, data = split(file)
    like = {}
    for name in tensors(header):
        like.setdefault((header[name]["dtype"], str(header[name]["shape"])), []).append(name)
    one, other = rng.sample(rng.choice([names for names in like.values() if len(names) > 1]), 2)
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[one]["data_offsets"],
    )
    join(file, header, data)


@kind(30)
def tensors_overlap(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / rng.choice(SHARDS)
    header, data = split(file)
    names = sorted(tensors(header), key=lambda name: header[name]["data_offsets"])
    index = rng.randrange(1, len(names))
    before, entry = header[names[index - 1]], header[names[index]]
    start, end = entry["data_offsets"]
    back = rng.choice([1, 2, before["data_offsets"][1] - before["data_offsets"][0]])
    if number % 3 == 0:  # two tensors in one place
        entry["data_offsets"] = list(before["data_offsets"])
        entry["dtype"], entry["shape"] = before["dtype"], before["shape"]
    else:
        entry["data_offsets"] = [start - back, end - back if number % 3 == 1 else end]
    join(file, header, data)


@kind(15)
def hole_between_tensors(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / rng.choice(SHARDS)
    header, data = split(file)
    if number % 2:  # bytes that no tensor owns, at the end
        join(file, header, data + bytes(rng.choice([1, 8, 4096])))
    else:
        del header[rng.choice(tensors(header))]
        join(file, header, data)


@kind(35)
def shape_lies(rng: random.Random, folder: Path, number: int) -> None:
    def edit(entry: dict[str, Any]) -> None:
        shape = entry["shape"]
        entry["shape"] = [
            [2**31, *shape],
            [2**63, 2**63],
            [2**64, 0],
            [2**62, 2**62, 0],
            [10**30],
            [1] * 10_000,
            [1] * 8 + shape,
            shape[::-1],
            [-dim for dim in shape],
            [dim + 1 for dim in shape],
            [float(dim) for dim in shape],
            [str(dim) for dim in shape],
            [],
            [[dim] for dim in shape],
            "x".join(map(str, shape)),
            None,
            0,
            [shape[0] * 2, *shape[1:-1], shape[-1] / 2],
        ][number % 18]

    edit_entry(rng, folder, edit)


@kind(12)
def shape_transposed_or_flattened(rng: random.Random, folder: Path, number: int) -> None:
    """Of equal size, so that the header alone is sound."""
    file = folder / rng.choice(SHARDS)
    header, data = split(file)
    uneven = [n for n in tensors(header) if len(set(header[n]["shape"])) > 1]
    entry = header[rng.choice(uneven)]
    rows, columns = entry["shape"]
    entry["shape"] = rng.choice([[columns, rows], [rows * columns], [1, rows, columns]])
    join(file, header, data)


@kind(36)
def dtype_lies(rng: random.Random, folder: Path, number: int) -> None:
    """A third of them by another dtype of equal size, so that the header alone is sound."""
    same = {
        "BF16": ["F16", "I16", "U16"],
        "F16": ["BF16", "I16", "U16"],
        "F32": ["I32", "U32"],
        "I32": ["F32", "U32"],
        "F8_E4M3": ["F8_E5M2", "U8", "I8", "F8_E8M0", "BOOL", "F8_E4M3FNUZ"],
    }

    def edit(entry: dict[str, Any]) -> None:
        if number % 3 == 0:
            entry["dtype"] = rng.choice(same[entry["dtype"]])
        else:
            wrong = ["F64", "BF17", "", None, 7, ["BF16"], "bf16", "F4", "C64", "I64", {}]
            entry["dtype"] = rng.choice(wrong)

    edit_entry(rng, folder, edit)


@kind(30)
def name_changed(rng: random.Random, folder: Path, number: int) -> None:
    ways: list[Callable[[str], str]] = [
        lambda name: "",
        lambda name: ".",
        lambda name: name + ".",
        lambda name: name.rpartition(".")[2],
        lambda name: name.upper(),
        lambda name: name + "\0",
        lambda name: "\ud800" + name,
        lambda name: name * 10_000,
        lambda name: "a" * 200_000,
        lambda name: name.replace("weight", "weight_scale"),
        lambda name: name.replace("layers.0", "layers.1").replace("layers.1", "layers.7"),
        lambda name: name.replace("layers.0", "layers.99999999999999999999"),
        lambda name: name.replace("experts.0", "experts.-1").replace("proj", "prj"),
        lambda name: "../../" + name,
        lambda name: "\x1b[2J\n" + name,
    ]
    renamed(rng, folder, ways[number % len(ways)])


@kind(24)
def name_twice(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / rng.choice(SHARDS)
    header, data = split(file)
    name = rng.choice(tensors(header))
    pairs = list(header.items())
    if number % 4 == 0:  # one tensor twice, in the same place
        join(file, [*pairs, (name, header[name])], data)
    elif number % 4 == 1:  # one name for two tensors
        other = rng.choice([n for n in tensors(header) if n != name])
        join(file, [(other if k == name else k, v) for k, v in pairs], data)
    elif number % 4 == 2:  # a field twice
        text = json.dumps(header).replace('"shape":', '"shape": [1], "shape":', 1)
        join(file, text, data)
    else:
        join(file, [("__metadata__", {}), ("__metadata__", {"a": "b"}), *pairs], data)


@kind(20)
def name_in_two_shards(rng: random.Random, folder: Path, number: int) -> None:
    one, other = (folder / shard for shard in rng.sample(SHARDS[:3], 2))
    header, data = split(one)
    other_header, other_data = split(other)
    name = rng.choice(tensors(header))
    start, end = header[name]["data_offsets"]
    entry = header[name] | {"data_offsets": [len(other_data), len(other_data) + end - start]}
    join(other, other_header | {name: entry}, other_data + bytes(reversed(data[start:end])))
    if number % 2:
        (folder / INDEX).unlink()
    elif number % 4:
        text = (folder / INDEX).read_text()
        put(
            folder / INDEX,
            text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{other.name}",').encode(),
        )


@kind(10)
def metadata_lies(rng: random.Random, folder: Path, number: int) -> None:
    file = folder / rng.choice(SHARDS)
    header, data = split(file)
    wrong = [None, [], "pt", {"format": 1}, {"a": {"b": "c"}}, {"a": None}, 1e400, -0.0, True, [{}]]
    join(file, {"__metadata__": wrong[number % 10]} | {n: header[n] for n in tensors(header)}, data)
