# SPDX-License-Identifier: Apache-2.0
"""Int4 linears by vLLM's ``cpu_gemm_wna16``, which computes in 16 bits and needs AVX512F only.

vLLM's own methods call it too, but refuse GPTQ whose groups are not 32, 64, 128 or all of K
(``verify_marlin_supported``) and GPTQ with zero points; and where there is AMX they take the W4A8
kernel instead, whatever the group size. Of the kernel's own limits see ``routing/kernels.py``.

The layout (kernels/linear/mixed_precision/cpu.py): for 16 output features together, one input
feature after the other, two words of eight codes each, the lowest bits the first.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.checkpoint.packing import AWQ_ORDER

_ISA = "vec"  # of the compiled library's own instruction set; the others are AMX and not x86
_CODES = 8  # in a word


def pack_int4_w16(scheme: Scheme, weight: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor | None]:
    """Lay an int4 linear (N, K) out for the kernel.

    Of GPTQ ``weight`` is (K / 8, N) int32, of AWQ (K, N / 8); ``zeros`` (K / g, N / 8) int32, each
    as its checkpoints pack it. Returns (N / 16, 2 * K) int32, and zero points (K / g, N / 8) int32
    in order; None of a symmetric scheme, whose zero points the kernel takes for 8.
    """
    if scheme.format == "awq":
        words, zeros = _reorder(weight), _reorder(zeros)
    else:
        words = _turn(weight)
    k = words.shape[0]
    blocks = words.view(k, -1, 2).transpose(0, 1).reshape(-1, 2 * k)
    return blocks, None if scheme.symmetric else zeros


def int4_w16_linear(
    scheme: Scheme, x: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor | None
) -> Tensor:
    """Multiply (M, K) by a packed int4 weight: (M, N), in the dtype of ``x`` or float32.

    ``scale`` (K / g, N) is bfloat16 or float16; ``weight`` and ``zeros`` are as packed.
    """
    x = x.to(scale.dtype).contiguous()
    out = ops.cpu_gemm_wna16(
        input=x,
        q_weight=weight,
        scales=scale,
        zeros=zeros,
        bias=None,
        pack_factor=_CODES,
        isa_hint=_ISA,
    )
    if zeros is None or scheme.format == "awq" or scheme.zero_offset == 0:
        return out
    # GPTQ v1 stores its zero points, 1 to 16, less one, and the kernel has but four bits for them:
    # what they lack comes off afterwards, a scale for each group's sum.
    sums = x.unflatten(-1, (scale.shape[0], -1)).sum(-1, dtype=torch.float32)
    return out.float() - scheme.zero_offset * (sums @ scale.float())


def _reorder(words: Tensor) -> Tensor:
    """Put the nibbles of AWQ's words into their columns' order."""
    return _gather((words >> 4 * place for place in AWQ_ORDER), torch.zeros_like(words))


def _turn(words: Tensor) -> Tensor:
    """Turn words of eight rows, (K / 8, N), into words of eight columns, (K, N / 8)."""
    rows, n = words.shape
    shifts = torch.arange(0, 4 * _CODES, 4, dtype=torch.int32, device=words.device)[:, None]
    turned = words.new_zeros(rows, _CODES, n // _CODES)
    columns = (words[:, None, column::_CODES] >> shifts for column in range(_CODES))
    return _gather(columns, turned).flatten(0, 1)


def _gather(columns: Iterable[Tensor], out: Tensor) -> Tensor:
    """Put the lowest nibble of each tensor's words into ``out``, the first lowest."""
    for place, column in enumerate(columns):
        out |= (column & 15) << 4 * place
    return out
