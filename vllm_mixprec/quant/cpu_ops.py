# SPDX-License-Identifier: Apache-2.0
"""vLLM's compiled x86 expert kernels, for experts of one layer in several formats.

vLLM 0.32 ships ``fused_experts_cpu`` (csrc/cpu/sgl-kernels/moe.cpp) for bf16, FP8 and int4 weights
but offers it only on CPUs with AMX tiles. The kernels themselves run on AVX512_BF16 without AMX;
where there is AMX, bf16 runs faster in ``cpu_fused_moe`` (csrc/cpu/cpu_fused_moe.cpp).
:mod:`.cpu_probe` runs each on a known case before it is trusted. Their traps, all avoided here: an
expert id of -1 crashes them, an empty batch divides by zero, non-contiguous ids or weights give
wrong results without an error, and so do more weights or tokens than ``cpu_fused_moe`` can count.
"""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from vllm import _custom_ops as ops
from vllm.utils.torch_utils import direct_register_custom_op


class ExpertKernel(IntEnum):
    """A weight format of experts; the values up to 5 are vLLM's ``CPUQuantMethod``."""

    BF16 = 0
    FP8_BLOCK = 2
    INT4 = 3
    FP8_CHANNEL = 100
    """``fused_experts_cpu`` has FP8 in blocks only: run by the linear kernel, expert by expert."""
    BF16_AMX = 101
    """By ``cpu_fused_moe``, as stock vLLM runs them where there is AMX."""


# How many tensors a group passes to the op: w13, w2, then scales, then zero points.
_TENSORS: dict[int, int] = {
    ExpertKernel.BF16: 2,
    ExpertKernel.FP8_BLOCK: 4,
    ExpertKernel.INT4: 6,
    ExpertKernel.FP8_CHANNEL: 4,
    ExpertKernel.BF16_AMX: 2,
}

_AMX_ROWS = 16  # of a tile
_AMX_SCRATCH_BYTES = 1 << 28
"""Of one call of ``cpu_fused_moe``, which counts them in 32 bits and keeps what it took."""
_BLOCK_ROWS = 32  # output features that a packed weight has together
_FP8_BLOCK_COLUMNS = 128
_MAGNITUDES = 0x7F7F7F7F7F7F7F7F  # of eight E4M3 codes: all but their signs


def pack_plain(weight: torch.Tensor, block_rows: int = _BLOCK_ROWS) -> torch.Tensor:
    """Reorder bf16 or E4M3 weights, (N, K) or (experts, N, K), for the kernel, and return them.

    As vLLM's ``convert_weight_packed`` does, but where they are: a copy of a layer's experts would
    be the peak of loading, and its fresh pages cost more time than the work does.
    """
    from vllm_mixprec.quant.cpu_loops import turn_blocks  # a GPU's worker needs no numba

    pair = np.dtype(f"uint{16 * weight.itemsize}")
    for matrix in weight.view(torch.uint8).view(-1, *weight.view(torch.uint8).shape[-2:]):
        turn_blocks(matrix.numpy().view(pair), block_rows)
    return weight


def pack_weight(kernel: ExpertKernel, weight: torch.Tensor) -> torch.Tensor:
    """Reorder bf16 or E4M3 weights for one kernel, as :func:`pack_plain` does."""
    return pack_plain(weight, _AMX_ROWS if kernel is ExpertKernel.BF16_AMX else _BLOCK_ROWS)


def clear_zero_tiles(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """Make the scale zero where all weights that share it are, and return the scales.

    vLLM's FP8 kernels for CPUs know no subnormal numbers: they read a code of zero as 2^-7. Beside
    codes up to 448 that is nothing, but of a tile of zeros it is all there is.

    Args:
        weight: E4M3 (N, K) or (experts, N, K), not yet packed; K a multiple of 32.
        scale: float32, one a block of ``block`` rows and columns; changed where it is.
    """
    n, k = weight.shape[-2:]
    rows, columns = block[0], min(block[1], k)
    matrices = weight.view(-1, n, k)
    for matrix, factors in zip(
        matrices, scale.view(len(matrices), -1, -(-k // columns)), strict=True
    ):
        words = matrix.view(torch.int64)  # eight codes each
        # Nearly every tile has a number among its first: only of the others all are read.
        first = words[::rows, :: columns // 8] & _MAGNITUDES
        for row, column in (first == 0).nonzero().tolist():
            tile = words[row * rows :, column * columns // 8 :][:rows, : columns // 8]
            if not (tile & _MAGNITUDES).any():
                factors[row, column] = 0
    return scale


def unit_scale(columns: int) -> torch.Tensor:
    """Return block scales of one, for weights (N, K) of so many columns and a block of (N, 128)."""
    return torch.ones(1, -(-columns // _FP8_BLOCK_COLUMNS), dtype=torch.float32)


def fp8_channel_linear(
    x: torch.Tensor, weight: torch.Tensor, unit: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Multiply (M, K) bfloat16 by a packed E4M3 weight (N, K) with a scale a row: (M, N) float32.

    The block kernel multiplies the codes, with scales of one (``unit``), and accumulates in
    float32; it rounds to bfloat16, and ``scale`` (N,) float32 multiplies what comes out.
    """
    return fp8_linear(x, weight, unit, [weight.shape[0], _FP8_BLOCK_COLUMNS]) * scale


def _has_no_rows(x: torch.Tensor) -> bool:
    """Whether a batch is empty, by which the kernels divide; of a symbolic size, whether always."""
    return statically_known_true(x.shape[0] == 0)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block: list[int]
) -> torch.Tensor:
    """Multiply (M, K) bfloat16 by a packed E4M3 weight (N, K) with its block scales: (M, N)."""
    if _has_no_rows(x):
        return x.new_empty(0, weight.shape[0])
    return torch.ops._C.fp8_scaled_mm_cpu(x.contiguous(), weight, scale, block, None, x.dtype, True)


def int4_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """Multiply (M, K) bfloat16 by a blocked int4 weight: (M, N)."""
    if _has_no_rows(x):
        return x.new_empty(0, weight.shape[0] * _BLOCK_ROWS)
    return ops.int4_scaled_mm_cpu(x.contiguous(), weight, zero, scale, None)


def _run(
    kernel: int,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    tensors: list[torch.Tensor],
    block: list[int],
) -> torch.Tensor:
    """Run one kernel: ``x`` (M, H), ``weights`` float32 and ``ids`` int32 (M, k) of local slots."""
    if kernel == ExpertKernel.FP8_CHANNEL:
        return _run_one_by_one(x, weights, ids, tensors)
    if kernel == ExpertKernel.BF16_AMX:
        return _run_amx(x, weights, ids, *tensors)
    out = torch.empty_like(x)
    scales = tensors[2:4] if len(tensors) > 2 else (None, None)
    zeros = tensors[4:6] if len(tensors) > 4 else (None, None)
    # The dispatcher is called directly: the Python wrapper of vLLM costs as much again per call.
    torch.ops._C.fused_experts_cpu(
        *(out, x, tensors[0], tensors[1], weights, ids, kernel, *scales, *zeros, None),
        *(block or None, None, None, None, None, True),
    )
    return out


def _run_amx(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """Run bf16 experts in AMX, so many tokens at a time as the kernel can."""
    out = torch.empty_like(x)
    hidden, inner = w2.shape[1:]
    # It keeps each chosen expert's activations and its output, which is float32.
    pair_bytes = x.itemsize * inner + 4 * hidden
    rows = max(1, _AMX_SCRATCH_BYTES // (ids.shape[1] * pair_bytes))
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        torch.ops._C.cpu_fused_moe(
            *(out[some], x[some], w13, w2, None, None, weights[some], ids[some]),
            *(False, "silu", "amx"),
        )
    return out


def _run_one_by_one(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, tensors: list[torch.Tensor]
) -> torch.Tensor:
    """Run FP8 experts with a scale a row: two linear kernels for each expert that is chosen.

    All else is done at once, on the (token, choice) pairs sorted by expert.
    """
    w13, w2, scale13, scale2 = tensors
    slots = ids.numpy().reshape(-1)
    pairs = slots.argsort(kind="stable")
    counts = np.bincount(slots)
    chosen = counts.nonzero()[0]
    ends = counts[chosen].cumsum().tolist()
    spans = list(zip(chosen.tolist(), [0, *ends[:-1]], ends, strict=True))
    rows = torch.from_numpy(pairs // ids.shape[1])
    gate, up = _each_expert(x.index_select(0, rows), w13, scale13, spans).chunk(2, 1)
    act = torch.nn.functional.silu(gate).mul_(up).to(x.dtype)
    parts = _each_expert(act, w2, scale2, spans)
    parts.mul_(weights.view(-1, 1).index_select(0, torch.from_numpy(pairs)))
    total = torch.zeros(x.shape, dtype=torch.float32)
    return total.index_add_(0, rows, parts).to(x.dtype)


def _each_expert(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    spans: list[tuple[int, int, int]],
) -> torch.Tensor:
    """Multiply each span of rows, (expert, first, end), by its expert's weight: float32."""
    out = torch.empty(x.shape[0], weight.shape[1], dtype=torch.float32)
    unit, block = unit_scale(weight.shape[2]), [weight.shape[1], _FP8_BLOCK_COLUMNS]
    for expert, first, end in spans:
        part = fp8_linear(x[first:end], weight[expert], unit, block)
        torch.mul(part, scale[expert], out=out[first:end])
    return out


def _mixed_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor | None,
    tensors: list[torch.Tensor],
    kernels: list[int],
    blocks: list[int],
) -> torch.Tensor:
    """Run the routed experts of one layer, one kernel call for each group of one format.

    Args:
        x: (M, H) bfloat16.
        topk_weights: (M, k) float32.
        topk_ids: (M, k) logical expert ids.
        slots: (2, experts) int32, contiguous: group of an expert (-1: on another rank) and its slot
            in that group. None: one group that holds every expert in order.
        tensors: the groups' packed tensors, one group after the other.
        kernels: an :class:`ExpertKernel` a group.
        blocks: two ints a group, the FP8 block (N, K); 0 where the format has none.

    Returns:
        (M, H) like ``x``: the sum over groups, accumulated in float32.
    """
    topk_weights = topk_weights.float().contiguous()
    if x.shape[0] == 0:
        return torch.empty_like(x)
    x = x.contiguous()
    if slots is None:
        ids = topk_ids.to(torch.int32).contiguous()
        return _run(kernels[0], x, topk_weights, ids, tensors, _block(blocks, 0))

    # Indices are worked out in numpy: at decode sizes a torch operator costs more than the work.
    pair_group, pair_slot = slots.numpy()[:, topk_ids.reshape(-1).numpy()]
    if x.shape[0] == 1:
        return _mixed_one_token(x, topk_weights, pair_group, pair_slot, tensors, kernels, blocks)

    # Each (token, choice) pair becomes a row with one expert, because the kernel cannot skip a
    # pair that belongs to another group.
    top_k = topk_ids.shape[1]
    pair_weights = topk_weights.view(-1, 1)
    total = torch.zeros(x.shape, dtype=torch.float32)
    for number, kernel, group in _groups(kernels, tensors):
        pairs = (pair_group == number).nonzero()[0]
        if pairs.size == 0:
            continue
        rows = torch.from_numpy(pairs // top_k)
        part = _run(
            kernel,
            x.index_select(0, rows),
            pair_weights.index_select(0, torch.from_numpy(pairs)),
            torch.from_numpy(pair_slot[pairs]).unsqueeze(1),
            group,
            _block(blocks, number),
        )
        total.index_add_(0, rows, part.float())
    return total.to(x.dtype)


def _mixed_one_token(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    pair_group: np.ndarray,
    pair_slot: np.ndarray,
    tensors: list[torch.Tensor],
    kernels: list[int],
    blocks: list[int],
) -> torch.Tensor:
    """Decode at batch 1: every group reads the same row, so nothing is gathered or scattered."""
    total = None
    weights = topk_weights.numpy()
    for number, kernel, group in _groups(kernels, tensors):
        mine = pair_group == number
        if not mine.any():
            continue
        ids = torch.from_numpy(pair_slot[None, mine])
        part = _run(
            kernel, x, torch.from_numpy(weights[:, mine]), ids, group, _block(blocks, number)
        )
        total = part if total is None else total.add_(part)
    return torch.zeros_like(x) if total is None else total


def _groups(
    kernels: list[int], tensors: list[torch.Tensor]
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """Yield (group, kernel, its tensors) from the flat list that a torch operator can take."""
    start = 0
    for number, kernel in enumerate(kernels):
        end = start + _TENSORS[kernel]
        yield number, kernel, tensors[start:end]
        start = end


def _block(blocks: list[int], number: int) -> list[int]:
    block = blocks[2 * number : 2 * number + 2]
    return block if block[0] else []


def _mixed_experts_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor | None,
    tensors: list[torch.Tensor],
    kernels: list[int],
    blocks: list[int],
) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("vllm_mixprec", "FRAGMENT")
direct_register_custom_op(
    "cpu_mixed_experts",
    _mixed_experts,
    fake_impl=_mixed_experts_fake,
    target_lib=_library,
    dispatch_key="CPU",
)
mixed_experts = torch.ops.vllm_mixprec.cpu_mixed_experts
