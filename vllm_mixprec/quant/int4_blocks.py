# SPDX-License-Identifier: Apache-2.0
"""Lays int4 weights out as vLLM's compiled x86 int4 kernels read them.

vLLM's own ``convert_weight_packed_scale_zp`` unpacks every code to an int32 of its own and packs
those one by one; most of the time that loading int4 experts took. Here whole words are masked and
shifted by compiled loops (:mod:`.cpu_loops`), where the experts are. The result is the same to the
last byte, which :mod:`vllm_mixprec.quant.cpu_probe` compares before it is trusted.

The layout (csrc/cpu/sgl-kernels/gemm_int4.cpp, ``_dequant_weight_zp_only`` and its callers), for 32
output features by ``block_k`` input features: for every 4 input features k, 16 output features and
j below 8, four bytes k, k + 1, k + 2, k + 3 which hold the code of output feature j in their lower
half and that of j + 8 in their upper one; behind these codes, an int32 for each output feature, the
sum over the block's input features of code less zero point. Scales and zero points are grouped by
the same 32 output features.
"""

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_mixprec.checkpoint.packing import AWQ_ORDER

Int4Layout = ops.CPUQuantAlgo
"""What int4 weights are packed from: AWQ's words or GPTQ v1's."""

_BLOCK_ROWS = 32
_BLOCK_COLUMNS = 128


def pack_int4(
    weight: Tensor, scale: Tensor, zero: Tensor, layout: Int4Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Block int4 tensors, of one linear or, with a leading dimension, of experts.

    Of GPTQ v1 ``weight`` is (K / 8, N) int32, of AWQ (K, N / 8); ``scale`` (K / g, N), ``zero``
    (K / g, N / 8) int32 holding the zero points, of GPTQ less 1, each as its checkpoints pack it.
    Returns the blocked weight uint8, scale float32 and zero point int8.
    """
    experts = weight[None] if weight.dim() == 2 else weight
    group_size = _group_size(experts, scale, layout)
    blocked = torch.empty(_roomy_shape(experts, group_size), dtype=torch.int32)
    zeros = _zero_points(zero, layout)
    _block(experts, zeros.view(-1, *zeros.shape[-2:]), group_size, layout, blocked)
    blocks = _as_blocks(blocked, scale.shape[-1], group_size)
    return blocks if weight.dim() == 3 else blocks[0], *_regroup(scale, zeros)


def block_in_place(words: Tensor, scale: Tensor, zero: Tensor, layout: Int4Layout) -> None:
    """Block the weights of some experts, of a tensor that :func:`with_room` made, where they are.

    The arguments are as :func:`pack_int4` has them.
    """
    group_size = _group_size(words, scale, layout)
    room = _room_of(words, group_size)
    assert room is not None, "see has_room"
    _block(words, _zero_points(zero, layout), group_size, layout, room)


def blocked_in_place(
    words: Tensor, scale: Tensor, zero: Tensor, layout: Int4Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`pack_int4` does, of experts that are all blocked where they are."""
    group_size = _group_size(words, scale, layout)
    room = _room_of(words, group_size)
    assert room is not None, "see has_room"
    blocks = _as_blocks(room, scale.shape[-1], group_size)
    return blocks, *_regroup(scale, _zero_points(zero, layout))


def with_room(words: Tensor, group_size: int) -> Tensor:
    """Return a tensor of this shape, (experts, K / 8, N) or (experts, K, N / 8), not its values.

    Its experts lie as far apart as :func:`block_in_place` needs: fresh memory for the result costs
    as much time as the work does, and would be the peak of loading.
    """
    room = torch.empty(_roomy_shape(words, group_size), dtype=torch.int32)
    # Not a view, which would forget how far apart they are where there is but one.
    return room.as_strided(words.shape, (room.shape[1], words.shape[2], 1))


def has_room(words: Tensor, scale: Tensor, layout: Int4Layout) -> bool:
    """Whether :func:`with_room` made the weights of all experts of a layer."""
    return _room_of(words, _group_size(words, scale, layout)) is not None


def block_columns(group_size: int) -> int:
    """Return how many input features a block spans: all of one group's, or 128 of them."""
    return _BLOCK_COLUMNS if group_size % _BLOCK_COLUMNS == 0 else group_size


def _block(words: Tensor, zeros: Tensor, group_size: int, layout: Int4Layout, out: Tensor) -> None:
    """Write the codes and sums of experts to int32 (experts, words), which may be their memory.

    Args:
        zeros: int8 (experts, groups, N), zero points as they are subtracted.
    """
    from vllm_mixprec.quant.cpu_loops import block_awq, block_gptq  # no GPU needs numba

    loop = block_awq if layout == Int4Layout.AWQ else block_gptq
    block_k = block_columns(group_size)
    assert block_k <= _BLOCK_COLUMNS, f"groups of {group_size}"  # sums of more overflow a byte
    assert words.shape[1] * (1 if layout == Int4Layout.AWQ else 8) % block_k == 0
    stored = np.empty(words.shape[1:], np.uint32)
    for expert, points, blocked in zip(words, zeros, out, strict=True):
        np.copyto(stored, expert.numpy().view(np.uint32))
        blocks = _as_blocks(blocked[None], points.shape[-1], group_size)[0]
        loop(stored, points.contiguous().numpy(), block_k, blocks.numpy().view(np.uint64))


def _group_size(words: Tensor, scale: Tensor, layout: Int4Layout) -> int:
    """Return the input features that share a scale."""
    columns = words.shape[-2] * (1 if layout == Int4Layout.AWQ else 8)
    return columns // scale.shape[-2]


def _as_blocks(room: Tensor, n: int, group_size: int) -> Tensor:
    """View int32 (experts, words) as uint8 (experts, N / 32, K / block_k, 16 * block_k + 128)."""
    block = 16 * block_columns(group_size) + 128
    assert n % _BLOCK_ROWS == 0, f"{n} rows"  # the loops trust the shape
    return room.view(torch.uint8).view(len(room), n // _BLOCK_ROWS, -1, block)


def _regroup(scale: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 scales and int8 zero points, (..., K / g, N) as (..., N / 32, K / g, 32)."""
    factors, points = (
        each.unflatten(-1, (-1, _BLOCK_ROWS)).transpose(-3, -2).to(dtype).contiguous()
        for each, dtype in ((scale, torch.float32), (zeros, torch.int8))
    )
    return factors, points


def _zero_points(words: Tensor, layout: Int4Layout) -> Tensor:
    """Return int8 (..., N), what is subtracted, of int32 (..., N / 8) as checkpoints pack it."""
    pairs = words.view(torch.uint8)
    codes = torch.stack((pairs & 15, pairs >> 4), -1).view(*words.shape, 8)
    if layout == Int4Layout.AWQ:
        return codes[..., list(AWQ_ORDER)].flatten(-2).view(torch.int8)
    return codes.flatten(-2).view(torch.int8).add_(1)


def _room_of(words: Tensor, group_size: int) -> Tensor | None:
    """Return the whole memory of a tensor that :func:`with_room` made; None of any other."""
    experts, each = _roomy_shape(words, group_size)
    begin, storage = words.storage_offset(), words.untyped_storage()
    if words.stride(0) != each or storage.nbytes() < 4 * (begin + experts * each):
        return None
    room = torch.empty(0, dtype=torch.int32)
    return room.set_(storage, begin, (experts, each), (each, 1))


def _roomy_shape(words: Tensor, group_size: int) -> tuple[int, int]:
    """Experts, and int32 that each takes when blocked: its words, and a sum a block and column."""
    each = words[0].numel()
    return len(words), each + 8 * each // block_columns(group_size)
