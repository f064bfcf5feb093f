# SPDX-License-Identifier: Apache-2.0
"""Weights back from their stored form, for the layers that no packed kernel runs."""

from collections.abc import Callable, Mapping

import torch

from vllm_mixprec.checkpoint.formats import Scheme
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
        tensors: suffix -> tensor, as loaded from the file, all on one device. bf16, fp16, fp32:
            ``weight``. fp8_block: ``weight`` (N, K) float8_e4m3fn, ``weight_scale_inv``
            (ceil(N/bn), ceil(K/bk)). gptq: ``qweight`` (K*bits/32, N) int32, ``qzeros``
            (K/g, N*bits/32) int32, ``scales`` (K/g, N), and ``g_idx`` (K,) int32 when the file
            has it, which is then what decides the group of a row.
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


def _dequantize_fp8_block(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """DeepSeek-V3, inference/kernel.py, ``weight_dequant``: weight times the block's scale."""
    weight = _tensor(tensors, "weight")
    if scheme.block is None or weight.dim() != 2:
        raise UnsupportedError(
            f"fp8_block with block {scheme.block} and a weight of shape {list(weight.shape)}, "
            "expected two sizes and (N, K). Choose another source."
        )
    (n, k), (bn, bk) = weight.shape, scheme.block
    scale = _tensor(tensors, "weight_scale_inv", (-(-n // bn), -(-k // bk))).float()
    # Of the last blocks only the part inside the weight exists.
    row_scale = scale.repeat_interleave(bk, dim=1)[:, :k]
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    rows = bn * max(1, CHUNK_WEIGHTS // max(1, bn * k))
    for low in range(0, n, rows):
        high = min(low + rows, n)
        chunk_scale = row_scale[low // bn : -(-high // bn)].repeat_interleave(bn, dim=0)
        out[low:high] = weight[low:high].float() * chunk_scale[: high - low]
    return out


def _dequantize_gptq(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """AutoGPTQ, qlinear_cuda_old.py: (code - zero point) times the scale of the row's group.

    Row ``k`` is in word ``k // (32 / bits)``, lowest bits first; zero points are packed the same
    way along N. ``zero_offset`` is added without wrapping round, as auto-round's own reader
    does (qlinear_torch_zp.py): of 4 bits, a stored 15 stands for a zero point of 16.
    """
    bits, group_size = scheme.bits, scheme.group_size
    if bits not in (2, 4, 8) or group_size is None:
        raise UnsupportedError(
            f"gptq of {bits} bits and group_size {group_size}, expected 2, 4 or 8 bits and a "
            "size. Choose another source."
        )
    per_word, mask = 32 // bits, (1 << bits) - 1
    qweight = _tensor(tensors, "qweight")
    n, k = qweight.shape[1], qweight.shape[0] * per_word
    groups = -(-k // group_size)
    scales = _tensor(tensors, "scales", (groups, n))
    qzeros = _tensor(tensors, "qzeros", (groups, n // per_word))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)
    zeros = ((qzeros.unsqueeze(-1) >> shifts) & mask).view(groups, n) + scheme.zero_offset
    group = _row_groups(tensors, k, group_size, groups, qweight.device)

    out = torch.empty(n, k, dtype=dtype, device=qweight.device)
    columns = max(per_word, CHUNK_WEIGHTS // max(1, k))
    for low in range(0, n, columns):
        part = slice(low, min(low + columns, n))
        codes = ((qweight[:, None, part] >> shifts[:, None]) & mask).view(k, -1)
        codes -= zeros[:, part][group]
        out[part] = (codes.float() * scales[:, part].float()[group]).t()
    return out


def _row_groups(
    tensors: Tensors, k: int, group_size: int, groups: int, device: torch.device
) -> torch.Tensor:
    """Return the group of each of the K rows, int64 (K,)."""
    if "g_idx" not in tensors:
        return torch.arange(k, device=device) // group_size
    g_idx = _tensor(tensors, "g_idx", (k,)).long()
    if k and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise CheckpointError(
            f"g_idx: values {int(g_idx.min())} to {int(g_idx.max())}, expected 0 to {groups - 1}. "
            "Re-export the module, or choose another source."
        )
    return g_idx


DEQUANTIZERS: dict[str, Callable[[Scheme, Tensors, torch.dtype], torch.Tensor]] = {
    "bf16": _cast,
    "fp16": _cast,
    "fp32": _cast,
    "fp8_block": _dequantize_fp8_block,
    "gptq": _dequantize_gptq,
}
"""Format -> how to undo it; the same keys as ``checkpoint.FORMATS``."""
