# SPDX-License-Identifier: Apache-2.0
"""Reads a module's stored tensors a range of output rows at a time, and what their format loses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.checkpoint.files import reopen, require_unchanged
from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.checkpoint.formats.fp4 import MAGNITUDES
from vllm_mixprec.checkpoint.formats.fp8 import SCALE_SUFFIXES
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.ranges import read_into
from vllm_mixprec.checkpoint.stored import DTYPES
from vllm_mixprec.checkpoint.stream import read_tensors

ORDERS = ("g_idx", "weight_g_idx")
SCALES = (*SCALE_SUFFIXES, "scales")

_MANTISSA_BITS = {"bf16": 7, "fp16": 10, "fp32": 23}  # without the hidden one
_FP8_MANTISSA_BITS = 3
_FP8_SUBNORMAL_STEP = 2.0**-9
_FP4_FORMATS = ("nvfp4", "mxfp4")
_FP4_NEXT = 8.0  # the code after 6 if there were one; nearer to it lies next to nothing

Stored = Mapping[str, torch.Tensor]


class StoredWeight:
    """A weight (N, K), or a plain tensor of any shape, that is read in ranges of its first rows.

    Tensors whose rows do not lie together in the file (``qweight`` of GPTQ and AWQ, with their
    scales and zero points, and columns of fused ones) are read whole, once, and kept; so are
    orders.
    """

    def __init__(
        self, scheme: Scheme, tensors: Mapping[str, TensorSpec], shape: tuple[int, ...]
    ) -> None:
        self.scheme = scheme
        self.shape = shape
        self._tensors = tensors
        self._cuts = {suffix: _cut(scheme, suffix, spec) for suffix, spec in tensors.items()}
        whole = {
            spec.name: suffix
            for suffix, spec in tensors.items()
            if self._cuts[suffix] != 0 or spec.view is not None
        }
        specs = [tensors[suffix] for suffix in whole.values()]
        self._whole = {whole[spec.name]: tensor for spec, tensor in read_tensors(specs)}

    @property
    def row_step(self) -> int:
        """Rows at whose multiples a range may begin: no block and no packed word is cut there."""
        return math.lcm(32, self.scheme.block[0] if self.scheme.block else 1)

    @property
    def order(self) -> torch.Tensor | None:
        """``g_idx``: the group of each of the K rows; None where they are in order."""
        found = next((self._whole[name] for name in ORDERS if name in self._whole), None)
        return None if found is None or bool((found == -1).any()) else found.long()

    @property
    def whole(self) -> Stored:
        """The tensors that are not read in ranges."""
        return self._whole

    def read_rows(self, low: int, high: int) -> dict[str, torch.Tensor]:
        """Return all stored tensors of rows ``low`` to ``high``, as if there were no others."""
        ranges = {
            suffix: spec.rows(_part(spec.shape[0], self._rows(suffix), low, high))
            for suffix, spec in self._tensors.items()
            if suffix not in self._whole
        }
        found = {suffix: _read(spec) for suffix, spec in ranges.items()}
        for suffix, tensor in self._whole.items():
            cut = self._cuts[suffix]
            if cut is not None:
                part = _part(tensor.shape[cut], self._rows(suffix), low, high)
                tensor = tensor.narrow(cut, part.start, len(part))
            elif suffix == "weight_shape":
                tensor = torch.tensor([high - low, self.shape[1]])
            found[suffix] = tensor
        return found

    def _rows(self, suffix: str) -> int:
        """Return how many rows of N one entry of a tensor belongs to."""
        if suffix in SCALE_SUFFIXES and self.scheme.block is not None:
            return self.scheme.block[0]
        packs_rows = {"awq": ("qweight", "qzeros"), "gptq": ("qzeros",)}
        packed = packs_rows.get(self.scheme.format, ("weight_zero_point",))
        return 32 // self.scheme.bits if suffix in packed else 1

    def dequantize(self, stored: Stored) -> torch.Tensor:
        """Return the weight, float32, of what :meth:`read_rows` returned."""
        return dequantize(self.scheme, stored, torch.float32)


def _cut(scheme: Scheme, suffix: str, spec: TensorSpec) -> int | None:
    """Return the dimension of a tensor that N lies along; None where it is needed whole."""
    if not spec.shape or suffix in ORDERS or suffix == "weight_shape":
        return None
    if scheme.format in ("gptq", "awq"):
        return 1
    is_one_scale = suffix in SCALE_SUFFIXES and scheme.block is None and math.prod(spec.shape) == 1
    return None if is_one_scale else 0


def _part(entries: int, rows: int, low: int, high: int) -> range:
    """Return which of the entries, each of so many rows of N, hold rows ``low`` to ``high``."""
    return range(low // rows, min(entries, -(-high // rows)))


def _read(spec: TensorSpec) -> torch.Tensor:
    """Read one tensor, in this thread: what others allocate, their own heaps keep for long.

    Raises:
        CheckpointError: the file changed since its header was read.
    """
    raw = torch.empty(spec.nbytes, dtype=torch.uint8)
    with open(reopen(spec.file, spec.stamp), "rb", buffering=0) as file:
        read_into(raw, file.fileno(), spec.start, spec)
        require_unchanged(spec.file, file.fileno(), spec.stamp)
    return raw.view(DTYPES[spec.dtype]).view(spec.shape)


def tile_of(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of a weight (N, K) that share a scale; all, of a plain one."""
    n, k = shape
    if scheme.block is not None:
        return scheme.block
    if scheme.group_size is not None:
        return 1, scheme.group_size
    is_channel = scheme.format == "fp8_channel" or scheme.granularity == "channel"
    return (1, k) if is_channel else (n, k)


def scale_values(scheme: Scheme, suffix: str, stored: torch.Tensor) -> torch.Tensor:
    """Return scales as float32 numbers, in whatever form they are stored."""
    if scheme.scale_format != "float" and suffix in SCALE_SUFFIXES:
        return stored.contiguous().view(torch.uint8).view(torch.float8_e8m0fnu).float()
    return stored.float()


def expected_error2(scheme: Scheme, stored: Stored, weight: torch.Tensor) -> torch.Tensor:
    """Return the mean square error that rounding to the nearest makes, by tile of equal scale.

    Args:
        stored: what was read of the weight's rows.
        weight: the same, dequantised, (rows, K).

    Returns:
        float32 (rows of tiles, columns of tiles), as :func:`tile_of` cuts the weight.
    """
    tile = tile_of(scheme, (weight.shape[0], weight.shape[1]))
    if scheme.group_size is not None:
        scales = stored["weight_scale" if scheme.format == "ct_pack" else "scales"].float()
        return (scales if scheme.format == "ct_pack" else scales.t()).square() / 12
    mean2 = tile_mean(weight.square(), tile)
    bits = _MANTISSA_BITS.get(scheme.format)
    if bits is not None:
        return mean2 * relative_error2(bits)
    suffix = next(name for name in SCALE_SUFFIXES if name in stored)
    scale = scale_values(scheme, suffix, stored[suffix])
    if scheme.format in _FP4_FORMATS:
        return _fp4_error2(scheme, _whole_scale(stored) * scale, weight, tile)
    return mean2 * relative_error2(_FP8_MANTISSA_BITS) + (
        scale.square().mean() * _FP8_SUBNORMAL_STEP**2 / 12
    )


def _whole_scale(stored: Stored) -> torch.Tensor | float:
    """Return what NVFP4's scales are multiplied by; 1 of MXFP4, which has none."""
    if "weight_global_scale" in stored:
        return stored["weight_global_scale"].float().reciprocal()
    return stored["weight_scale_2"].float() if "weight_scale_2" in stored else 1.0


def _fp4_error2(
    scheme: Scheme, scale: torch.Tensor, weight: torch.Tensor, tile: tuple[int, int]
) -> torch.Tensor:
    """Return the errors of E2M1, by group: each code stands for numbers spread evenly around it.

    A group's largest number is NVFP4's 6 but for the rounding of the scale to E4M3.
    """
    cells = _fp4_cells()
    codes = weight.abs() / scale.repeat_interleave(tile[1], 1)[:, : weight.shape[1]]
    codes = codes.nan_to_num(0.0).mul(2).round().clamp(max=len(cells) - 1).int()
    errors = tile_mean(cells[codes], tile)
    if scheme.format == "nvfp4":
        has_largest = tile_mean((codes == len(cells) - 1).float(), tile) > 0
        largest = MAGNITUDES[-1] ** 2 * relative_error2(_FP8_MANTISSA_BITS)
        errors -= has_largest * (cells[-1] - largest) / tile[1]
    return scale.square() * errors


def _fp4_cells() -> torch.Tensor:
    """Return the mean square error of what is rounded to a code, at twice the code's magnitude."""
    below, above = (-MAGNITUDES[1], *MAGNITUDES[:-1]), (*MAGNITUDES[1:], _FP4_NEXT)
    cells = torch.zeros(int(2 * MAGNITUDES[-1]) + 1)
    for low, code, high in zip(below, MAGNITUDES, above, strict=True):
        down, up = (code - low) / 2, (high - code) / 2
        cells[int(2 * code)] = (down**3 + up**3) / (down + up) / 3
    return cells


def relative_error2(mantissa_bits: int) -> float:
    """Mean square of the error over that of the number, for mantissas spread evenly in [1, 2)."""
    return 4.0**-mantissa_bits / 12 / (7 / 3)


def tile_mean(values: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Return the means of a matrix over tiles; at the edges over the part that exists."""
    n, k = values.shape
    rows, columns = min(tile[0], n), min(tile[1], k)
    down, across = -(-n // rows), -(-k // columns)
    padded = torch.nn.functional.pad(values, (0, across * columns - k, 0, down * rows - n))
    sums = padded.view(down, rows, across, columns).sum((1, 3))
    heights = torch.full((down, 1), float(rows))
    heights[-1] = n - (down - 1) * rows
    widths = torch.full((1, across), float(columns))
    widths[0, -1] = k - (across - 1) * columns
    return sums / (heights * widths)
