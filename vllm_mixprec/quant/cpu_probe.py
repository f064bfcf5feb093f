# SPDX-License-Identifier: Apache-2.0
"""Runs each compiled CPU kernel once on a small known case, before it is trusted."""

from functools import cache

import torch
from vllm import _custom_ops as ops
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.checkpoint.packing import AWQ_ORDER, pack
from vllm_mixprec.quant import cpu_int4_w16, cpu_ops, int4_blocks
from vllm_mixprec.quant.cpu_ops import ExpertKernel
from vllm_mixprec.quant.int4_blocks import Int4Layout

_BF16 = (ExpertKernel.BF16, ExpertKernel.BF16_AMX)


@cache
def probe(kernel: ExpertKernel, layout: Int4Layout | None = None) -> str | None:
    """Run a kernel, experts and linear, on a small known case; None means it can be trusted.

    Two experts, 256 x 128, three tokens and forty, against float32 arithmetic on the same
    dequantised weights; ``layout`` is that of int4 ones. Returns what went wrong otherwise. A CPU
    without the instructions would die of SIGILL here, so the caller asks the CPU's flags first.
    """
    # A worker calls this while it builds the model, under the model's default dtype and device.
    with set_default_torch_dtype(torch.float32), torch.device("cpu"):
        try:
            if not _is_packed_as_vllm_does(kernel, layout):
                return "vLLM lays its weights out otherwise than is known here"
            # With more than four tokens, those that have AMX or its like take another way.
            error = max(_probe(kernel, layout, tokens) for tokens in (3, 40))
        except Exception as problem:  # whatever it is, it is why this kernel is not used
            return _raised(problem)
    # int8 activations cost the int4 kernel about 0.02, rounding to bf16 the others 0.004; a wrong
    # layout, sign or scale is off by 0.3 and more.
    if not error < 0.06:
        return f"its probe is off by {error:.3f} of the result's norm (at most 0.06)"
    return None


@cache
def probe_int4_w16(format: str) -> str | None:
    """Run the 16-bit int4 kernel on small known cases; None means it can be trusted.

    A linear of 64 x 96, five tokens, as :func:`probe` does it: each dtype, groups of 16 and of all
    of K, one zero point and many. No instruction can be lacking: the library that vLLM chose for
    this CPU has the kernel, or has it not.
    """
    with set_default_torch_dtype(torch.float32), torch.device("cpu"):
        try:
            error = max(
                _probe_int4_w16(format, dtype, group_size, symmetric)
                for dtype in (torch.bfloat16, torch.float16)
                for group_size in (16, 96)
                for symmetric in (True, False)
            )
        except Exception as problem:  # whatever it is, it is why this kernel is not used
            return _raised(problem)
    # Rounding to bf16 costs at most 0.007; a wrong layout or zero point is off by 0.2 and more.
    if not error < 0.02:
        return f"its probe is off by {error:.3f} of the result's norm (at most 0.02)"
    return None


def _raised(problem: Exception) -> str:
    line = str(problem).strip().partition("\n")[0]
    return f"its probe raised {type(problem).__name__}: {line}"


def _probe_int4_w16(format: str, dtype: torch.dtype, group_size: int, symmetric: bool) -> float:
    """Return the relative error of one case."""
    generator = torch.Generator().manual_seed(group_size)
    n, k, offset = 64, 96, int(format == "gptq")
    scheme = Scheme(format, 4, group_size=group_size, symmetric=symmetric, zero_offset=offset)
    codes = torch.randint(0, 16, (k, n), generator=generator)
    stored = torch.randint(0, 16, (k // group_size, n), generator=generator)
    if symmetric:
        stored.fill_(8 - offset)
    scale = ((torch.rand(k // group_size, n, generator=generator) + 0.1) / k**0.5).to(dtype)
    order = () if format == "gptq" else AWQ_ORDER
    words = pack(codes.mT, 4).mT if format == "gptq" else pack(codes, 4, AWQ_ORDER)
    weight, zeros = cpu_int4_w16.pack_int4_w16(scheme, words, pack(stored, 4, order))
    x = torch.randn(5, k, generator=generator).to(dtype)
    out = cpu_int4_w16.int4_w16_linear(scheme, x, weight, scale, zeros).float()
    group = torch.arange(k) // group_size
    expected = x.float() @ ((codes - stored[group] - offset) * scale.float()[group])
    return ((out - expected).norm() / expected.norm()).item()


def _probe(kernel: ExpertKernel, layout: Int4Layout | None, tokens: int) -> float:
    """Return the larger relative error of the expert and the linear kernel."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = 256, 128
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    first = torch.randint(0, 2, (tokens, 1), generator=generator, dtype=torch.int32)
    ids = torch.cat((first, 1 - first), dim=1)
    weights = torch.rand(tokens, 2, generator=generator)
    w13, stored13 = _probe_weights(kernel, layout, 2 * inner, hidden, generator)
    w2, stored2 = _probe_weights(kernel, layout, hidden, inner, generator)
    # Packing may be in place.
    linear = _pack(kernel, layout, [tensor[0].clone() for tensor in stored13])
    packed = zip(_pack(kernel, layout, stored13), _pack(kernel, layout, stored2), strict=True)
    block = [128, 128] if kernel is ExpertKernel.FP8_BLOCK else [0, 0]
    tensors = [tensor for pair in packed for tensor in pair]
    out = cpu_ops.mixed_experts(x, weights, ids, None, tensors, [kernel], block)
    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for choice, expert in enumerate(ids[token].tolist()):
            gate, up = (w13[expert] @ x[token].float()).chunk(2)
            act = torch.nn.functional.silu(gate) * up
            expected[token] += weights[token, choice] * (w2[expert] @ act)
    error = ((out.float() - expected).norm() / expected.norm()).item()
    if kernel in _BF16:  # vLLM's own linear serves bf16
        return error
    if kernel is ExpertKernel.FP8_BLOCK:
        out = cpu_ops.fp8_linear(x, *linear, block)
    elif kernel is ExpertKernel.FP8_CHANNEL:
        out = cpu_ops.fp8_channel_linear(x, linear[0], cpu_ops.unit_scale(hidden), linear[1])
    else:
        out = cpu_ops.int4_linear(x, *linear)
    expected = x.float() @ w13[0].T
    return max(error, ((out.float() - expected).norm() / expected.norm()).item())


def _is_packed_as_vllm_does(kernel: ExpertKernel, layout: Int4Layout | None) -> bool:
    if layout is not None:
        return _is_blocked_as_vllm_does(layout)
    return (
        _is_tiled_as_vllm_does() if kernel is ExpertKernel.BF16_AMX else _is_turned_as_vllm_does()
    )


def _is_tiled_as_vllm_does() -> bool:
    """Compare what is packed for AMX with vLLM's own, byte by byte."""
    weight = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = ops.cpu_prepack_moe_weight(weight, "amx")
    packed = cpu_ops.pack_weight(ExpertKernel.BF16_AMX, weight)
    return torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))


def _is_turned_as_vllm_does() -> bool:
    """Compare ``pack_plain`` with vLLM's own, byte by byte, of rows that fill no block, too."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        weight = torch.randn(2, 80, 96, generator=generator).to(dtype)
        expected = torch.ops._C.convert_weight_packed(weight)
        if not torch.equal(
            cpu_ops.pack_plain(weight).view(torch.uint8), expected.view(torch.uint8)
        ):
            return False
    return True


def _is_blocked_as_vllm_does(layout: Int4Layout) -> bool:
    """Compare ``pack_int4`` with vLLM's own, byte by byte, in each size of block."""
    generator = torch.Generator().manual_seed(0)
    for group_size in (32, 64, 128, 256):
        words = (256, 8) if layout == Int4Layout.AWQ else (32, 64)
        weight, zero = (
            torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
            for shape in (words, (256 // group_size, 8))
        )
        scale = torch.rand(256 // group_size, 64, generator=generator)
        expected = ops.convert_weight_packed_scale_zp(weight, zero, scale, layout)
        found, scales, zeros = int4_blocks.pack_int4(weight, scale, zero, layout)
        if not all(map(torch.equal, (found, zeros, scales), expected)):
            return False
    return True


def _pack(
    kernel: ExpertKernel, layout: Int4Layout | None, stored: list[torch.Tensor]
) -> list[torch.Tensor]:
    if layout is not None:
        weight, scale, zero = stored
        return list(int4_blocks.pack_int4(weight, scale, zero, layout))
    return [cpu_ops.pack_weight(kernel, stored[0]), *stored[1:]]


def _probe_weights(
    kernel: ExpertKernel,
    layout: Int4Layout | None,
    n: int,
    k: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return two experts' float32 weights (2, n, k) and the tensors a checkpoint holds of them."""
    weight = torch.randn(2, n, k, generator=generator)
    if kernel in _BF16:
        weight = (weight / k**0.5).bfloat16()
        return weight.float(), [weight]
    if kernel is ExpertKernel.FP8_BLOCK:
        weight = (weight * 8).to(torch.float8_e4m3fn)
        scale = torch.rand(2, n // 128, k // 128, generator=generator) / (8 * k**0.5)
        wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        return weight.float() * wide, [weight, scale]
    if kernel is ExpertKernel.FP8_CHANNEL:
        weight = (weight * 8).to(torch.float8_e4m3fn)
        scale = torch.rand(2, n, generator=generator) / (8 * k**0.5)
        return weight.float() * scale.unsqueeze(2), [weight, scale]
    group = 64
    codes = torch.randint(0, 16, (2, k, n), generator=generator)
    offset = 0 if layout == Int4Layout.AWQ else 1  # what is added to a stored zero point
    zeros = torch.randint(0, 16, (2, k // group, n), generator=generator) + offset
    scale = torch.rand(2, k // group, n, generator=generator) / (6 * k**0.5)
    centred = codes - zeros.repeat_interleave(group, 1)
    dense = (centred * scale.repeat_interleave(group, 1)).mT.contiguous()
    if layout == Int4Layout.AWQ:
        words, zero_words = (pack(each.int(), 4, AWQ_ORDER) for each in (codes, zeros))
    else:
        words, zero_words = pack(codes.mT.int(), 4).mT, pack((zeros - offset).int(), 4)
    return dense, [words, scale, zero_words]
