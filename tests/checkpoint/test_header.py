# SPDX-License-Identifier: Apache-2.0
"""The header reader: what a sound file gives, and that no damaged one gets through."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vllm_mixprec.checkpoint.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    UNREAD_DTYPES,
    read_header,
)
from vllm_mixprec.checkpoint.stored import DTYPES
from vllm_mixprec.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
SHARDS = sorted(FIXTURES.glob("*/*.safetensors"))
SHARD = FIXTURES / "fp8" / "model.safetensors"


def write_raw(path: Path, header: str | bytes | dict[str, Any], data_bytes: int) -> Path:
    """Write a file with any header before zeroed data."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data_bytes))
    return path


def entry(dtype: Any = "BF16", shape: Any = (2, 2), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: f"{shard.parent.name}-{shard.name}")
def test_specs_agree_with_the_safetensors_library(shard: Path) -> None:
    specs = read_header(shard)
    raw = shard.read_bytes()
    with safe_open(shard, framework="pt") as theirs:
        assert set(specs) == set(theirs.keys())
        for name, spec in specs.items():
            part = theirs.get_slice(name)
            assert (spec.name, spec.dtype, list(spec.shape)) == (
                name,
                part.get_dtype(),
                part.get_shape(),
            )
            assert spec.file == shard
            tensor = theirs.get_tensor(name)
            if name.endswith(("layernorm.weight", "scales", "weight_scale_inv")):
                data = tensor.contiguous().view(torch.uint8)
                assert raw[spec.start : spec.end] == bytes(data.flatten().tolist())
            assert spec.nbytes == tensor.numel() * tensor.element_size()


def test_every_dtype_is_read_or_known_not_to_be() -> None:
    assert DTYPE_BITS.keys() - UNREAD_DTYPES == DTYPES.keys()
    assert UNREAD_DTYPES < DTYPE_BITS.keys()


def test_path_may_be_a_string() -> None:
    assert read_header(str(SHARD)) == read_header(SHARD)


def test_metadata_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "scalar": entry("F32", [], [0, 4]),
        "empty": entry("I32", [0, 7], [4, 4]),
        "half_bytes": entry("F4", [2, 3], [4, 7]),
    }
    specs = read_header(write_raw(tmp_path / "x.safetensors", header, 7))
    assert {name: (spec.shape, spec.nbytes) for name, spec in specs.items()} == {
        "scalar": ((), 4),
        "empty": ((0, 7), 0),
        "half_bytes": ((2, 3), 3),
    }


def test_header_without_tensors_is_read(tmp_path: Path) -> None:
    assert read_header(write_raw(tmp_path / "x.safetensors", {}, 0)) == {}


def test_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "gone.safetensors"
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: cannot be read"):
        read_header(file)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_file_shorter_than_the_length_is_cut_short(tmp_path: Path, size: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(SHARD.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{size} bytes, expected at least the 8"):
        read_header(file)


@pytest.mark.parametrize("size", [8, 9, 5000, 14488 + 7])
def test_file_that_ends_in_the_header_is_cut_short(tmp_path: Path, size: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(SHARD.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"header ends at byte 14496, .* has {size} bytes"):
        read_header(file)


@pytest.mark.parametrize("lost", [1, 2, 100_000, 2516384 - 14496])
def test_file_that_ends_in_the_data_is_cut_short(tmp_path: Path, lost: int) -> None:
    raw = SHARD.read_bytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw[: len(raw) - lost])
    match = rf"has {len(raw) - lost} bytes, expected {len(raw)} .*cut short"
    with pytest.raises(CheckpointError, match=match):
        read_header(file)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "x.safetensors", {"a": entry()}, 9)
    with pytest.raises(CheckpointError, match=r"Bytes follow that no tensor owns"):
        read_header(file)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_huge_header_length_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"header length is {length} bytes, expected at most"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON .*utf-8"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[]", "header is a JSON list, expected an object"),
        ("null", "header is a JSON NoneType"),
    ],
)
def test_header_that_is_no_json_object_is_refused(
    tmp_path: Path, header: str | bytes, match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_header(write_raw(tmp_path / "x.safetensors", header, 0))


def test_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry())
    file = write_raw(tmp_path / "x.safetensors", f'{{"a": {one}, "a": {one}}}', 8)
    with pytest.raises(CheckpointError, match="key 'a' occurs twice"):
        read_header(file)


def test_field_named_twice_is_refused(tmp_path: Path) -> None:
    header = '{"a": {"dtype": "BF16", "dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}'
    with pytest.raises(CheckpointError, match="key 'dtype' occurs twice"):
        read_header(write_raw(tmp_path / "x.safetensors", header, 8))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ("text", "entry is 'text', expected dtype, shape and two data_offsets"),
        ({"dtype": "BF16", "shape": [4]}, "expected dtype, shape and two data_offsets"),
        (entry(offsets=[0, 8, 16]), "expected dtype, shape and two data_offsets"),
        (entry(offsets=8), "expected dtype, shape and two data_offsets"),
        (entry(dtype="BF17"), r"dtype is 'BF17', expected one of BOOL U8"),
        (entry(dtype=["BF16"]), r"dtype is \['BF16'\], expected one of"),
        (entry(shape=4), "shape is 4, expected a list"),
        (entry(shape="22"), "shape is '22', expected a list"),
        (entry(shape=[-2, -2]), r"shape is \[-2, -2\], expected a list of non-negative"),
        (entry(shape=[2, 2.0]), "expected a list of non-negative integers"),
        (entry(shape=[4, True]), "expected a list of non-negative integers"),
        (entry(shape=[2, 3]), "span 8 bytes, expected 12 for BF16"),
        (entry(shape=[2**62, 2**62]), "expected at most 18446744073709551615 bits"),
        (entry(shape=[2**70, 0]), "expected at most 18446744073709551615 bits"),
        ({**entry(), "extra": 1}, r"entry has \['extra'\] too, expected dtype, shape and two"),
        (entry(dtype="F4", shape=[3], offsets=[0, 1]), "span 1 bytes, expected 1.5 for F4"),
        (entry(offsets=[8, 0]), r"data_offsets are \[8, 0\], expected 0 <= start <= end"),
        (entry(offsets=[-8, 0]), "expected 0 <= start <= end"),
        (entry(offsets=[0.0, 8.0]), "expected 0 <= start <= end"),
        (entry(offsets=["0", "8"]), "expected 0 <= start <= end"),
        (entry(offsets=[2**70, 2**70 + 8]), "leaves a hole after the header"),
        (entry(offsets=[8, 16]), "leaves a hole after the header"),
    ],
)
def test_entry_that_lies_is_refused_by_name(tmp_path: Path, bad: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tensor 'a\.b': .*{match}"):
        read_header(write_raw(tmp_path / "x.safetensors", {"a.b": bad}, 8))


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {"a": entry(), "b": entry(offsets=[6, 14])}
    with pytest.raises(CheckpointError, match=r"tensor 'b': .* overlaps a, expected byte"):
        read_header(write_raw(tmp_path / "x.safetensors", header, 14))


def test_hole_between_tensors_is_refused(tmp_path: Path) -> None:
    header = {"a": entry(), "b": entry(offsets=[10, 18])}
    with pytest.raises(CheckpointError, match=r"tensor 'b': .* leaves a hole after a"):
        read_header(write_raw(tmp_path / "x.safetensors", header, 18))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(st.tuples(st.integers(0, 2143 + 8), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_damaged_header_is_refused_or_stays_inside_the_file(
    tmp_path: Path, edits: list[tuple[int, int]]
) -> None:
    raw = bytearray(SHARDS[0].read_bytes())
    for position, value in edits:
        raw[position] = value
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw)
    try:
        specs = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)
    else:
        assert all(0 <= spec.start <= spec.end <= len(raw) for spec in specs.values())
