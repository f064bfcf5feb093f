# SPDX-License-Identifier: Apache-2.0
"""Experts of several formats in one launch a GEMM: the grouped Triton kernel as a vLLM method.

The layer's children hold the weights, a format each, and :class:`OneLaunch` runs them all. Int4 is
stored as that kernel reads it, which Marlin does not: a layer is served one way or the other.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.quant.expert_parameters import (
    ExpertSizes,
    create_fp8_block,
    create_fp8_channel,
    create_int4,
    create_plain,
    is_plain_silu,
)
from vllm_mixprec.quant.grouped_weights import (
    ExpertTable,
    Fp8Weight,
    Int4Weight,
    PlainWeight,
    Weight,
    pack_int4,
)
from vllm_mixprec.routing.platform import Platform

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

VARIABLE = "VLLM_MIXPREC_EXPERT_KERNEL"
_FP8_SCALES = {"fp8_block": "weight_scale_inv", "fp8_channel": "weight_scale"}
_SETTINGS = ("auto", "groups", "one-launch")

MEASURED: frozenset[tuple[int, frozenset[str]]] = frozenset()
"""(compute capability, formats of a layer) for which one launch was measured to be the faster at
batch 1 to 64, by ``scripts/gpu_suite.sh``. Empty: nothing was measured yet."""


def use_one_launch(
    schemes: Sequence[Scheme], platform: Platform, layer: "RoutedExperts"
) -> tuple[bool, str | None]:
    """Choose how a layer of several formats is run on CUDA.

    Returns:
        Whether in one launch, and why not where the user asked for it.

    Raises:
        UnsupportedError: the variable holds what it cannot.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in _SETTINGS:
        raise UnsupportedError(
            f"{VARIABLE}={asked}; expected {', '.join(_SETTINGS[:-1])} or {_SETTINGS[-1]}. "
            "Correct or unset it"
        )
    if platform.family != "cuda" or asked == "groups":
        return False, None
    mix = platform.compute_capability, frozenset(scheme.format for scheme in schemes)
    if asked == "auto" and mix not in MEASURED:
        return False, None
    problem = _problem(schemes, platform, layer)
    return problem is None, problem if asked == "one-launch" else None


def _problem(schemes: Sequence[Scheme], platform: Platform, layer: "RoutedExperts") -> str | None:
    """Say why the grouped kernel cannot run a layer; None if it can."""
    moe = layer.moe_config
    if platform.compute_capability < 80:
        return f"compute capability {platform.compute_capability / 10}, below 8.0"
    if not is_plain_silu(layer) or moe.has_bias:
        return f"activation {layer.activation.value!r}, a clamp or biases"
    if layer.apply_router_weight_on_input:
        return "router weights on the experts' inputs"
    if moe.in_dtype not in (torch.bfloat16, torch.float16):
        return f"hidden states in {moe.in_dtype}"
    for scheme in schemes:
        if scheme.is_quantized and scheme.format not in (*_FP8_SCALES, "gptq"):
            return f"{scheme.label}: it takes FP8 with a scale a block or a row, and GPTQ int4"
        if scheme.format == "gptq" and scheme.bits != 4:
            return f"{scheme.label}: it takes 4 bits"
        sizes = moe.hidden_dim, moe.intermediate_size_per_partition
        if any(size % 32 for size in sizes):
            return f"sizes of {sizes} on a rank, which are not multiples of 32"
        if scheme.block is not None and moe.intermediate_size_per_partition % scheme.block[0]:
            return f"{scheme.label}: a rank's part of an expert ends within a block"
    return None


class HeldExpertsMethod(FusedMoEMethodBase):
    """Experts of one format in a layer that is run in one launch; holds them and runs nothing."""

    def __init__(self, scheme: Scheme, layer: "RoutedExperts") -> None:
        super().__init__(layer.moe_config)
        self.scheme = scheme

    def get_fused_moe_quant_config(self, layer: "RoutedExperts") -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = ExpertSizes(num_experts, hidden_size, intermediate_size_per_partition)
        if self.scheme.format == "fp8_block":
            create_fp8_block(layer, sizes, self.scheme, extra_weight_attrs)
        elif self.scheme.format == "fp8_channel":
            create_fp8_channel(layer, sizes, extra_weight_attrs)
        elif self.scheme.format == "gptq":
            # As GPTQ stores them; bfloat16 would round them.
            create_int4(layer, sizes, self.scheme, torch.float16, extra_weight_attrs)
        else:
            create_plain(layer, sizes, params_dtype, extra_weight_attrs)

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        """Pack int4 for the kernel, an expert at a time; the others are as they must be."""
        layer.times_processed = getattr(layer, "times_processed", 0) + 1
        if self.scheme.format != "gptq":
            return
        for name in ("w13", "w2"):
            words, scales = getattr(layer, f"{name}_qweight"), getattr(layer, f"{name}_scales")
            experts, packed_rows, columns = words.shape
            codes = words.new_empty((experts, packed_rows // 4, columns, 16), dtype=torch.uint8)
            for expert in range(experts):
                assert self.scheme.symmetric, "routing widens asymmetric int4 on CUDA"
                codes[expert] = pack_int4(words[expert], scales[expert]).codes
            for stored in ("qweight", "qzeros"):
                delattr(layer, f"{name}_{stored}")
            layer.register_parameter(f"{name}_codes", Parameter(codes, requires_grad=False))

    def weights(self, layer: "RoutedExperts", name: str) -> list[Weight]:
        """Return ``w13`` or ``w2`` of every expert of this format, by slot; views."""
        if self.scheme.format in _FP8_SCALES:
            weights = getattr(layer, f"{name}_weight")
            scales = getattr(layer, f"{name}_{_FP8_SCALES[self.scheme.format]}")
            block = self.scheme.block or (1, weights.shape[2])
            pairs = zip(weights, scales, strict=True)
            return [Fp8Weight(weight.data, scale.data, block) for weight, scale in pairs]
        if self.scheme.format == "gptq":
            pairs = zip(
                getattr(layer, f"{name}_codes"), getattr(layer, f"{name}_scales"), strict=True
            )
            return [Int4Weight(codes.data, scales.data) for codes, scales in pairs]
        return [PlainWeight(weight.data) for weight in getattr(layer, f"{name}_weight")]

    def apply(
        self,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Module | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        raise UnsupportedError(
            f"{layer.layer_name}: one format of a layer that is run in one launch was called by "
            "itself; expected the whole layer. Report this"
        )


class OneLaunch:
    """Runs the children of a layer together; builds the kernel's table when it is first run."""

    def __init__(self, experts: int, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype
        self._table: ExpertTable | None = None
        self._read: tuple[int, ...] = ()

    def __call__(
        self,
        children: "Sequence[RoutedExperts]",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        from vllm_mixprec.quant.grouped_kernel import grouped_experts
        from vllm_mixprec.quant.grouped_tiles import choose_config

        if not children:  # expert parallelism left none here
            return torch.zeros_like(x)
        table = self._table_of(children)
        rows, top_k = topk_ids.shape
        config = choose_config(rows, top_k, table.experts, table.intermediate_size)
        aligned = None
        if topk_ids.is_cuda:
            # The -1 of padding (VLLM_MOE_SKIP_PADDING) goes to an expert behind the last, whose
            # tiles the kernel leaves: older versions of the operator read out of bounds for it.
            ids = topk_ids.masked_fill(topk_ids < 0, table.experts)
            aligned = moe_align_block_size(ids, config.block_m, table.experts + 1)
        return grouped_experts(x, topk_weights, topk_ids, table, config=config, aligned=aligned)

    def _table_of(self, children: "Sequence[RoutedExperts]") -> ExpertTable:
        """Return the table; anew after a reload, at the address that CUDA graphs hold.

        Raises:
            UnsupportedError: the weights that came need another kernel than was captured.
        """
        read = tuple(p.data_ptr() for child in children for p in child.parameters(recurse=False))
        read += tuple(child.times_processed for child in children)
        if self._table is None or read != self._read:
            w13: list[Weight | None] = [None] * self._experts
            w2 = w13.copy()
            for child in children:
                method = child.quant_method
                assert isinstance(method, HeldExpertsMethod), type(method)
                slots = child.expert_map_manager.expert_map.tolist()
                firsts, seconds = method.weights(child, "w13"), method.weights(child, "w2")
                for expert, slot in enumerate(slots):
                    if slot >= 0:
                        w13[expert], w2[expert] = firsts[slot], seconds[slot]
            table = ExpertTable(w13, w2, self._dtype)
            if self._table is not None:
                if table.traits != self._table.traits:
                    raise UnsupportedError(
                        f"{children[0].layer_name}: reloaded weights need the kernel "
                        f"{table.traits}, expected {self._table.traits}. Restart the server"
                    )
                table.descriptors = self._table.descriptors.copy_(table.descriptors)
            self._table, self._read = table, read
        return self._table
