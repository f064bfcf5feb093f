# SPDX-License-Identifier: Apache-2.0
"""Reads the header of one safetensors file: names, dtypes, shapes and byte ranges, no data."""

import os
from dataclasses import dataclass
from functools import partial
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vllm_mixprec.checkpoint.bounded_json import parse_json
from vllm_mixprec.checkpoint.files import FileStamp, open_file
from vllm_mixprec.checkpoint.usual_json import decode_entries
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

UNREAD_DTYPES = frozenset(
    {"U16", "U32", "U64", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}
)
"""Those that no layer takes: a header may have them, ``stored.DTYPES`` has all others."""

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_LARGEST = 2**64 - 1  # of a size or an offset, as the safetensors library counts them

_Kind = tuple[str, tuple[int, ...]]  # dtype and shape
Kinds = dict[_Kind, tuple[_Kind, float]]
"""Dtypes and shapes that were met before: themselves, so that equal ones are one object, and the
bytes that they take."""


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


class TensorSpec(NamedTuple):
    """Where one stored tensor lies, or one part of a fused one.

    ``name`` is spelt as in the file, ``dtype`` as in safetensors (``BF16``, ``F8_E4M3``, ``I32``);
    of a part it is the name that it would have if it were stored by itself.
    ``shape`` counts elements of the stored dtype, so packed int4 counts int32 words, not weights.
    ``start`` and ``end`` (exclusive) are byte offsets from the beginning of ``file``; without a
    ``view`` they hold the tensor and nothing else. ``stamp`` is of the file whose header this was:
    data may only be read from a file that still has it; None for a file that is not here yet.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    view: View | None = None
    stamp: FileStamp | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        if self.view is None:
            return self.end - self.start
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def rows(self, rows: range) -> "TensorSpec":
        """Return the spec of some neighbouring rows, of a tensor without a ``view``."""
        row_bytes = self.nbytes // max(1, self.shape[0])
        return self._replace(
            shape=(len(rows), *self.shape[1:]),
            start=self.start + rows.start * row_bytes,
            end=self.start + rows.stop * row_bytes,
        )


# A third faster than to call the class, which unpacks and packs its arguments in Python.
_make_spec: partial[TensorSpec] = partial(tuple.__new__, TensorSpec)


@dataclass(frozen=True, slots=True)
class RawHeader:
    """A header as it lies in its file, not parsed yet.

    Attributes:
        text: its JSON.
        file_bytes: size of the whole file.
        mtime_ns: when the file was last written; None where it cannot change, as on the hub.
        stamp: of the file that it stands for; None where that is not here.
    """

    text: bytes
    file_bytes: int
    mtime_ns: int | None
    stamp: FileStamp | None = None


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorSpec]:
    """Read the tensor specs of one safetensors file, none of its data.

    Returns:
        Tensor name -> spec, in the order of the header.

    Raises:
        CheckpointError: the file cannot be read, is cut short, or its header is malformed.
    """
    file = Path(path)
    return parse_header(file, read_raw(file))


def read_raw(file: Path) -> RawHeader:
    """Read one file's header and nothing else.

    Raises:
        CheckpointError: the file cannot be read, or is too short for its header.
    """
    try:
        descriptor, stamp = open_file(file)
        with open(descriptor, "rb") as stream:
            header_bytes = header_length(file, stream.read(8), stamp.size_bytes)
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}). "
            "Check that the file exists and its permissions."
        ) from error
    return RawHeader(text, stamp.size_bytes, stamp.modified_ns, stamp)


def header_length(file: Path, first: bytes, file_bytes: int) -> int:
    """Return how many bytes of JSON follow the ``first`` eight of a file.

    Raises:
        CheckpointError: there are not as many in the file, or more than a header may have.
    """
    if file_bytes < 8:
        raise CheckpointError(
            f"{file}: {file_bytes} bytes, expected at least the 8 of a header length. "
            "The file is cut short: download it again."
        )
    header_bytes = int.from_bytes(first[:8], "little")
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
    return header_bytes


def parse_header(file: Path, raw: RawHeader, known: Kinds | None = None) -> dict[str, TensorSpec]:
    """Turn a header into the specs of ``file``'s tensors.

    Format: https://github.com/huggingface/safetensors#format. The byte ranges must cover the
    file's data without a hole or an overlap, as the safetensors library demands.

    Args:
        known: shared by the files of a checkpoint, and added to.

    Raises:
        CheckpointError: the header is malformed, or contradicts the file's size.
    """
    known = {} if known is None else known
    specs = _parse_usual(file, raw, known)
    if specs is not None:
        return specs
    data_start = 8 + len(raw.text)
    specs = {}
    entries = _parse_json(file, raw.text)
    _check_metadata(file, entries.pop("__metadata__", {}))
    for name, entry in entries.items():
        specs[name] = _parse_entry(file, name, entry, data_start, raw.stamp)
    _check_ranges(file, specs, data_start, raw.file_bytes)
    return specs


def _parse_usual(file: Path, raw: RawHeader, known: Kinds) -> dict[str, TensorSpec] | None:
    """Turn a sound header as libraries write it into specs, None for any other.

    One pass over the tensors with the same demands as the general one, which has the words for
    what is wrong.
    """
    entries = decode_entries(raw.text)
    if entries is None:
        return None
    stamp = raw.stamp
    data_start = position = 8 + len(raw.text)
    specs: dict[str, TensorSpec] = {}
    is_in_order = True
    try:
        for name, entry in entries.items():
            kind = entry.dtype, entry.shape
            found = known.get(kind)
            if found is None:
                found = known[kind] = _parse_kind(file, name, *kind)
            (dtype, shape), nbytes = found
            start, end = entry.data_offsets
            if end - start != nbytes:
                return None
            start += data_start
            is_in_order = is_in_order and start == position
            position = end + data_start
            specs[name] = _make_spec((name, dtype, shape, file, start, position, None, stamp))
        if not is_in_order or position != raw.file_bytes:
            _check_ranges(file, specs, data_start, raw.file_bytes)
    except CheckpointError:
        return None
    return specs


def _parse_json(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: the header is not valid JSON ({error}), expected one object of tensors. "
            "Download the file again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file}: the header is a JSON {type(header).__name__}, expected an object of "
            "tensors. Download the file again."
        )
    return header


def _check_metadata(file: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        _refuse(file, "__metadata__", f"entry is {metadata!r}", "an object of strings")


def _parse_entry(
    file: Path,
    name: str,
    entry: Any,
    data_start: int,
    stamp: FileStamp | None,
) -> TensorSpec:
    """Turn one header entry into a spec; the ranges of the tensors are compared later."""
    try:
        dtype, dims, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        _refuse(file, name, f"entry is {entry!r}", "dtype, shape and two data_offsets")
    if len(entry) != len(_ENTRY_KEYS):
        extra = sorted(entry.keys() - _ENTRY_KEYS)
        _refuse(file, name, f"entry has {extra!r} too", "dtype, shape and two data_offsets alone")
    kind, nbytes = _parse_kind(file, name, dtype, dims)
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        _refuse(file, name, f"data_offsets are [{start!r}, {end!r}]", "0 <= start <= end")
    if nbytes != end - start:
        _refuse(
            file,
            name,
            f"data_offsets span {end - start} bytes",
            f"{nbytes:g} for {dtype} of shape {dims}",
        )
    return TensorSpec(name, *kind, file, data_start + start, data_start + end, None, stamp)


def _parse_kind(file: Path, name: str, dtype: Any, dims: Any) -> tuple[_Kind, float]:
    """Return dtype and shape, and the bytes that they take."""
    bits = DTYPE_BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        _refuse(file, name, f"dtype is {dtype!r}", f"one of {' '.join(DTYPE_BITS)}")
    if type(dims) not in (list, tuple):  # a tuple from the typed decoder
        _refuse(file, name, f"shape is {dims!r}", "a list of sizes")
    elements = 1
    for dim in dims:
        if type(dim) is not int or dim < 0:
            _refuse(file, name, f"shape is {dims!r}", "a list of non-negative integers")
        elements *= dim
        if max(dim, elements * bits) > _LARGEST:
            _refuse(file, name, f"shape is {dims!r}", f"at most {_LARGEST} bits")
    nbytes, left = divmod(elements * bits, 8)
    return (dtype, tuple(dims)), nbytes + left / 8 if left else nbytes


def _check_ranges(
    file: Path, specs: dict[str, TensorSpec], data_start: int, file_bytes: int
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
