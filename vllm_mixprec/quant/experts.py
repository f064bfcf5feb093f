# SPDX-License-Identifier: Apache-2.0
"""Routed experts of one layer in several formats: a child layer for each group of one format."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.errors import RouteError, UnsupportedError
from vllm_mixprec.quant.cpu import CpuExpertsMethod
from vllm_mixprec.quant.cpu_ops import mixed_experts
from vllm_mixprec.quant.methods import experts_method
from vllm_mixprec.quant.one_launch import HeldExpertsMethod, OneLaunch, use_one_launch
from vllm_mixprec.routing.platform import Platform
from vllm_mixprec.routing.table import ExpertGroup

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

logger = init_logger("vllm.mixprec")


class _GroupConfig(QuantizationConfig):
    """The quantization config of one child: every layer under it is of one scheme."""

    def __init__(self, scheme: Scheme, platform: Platform, held: bool) -> None:
        super().__init__()
        self.scheme = scheme
        self.platform = platform
        self.held = held

    def get_name(self) -> str:
        return "mixprec"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "_GroupConfig":
        raise UnsupportedError("a precision group is made by its layer, never from a config.json")

    def get_quant_method(self, layer: Module, prefix: str) -> FusedMoEMethodBase:
        assert isinstance(layer, RoutedExperts)
        if self.held:
            return HeldExpertsMethod(self.scheme, layer)
        return experts_method(self.scheme, self.platform, layer, prefix)


class _GroupMap:
    """What a child asks of vLLM's ``ExpertMapManager``: logical expert id -> slot in the group.

    ``expert_map`` is int32 [experts], -1 for experts of other groups and other ranks, the
    convention of expert parallelism.
    """

    expert_mask = None
    routing_tables = None
    num_fused_shared_experts = 0

    def __init__(self, parent: "ExpertMapManager", experts: tuple[int, ...]) -> None:
        self.placement_strategy = parent.placement_strategy
        self.local_num_experts = len(experts)
        self.global_num_experts = parent.global_num_experts
        self._slots = {expert: slot for slot, expert in enumerate(experts)}
        self.expert_map = torch.full((parent.global_num_experts,), -1, dtype=torch.int32)
        self.expert_map[list(experts)] = torch.arange(len(experts), dtype=torch.int32)

    def map_global_to_local(self, expert: int) -> int:
        return self._slots.get(expert, -1)


class MixedExpertsMethod(FusedMoEMethodBase):
    """Experts in two or more formats.

    ``create_weights`` gives the layer one child ``RoutedExperts`` a group, each with the method,
    parameters and post-processing of its own format; the layer itself holds no weight. Forward
    makes one kernel call a group and sums, or one for all of them: :mod:`.one_launch`.
    """

    def __init__(
        self, groups: tuple[ExpertGroup, ...], platform: Platform, layer: RoutedExperts
    ) -> None:
        super().__init__(layer.moe_config)
        self.groups = groups
        self.platform = platform
        parallel = layer.moe_config.moe_parallel_config
        # A group's kernel on a GPU would fetch the other ranks' tokens again, which vLLM's runner
        # has fetched for the whole layer; those on a CPU only compute.
        on_gpu = platform.family == "cuda"
        if parallel.pcp_size > 1 or (on_gpu and parallel.dp_size > 1):
            raise UnsupportedError(
                f"{layer.layer_name}: experts in {len(groups)} formats over {parallel.dp_size} "
                f"data-parallel and {parallel.pcp_size} prefill-context-parallel ranks; expected "
                "one format a layer there. Use tensor or expert parallelism within one replica, "
                "or route each layer's experts to one source"
            )
        schemes = [group.scheme for group in groups]
        one_launch, problem = use_one_launch(schemes, platform, layer)
        if problem is not None:
            logger.warning("%s is run group by group: %s", layer.layer_name, problem)
        self.one_launch = (
            OneLaunch(layer.global_num_experts, layer.moe_config.in_dtype) if one_launch else None
        )

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int32

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        holders: dict[int, RoutedExperts] = {}
        kept = []
        for group in self.groups:
            local = tuple(e for e in group.experts if layer.expert_map_manager.is_local_expert(e))
            if not local:  # expert parallelism left none of this group here
                continue
            moe_config = copy.copy(layer.moe_config)
            moe_config.num_local_experts = len(local)
            if self.platform.family == "cuda" and self.one_launch is None:
                moe_config.moe_backend = _mapped_backend(group.scheme, self.platform)
                if layer.moe_config.moe_backend not in ("auto", moe_config.moe_backend):
                    logger.warning_once(
                        "--moe-backend %s is not used for %s experts that share a layer with other "
                        "formats: %s is, which honours an expert map",
                        layer.moe_config.moe_backend,
                        group.scheme.label,
                        moe_config.moe_backend,
                    )
            child = RoutedExperts(
                layer.layer_name,
                params_dtype,
                moe_config,
                _GroupConfig(group.scheme, self.platform, held=self.one_launch is not None),
                expert_map_manager=_GroupMap(layer.expert_map_manager, local),
                ckpt_gate_proj_name=layer.ckpt_gate_proj_name,
                ckpt_down_proj_name=layer.ckpt_down_proj_name,
                ckpt_up_proj_name=layer.ckpt_up_proj_name,
                renormalize=layer.renormalize,
                scoring_func=layer.scoring_func,
                routed_scaling_factor=layer.routed_scaling_factor,
                swiglu_limit=layer.swiglu_limit,
                swiglu_alpha=layer.swiglu_alpha,
                swiglu_beta=layer.swiglu_beta,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
            )
            if child.quant_method.is_monolithic:
                raise UnsupportedError(
                    f"{layer.layer_name}: vLLM chose {type(child.quant_method).__name__} for the "
                    f"{group.scheme.label} experts, which routes inside its kernel and cannot "
                    "share a layer. Route the experts of each layer to one format"
                )
            name = f"group{len(kept)}"
            layer.add_module(name, child)
            kept.append(name)
            holders |= dict.fromkeys(local, child)
        layer.group_names = tuple(kept)
        layer.holders = holders

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Build the CPU op's (2, experts) slot table; the children reorder their own weights."""
        if self.platform.family == "cuda":
            return
        slots = torch.full((2, layer.global_num_experts), -1, dtype=torch.int32)
        for number, child in enumerate(self._children(layer)):
            expert_map = child.expert_map_manager.expert_map.to("cpu")
            slots[0, expert_map >= 0] = number
            slots[1, expert_map >= 0] = expert_map[expert_map >= 0]
        layer.register_buffer("expert_slots", slots, persistent=False)

    @staticmethod
    def _children(layer: RoutedExperts) -> list[RoutedExperts]:
        return [getattr(layer, name) for name in layer.group_names]

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Module | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        children = self._children(layer)
        if self.platform.name == "cpu-avx512":
            tensors, kernels, blocks = [], [], []
            for child in children:
                method = child.quant_method
                assert isinstance(method, CpuExpertsMethod), type(method)
                tensors += method.tensors(child)
                kernels.append(int(method.kernel))
                blocks += method.blocks
            return mixed_experts(
                x, topk_weights, topk_ids, layer.expert_slots, tensors, kernels, blocks
            )
        if self.one_launch is not None:
            return self.one_launch(children, x, topk_weights, topk_ids)
        # Modular kernels return a fresh tensor, so the first can be added to.
        total = None
        for child in children:
            child._ensure_moe_quant_config_init()
            part = child.forward_modular(x, topk_weights, topk_ids)
            total = part if total is None else total.add_(part)
        return torch.zeros_like(x) if total is None else total


# Format of a group -> vLLM's backends whose kernels skip the -1 of an expert map, best first, each
# from a compute capability on. Read from vLLM 0.32, fused_moe/experts: Triton's (triton_moe.py)
# computes FP8 in FP8, which needs 8.9; Marlin's (marlin_moe.py) dequantises in registers. The
# others stay out: flashinfer_trtllm routes by itself, b12x, flashinfer_b12x and hpc say that they
# support no map (supports_expert_map), and of the rest nothing was measured on a group of a layer.
MAPPED_BACKENDS: dict[str, tuple[tuple[int, str], ...]] = {
    "fp8_block": ((89, "triton"), (80, "marlin")),
    "fp8_channel": ((89, "triton"), (80, "marlin")),
    "gptq": ((80, "marlin"),),
    "awq": ((80, "marlin"),),
    "bf16": ((0, "triton"),),
}


def _mapped_backend(scheme: Scheme, platform: Platform) -> str:
    """Name the CUDA backend of one group of a layer.

    Raises:
        UnsupportedError: the device is too old for the format.
    """
    backends = MAPPED_BACKENDS.get(scheme.format, MAPPED_BACKENDS["bf16"])
    for capability, backend in backends:
        if platform.compute_capability >= capability:
            return backend
    raise UnsupportedError(
        f"{scheme.label} experts on compute capability {platform.compute_capability / 10}; "
        f"expected {backends[-1][0] / 10} or later. Route these experts to another source"
    )


# An expert's projection in a checkpoint -> the parameter that holds it, and its part of that.
_SHARDS = {
    "gate_proj": ("w13", "w1"),
    "w1": ("w13", "w1"),
    "up_proj": ("w13", "w3"),
    "w3": ("w13", "w3"),
    "down_proj": ("w2", "w2"),
    "w2": ("w2", "w2"),
}


def holder_of(layer: RoutedExperts, expert: int) -> RoutedExperts:
    """Return the group of a layer that holds an expert, or the layer if it has no groups."""
    holder: RoutedExperts = getattr(layer, "holders", {}).get(expert, layer)
    return holder


def load_expert(
    layer: RoutedExperts, expert: int, projection: str, suffix: str, tensor: torch.Tensor
) -> None:
    """Load one tensor of one expert straight to its place.

    Args:
        layer: the whole layer, of one format or several.
        expert: its logical id; one of another expert-parallel rank is passed over.
        projection: as the checkpoint spells it, ``gate_proj`` or ``w1``.
        suffix: ``weight``, ``weight_scale_inv``, ``qweight`` ...

    Raises:
        RouteError: the layer has no parameter for it.
    """
    # Experts without a gate keep their one up projection in w1; then the layer says so.
    stem, shard = _SHARDS[projection]
    if projection == layer.ckpt_gate_proj_name:
        shard = "w1"
    holder = holder_of(layer, expert)
    parameter = getattr(holder, f"{stem}_{suffix}", None)
    if parameter is None:
        raise RouteError(
            f"{layer.layer_name}.{expert}.{projection}.{suffix}: the layer that serves this "
            f"expert has no parameter {stem}_{suffix}; it holds "
            f"{sorted(name for name, _ in holder.named_parameters())}. Report this plan"
        )
    parameter.weight_loader(
        param=parameter,
        loaded_weight=tensor,
        weight_name=f"{stem}_{suffix}",
        shard_id=shard,
        expert_id=expert,
        return_success=True,
    )
