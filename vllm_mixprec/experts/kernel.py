# SPDX-License-Identifier: Apache-2.0
"""The counting of one MoE layer as one Triton kernel, for CUDA graphs."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit(do_not_specialize=["pairs", "stride", "experts"])
def _count_kernel(
    ids, real, counts, pairs, stride, experts, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    row = pair // TOP_K
    expert = tl.load(ids + row * stride + pair % TOP_K, mask=inside, other=-1).to(tl.int64)
    is_real = tl.load(real + row, mask=inside, other=0) != 0
    counted = inside & is_real & (expert >= 0) & (expert < experts)
    one = tl.full((BLOCK,), 1, tl.int64)
    tl.atomic_add(counts + tl.where(counted, expert, 0), one, mask=counted, sem="relaxed")


def count_experts(topk_ids: Tensor, real: Tensor, counts: Tensor, experts: int) -> None:
    """Add 1 to ``counts[id]`` for every id of a real row.

    Args:
        topk_ids: integer ``[rows, experts per token]``; ids outside ``[0, experts)`` are skipped.
        real: bool ``[at least rows]``.
        counts: int64 ``[at least experts]``, contiguous.
        experts: of the layer.
    """
    rows, top_k = topk_ids.shape
    if topk_ids.stride(1) != 1:
        topk_ids = topk_ids.contiguous()
    pairs = rows * top_k
    if pairs:
        _count_kernel[(triton.cdiv(pairs, _BLOCK),)](
            topk_ids,
            real,
            counts,
            pairs,
            topk_ids.stride(0),
            experts,
            TOP_K=top_k,
            BLOCK=_BLOCK,
        )
