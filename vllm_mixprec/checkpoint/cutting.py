# SPDX-License-Identifier: Apache-2.0
"""Some rows of a fused module's weight, cut out of all its tensors by their byte ranges.

Scales, zero points and biases are cut with their weight; what speaks for the whole is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_mixprec.checkpoint.formats import Module
from vllm_mixprec.checkpoint.formats.base import ACTIVATION_SCALES
from vllm_mixprec.checkpoint.formats.fp8 import SCALE_SUFFIXES
from vllm_mixprec.checkpoint.header import TensorSpec, View

# Suffixes that speak for the whole; that lie as (K, N); and of words that hold several rows each.
_SHARED = ACTIVATION_SCALES | {"g_idx", "weight_g_idx"}
_BY_COLUMN = frozenset({"qweight", "qzeros", "scales"})
_OF_WORDS = frozenset({"qzeros", "weight_zero_point"})


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a fused linear, or of all experts as each of them sees it.

    ``shape`` is what one expert has, once it is transposed where it is stored so; ``stride`` the
    bytes from one expert to the next, 0 for what they share.
    """

    spec: TensorSpec
    shape: tuple[int, ...]
    stride: int = 0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a part lies within a stored tensor, ``offset`` from where an expert's begins."""

    stored: Stored
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    view: View | None

    def spec(self, name: str, expert: int) -> TensorSpec:
        """Return the spec of what an expert has of it; of a linear that is expert 0."""
        whole = self.stored.spec
        start = whole.start + expert * self.stored.stride + self.offset
        end = start + self.nbytes
        return TensorSpec(
            name, whole.dtype, self.shape, whole.file, start, end, self.view, whole.stamp
        )


def cut_rows(
    fused: Module, stored: Mapping[str, Stored], part: str, rows: range
) -> tuple[dict[str, Piece], tuple[str, ...]]:
    """Cut some rows out of every tensor of a module; also say what cannot be cut there."""
    pieces: dict[str, Piece] = {}
    problems = fused.problems
    for suffix, tensor in stored.items():
        piece = _piece(fused, suffix, tensor, rows)
        if piece is not None:
            pieces[suffix] = piece
        elif not fused.problems:
            per_entry = _rows_per_entry(suffix, fused)
            problems += (
                f"{fused.name}.{suffix}: rows {rows.start} to {rows.stop - 1} of "
                f"{fused.shape[0]} are {part}, but {per_entry} rows share an entry of "
                f"{list(tensor.shape)}; expected each part to begin with one. Choose a source that "
                "stores the parts apart.",
            )
    return pieces, problems


def make_part(
    fused: Module,
    name: str,
    expert: int,
    rows: int,
    pieces: Mapping[str, Piece],
    problems: tuple[str, ...],
) -> Module:
    """Make the module that ``cut_rows`` cut out of a fused one, as one of its experts has it."""
    tensors = {suffix: piece.spec(f"{name}.{suffix}", expert) for suffix, piece in pieces.items()}
    return Module(name, tensors, fused.scheme, (rows, fused.shape[1]), problems, fused.name)


def _piece(fused: Module, suffix: str, tensor: Stored, rows: range) -> Piece | None:
    """Return the part of a tensor that belongs to rows of its module, None where none does."""
    shape, spec = tensor.shape, tensor.spec
    nbytes = tensor.stride or spec.end - spec.start
    if suffix == "weight_shape":
        values = (len(rows), fused.shape[1])
        return Piece(tensor, 0, nbytes, shape, View(shape, values=values))
    as_stored = shape[::-1] if tensor.transposed else shape
    whole = View(as_stored, transposed=True) if tensor.transposed else None
    if suffix in _SHARED or len(rows) == fused.shape[0] or math.prod(shape) == 1:
        return Piece(tensor, 0, nbytes, shape, whole)
    axis = 1 if suffix in _BY_COLUMN else 0
    entries = _entries(suffix, shape, axis, fused, rows)
    if entries is None:
        return None
    cut = (*shape[:axis], len(entries), *shape[axis + 1 :])
    if (axis == 1) != tensor.transposed:
        columns = (entries.start, entries.stop)
        return Piece(tensor, 0, nbytes, cut, View(as_stored, columns, tensor.transposed))
    each = nbytes // as_stored[0]
    view = View(cut[::-1], transposed=True) if tensor.transposed else None
    return Piece(tensor, entries.start * each, len(entries) * each, cut, view)


def _entries(
    suffix: str, shape: tuple[int, ...], axis: int, fused: Module, rows: range
) -> range | None:
    """Return which entries along N of a tensor belong to some rows; None where one is cut."""
    if len(shape) <= axis:
        return None
    per_entry = _rows_per_entry(suffix, fused)
    first, last = rows.start // per_entry, -(-rows.stop // per_entry)
    if last > shape[axis]:
        return None  # the module's problems say what is wrong with its shape
    if suffix in SCALE_SUFFIXES:
        # A scale stands for each of its rows, in whichever part they are.
        starts_whole = rows.start % per_entry == 0 or last - first == 1
        return range(first, last) if starts_whole else None
    is_whole = rows.start % per_entry == 0 and (
        rows.stop % per_entry == 0 or rows.stop == fused.shape[0]
    )
    return range(first, last) if is_whole else None


def _rows_per_entry(suffix: str, fused: Module) -> int:
    """Return how many rows of the weight one entry of a tensor stands for."""
    scheme = fused.scheme
    if suffix in SCALE_SUFFIXES and scheme.block is not None:
        return scheme.block[0]
    is_packed = suffix in _OF_WORDS or (suffix == "qweight" and scheme.format == "awq")
    return 32 // scheme.bits if is_packed else 1
