# SPDX-License-Identifier: Apache-2.0
"""The experts of one layer as the grouped kernel reads them: weights, int4 packing, descriptors."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from vllm_mixprec.errors import UnsupportedError


class Format(IntEnum):
    """How the weight of an expert is stored."""

    ABSENT = 0
    """The expert is not on this rank."""
    BF16 = 1
    """Plain, bfloat16 or float16, the dtype of the hidden states."""
    FP8_BLOCK = 2
    INT4 = 3


class Field(IntEnum):
    """A column of the descriptor table; strides and sizes count elements."""

    FORMAT = 0
    WEIGHT = 1
    """Address; a multiple of 16, as is the row stride in bytes."""
    SCALES = 2
    ZEROS = 3
    """Address, or 0: symmetric, the zero point is 8."""
    WEIGHT_STRIDE = 4
    """Of a row; of a slice of 32 weights along K for int4."""
    SCALE_STRIDE = 5
    """Of a row of the scales, which int4's zero points share."""
    BLOCK_ROWS = 6
    BLOCK_COLS = 7
    """Weights along K that share a scale: the block's, or the group size."""
    UP_SHIFT = 8
    """Row ``j`` of up takes the scale row ``(j + UP_SHIFT) // BLOCK_ROWS + UP_SCALES``."""
    UP_SCALES = 9
    FP16_SCALES = 10
    """1: the 16-bit scales are float16, 0: bfloat16."""


FIELDS = 12
"""Columns of the table: the fields, and one for lines of whole 16-byte words."""

SLICE = 32
"""Weights along K that lie in 16 bytes of packed int4."""

MAX_STEP = 256
"""No tile is longer along K."""


@dataclass(frozen=True)
class PlainWeight:
    """``weight`` [rows, cols], bfloat16 or float16; rows may be padded."""

    weight: Tensor


@dataclass(frozen=True)
class Fp8Weight:
    """Block-scaled E4M3 (DeepSeek-V3, inference/kernel.py, ``weight_dequant``).

    ``weight`` [rows, cols] float8_e4m3fn, or its bytes as uint8; ``scales`` float32
    [parts * ceil(rows / parts / bn), ceil(cols / bk)], factors. ``bn`` is free, ``bk`` a multiple
    of 32 or at least ``cols``; so (1, cols) is a scale a channel and (rows, cols) one a tensor.
    ``parts`` is 2 where gate and up were stacked after they were quantised, as vLLM does: then
    each begins a block. It is 1 for w2.
    """

    weight: Tensor
    scales: Tensor
    block: tuple[int, int]
    parts: int = 1


@dataclass(frozen=True)
class Int4Weight:
    """Group-wise int4, ``(code - zero point) * scale``, in the layout of :func:`pack_int4`.

    ``codes`` uint8 [cols / 32, rows, 16]; ``scales`` [cols / group size, rows] bfloat16 or float16;
    ``zeros`` uint8 like ``scales``, or None: all 8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


Weight = PlainWeight | Fp8Weight | Int4Weight


def pack_int4(
    qweight: Tensor, scales: Tensor, qzeros: Tensor | None = None, *, zero_offset: int = 1
) -> Int4Weight:
    """Reorder a GPTQ weight (AutoGPTQ, qlinear_cuda_old.py) for the grouped kernel.

    A slice of 32 weights along K of one row is 16 bytes: byte ``j`` holds weight ``j`` in its low
    and weight ``16 + j`` in its high nibble. The rows of a slice follow each other, so the loads
    of a tile are whole runs of memory however short the group is.

    Args:
        qweight: int32 [K / 8, N], eight codes along K a word, the lowest bits first.
        scales: [K / group size, N] bfloat16 or float16; kept, not copied, if contiguous.
        qzeros: int32 [K / group size, N / 8], eight along N a word. None: symmetric. Zero points
            that are all 8 are left out, which waits for the device.
        zero_offset: added to a stored zero point, 1 in GPTQ v1, 0 in v2; 15 + 1 is 16.

    Raises:
        UnsupportedError: K or the group size is not a multiple of 32.
        ValueError: the tensors do not fit together.
    """
    if qweight.dtype != torch.int32 or qweight.dim() != 2 or scales.dim() != 2:
        raise ValueError(
            f"qweight {_describe(qweight)} with scales {_describe(scales)}, expected int32 "
            "[K / 8, N] with [K / group size, N]. Pass one expert's tensors as GPTQ stores them"
        )
    cols, rows = 8 * qweight.shape[0], qweight.shape[1]
    groups = scales.shape[0]
    if scales.shape[1] != rows or groups == 0 or cols % groups:
        raise ValueError(
            f"scales {_describe(scales)} for K={cols}, N={rows}, expected [K / group size, {rows}] "
            "with a group size that divides K. Pass the scales of this weight"
        )
    if cols == 0 or cols % SLICE or (cols // groups) % SLICE:
        raise UnsupportedError(
            f"int4 with K={cols} and group_size={cols // groups}, expected multiples of {SLICE}. "
            "Route these experts to another source"
        )
    if qzeros is not None and (qzeros.dtype != torch.int32 or qzeros.shape != (groups, rows // 8)):
        raise ValueError(
            f"qzeros {_describe(qzeros)}, expected int32 {[groups, rows // 8]}. "
            "Pass the zero points of this weight"
        )
    words = qweight.reshape(cols // SLICE, 4, rows)
    codes = torch.empty(cols // SLICE, rows, 16, dtype=torch.uint8, device=qweight.device)
    for byte in range(16):
        word, shift = byte // 8, 4 * (byte % 8)
        low, high = (words[:, word] >> shift) & 15, (words[:, word + 2] >> shift) & 15
        codes[..., byte] = low | (high << 4)
    zeros = None
    if qzeros is not None:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=qzeros.device)
        stored = (qzeros[..., None] >> shifts) & 15
        zeros = (stored.reshape(groups, rows) + zero_offset).to(torch.uint8)
        if bool((zeros == 8).all()):
            zeros = None
    return Int4Weight(codes, scales.contiguous(), zeros)


@dataclass(frozen=True)
class Traits:
    """What the weights of one GEMM have in common; the kernel is compiled for it.

    A step is the longest piece of K whose weights share a scale in every expert of the format, a
    power of two from 32 to 256; 0: no expert has the format.
    """

    plain: bool
    fp8_step: int
    fp8_nan: bool
    """Some code is not a number. Checkpoints have none, and the check costs as much as decoding."""
    int4_step: int
    int4_zeros: bool


class ExpertTable:
    """The experts of one layer: their tensors, kept alive, and the lines that the kernel reads.

    Attributes:
        descriptors: int64 [2, experts, FIELDS] on the weights' device; line ``e`` of 0 is w13, of 1
            w2, of expert ``e``.
        traits: of w13 and of w2.
        hidden_size: columns of w13 and rows of w2, ``K``.
        intermediate_size: half the rows of w13 and columns of w2, ``N``.
    """

    def __init__(
        self, w13: Sequence[Weight | None], w2: Sequence[Weight | None], dtype: torch.dtype
    ) -> None:
        """Check the weights and write the table.

        Args:
            w13: an expert each, [2N, K], gate rows before up rows; None: not on this rank.
            w2: likewise, [K, N]. The formats of an expert's two weights may differ.
            dtype: of the hidden states, bfloat16 or float16; plain weights must have it.

        Raises:
            UnsupportedError: a block size, a dimension or an alignment that the kernel lacks.
            ValueError: a tensor's shape, dtype, strides or device does not fit.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            raise UnsupportedError(
                f"hidden states in {dtype}, expected bfloat16 or float16. "
                "Serve with --dtype bfloat16"
            )
        for expert, (first, second) in enumerate(zip(w13, w2, strict=True)):
            if (first is None) != (second is None):
                raise ValueError(
                    f"expert {expert}: w13 is {_kind(first)}, w2 is {_kind(second)}, expected both "
                    "or none. Pass None for both where the expert is on another rank"
                )
        present = next((weight for weight in w13 if weight is not None), None)
        if present is None:
            raise ValueError(
                f"all {len(w13)} experts are absent, expected one. Return zeros without a kernel"
            )
        self.dtype = dtype
        self.experts = len(w13)
        self.weights = (tuple(w13), tuple(w2))
        self.device = _tensors(present)[0].device
        rows, self.hidden_size = _shape("w13", present)
        self.intermediate_size = rows // 2
        lines, traits = [], []
        for name, weights in zip(("w13", "w2"), self.weights, strict=True):
            shape = self.hidden_size, self.intermediate_size
            if gated := name == "w13":
                shape = 2 * self.intermediate_size, self.hidden_size
            for expert, weight in enumerate(weights):
                lines.append([0] * FIELDS)
                if weight is not None:
                    self._check(f"{name} of expert {expert}", weight, shape, 1 + gated)
                    _write(lines[-1], weight, gated)
            traits.append(_traits([weight for weight in weights if weight is not None], shape[1]))
        self.traits = (traits[0], traits[1])
        table = torch.tensor(lines, dtype=torch.int64).view(2, self.experts, FIELDS)
        self.descriptors = table.to(self.device)

    def _check(self, place: str, weight: Weight, shape: tuple[int, int], parts: int) -> None:
        found = _shape(place, weight)
        if found != shape:
            raise ValueError(
                f"{place}: {_kind(weight)} of {list(found)}, expected {list(shape)}. Give all "
                "experts of the layer one shape, w13 [2N, K] and w2 [K, N]"
            )
        main, *scales = _tensors(weight)
        fp8 = (torch.float8_e4m3fn, torch.uint8)
        dtypes = {PlainWeight: (self.dtype,), Fp8Weight: fp8, Int4Weight: (torch.uint8,)}
        _check_dtype(place, "weight", main, dtypes[type(weight)])
        multiple = SLICE if isinstance(weight, Int4Weight) else 16 // main.element_size()
        if 0 in shape or shape[1] % multiple:
            raise UnsupportedError(
                f"{place}: {_kind(weight)} of {list(shape)}, expected columns that are a multiple "
                f"of {multiple}. Use another tensor-parallel size or format"
            )
        aligned = main.stride(-1) == 1 and main.stride(0) * main.element_size() % 16 == 0
        if isinstance(weight, Int4Weight):
            aligned = main.is_contiguous()
        if not aligned or main.data_ptr() % 16 or main.stride(0) * main.shape[0] >= 2**31:
            raise UnsupportedError(
                f"{place}: {_describe(main)} with strides {main.stride()} at address "
                f"{main.data_ptr():#x}, expected rows without gaps between columns that begin at "
                "multiples of 16 bytes, under 2**31 elements. Pass weight.contiguous().clone()"
            )
        if isinstance(weight, Fp8Weight):
            _check_fp8(place, weight, shape, parts)
        elif isinstance(weight, Int4Weight):
            _check_int4(place, weight, shape)
        for tensor in [main, *scales]:
            if tensor.device != self.device:
                raise ValueError(
                    f"{place}: a tensor on {tensor.device}, expected {self.device} like the first. "
                    "Move the layer to one device"
                )
        for tensor in scales:
            # The stride of a dimension of one element is arbitrary and never used.
            gaps = tensor.shape[1] > 1 and tensor.stride(1) != 1
            if gaps or (tensor.shape[0] > 1 and tensor.stride(0) != scales[0].stride(0)):
                raise ValueError(
                    f"{place}: scales or zero points {_describe(tensor)} with strides "
                    f"{tensor.stride()}, expected contiguous ones. Pass scales.contiguous()"
                )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _kind(weight: Weight | None) -> str:
    return "absent" if weight is None else type(weight).__name__


def _tensors(weight: Weight) -> list[Tensor]:
    match weight:
        case PlainWeight():
            return [weight.weight]
        case Fp8Weight():
            return [weight.weight, weight.scales]
        case Int4Weight():
            tensors = [weight.codes, weight.scales]
            return tensors if weight.zeros is None else [*tensors, weight.zeros]


def _shape(place: str, weight: Weight) -> tuple[int, int]:
    """Return (rows, cols) of the logical weight."""
    main, *scales = _tensors(weight)
    if main.dim() != 2 + isinstance(weight, Int4Weight) or any(t.dim() != 2 for t in scales):
        raise ValueError(
            f"{place}: {_kind(weight)} of {', '.join(map(_describe, [main, *scales]))}, expected "
            "matrices, and packed int4 in three dimensions. Pass the tensors of one expert"
        )
    if isinstance(weight, Int4Weight):
        return main.shape[1], SLICE * main.shape[0]
    return main.shape[0], main.shape[1]


def _check_dtype(place: str, name: str, tensor: Tensor, known: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in known:
        raise ValueError(
            f"{place}: {name} is {_describe(tensor)}, expected "
            f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in known)}. "
            "Load it in that dtype"
        )


def _check_fp8(place: str, weight: Fp8Weight, shape: tuple[int, int], parts: int) -> None:
    (rows, cols), (bn, bk) = shape, weight.block
    if bn < 1 or bk < 1 or (bk % 32 and bk < cols):
        raise UnsupportedError(
            f"{place}: FP8 block {[bn, bk]}, expected a length along K that is a multiple of 32 or "
            f"at least {cols}. Use another source"
        )
    _check_dtype(place, "scales", weight.scales, (torch.float32,))
    grid = (weight.parts * -(-rows // weight.parts // bn), -(-cols // bk))
    if weight.scales.shape != grid or weight.parts not in (1, parts):
        raise ValueError(
            f"{place}: FP8 scales {_describe(weight.scales)}, expected {list(grid)} for blocks of "
            f"{[bn, bk]} in {weight.parts} parts, 1 or for w13 2. Pass this weight's scales"
        )


def _check_int4(place: str, weight: Int4Weight, shape: tuple[int, int]) -> None:
    rows, cols = shape
    tensors = _tensors(weight)[1:]
    _check_dtype(place, "scales", weight.scales, (torch.bfloat16, torch.float16))
    if weight.zeros is not None:
        _check_dtype(place, "zeros", weight.zeros, (torch.uint8,))
    groups = weight.scales.shape[0]
    fits = groups > 0 and cols % (SLICE * groups) == 0 and weight.codes.shape[2] == 16
    if not fits or any(tensor.shape != (groups, rows) for tensor in tensors):
        raise ValueError(
            f"{place}: codes, scales and zeros {', '.join(map(_describe, _tensors(weight)))}, "
            f"expected [K / 32, {rows}, 16], then [K / group size, {rows}]. Pack with pack_int4"
        )


def _block_cols(weight: Fp8Weight | Int4Weight) -> int:
    if isinstance(weight, Fp8Weight):
        return weight.block[1]
    return int(SLICE * weight.codes.shape[0] // weight.scales.shape[0])


def _write(line: list[int], weight: Weight, gated: bool) -> None:
    main, *scales = _tensors(weight)
    line[Field.FORMAT] = Format.BF16
    line[Field.WEIGHT], line[Field.WEIGHT_STRIDE] = main.data_ptr(), main.stride(0)
    if isinstance(weight, PlainWeight):
        return
    line[Field.SCALES] = weight.scales.data_ptr()
    line[Field.SCALE_STRIDE] = weight.scales.stride(0)
    line[Field.BLOCK_COLS] = _block_cols(weight)
    if isinstance(weight, Int4Weight):
        line[Field.FORMAT] = Format.INT4
        line[Field.ZEROS] = scales[1].data_ptr() if scales[1:] else 0
        line[Field.FP16_SCALES] = weight.scales.dtype == torch.float16
        return
    line[Field.FORMAT] = Format.FP8_BLOCK
    line[Field.BLOCK_ROWS] = weight.block[0]
    if gated and weight.parts == 2:
        line[Field.UP_SCALES] = weight.scales.shape[0] // 2
    elif gated:
        line[Field.UP_SHIFT] = weight.weight.shape[0] // 2


def _traits(weights: list[Weight], cols: int) -> Traits:
    steps = {Fp8Weight: 0, Int4Weight: 0}
    for weight in weights:
        if not isinstance(weight, PlainWeight):
            block, step = _block_cols(weight), steps[type(weight)] or MAX_STEP
            while block < cols and block % step:  # with one block of all K, any step will do
                step //= 2
            steps[type(weight)] = step
    codes = [w.weight.view(torch.uint8) for w in weights if isinstance(w, Fp8Weight)]
    nan = [((c & 0x7F) == 0x7F).any() for c in codes]
    return Traits(
        plain=any(isinstance(weight, PlainWeight) for weight in weights),
        fp8_step=steps[Fp8Weight],
        fp8_nan=bool(torch.stack(nan).any()) if nan else False,
        int4_step=steps[Int4Weight],
        int4_zeros=any(isinstance(w, Int4Weight) and w.zeros is not None for w in weights),
    )
