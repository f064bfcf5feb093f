# SPDX-License-Identifier: Apache-2.0
"""Reads the header of one safetensors file: names, dtypes, shapes and byte ranges, no data."""

import json
import os
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from vllm_mixprec.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The bound that the safetensors library itself sets on a header."""

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element by safetensors dtype (safetensors/src/tensor.rs, ``Dtype``)."""


@dataclass(frozen=True, slots=True)
class View:
    """How a part of a fused tensor lies between ``start`` and ``end``, where it is not all of it.

    Attributes:
        stored: shape of what lies there.
        columns: the first column of the part and the one after its last; None for all.
        transposed: rows and columns are swapped once the columns are taken.
        values: what the part holds in place of what is stored, which speaks of the whole.
    """

    stored: tuple[int, ...]
    columns: tuple[int, int] | None = None
    transposed: bool = False
    values: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one stored tensor lies, or one part of a fused one.

    ``name`` is spelt as in the file, ``dtype`` as in safetensors (``BF16``, ``F8_E4M3``, ``I32``);
    of a part it is the name that it would have if it were stored by itself.
    ``shape`` counts elements of the stored dtype, so packed int4 counts int32 words, not weights.
    ``start`` and ``end`` (exclusive) are byte offsets from the beginning of ``file``; without a
    ``view`` they hold the tensor and nothing else.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    view: View | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        if self.view is None:
            return self.end - self.start
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorSpec]:
    """Read the tensor specs of one safetensors file, none of its data.

    Format: https://github.com/huggingface/safetensors#format. The byte ranges must cover the
    file's data without a hole or an overlap, as the safetensors library demands.

    Returns:
        Tensor name -> spec, in the order of the header.

    Raises:
        CheckpointError: the file cannot be read, is cut short, or its header is malformed.
    """
    file = Path(path)
    entries, data_start, data_bytes = _read_json(file)
    specs: dict[str, TensorSpec] = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            specs[name] = _parse_entry(file, name, entry, data_start)
    _check_ranges(file, specs, data_start, data_bytes)
    return specs


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, the offset where the data begins, and the bytes of data."""
    try:
        with open(file, "rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            if file_bytes < 8:
                raise CheckpointError(
                    f"{file}: {file_bytes} bytes, expected at least the 8 of a header length. "
                    "The file is cut short: download it again."
                )
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: header length is {header_bytes} bytes, expected at most "
                    f"{MAX_HEADER_BYTES}. This is not a safetensors file, or its first bytes are "
                    "damaged: download it again."
                )
            if 8 + header_bytes > file_bytes:
                raise CheckpointError(
                    f"{file}: the header ends at byte {8 + header_bytes}, but the file has "
                    f"{file_bytes} bytes. The file is cut short: download it again."
                )
            raw = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}). "
            "Check that the file exists and its permissions."
        ) from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the header is not valid JSON ({error}), expected one object of tensors. "
            "Download the file again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file}: the header is a JSON {type(header).__name__}, expected an object of "
            "tensors. Download the file again."
        )
    return header, 8 + header_bytes, file_bytes - 8 - header_bytes


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a key that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} occurs twice")
            seen.add(key)
    return result


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> TensorSpec:
    """Turn one header entry into a spec; the ranges of the tensors are compared later."""
    try:
        dtype, dims, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        _refuse(file, name, f"entry is {entry!r}", "dtype, shape and two data_offsets")
    bits = DTYPE_BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        _refuse(file, name, f"dtype is {dtype!r}", f"one of {' '.join(DTYPE_BITS)}")
    if type(dims) is not list:
        _refuse(file, name, f"shape is {dims!r}", "a list of sizes")
    for dim in dims:
        if type(dim) is not int or dim < 0:
            _refuse(file, name, f"shape is {dims!r}", "a list of non-negative integers")
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        _refuse(file, name, f"data_offsets are [{start!r}, {end!r}]", "0 <= start <= end")
    if prod(dims) * bits != (end - start) * 8:
        _refuse(
            file,
            name,
            f"data_offsets span {end - start} bytes",
            f"{prod(dims) * bits / 8:g} for {dtype} of shape {dims}",
        )
    return TensorSpec(name, dtype, tuple(dims), file, data_start + start, data_start + end)


def _check_ranges(
    file: Path, specs: dict[str, TensorSpec], data_start: int, data_bytes: int
) -> None:
    """Demand that the byte ranges tile the data: no overlap, no hole, nothing past the end."""
    position, previous = data_start, "the header"
    for spec in sorted(specs.values(), key=attrgetter("start", "end")):
        if spec.start != position:
            what = "overlaps" if spec.start < position else "leaves a hole after"
            _refuse(
                file,
                spec.name,
                f"data starts at byte {spec.start} and {what} {previous}",
                f"byte {position}",
            )
        position, previous = spec.end, spec.name
    file_bytes = data_start + data_bytes
    if position > file_bytes:
        raise CheckpointError(
            f"{file}: the file has {file_bytes} bytes, expected {position} (the end of "
            f"{previous}). The file is cut short: download it again."
        )
    if position < file_bytes:
        raise CheckpointError(
            f"{file}: the file has {file_bytes} bytes, expected {position} (the end of "
            f"{previous}). Bytes follow that no tensor owns: download it again."
        )


def _refuse(file: Path, name: str, found: str, expected: str) -> NoReturn:
    if len(found) > 300:
        found = found[:300] + "..."
    raise CheckpointError(
        f"{file}: tensor {name!r}: {found}, expected {expected}. "
        "The header is damaged: download the file again."
    )
