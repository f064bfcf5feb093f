# SPDX-License-Identifier: Apache-2.0
"""What scripts/corrupt.py does to a checkpoint: every kind of damage, and how often."""

import functools
import json
import os
import random
from collections.abc import Callable, Iterator
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
            ("load") or amid ("middle") the loader's reads.
    """

    name: str
    cases: int
    damage: Damage
    untellable: str = ""
    moment: str = ""


KINDS: list[Kind] = []


def kind(cases: int, untellable: str = "", moment: str = "") -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        name = damage.__name__.replace("_", " ")
        KINDS.append(Kind(name, cases, damage, untellable, moment))
        return damage

    return add


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


# Headers.


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


def _changes() -> Iterator[tuple[str, Damage]]:
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
    for _what, _change in _changes():
        KINDS.append(Kind(f"{_what} {_when}", 2, _change, moment=_moment))
