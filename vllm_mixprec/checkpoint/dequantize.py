# SPDX-License-Identifier: Apache-2.0
"""Weights back from their stored form, for the layers that no packed kernel runs."""

from collections.abc import Callable, Mapping

import torch

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.checkpoint.formats.fp8 import SCALE_SUFFIXES
from vllm_mixprec.errors import CheckpointError, UnsupportedError

CHUNK_WEIGHTS = 1 << 22
"""Weights that are dequantised at a time: 16 MiB in float32, whatever the layer's size."""

Tensors = Mapping[str, torch.Tensor]


def dequantize(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """Return a module's weight as a plain tensor.

    Computed in float32 and rounded once to ``dtype``, so that it is exact with respect to the
    stored codes and scales.

    Args:
        scheme: how the module is stored.
        tensors: suffix -> tensor, as loaded from the file, all on one device; shapes and dtypes
            are in the docstring of the format's file in ``checkpoint.formats``. ``g_idx`` or
            ``weight_g_idx``, when the file has it, is what decides the group of a row.
        dtype: of the result.

    Returns:
        A new tensor (N, K) on the same device, contiguous; of an unquantised weight of the same
        dtype the tensor itself.

    Raises:
        CheckpointError: a tensor is missing, or its shape or the values of ``g_idx`` do not fit.
        UnsupportedError: the scheme is not one that this version reads.
    """
    try:
        read = DEQUANTIZERS[scheme.format]
    except KeyError:
        raise UnsupportedError(
            f'format "{scheme.format}" cannot be dequantised, expected one of '
            f"{', '.join(DEQUANTIZERS)}. Choose another source."
        ) from None
    return read(scheme, tensors, dtype)


def _tensor(tensors: Tensors, suffix: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    tensor = tensors.get(suffix)
    if tensor is None:
        raise CheckpointError(
            f"{suffix}: missing, found {', '.join(tensors) or 'nothing'}. Re-export the module, "
            "or choose another source."
        )
    if shape is not None and tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{suffix}: shape {list(tensor.shape)}, expected {list(shape)}. Re-export the module, "
            "or choose another source."
        )
    return tensor


def _cast(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return _tensor(tensors, "weight").to(dtype)


def _dequantize_fp8(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """DeepSeek-V3, inference/kernel.py, ``weight_dequant``: weight times the block's scale."""
    weight = _tensor(tensors, "weight")
    if weight.dim() != 2 or (scheme.block is None and scheme.format == "fp8_block"):
        raise UnsupportedError(
            f"{scheme.format} with block {scheme.block} and a weight of shape "
            f"{list(weight.shape)}, expected two sizes and (N, K). Choose another source."
        )
    n, k = weight.shape
    bn, bk = scheme.block or (_rows_a_scale(scheme, n), max(1, k))
    scale = _fp8_scale(scheme, tensors, (-(-n // bn), -(-k // bk)))

    def part_of(part: slice) -> torch.Tensor:
        blocks = torch.arange(part.start, part.stop, device=scale.device) // bn
        part_scale = scale[blocks]
        if scale.shape[1] != 1:
            # Of the last blocks only the part inside the weight exists.
            part_scale = part_scale.repeat_interleave(bk, dim=1)[:, :k]
        return weight[part].float() * part_scale

    return _in_parts((n, k), part_of, dtype, weight.device)


def _rows_a_scale(scheme: Scheme, n: int) -> int:
    is_channel = scheme.format == "fp8_channel" or scheme.granularity == "channel"
    return 1 if is_channel else max(1, n)


def _fp8_scale(scheme: Scheme, tensors: Tensors, grid: tuple[int, int]) -> torch.Tensor:
    """Return the scales in float32, one a block."""
    suffix = next((suffix for suffix in SCALE_SUFFIXES if suffix in tensors), SCALE_SUFFIXES[0])
    if scheme.scale_format == "e8m0_packed":
        words = _tensor(tensors, suffix, (grid[0], -(-grid[1] // 4)))
        return _exponents(words.contiguous().view(torch.uint8)[:, : grid[1]])
    scale = _tensor(tensors, suffix)
    if scheme.block is None and scale.numel() == grid[0] * grid[1]:
        scale = scale.reshape(grid)
    scale = _tensor({suffix: scale}, suffix, grid)
    return _exponents(scale.view(torch.uint8)) if scheme.scale_format == "e8m0" else scale.float()


def _exponents(stored: torch.Tensor) -> torch.Tensor:
    """Decode E8M0: a byte ``b`` is ``2 ** (b - 127)``, and 255 not a number."""
    return stored.view(torch.float8_e8m0fnu).float()


def _dequantize_gptq(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """AutoGPTQ, qlinear_cuda_old.py: (code - zero point) times the scale of the row's group.

    ``zero_offset`` is added without wrapping round, as auto-round's own reader does
    (qlinear_torch_zp.py): of 4 bits, a stored 15 stands for a zero point of 16.
    """
    bits, group_size = _sizes(scheme, (2, 4, 8))
    qweight = _tensor(tensors, "qweight")
    n, k = qweight.shape[1], qweight.shape[0] * 32 // bits
    groups = -(-k // group_size)
    scales = _tensor(tensors, "scales", (groups, n))
    qzeros = _tensor(tensors, "qzeros", (groups, n * bits // 32))
    zeros = _unpack(qzeros, bits) + scheme.zero_offset
    group = _row_groups(tensors, "g_idx", k, group_size, groups, qweight.device)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)[:, None]

    def part_of(part: slice) -> torch.Tensor:
        codes = ((qweight[:, None, part] >> shifts) & ((1 << bits) - 1)).flatten(0, 1)  # (K, rows)
        return ((codes - zeros[:, part][group]).float() * scales[:, part].float()[group]).t()

    return _in_parts((n, k), part_of, dtype, qweight.device)


def _dequantize_awq(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """AutoAWQ, awq/utils/packing_utils.py, ``dequantize_gemm``."""
    bits, group_size = _sizes(scheme, (4,))
    qweight = _tensor(tensors, "qweight")
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = -(-k // group_size)
    scales = _tensor(tensors, "scales", (groups, n))
    qzeros = _tensor(tensors, "qzeros", (groups, n // 8))
    zeros = _unpack(qzeros, bits, AWQ_ORDER)
    group = torch.arange(k, device=qweight.device) // group_size

    def part_of(part: slice) -> torch.Tensor:
        codes = _unpack(qweight[:, part.start // 8 : part.stop // 8], bits, AWQ_ORDER)  # (K, rows)
        return ((codes - zeros[:, part][group]).float() * scales[:, part].float()[group]).t()

    return _in_parts((n, k), part_of, dtype, qweight.device)


def _dequantize_ct_pack(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """compressed_tensors, pack_quantized/base.py, ``decompress``.

    Codes and zero points are stored plus ``2 ** (bits - 1)``, which cancels out of the difference.
    """
    bits, group_size = _sizes(scheme, (4, 8))
    packed = _tensor(tensors, "weight_packed")
    n, k = packed.shape[0], packed.shape[1] * 32 // bits
    shape = _tensor(tensors, "weight_shape", (2,)).tolist()
    if shape != [n, k]:
        raise CheckpointError(
            f"weight_shape: {shape}, expected {[n, k]} as weight_packed is {list(packed.shape)}. "
            "Re-export the module, or choose another source."
        )
    groups = -(-k // group_size)
    scales = _tensor(tensors, "weight_scale", (n, groups))
    if scheme.symmetric:
        zeros = torch.full_like(packed[:, :1], 1 << (bits - 1)).expand(n, groups)
    else:
        stored = _tensor(tensors, "weight_zero_point", (-(-n * bits // 32), groups))
        zeros = _unpack(stored.t(), bits)[:, :n].t()
    group = _row_groups(tensors, "weight_g_idx", k, group_size, groups, packed.device)

    def part_of(part: slice) -> torch.Tensor:
        codes = _unpack(packed[part], bits)  # (rows, K)
        return (codes - zeros[part][:, group]).float() * scales[part].float()[:, group]

    return _in_parts((n, k), part_of, dtype, packed.device)


AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of a word's eight columns among its nibbles, from the lowest."""


def _sizes(scheme: Scheme, known_bits: tuple[int, ...]) -> tuple[int, int]:
    if scheme.bits not in known_bits or scheme.group_size is None:
        raise UnsupportedError(
            f"{scheme.format} of {scheme.bits} bits and group_size {scheme.group_size}, expected "
            f"{' or '.join(map(str, known_bits))} bits and a size. Choose another source."
        )
    return scheme.bits, scheme.group_size


def _unpack(words: torch.Tensor, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Unpack int32 words along the last dimension, by default the lowest bits first."""
    places = torch.tensor(order or range(32 // bits), dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> places * bits) & ((1 << bits) - 1)
    return codes.flatten(-2)


def _in_parts(
    shape: tuple[int, int],
    part_of: Callable[[slice], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Fill a tensor (N, K) from float32 rows; each slice of N starts at a multiple of 32."""
    n, k = shape
    out = torch.empty(n, k, dtype=dtype, device=device)
    rows = 32 * max(1, CHUNK_WEIGHTS // max(1, 32 * k))
    for low in range(0, n, rows):
        part = slice(low, min(low + rows, n))
        out[part] = part_of(part)
    return out


def _row_groups(
    tensors: Tensors, suffix: str, k: int, group_size: int, groups: int, device: torch.device
) -> torch.Tensor:
    """Return the group of each of the K rows, int64 (K,)."""
    if suffix not in tensors:
        return torch.arange(k, device=device) // group_size
    g_idx = _tensor(tensors, suffix, (k,)).long()
    if suffix == "weight_g_idx" and bool((g_idx == -1).any()):
        return torch.arange(k, device=device) // group_size  # compressed-tensors' "never set"
    low, high = (int(g_idx.min()), int(g_idx.max())) if k else (0, 0)
    if not 0 <= low <= high < max(1, groups):
        raise CheckpointError(
            f"{suffix}: values {low} to {high}, expected 0 to {groups - 1}. "
            "Re-export the module, or choose another source."
        )
    return g_idx


DEQUANTIZERS: dict[str, Callable[[Scheme, Tensors, torch.dtype], torch.Tensor]] = {
    "bf16": _cast,
    "fp16": _cast,
    "fp32": _cast,
    "fp8_block": _dequantize_fp8,
    "fp8_channel": _dequantize_fp8,
    "fp8_tensor": _dequantize_fp8,
    "gptq": _dequantize_gptq,
    "awq": _dequantize_awq,
    "ct_fp8": _dequantize_fp8,
    "ct_pack": _dequantize_ct_pack,
}
"""Format -> how to undo it; the same keys as ``checkpoint.FORMATS``."""
