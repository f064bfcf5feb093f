# SPDX-License-Identifier: Apache-2.0
"""Scheme and platform -> the vLLM method that serves a layer.

On a GPU this delegates to vLLM's own methods for the format; on x86 CPUs to :mod:`.cpu` and
:mod:`.cpu_linear`. Which pairs exist is :data:`vllm_mixprec.routing.kernels.KERNELS`; routing has
widened everything else before a layer is built, so a pair that is missing here is a defect and
raises.
"""

import os
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.patches import amx_permission
from vllm_mixprec.quant import cpu, cpu_linear
from vllm_mixprec.quant.cpu_ops import ExpertKernel
from vllm_mixprec.quant.cpu_probe import probe, probe_int4_w16
from vllm_mixprec.quant.expert_parameters import is_plain_silu
from vllm_mixprec.quant.int4_blocks import Int4Layout
from vllm_mixprec.routing.kernels import KERNELS, bf16_experts_kernel
from vllm_mixprec.routing.platform import (
    AMX_EXPERTS,
    INT4_W16,
    PLATFORM_VARIABLE,
    Platform,
    detect_platform,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

logger = init_logger("vllm.mixprec")

# (kernel, format) -> method; vLLM's own serve what is absent.
_CPU_LINEAR = {
    ("fp8_scaled_mm_cpu", "fp8_block"): cpu_linear.CpuFp8LinearMethod,
    ("fp8_scaled_mm_cpu", "fp8_channel"): cpu_linear.CpuFp8ChannelLinearMethod,
    ("int4_scaled_mm_cpu", "gptq"): cpu_linear.CpuInt4LinearMethod,
    ("int4_scaled_mm_cpu", "awq"): cpu_linear.CpuInt4LinearMethod,
    (INT4_W16, "gptq"): cpu_linear.CpuInt4W16LinearMethod,
    (INT4_W16, "awq"): cpu_linear.CpuInt4W16LinearMethod,
}
_CPU_EXPERTS = {
    "fp8_block": cpu.CpuFp8ExpertsMethod,
    "fp8_channel": cpu.CpuFp8ChannelExpertsMethod,
    "gptq": cpu.CpuInt4ExpertsMethod,
    "awq": cpu.CpuInt4ExpertsMethod,
}
# Format -> the kernel and, of int4, the layout that it is packed from.
_CPU_KERNELS = {
    "bf16": (ExpertKernel.BF16, None),
    "fp8_block": (ExpertKernel.FP8_BLOCK, None),
    "fp8_channel": (ExpertKernel.FP8_CHANNEL, None),
    "gptq": (ExpertKernel.INT4, Int4Layout.GPTQ),
    "awq": (ExpertKernel.INT4, Int4Layout.AWQ),
}


def linear_method(
    scheme: Scheme, kernel: str | None, layer: Module, prefix: str
) -> QuantizeMethodBase:
    """Return the method of one linear layer whose weights are all of ``scheme``.

    Args:
        kernel: the name in ``KERNELS`` that its routes have; None of an unquantised scheme.
    """
    if not scheme.is_quantized:
        return UnquantizedLinearMethod()
    made = _CPU_LINEAR.get((kernel or "", scheme.format))
    if made is not None:
        return made(scheme)
    method = _stock_config(_spell_whole_k(scheme, layer.input_size)).get_quant_method(layer, prefix)
    if method is None or isinstance(method, UnquantizedLinearMethod):
        raise UnsupportedError(f"{prefix}: vLLM offers no {scheme.label} linear method here")
    return method


def experts_method(
    scheme: Scheme, platform: Platform, layer: "RoutedExperts", prefix: str
) -> FusedMoEMethodBase:
    """Return the method of routed experts that are all of ``scheme``."""
    if platform.name == "cpu-avx512" and (scheme.is_quantized or _fast_bf16(scheme, layer)):
        if scheme.format == "bf16":
            return cpu.CpuBf16ExpertsMethod(scheme, layer, _bf16_kernel(platform, layer))
        return _CPU_EXPERTS[scheme.format](scheme, layer)
    moe = layer.moe_config
    if not scheme.is_quantized:
        if current_platform.is_cpu() and moe.moe_parallel_config.use_ep:
            raise UnsupportedError(
                f"{prefix}: --enable-expert-parallel with vLLM's own CPU kernel for unquantised "
                "experts, which takes the other ranks' experts for its own and crashes; expected "
                "bfloat16 experts with plain silu on a CPU with AVX512_BF16. Leave the flag out"
            )
        return UnquantizedFusedMoEMethod(moe)
    if moe.hidden_dim == moe.intermediate_size:
        scheme = _spell_whole_k(scheme, moe.hidden_dim)
    method = _stock_config(scheme).get_quant_method(layer, prefix)
    if method is None or isinstance(method, UnquantizedFusedMoEMethod):
        raise UnsupportedError(f"{prefix}: vLLM offers no {scheme.label} expert method here")
    return method


def _fast_bf16(scheme: Scheme, layer: "RoutedExperts") -> bool:
    """Whether our kernels can run these unquantised experts; stock's runs any, without AMX."""
    moe = layer.moe_config
    return (
        scheme.format == "bf16"
        and moe.in_dtype == torch.bfloat16
        and is_plain_silu(layer)
        and not moe.has_bias
        and not layer.apply_router_weight_on_input
        and moe.hidden_dim % 32 == 0
        and moe.intermediate_size_per_partition % 32 == 0
        and kernel_problem("bf16") is None
    )


def _bf16_kernel(platform: Platform, layer: "RoutedExperts") -> ExpertKernel:
    moe = layer.moe_config
    experts = -(-moe.num_experts // moe.moe_parallel_config.ep_size)
    weights = experts * 2 * moe.intermediate_size_per_partition * moe.hidden_dim
    in_amx = bf16_experts_kernel(platform, weights) == AMX_EXPERTS
    return ExpertKernel.BF16_AMX if in_amx else ExpertKernel.BF16


@cache
def kernel_problem(format: str, kernel: str | None = None) -> str | None:
    """Why a format's compiled CPU kernel cannot be trusted here; None if it can.

    Runs the kernel's probe, once a process. ``kernel`` is its name; None of bf16's without AMX,
    which ``KERNELS`` does not list.
    """
    if kernel == AMX_EXPERTS:
        return probe(ExpertKernel.BF16_AMX) if amx_permission.apply() else "Linux refuses AMX"
    if kernel == INT4_W16:
        return probe_int4_w16(format)
    if detect_platform().name != "cpu-avx512":
        return "the CPU lacks AVX512_BF16 or AVX512_VNNI"
    return probe(*_CPU_KERNELS[format])


def _spell_whole_k(scheme: Scheme, k: int) -> Scheme:
    """Return the scheme with a group that spans all of K spelled -1, as vLLM's GPTQ wants it.

    Its AWQ experts divide by the group size, whatever it is.
    """
    if scheme.format == "gptq" and scheme.group_size == k:
        return replace(scheme, group_size=-1)
    return scheme


@cache
def _stock_config(scheme: Scheme) -> Any:
    """vLLM's own config object for one scheme, as its checkpoint's config.json would give it."""
    if scheme.format == "fp8_block":
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config

        assert scheme.block is not None
        return Fp8Config(
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            weight_block_size=list(scheme.block),
        )
    if scheme.format == "fp8_channel":
        from vllm.model_executor.layers.quantization.compressed_tensors import (
            compressed_tensors,
        )

        # As llm-compressor's FP8_DYNAMIC writes it: activations are quantised a token, where the
        # device computes in FP8; below compute capability 8.9 Marlin takes them as they are.
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        group = {
            "targets": ["re:.*"],
            "weights": weights,
            "input_activations": weights | {"strategy": "token", "dynamic": True},
        }
        return compressed_tensors.CompressedTensorsConfig.from_config(
            {"format": "float-quantized", "config_groups": {"group_0": group}, "ignore": []}
        )
    if scheme.format == "gptq":
        from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

        return AutoGPTQConfig.from_config(
            {
                "quant_method": "gptq",
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "desc_act": scheme.desc_act,
                "sym": scheme.symmetric,
                "lm_head": False,
                "dynamic": {},
            }
        )
    if scheme.format == "awq":
        from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig

        # With zero points also where all are 8: without them its layers read those stored as codes.
        return AutoAWQConfig.from_config(
            {"bits": scheme.bits, "group_size": scheme.group_size, "zero_point": True}
        )
    raise UnsupportedError(f"no vLLM method is known for the format {scheme.format!r}")


@cache
def usable_platform() -> Platform:
    """The platform vLLM runs on, less the formats whose compiled kernel fails its probe.

    Raises:
        UnsupportedError: ``VLLM_MIXPREC_PLATFORM`` names another kind of device than vLLM uses.
    """
    platform = _vllm_platform()
    if platform.name == "cpu-avx512" and (problem := kernel_problem("bf16")) is not None:
        # Widened experts share a layer with packed ones through this kernel.
        logger.warning("only int4 linears are packed: the bf16 kernel of this vLLM: %s", problem)
        platform = Platform("cpu-other")
    if not platform.name.startswith("cpu-"):
        return platform
    failed = dict(platform.broken)
    probed = [
        (format, kernel.name)
        for (family, format), kernels in KERNELS.items()
        for kernel in kernels
        if family == platform.family
    ]
    for format, kernel in (*probed, *([("bf16", AMX_EXPERTS)] if platform.has_amx else ())):
        if (format, kernel) in failed:
            continue
        problem = kernel_problem(format, kernel)
        if problem is not None:
            name = f"{kernel} for {format}"
            logger.warning("the kernel %s of this vLLM is not used: %s", name, problem)
            failed[format, kernel] = problem
    return platform.without(failed)


def _vllm_platform() -> Platform:
    """What vLLM computes on; ``detect_platform`` can only guess it from the machine."""
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        family, found = "cuda", Platform(f"cuda-{capability.to_int() if capability else 0:02d}")
    elif current_platform.is_cpu():
        family, found = "cpu", Platform("cpu-other")
    else:
        family, found = "other", Platform("other")
    named = detect_platform()
    if named.name.startswith(family):
        return named if family == "cpu" or os.environ.get(PLATFORM_VARIABLE) else found
    if os.environ.get(PLATFORM_VARIABLE):
        raise UnsupportedError(
            f"{PLATFORM_VARIABLE} is {named.name!r}, but vLLM runs on {found.name!r}; the variable "
            "is for `check`. Unset it"
        )
    return found
