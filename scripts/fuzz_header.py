# SPDX-License-Identifier: Apache-2.0
"""Fuzz the header reader with atheris, against the safetensors library as the judge.

    pip install atheris                       # needs no compiler on x86 Linux with Python 3.11
    python scripts/fuzz_header.py CORPUS -max_total_time=600 -print_final_stats=1

What the reader does with any bytes must be to raise CheckpointError, or to accept a file that the
safetensors library accepts too, with the same names, dtypes, shapes and byte ranges. The mutator
works on the header's text and sets its 8 bytes of length, right in most cases; else nearly every
input would end at the first check. CORPUS is a folder; an empty one is filled with small headers.
"""

import json
import math
import os
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vllm_mixprec.checkpoint", "json"]):
    from vllm_mixprec.checkpoint.header import DTYPE_BITS, read_header
    from vllm_mixprec.errors import CheckpointError

from safetensors import SafetensorError, deserialize

_LENGTH_IS_RIGHT = 0.9
_WORDS = (
    b'"dtype":"BF16"', b'"shape":[2,2]', b'"data_offsets":[0,8]', b'"__metadata__":{"a":"b"}',
    b'"F8_E4M3"', b'"F4"', b'"I32"', b"18446744073709551615", b"18446744073709551616", b"-0",
    b"1e3", b"\\ud800", b"\\u0000", b"NaN", b"null", b"[]", b"{}", b",", b'"', b"\xff", b" ",
)  # fmt: skip

accepted = 0


def join(text: bytes, data: bytes, length: int) -> bytes:
    return length.to_bytes(8, "little") + text + data


def seeds() -> list[bytes]:
    """Headers of every dtype, empty tensors, scalars, metadata."""
    found = [join(b"{}", b"", 2)]
    for dtype, size in (("BF16", 8), ("F8_E4M3", 4), ("F4", 2), ("I32", 16), ("F64", 32)):
        header = {
            "__metadata__": {"format": "pt"},
            "model.a.weight": {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, size]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [size, size + 4]},
            "empty": {"dtype": "U8", "shape": [0, 7], "data_offsets": [size + 4, size + 4]},
        }
        text = json.dumps(header).encode()
        found.append(join(text, bytes(size + 4), len(text)))
    return found


def draw_header(rng: random.Random) -> tuple[bytes, bytes]:
    """Draw a sound header, spelt in any of JSON's ways, and its data."""
    header, end = {}, 0
    for number in range(rng.randrange(4)):
        dtype, bits = rng.choice(list(DTYPE_BITS.items()))
        shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(4))]
        start, end = end, end + bits * math.prod(shape) // 8
        name = "".join(rng.choice('ab.0"\\\n\u00e9\U0001f600') for _ in range(rng.randrange(4)))
        header[f"{number}{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    entries = list(header.items())
    if rng.random() < 0.3:
        entries.append(("__metadata__", {"format": "pt"}))
    rng.shuffle(entries)
    indent, ascii_only = rng.choice((None, None, 1)), rng.random() < 0.5
    text = json.dumps(dict(entries), ensure_ascii=ascii_only, indent=indent).encode()
    return text, bytes(end)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the header's text, by libFuzzer's mutations or by whole words, and set its length."""
    rng = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.4:
        text, body = draw_header(rng)
        if rng.random() < 0.5:  # sound, but for one word
            return mutate(join(text, body, len(text)), max_size, rng.randrange(2**32))
    elif rng.random() < 0.3:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(_WORDS) + text[at + rng.choice((0, 1, 8)) :]
    elif rng.random() < 0.9:
        text = atheris.Mutate(text, max(len(text) + 16, 32))
    else:
        body = body[: rng.randrange(len(body) + 1)] + bytes(rng.choice((0, 1, 8)))
    length = len(text) if rng.random() < _LENGTH_IS_RIGHT else rng.randrange(1 << rng.randrange(65))
    return join(text, body, length)[:max_size]


def judge(raw: bytes) -> None:
    """Read one file of these bytes; any disagreement is an exception, which atheris reports."""
    global accepted
    descriptor = os.memfd_create("header")
    try:
        os.write(descriptor, raw)
        try:
            specs = read_header(f"/proc/self/fd/{descriptor}")
        except CheckpointError as error:
            str(error).encode("utf-8")
            return
    finally:
        os.close(descriptor)
    accepted += 1
    if accepted % 1_000 == 0:  # libFuzzer ends the process itself
        print(f"accepted by both: {accepted}", flush=True)
    try:
        theirs = dict(deserialize(raw))
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses what was accepted: {error}") from error
    ours = {name: (spec.dtype, list(spec.shape)) for name, spec in specs.items()}
    if ours != {name: (entry["dtype"], entry["shape"]) for name, entry in theirs.items()}:
        raise AssertionError(f"other tensors than safetensors has: {ours} {theirs}")
    for name, spec in specs.items():
        if raw[spec.start : spec.end] != bytes(theirs[name]["data"]):
            raise AssertionError(f"other bytes than safetensors has: {name}")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (folder / f"seed{number}").write_bytes(seed)
    atheris.Setup(sys.argv, judge, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
