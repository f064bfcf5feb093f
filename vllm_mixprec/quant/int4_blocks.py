# SPDX-License-Identifier: Apache-2.0
"""Lays int4 weights out as vLLM's compiled x86 int4 kernels read them.

vLLM's own ``convert_weight_packed_scale_zp`` unpacks every code to an int32 of its own and packs
those one by one; most of the time that loading int4 experts took. Here whole words are masked,
shifted and added, four to eight codes at a time, in tiles that stay in the cache. The result is the
same to the last byte, which :mod:`vllm_mixprec.quant.cpu_probe` compares before it is trusted.

The layout (csrc/cpu/sgl-kernels/gemm_int4.cpp, ``_dequant_weight_zp_only`` and its callers), for 32
output features by ``block_k`` input features: for every 4 input features k, 16 output features and
j below 8, four bytes k, k + 1, k + 2, k + 3 which hold the code of output feature j in their lower
half and that of j + 8 in their upper one; behind these codes, an int32 for each output feature, the
sum over the block's input features of code less zero point. Scales and zero points are grouped by
the same 32 output features.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from threading import local

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_mixprec.checkpoint.packing import AWQ_ORDER
from vllm_mixprec.checkpoint.stored import unpin

Int4Layout = ops.CPUQuantAlgo
"""What int4 weights are packed from: AWQ's words or GPTQ v1's."""

_BLOCK_ROWS = 32
_BLOCK_COLUMNS = 128
_TILE_WORDS = 1 << 19  # 2 MiB of words, 12 with what is made of them, of a cache that cores share
_THREADS = min(4, os.cpu_count() or 1)
# The codes at even places of a word's eight.
_EVEN = torch.tensor(0x0F0F0F0F, dtype=torch.int32, device="cpu")
Scratch = dict[str, Tensor]

# How many codes of 4 bits may be added up within a byte.
_ADDENDS = 16


def pack_int4(
    weight: Tensor, scale: Tensor, zero: Tensor, layout: Int4Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Block int4 tensors, of one linear or, with a leading dimension, of experts.

    Of GPTQ v1 ``weight`` is (K / 8, N) int32, of AWQ (K, N / 8); ``scale`` (K / g, N), ``zero``
    (K / g, N / 8) int32 holding the zero points, of GPTQ less 1, each as its checkpoints pack it.
    Returns the blocked weight uint8, scale float32 and zero point int8.
    """
    awq = layout == Int4Layout.AWQ
    experts = weight[None] if weight.dim() == 2 else weight
    groups, n = scale.shape[-2:]
    group_size = experts.shape[1] * (1 if awq else 8) // groups
    room = _room_of(experts, group_size)
    in_place = room is not None
    if room is None:
        room = torch.empty(_roomy_shape(experts, group_size), dtype=torch.int32)
    blocked = room.view(torch.uint8).view(
        len(experts), n // _BLOCK_ROWS, -1, 16 * block_columns(group_size) + 128
    )
    zeros = _zero_points(zero, awq)
    place = block_awq if awq else block_gptq
    scratch = local()  # fresh memory for every expert would cost as much time as the work

    def block(words: Tensor, points: Tensor, out: Tensor) -> None:
        made = scratch.__dict__
        if in_place:
            words = _take(made, "words", words.shape).copy_(words)
        place(words, points, group_size, out, made)

    each = experts, zeros.view(-1, groups, n), blocked

    def regroup(stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.unflatten(-1, (-1, _BLOCK_ROWS)).transpose(-3, -2).to(dtype).contiguous()

    if len(experts) == 1 or torch.get_num_threads() > 1:
        list(map(block, *each))
        factors, points = regroup(scale, torch.float32), regroup(zeros, torch.int8)
    else:  # where OpenMP has one thread, whole experts go to the cores that it leaves idle
        with ThreadPoolExecutor(_THREADS, initializer=unpin) as pool:
            blocks = pool.map(block, *each)
            factors, points = regroup(scale, torch.float32), regroup(zeros, torch.int8)
            list(blocks)
    return (blocked if weight.dim() == 3 else blocked[0]), factors, points


def _zero_points(words: Tensor, awq: bool) -> Tensor:
    """Return int8 (..., N), what is subtracted, of int32 (..., N / 8) as checkpoints pack it."""
    pairs = words.view(torch.uint8)
    codes = torch.stack((pairs & 15, pairs >> 4), -1).view(*words.shape, 8)
    if awq:
        return codes[..., list(AWQ_ORDER)].flatten(-2).view(torch.int8)
    return codes.flatten(-2).view(torch.int8).add_(1)


def with_room(words: Tensor, group_size: int) -> Tensor:
    """Return a tensor of this shape, (experts, K / 8, N) or (experts, K, N / 8), not its values.

    Its experts lie as far apart as :func:`pack_int4` needs to block them where they are: fresh
    memory for the result costs as much time as the work does, and would be the peak of loading.
    """
    room = torch.empty(_roomy_shape(words, group_size), dtype=torch.int32)
    return room[:, : words[0].numel()].view(words.shape)


def _room_of(words: Tensor, group_size: int) -> Tensor | None:
    """Return the whole memory of a tensor that :func:`with_room` made; None of any other."""
    experts, each = _roomy_shape(words, group_size)
    storage = words.untyped_storage()
    if words.stride(0) != each or storage.nbytes() != 4 * experts * each:
        return None
    return torch.empty(0, dtype=torch.int32).set_(storage).view(experts, each)


def _roomy_shape(words: Tensor, group_size: int) -> tuple[int, int]:
    """Experts, and int32 that each takes when blocked: its words, and a sum a block and column."""
    each = words[0].numel()
    return len(words), each + 8 * each // block_columns(group_size)


def block_columns(group_size: int) -> int:
    """Return how many input features a block spans: all of one group's, or 128 of them."""
    return _BLOCK_COLUMNS if group_size % _BLOCK_COLUMNS == 0 else group_size


def block_gptq(
    words: Tensor, zeros: Tensor, group_size: int, out: Tensor, scratch: Scratch
) -> None:
    """Lay out one GPTQ weight.

    Args:
        words: int32 (K / 8, N): eight input features a word, the first lowest.
        zeros: int8 (K / group_size, N), zero points as they are subtracted.
        group_size: input features that share a scale, a multiple of 8.
        out: uint8 (N / 32, K / block_k, 16 * block_k + 128), written.
        scratch: memory of this thread, which is used again.
    """
    n, block_k = words.shape[1], block_columns(group_size)
    blocks, rows = 8 * len(words) // block_k, block_k // 8
    codes, sums = _open(out, block_k)
    # Bytes of a word: the even input features of its eight, then, apart, the odd ones.
    added = torch.empty(blocks, -(-rows // 8), n, dtype=torch.int32)
    for block, count, low, high in _tiles(words, blocks, rows, scratch):
        part, last = slice(block, block + count), block + count
        even, odd = (
            _widen(scratch, name, _pair(scratch, each.view(count * rows, n // 16, 2, 8)))
            for name, each in (("even", low), ("odd", high))
        )
        bytes_of = even.add_(odd, alpha=256)  # even, odd, even, odd: in order
        quads = bytes_of.view(torch.int32).view(count, rows, n // 32, 2, 8, 2)
        target = codes.view(n // 32, blocks, rows, 2, 2, 8)
        target[:, part].copy_(quads.permute(2, 0, 1, 5, 3, 4))
        low.add_(high)
        for number, some in enumerate(low.view(count, rows, n).split(_ADDENDS // 2, 1)):
            torch.sum(some, 1, dtype=torch.int32, out=added[block:last, number])
    total = _add_bytes(added).sum(1, dtype=torch.int32)
    sums.copy_(_less_zeros(total, zeros, block_k).transpose(0, 1))


def block_awq(words: Tensor, zeros: Tensor, group_size: int, out: Tensor, scratch: Scratch) -> None:
    """Lay out one AWQ weight.

    Args:
        words: int32 (K, N / 8): eight output features a word, in AWQ's order.
        zeros: int8 (K / group_size, N), zero points as they are subtracted.
        group_size: input features that share a scale, a multiple of 8.
        out: uint8 (N / 32, K / block_k, 16 * block_k + 128), written.
        scratch: memory of this thread, which is used again.
    """
    n, block_k = 8 * words.shape[1], block_columns(group_size)
    blocks = len(words) // block_k
    codes, sums = _open(out, block_k)
    # Output features of a word's bytes: 0, 4, 1, 5 at even places, 2, 6, 3, 7 at odd ones.
    added = torch.zeros(2, blocks, n // 8 * 4, dtype=torch.int32)
    for block, count, low, high in _tiles(words, blocks, block_k, scratch):
        part = slice(block, block + count)
        for place, each in enumerate((low, high)):
            pair = _pair(scratch, each.view(count * block_k, n // 16, 2))
            quads = pair.view(torch.uint8).view(count * block_k // 4, 4, n // 4)
            first, second = (quads[:, row].to(torch.int16) for row in (0, 2))
            first.add_(quads[:, 1], alpha=256)
            second.add_(quads[:, 3], alpha=256)
            # Two's complement: the upper half is shifted, the lower one loses its sign.
            words_of = second.to(torch.int32).bitwise_left_shift_(16)
            words_of.bitwise_or_(first.to(torch.int32).bitwise_and_(0xFFFF))
            ordered = words_of.view(count, block_k // 4, n // 32, 2, 2, 2)
            target = codes.view(n // 32, blocks, block_k // 4, 2, 2, 2, 2)[:, part, :, :, :, place]
            target.copy_(ordered.permute(2, 0, 1, 3, 5, 4))
            for some in each.view(count, block_k, n // 8).split(_ADDENDS, 1):
                total = some.sum(1, dtype=torch.int32).view(torch.uint8)
                added[place, part].add_(total.view(count, -1))
    columns = added.view(2, blocks, n // 8, 2, 2).permute(1, 2, 4, 0, 3).reshape(blocks, n)
    sums.copy_(_less_zeros(columns, zeros, block_k).transpose(0, 1))


def _open(out: Tensor, block_k: int) -> tuple[Tensor, Tensor]:
    """Return views of a weight's codes, int32 (N / 32, blocks, 4 * block_k), and of its sums."""
    words = out.view(torch.int32)
    return words[..., : 4 * block_k], words[..., 4 * block_k :]


def _tiles(
    words: Tensor, blocks: int, rows: int, scratch: Scratch
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (first block, blocks, codes at even places, codes at odd places), each byte a code.

    The two tensors of codes are int32 (blocks * rows, columns) and good until the next.
    """
    columns = words.shape[1]
    count = max(_TILE_WORDS // (rows * columns), 1)
    for block in range(0, blocks, count):
        some = min(count, blocks - block)
        tile = words[block * rows : (block + some) * rows]
        low, high = (_take(scratch, name, tile.shape) for name in ("low", "high"))
        torch.bitwise_and(tile, _EVEN, out=low)
        torch.bitwise_right_shift(tile, 4, out=high).bitwise_and_(_EVEN)
        yield block, some, low, high


def _pair(scratch: Scratch, codes: Tensor) -> Tensor:
    """Put the codes of output features j and j + 8 into one byte; good until the next."""
    first, second = codes[:, :, 0], codes[:, :, 1]
    return torch.add(first, second, alpha=16, out=_take(scratch, "pair", first.shape))


def _widen(scratch: Scratch, name: str, words: Tensor) -> Tensor:
    """Return the bytes of words, each an int16."""
    each = words.view(torch.uint8)
    return _take(scratch, name, each.shape, torch.int16).copy_(each)


def _take(
    scratch: Scratch, name: str, shape: Sequence[int], dtype: torch.dtype = torch.int32
) -> Tensor:
    """Return memory of a name, the same for every call that asks for no more than one before."""
    size = prod(shape)
    held = scratch.get(name)
    if held is None or held.numel() < size:
        held = scratch[name] = torch.empty(size, dtype=dtype)
    return held[:size].view(shape)


def _add_bytes(words: Tensor) -> Tensor:
    """Return the sum of each word's four bytes."""
    pairs = (words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF)
    return (pairs & 0xFFFF) + (pairs >> 16)


def _less_zeros(sums: Tensor, zeros: Tensor, block_k: int) -> Tensor:
    """Return int32 (blocks, N / 32, 32): sums of codes, less the zero point of each."""
    each = zeros.to(torch.int32).repeat_interleave(len(sums) // len(zeros), 0)
    return (sums - each * block_k).view(len(sums), -1, _BLOCK_ROWS)
