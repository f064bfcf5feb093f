# SPDX-License-Identifier: Apache-2.0
"""The typed decoder takes nothing that the general parser refuses, and reads the same from it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from vllm_mixprec.checkpoint import header as reader
from vllm_mixprec.checkpoint.bounded_json import parse_json
from vllm_mixprec.checkpoint.header import RawHeader, TensorSpec, parse_header
from vllm_mixprec.checkpoint.usual_json import decode_entries, decode_weight_map
from vllm_mixprec.errors import CheckpointError

DATA_BYTES = 22
TENSORS: dict[str, Any] = {
    "a.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
    "a.bias": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    "b": {"dtype": "F4", "shape": [4], "data_offsets": [16, 18]},
    "c": {"dtype": "I32", "shape": [], "data_offsets": [18, 22]},
}
HEADER: dict[str, Any] = {"__metadata__": {"format": "pt"}, **TENSORS}
INDEX = {
    "metadata": {"total_size": 22, "loss": 1.5},
    "weight_map": {"a.weight": "model-1.safetensors", "a.bias": "model-2.safetensors"},
}
PIECES = (
    b"""
" : , { } [ ] - 0 -0 .0 e0 1 8 \\ \\u0061 true null NaN {} "dtype" "shape":[2], "dtype":"BF16",
"a.bias" "__metadata__":{}, "x":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}, "weight_map":{},
"metadata":{}, "a.bias":"model-1.safetensors",
""".split()
    + [b" ", b"\n", b"\x00", b"\x0b", b"\x0c", b"\x85", b"\xc3\xa9", b"\xff"]
)


def damage(rng: random.Random, text: bytes) -> bytes:
    damaged = bytearray(text)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        place = rng.choice([0, len(damaged), rng.randrange(len(damaged) + 1)])
        damaged[place : place + rng.choice([0, 0, 1, 2, 8])] = rng.choice(PIECES)
    return bytes(damaged)


def judge(text: bytes) -> dict[str, TensorSpec] | str:
    try:
        return parse_header(Path("x"), RawHeader(text, 8 + len(text) + DATA_BYTES, None))
    except CheckpointError as error:
        return str(error)


def test_usual_headers_are_decoded() -> None:
    for header in (HEADER, TENSORS, HEADER | {"__metadata__": {}}):
        for separators in ((",", ":"), (", ", ": ")):
            entries = decode_entries(json.dumps(header, separators=separators).encode())
            assert entries is not None and list(entries) == list(TENSORS)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_headers_are_judged_as_without_the_decoder(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    texts = []
    for _ in range(1000):
        items = list(HEADER.items())
        if rng.random() < 0.3:
            rng.shuffle(items)
        separators = rng.choice([(",", ":"), (", ", ": ")])
        texts.append(damage(rng, json.dumps(dict(items), separators=separators).encode()))
    verdicts = [judge(text) for text in texts]
    assert sum(decode_entries(text) is not None for text in texts) > 50
    monkeypatch.setattr(reader, "decode_entries", lambda text: None)
    for text, verdict in zip(texts, verdicts, strict=True):
        expected = judge(text)
        assert (verdict, list(verdict)) == (expected, list(expected)), text


@pytest.mark.parametrize("seed", range(8))
def test_damaged_indexes_are_read_as_without_the_decoder(seed: int) -> None:
    rng = random.Random(seed)
    taken = 0
    for _ in range(1000):
        text = damage(rng, json.dumps(INDEX, indent=rng.choice([None, 2])).encode())
        found = decode_weight_map(text)
        if found is not None:
            taken += 1
            assert list(found.items()) == list(parse_json(text)["weight_map"].items()), text
    assert taken > 50
