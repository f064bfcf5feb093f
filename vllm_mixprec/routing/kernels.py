# SPDX-License-Identifier: Apache-2.0
"""Which packed formats have a kernel on which platform, as one literal table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.routing.fused import Kind
from vllm_mixprec.routing.platform import AMX_EXPERTS, INT4_W16, Platform
from vllm_mixprec.routing.structure import PLAIN_EXPERT, ExpertArithmetic

# Says why a weight of (N, K) on one rank cannot run packed, or None when it can.
ShapeRule = Callable[[Platform, Scheme, int, int], "str | None"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One packed kernel family and the shapes that it takes.

    ``experts``: None of a kernel for linears only. ``activations``: the formats that it computes
    in. ``one_group_size``: an expert's projections must have groups of one size, also where each
    group spans all of its projection's K. ``plain_experts``: of experts it computes
    silu(gate) * up, and nothing else.
    """

    name: str
    linear: ShapeRule
    experts: ShapeRule | None
    activations: frozenset[str]
    one_group_size: bool = False
    plain_experts: bool = False


def _cpu_fp8_block(platform: Platform, scheme: Scheme, n: int, k: int) -> str | None:
    # vLLM kernels/linear/scaled_mm/cpu.py can_implement: block K of 128, block N a multiple
    # of 32; convert_weight_packed tiles N by 32.
    assert scheme.block is not None, f"{scheme.label} without a block"
    block_n, block_k = scheme.block
    if scheme.scale_format == "float" and (block_k != 128 or block_n % 32):
        return f"it takes blocks of 32x128, 64x128, 96x128 ..., not {block_n}x{block_k}"
    return _cpu_fp8_channel(platform, scheme, n, k) or (
        f"K={k} on a rank is not a multiple of 128" if k % 128 else None
    )


def _cpu_fp8_channel(platform: Platform, scheme: Scheme, n: int, k: int) -> str | None:
    # The block kernel with scales of one; a row's scale multiplies what comes out. Its last block
    # of K may be a part of one: convert_weight_packed tiles both dimensions by 32.
    if scheme.scale_format != "float":
        return f"it takes floating-point scales, not {scheme.scale_format}"
    if n % 32:
        return f"N={n} on a rank is not a multiple of 32"
    if k % 32:
        return f"K={k} on a rank is not a multiple of 32"
    return None


def _cpu_int4(platform: Platform, scheme: Scheme, n: int, k: int) -> str | None:
    # vLLM csrc/cpu/sgl-kernels int4: blocks of 32 along N, whole groups along K. Shared by
    # int4_scaled_mm_cpu and fused_experts_cpu (INT4_W4A8), out of either layout.
    group_size = scheme.group_size or k
    if scheme.bits != 4:
        return f"it takes 4 bits, not {scheme.bits}"
    if scheme.desc_act:
        return "it takes no act-order"
    if scheme.format == "gptq" and scheme.zero_offset != 1 and not scheme.symmetric:
        return "it takes zero points as GPTQ v1 stores them"
    if group_size % 32:
        return f"the group size {group_size} is not a multiple of 32"
    if group_size > 128 and group_size % 128:
        # The kernel works in blocks of 128 columns then, with the scale of each one's first.
        return f"the group size {group_size} is over 128 and not a multiple of it"
    if k % group_size:
        return f"K={k} on a rank is not a multiple of the group size {group_size}"
    if n % 32:
        return f"N={n} on a rank is not a multiple of 32"
    return None


def _cpu_int4_w16(platform: Platform, scheme: Scheme, n: int, k: int) -> str | None:
    # vLLM kernels/linear/mixed_precision/cpu.py can_implement. Zero points of any kind: see
    # quant/cpu_int4_w16.py.
    group_size = scheme.group_size or k
    if scheme.bits != 4:
        return f"it takes 4 bits, not {scheme.bits}"
    if scheme.desc_act:
        return "it takes no act-order"
    if group_size % 2:
        return f"the group size {group_size} is odd"
    if k % group_size:
        return f"K={k} on a rank is not a multiple of the group size {group_size}"
    if n % 32:
        return f"N={n} on a rank is not a multiple of 32"
    if k % 32:
        return f"K={k} on a rank is not a multiple of 32"
    return None


def _cuda_fp8_block(platform: Platform, scheme: Scheme, n: int, k: int) -> str | None:
    if scheme.scale_format != "float":
        return f"it takes floating-point scales, not {scheme.scale_format}"
    # Marlin from compute 8.0, native from 8.9; both are built for DeepSeek's 128x128.
    if platform.compute_capability < 80:
        return "it needs compute capability 8.0"
    if scheme.block != (128, 128):
        block = "x".join(str(size) for size in scheme.block or ())
        return f"it takes blocks of 128x128, not {block}"
    if k % 128:  # quantization/utils/fp8_utils.py per_token_group_quant_fp8
        return f"K={k} on a rank is not a multiple of 128"
    return _marlin_tiles(n, k)


def _cuda_fp8_channel(platform: Platform, scheme: Scheme, n: int, k: int) -> str | None:
    # vLLM's compressed-tensors W8A8 of strategy "channel": FP8 from 8.9, Marlin from 8.0.
    if scheme.scale_format != "float":
        return f"it takes floating-point scales, not {scheme.scale_format}"
    if platform.compute_capability < 80:
        return "it needs compute capability 8.0"
    return _marlin_tiles(n, k)


def _cuda_gptq(platform: Platform, scheme: Scheme, n: int, k: int) -> str | None:
    # vLLM quantization/utils/marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES and
    # GPTQ_MARLIN_MIN_THREAD_N / _K. A group of all of K is its -1.
    if platform.compute_capability < 80:
        return "it needs compute capability 8.0"
    if scheme.bits not in (4, 8):
        return f"it takes 4 or 8 bits, not {scheme.bits}"
    if scheme.desc_act:
        return "vLLM drops the g_idx that act-order needs (base_config.py, 0.32)"
    if not scheme.symmetric:
        return "it takes symmetric weights only"
    if scheme.group_size not in (None, 32, 64, 128, k):
        return f"it takes groups of 32, 64, 128 or all of K, not {scheme.group_size}"
    if k % (scheme.group_size or k):
        return f"K={k} on a rank is not a multiple of the group size {scheme.group_size}"
    return _marlin_tiles(n, k)


def _cuda_awq(platform: Platform, scheme: Scheme, n: int, k: int) -> str | None:
    # vLLM quantization/auto_awq.py: Marlin with zero points. Its experts take no group of -1.
    if platform.compute_capability < 80:
        return "it needs compute capability 8.0"
    if scheme.group_size not in (32, 64, 128):
        return f"it takes groups of 32, 64 or 128, not {scheme.group_size}"
    if k % scheme.group_size:
        return f"K={k} on a rank is not a multiple of the group size {scheme.group_size}"
    return _marlin_tiles(n, k)


def _marlin_tiles(n: int, k: int) -> str | None:
    if n % 64:
        return f"N={n} on a rank is not a multiple of 64"
    if k % 128 and n % 128:
        # Marlin's second tile shape is 64 x 256 (K x N); it wants one of them a multiple of 128.
        return f"neither N={n} nor K={k} on a rank is a multiple of 128"
    if k % 64:
        return f"K={k} on a rank is not a multiple of 64"
    return None


FUSED_EXPERTS = "fused_experts_cpu"
"""Name of the kernel of all experts on a CPU with AVX512_BF16 but those of ``AMX_EXPERTS``."""

# What vLLM 0.32's unquantised experts compute on a CPU (fused_moe/experts/cpu_moe.py); swigluoai is
# left out, which takes gate and up in turns.
_CPU_ACTIVATIONS = frozenset({"silu", "gelu", "gelu_tanh"})

_BF16 = frozenset({"bf16"})
_HALF = frozenset({"bf16", "fp16"})

_CPU_FP8_BLOCK = Kernel(
    "fp8_scaled_mm_cpu", _cpu_fp8_block, _cpu_fp8_block, _BF16, plain_experts=True
)
_CPU_FP8_CHANNEL = Kernel(
    "fp8_scaled_mm_cpu", _cpu_fp8_channel, _cpu_fp8_channel, _BF16, plain_experts=True
)
# With groups of unlike sizes in w13 and w2 fused_experts_cpu is off by 0.2, without an error
# (measured with vLLM 0.32, tests/quant/test_formats.py).
_CPU_INT4 = Kernel(
    "int4_scaled_mm_cpu", _cpu_int4, _cpu_int4, _BF16, one_group_size=True, plain_experts=True
)
_CPU_INT4_W16 = Kernel(INT4_W16, _cpu_int4_w16, None, _HALF)

# (platform family, format) -> its kernels, best first: a weight is laid out anew for an earlier one
# before a later one takes it as it is. A pair that is absent has no packed kernel.
KERNELS: dict[tuple[str, str], tuple[Kernel, ...]] = {
    ("cpu-avx512", "fp8_block"): (_CPU_FP8_BLOCK,),
    ("cpu-avx512", "fp8_channel"): (_CPU_FP8_CHANNEL,),
    ("cpu-avx512", "gptq"): (_CPU_INT4, _CPU_INT4_W16),
    ("cpu-avx512", "awq"): (_CPU_INT4, _CPU_INT4_W16),
    ("cpu-other", "gptq"): (_CPU_INT4_W16,),
    ("cpu-other", "awq"): (_CPU_INT4_W16,),
    ("cuda", "fp8_block"): (Kernel("fp8 block", _cuda_fp8_block, _cuda_fp8_block, _HALF),),
    ("cuda", "fp8_channel"): (Kernel("fp8 channel", _cuda_fp8_channel, _cuda_fp8_channel, _HALF),),
    ("cuda", "gptq"): (Kernel("gptq_marlin", _cuda_gptq, _cuda_gptq, _HALF),),
    ("cuda", "awq"): (Kernel("awq_marlin", _cuda_awq, _cuda_awq, _HALF),),
}


def kernels_for(platform: Platform, format: str, kind: Kind) -> tuple[Kernel, ...]:
    """Return the kernels of a format that run linears, or experts, on a platform; best first."""
    kernels = KERNELS.get((platform.family, format), ())
    return tuple(k for k in kernels if kind != "experts" or k.experts is not None)


def missing_kernel(
    platform: Platform,
    scheme: Scheme,
    kind: Kind,
    shape_per_rank: tuple[int, int],
    activation: str = "bf16",
    arithmetic: ExpertArithmetic = PLAIN_EXPERT,
    among: Sequence[Kernel] | None = None,
) -> str | None:
    """Return why no packed kernel serves a weight here, or None when one does.

    Args:
        shape_per_rank: (N, K) of the logical weight that one tensor-parallel rank holds.
        activation: format that the model computes in.
        arithmetic: what an expert computes.
        among: the kernels that may; None for all that :func:`kernels_for` returns.
    """
    if not scheme.is_quantized:
        return None
    kernels = kernels_for(platform, scheme.format, kind) if among is None else among
    if not kernels:
        of_linears = (platform.family, scheme.format) in KERNELS
        whose = " for experts" if of_linears else ""
        return f"no {scheme.format} kernel on {platform.name}{whose}"
    reasons = []
    for kernel in kernels:
        why = _refusal(kernel, platform, scheme, kind, shape_per_rank, activation, arithmetic)
        if why is None:
            return None
        reasons.append(f"{kernel.name}: {why}")
    noun = "expert" if kind == "experts" else "linear"
    return f"no {noun} kernel on {platform.name} for {scheme.label}: {'; '.join(reasons)}"


def _refusal(
    kernel: Kernel,
    platform: Platform,
    scheme: Scheme,
    kind: Kind,
    shape_per_rank: tuple[int, int],
    activation: str,
    arithmetic: ExpertArithmetic,
) -> str | None:
    """Return why one kernel does not serve a weight, or None when it does."""
    why = dict(platform.broken).get((scheme.format, kernel.name))
    if why is not None:
        return f"it is not used: {why}"
    if activation not in kernel.activations:
        return f"it computes in {' or '.join(sorted(kernel.activations))}, not in {activation}"
    if kind == "experts" and kernel.plain_experts and not arithmetic.is_plain:
        return f"its experts compute plain silu, not {arithmetic}"
    rule = kernel.experts if kind == "experts" else kernel.linear
    assert rule is not None, f"{kernel.name} is for linears only"
    return rule(platform, scheme, *shape_per_rank)


def bf16_experts_kernel(platform: Platform, weights: int) -> str:
    """Name the kernel of unquantised experts on a CPU with AVX512_BF16.

    Args:
        weights: of gate and up of all experts that a rank holds of a layer. vLLM's kernel for AMX
            counts them in 32 bits (csrc/cpu/cpu_fused_moe.cpp), and reads elsewhere beyond.
    """
    return AMX_EXPERTS if platform.has_amx and weights < 1 << 31 else FUSED_EXPERTS


_ON_A_GPU = "Serve this model on a GPU (check and compose for one: --platform cuda-90)."


def unserved_experts(
    platform: Platform, arithmetic: ExpertArithmetic, is_split: bool
) -> tuple[str, str] | None:
    """Return why experts cannot be served unquantised either, and the remedy; None when they can.

    Only vLLM's own kernel for CPUs is known to lack any that no kernel here serves packed.

    Args:
        is_split: each rank holds some experts only (expert parallelism).
    """
    if not platform.family.startswith("cpu") or arithmetic.is_plain:
        return None
    what = f"experts compute {arithmetic}; vLLM's own kernel for unquantised experts on a CPU"
    if arithmetic.activation not in _CPU_ACTIVATIONS:
        return f"{what} has no such activation", _ON_A_GPU
    if arithmetic.limit:
        return f"{what} leaves the clamp out", _ON_A_GPU
    if is_split:
        return f"{what} takes other ranks' experts for its own", "Leave expert parallelism out."
    return None
