# SPDX-License-Identifier: Apache-2.0
"""The header reader over any header, with the safetensors library as the judge."""

import json
from ctypes import addressof, create_string_buffer
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from vllm_mixprec.checkpoint.header import DTYPE_BITS, TensorSpec, read_header
from vllm_mixprec.errors import CheckpointError

PROFILE = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# dtype of the library's writer -> as headers spell it, bytes of an element
WRITTEN = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int32": ("I32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float64": ("F64", 8),
}
names = st.text(min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__" and name.isprintable()
)
shapes = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def stored(draw: st.DrawFn) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensors of any name, dtype and shape: name -> (writer's dtype, shape, data)."""
    tensors = {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(WRITTEN))), draw(shapes)
        size = WRITTEN[dtype][1]
        for dim in shape:
            size *= dim
        tensors[name] = (dtype, shape, draw(st.binary(min_size=size, max_size=size)))
    return tensors


def encode(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    buffers = {name: create_string_buffer(data) for name, (_, _, data) in tensors.items()}
    entries = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=shape, data_ptr=addressof(buffers[name]), data_len=len(data)
        )
        for name, (dtype, shape, data) in tensors.items()
    }
    return bytes(safetensors.serialize(entries, metadata={"format": "pt"}))


def read(folder: Path, raw: bytes) -> dict[str, TensorSpec]:
    file = folder / "x.safetensors"
    file.write_bytes(raw)
    return read_header(file)


def agree(raw: bytes, specs: dict[str, TensorSpec]) -> None:
    """What was accepted, the library accepts, and finds the same there."""
    theirs = dict(deserialize(raw))
    assert {name: (spec.dtype, list(spec.shape)) for name, spec in specs.items()} == {
        name: (entry["dtype"], entry["shape"]) for name, entry in theirs.items()
    }
    for name, spec in specs.items():
        assert raw[spec.start : spec.end] == bytes(theirs[name]["data"])


@PROFILE
@given(stored())
def test_what_the_library_writes_is_read_back(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int], bytes]]
) -> None:
    raw = encode(tensors)
    specs = read(tmp_path, raw)
    assert specs.keys() == tensors.keys()
    for name, (dtype, shape, data) in tensors.items():
        spec = specs[name]
        assert (spec.dtype, list(spec.shape)) == (WRITTEN[dtype][0], shape)
        assert raw[spec.start : spec.end] == data


@PROFILE
@given(
    stored(),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes_are_refused_or_mean_what_the_library_says(
    tmp_path: Path,
    tensors: dict[str, tuple[str, list[int], bytes]],
    flips: list[tuple[float, int]],
) -> None:
    raw = bytearray(encode(tensors))
    length = int.from_bytes(raw[:8], "little")
    for place, bits in flips:
        raw[int(place * (8 + length - 1))] ^= bits
    try:
        specs = read(tmp_path, bytes(raw))
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
        str(error).encode("utf-8")
    else:
        agree(bytes(raw), specs)


numbers = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, -(2**63), 1e3, -0.0, True, None, "8", [8]]),
)
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPE_BITS, "BF17", "bf16", None, 3]),
            "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
            "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), numbers),
        },
        optional={"extra": numbers},
    ),
    numbers,
)
# Sound ones of 18 bytes, in part or with something odd among them.
SOUND = {
    "b.weight": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
    "b.scale": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    "empty": {"dtype": "F4", "shape": [0, 3], "data_offsets": [16, 16]},
    "": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]},
}
odd = st.dictionaries(
    st.sampled_from(["b.weight", "", "__metadata__", "\ud800", "a\0"]),
    st.one_of(entries, st.just({"format": "pt"}), st.sampled_from(list(SOUND.values()))),
    max_size=1,
)
headers = st.builds(lambda some, more: some | more, st.sampled_from([SOUND, SOUND, {}]), odd)
_accepted = 0


@PROFILE
@given(headers, st.sampled_from([18, 18, 18, 0, 8, 40]))
def test_any_header_is_refused_or_accepted_by_the_library_too(
    tmp_path: Path, header: dict[str, Any], data_bytes: int
) -> None:
    global _accepted
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + bytes(data_bytes)
    try:
        specs = read(tmp_path, raw)
    except CheckpointError as error:
        str(error).encode("utf-8")
        return
    _accepted += 1
    agree(raw, specs)


def test_some_of_those_headers_were_accepted() -> None:
    assert _accepted >= 10


@PROFILE
@given(stored(), st.floats(0, 1))
def test_a_file_cut_anywhere_is_refused_like_the_library_does(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int], bytes]], place: float
) -> None:
    whole = encode(tensors)
    raw = whole[: int(place * len(whole))]
    assume(raw != whole)
    with pytest.raises(SafetensorError):
        deserialize(raw)
    with pytest.raises(CheckpointError, match="cut short|at least the 8"):
        read(tmp_path, raw)
