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
from vllm_mixprec.checkpoint.threads import unpin

Int4Layout = ops.CPUQuantAlgo
"""What int4 weights are packed from: AWQ's words or GPTQ v1's."""

_BLOCK_ROWS = 32
_BLOCK_COLUMNS = 128
_TILE_WORDS = 1 << 19  # 2 MiB of words, 12 with what is made of them, of a cache that cores share
_THREADS = min(4, os.cpu_count() or 1)
# The codes at even places of a word's eight.
_EVEN = torch.tensor(0x0F0F0F0F, dtype=torch.int32, device="cpu")
_RUN = torch.complex128  # four int32 that are moved together
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
    if experts.stride(-1) != 1:
        experts = experts.contiguous()
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

    size = max(_TILE_WORDS // experts[0].numel(), 1)  # experts that are blocked at a time
    batches = [tensor.split(size) for tensor in (experts, zeros.view(-1, groups, n), blocked)]
    to_come = iter(list(zip(*batches, strict=True)))  # a list's, which threads may share

    def block_the_rest() -> None:
        made = scratch.__dict__
        for words, points, out in to_come:
            if in_place and words.numel() > _TILE_WORDS:  # a lone tile is read before it is written
                words = _take(made, "words", words.shape).copy_(words)
            place(words, points, group_size, out, made)

    def regroup(stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.unflatten(-1, (-1, _BLOCK_ROWS)).transpose(-3, -2).to(dtype).contiguous()

    if len(experts) == 1 or torch.get_num_threads() > 1:
        block_the_rest()
        factors, points = regroup(scale, torch.float32), regroup(zeros, torch.int8)
    else:  # where OpenMP has one thread, whole experts go to the cores that it leaves idle
        with ThreadPoolExecutor(_THREADS, initializer=unpin) as pool:
            threads = [pool.submit(block_the_rest) for _ in range(_THREADS)]
            factors, points = regroup(scale, torch.float32), regroup(zeros, torch.int8)
            for thread in threads:
                thread.result()
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
    begin, storage = words.storage_offset(), words.untyped_storage()
    if words.stride(0) != each or storage.nbytes() < 4 * (begin + experts * each):
        return None
    room = torch.empty(0, dtype=torch.int32)
    return room.set_(storage, begin, (experts, each), (each, 1))


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
    """Lay out GPTQ weights of experts.

    Args:
        words: int32 (experts, K / 8, N): eight input features a word, the first lowest.
        zeros: int8 (experts, K / group_size, N), zero points as they are subtracted.
        group_size: input features that share a scale, a multiple of 8.
        out: uint8 (experts, N / 32, K / block_k, 16 * block_k + 128), written.
        scratch: memory of this thread, which is used again.
    """
    experts, n, block_k = len(words), words.shape[2], block_columns(group_size)
    blocks, rows = 8 * words.shape[1] // block_k, block_k // 8
    codes, sums = _open(out, block_k)
    # The four input features k of a word's lower half, then of its upper one, for 16 features each.
    quads = codes.view(_RUN).unflatten(-1, (rows, 2, 4))
    added = torch.empty(2, -(-rows // _ADDENDS), 2, experts, blocks, n // 2, dtype=torch.int32)
    for block, count, tile in _tiles(words, blocks, rows):
        part = slice(block, block + count)
        # Output features j apart from j + 8: all that follows works on contiguous memory.
        high = _take(scratch, "high", (2, experts, count, rows, n // 2))
        runs = tile.view(_RUN).unflatten(-1, (n // 16, 2, 2)).permute(3, 0, 1, 2, 4)
        high.view(_RUN).view(runs.shape).copy_(runs)
        low = torch.bitwise_and(high, _EVEN, out=_take(scratch, "low", high.shape))
        high.bitwise_right_shift_(4).bitwise_and_(_EVEN)
        for place, each in enumerate((low, high)):
            for number, some in enumerate(each.split(_ADDENDS, 3)):
                torch.sum(some, 3, dtype=torch.int32, out=added[place, number, :, :, part])
        pair = _take(scratch, "pair", high.shape[1:])
        even, odd = (
            _widen(scratch, name, torch.add(each[0], each[1], alpha=16, out=pair))
            for name, each in (("even", low), ("odd", high))
        )
        in_order = even.add_(odd, alpha=256).view(torch.int64)
        for half in range(2):
            pair.copy_(in_order if half == 0 else in_order.bitwise_right_shift_(32))
            run = pair.view(_RUN).unflatten(-1, (n // 32, 4))
            quads[:, :, part, :, half].copy_(run.permute(0, 3, 1, 2, 4))
    lanes = (added & 0x00FF00FF).add_((added >> 8).bitwise_and_(0x00FF00FF))
    total = _add_lanes(lanes.sum((0, 1), dtype=torch.int32)).unflatten(-1, (-1, 8))
    _write_sums(sums, total.permute(1, 2, 3, 0, 4), zeros, block_k)


def block_awq(words: Tensor, zeros: Tensor, group_size: int, out: Tensor, scratch: Scratch) -> None:
    """Lay out AWQ weights of experts.

    Args:
        words: int32 (experts, K, N / 8): eight output features a word, in AWQ's order.
        zeros: int8 (experts, K / group_size, N), zero points as they are subtracted.
        group_size: input features that share a scale, a multiple of 8.
        out: uint8 (experts, N / 32, K / block_k, 16 * block_k + 128), written.
        scratch: memory of this thread, which is used again.
    """
    experts, n, block_k = len(words), 8 * words.shape[2], block_columns(group_size)
    blocks = words.shape[1] // block_k
    codes, sums = _open(out, block_k)
    quads_of = codes.unflatten(-1, (block_k // 4, 2, 2, 2, 2))
    # Output features of a word's bytes: 0, 4, 1, 5 at even places, 2, 6, 3, 7 at odd ones.
    added = torch.zeros(2, experts, blocks, n // 8 * 4, dtype=torch.int32)
    for block, count, tile in _tiles(words, blocks, block_k):
        part = slice(block, block + count)
        low, high = (_take(scratch, name, tile.shape) for name in ("low", "high"))
        torch.bitwise_and(tile, _EVEN, out=low)
        torch.bitwise_right_shift(tile, 4, out=high).bitwise_and_(_EVEN)
        for place, each in enumerate((low, high)):
            pair = _pair(scratch, each.unflatten(-1, (n // 16, 2)))
            quads = pair.view(torch.uint8).view(-1, 4, n // 4)
            first, second = (quads[:, row].to(torch.int16) for row in (0, 2))
            first.add_(quads[:, 1], alpha=256)
            second.add_(quads[:, 3], alpha=256)
            # Two's complement: the upper half is shifted, the lower one loses its sign.
            words_of = second.to(torch.int32).bitwise_left_shift_(16)
            words_of.bitwise_or_(first.to(torch.int32).bitwise_and_(0xFFFF))
            ordered = words_of.view(experts, count, block_k // 4, n // 32, 2, 2, 2)
            quads_of[:, :, part, :, :, :, place].copy_(ordered.permute(0, 3, 1, 2, 4, 6, 5))
            for some in each.view(experts, count, block_k, n // 8).split(_ADDENDS, 2):
                total = some.sum(2, dtype=torch.int32).view(torch.uint8)
                added[place, :, part].add_(total)
    total = added.view(2, experts, blocks, n // 8, 2, 2).permute(1, 2, 3, 5, 0, 4)
    _write_sums(sums, total.reshape(experts, blocks, n // 16, 2, 8), zeros, block_k)


def _open(out: Tensor, block_k: int) -> tuple[Tensor, Tensor]:
    """Return views: of codes, int32 (experts, N / 32, blocks, 4 * block_k), and of their sums."""
    words = out.view(torch.int32)
    return words[..., : 4 * block_k], words[..., 4 * block_k :]


def _tiles(words: Tensor, blocks: int, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first block, blocks, their words of all experts); ``rows`` rows are a block's."""
    count = max(_TILE_WORDS // (len(words) * rows * words.shape[2]), 1)
    for block in range(0, blocks, count):
        some = min(count, blocks - block)
        yield block, some, words[:, block * rows : (block + some) * rows]


def _pair(scratch: Scratch, codes: Tensor) -> Tensor:
    """Put the codes of output features j and j + 8 into one byte; good until the next."""
    first, second = codes[..., 0], codes[..., 1]
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


def _add_lanes(words: Tensor) -> Tensor:
    """Return the sum of each word's two unsigned halves."""
    return (words & 0xFFFF).add_((words >> 16).bitwise_and_(0xFFFF))


def _write_sums(sums: Tensor, total: Tensor, zeros: Tensor, block_k: int) -> None:
    """Write what lies behind a block's codes.

    Args:
        sums: int32 (experts, N / 32, blocks, 32).
        total: int32 (experts, blocks, N / 16, 2, 8), sums of codes.
        zeros: int8 (experts, groups, N), what is less for each of ``block_k`` codes.
    """
    groups, pairs = zeros.shape[1], total.shape[2]
    points = zeros.unflatten(-1, (pairs, 2, 8)).unsqueeze(2)
    less = torch.sub(total.unflatten(1, (groups, -1)), points, alpha=block_k)
    rows = less.reshape(*total.shape[:2], pairs // 2, _BLOCK_ROWS)
    sums.copy_(rows.transpose(1, 2))
