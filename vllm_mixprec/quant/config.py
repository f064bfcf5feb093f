# SPDX-License-Identifier: Apache-2.0
"""The quantization config that vLLM finds under ``quant_method: mixprec``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from vllm.config import SpeculativeConfig, VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.checkpoint.spelling import class_name
from vllm_mixprec.errors import PlanError, RouteError, UnsupportedError
from vllm_mixprec.plan import Plan
from vllm_mixprec.quant.checked import require_checked, require_checked_files
from vllm_mixprec.quant.experts import MixedExpertsMethod
from vllm_mixprec.quant.methods import experts_method, linear_method, usable_platform
from vllm_mixprec.routing import Layout, RouteTable, load_route_table
from vllm_mixprec.routing.fused import parse_expert

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger("vllm.mixprec")

# vLLM's names of the fused linears in routing.fused.FUSED_LAYERS, for models that declare none in
# their packed_modules_mapping (Qwen3-MoE leaves out gate_up_proj of its dense and shared experts,
# DeepSeekMTP has none at all).
_FUSED_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "w13": ("w1", "w3"),
}

METHOD = "mixprec"
LOAD_FORMAT = "mixprec"
OVERRIDE_KEY = "mixprec_plan"  # in --hf-overrides


def plan_path(model: str, hf_config: "PretrainedConfig") -> Path:
    """Find the plan of a model: ``--hf-overrides`` first, then a composed directory's config.

    Raises:
        PlanError: neither names one.
    """
    override = getattr(hf_config, OVERRIDE_KEY, None)
    if override is not None:
        return Path(override)
    named = (getattr(hf_config, "quantization_config", None) or {}).get("plan")
    if named is None:
        raise PlanError(
            f"{model}: quantization {METHOD!r} without a plan; expected a directory made by "
            f'`vllm-mixprec compose`, or --hf-overrides \'{{"{OVERRIDE_KEY}": "plan.yaml"}}\''
        )
    return Path(model) / named


def layout_of(vllm_config: VllmConfig) -> Layout:
    """Return the parallel layout that decides which tensors a rank holds and where they are cut."""
    parallel = vllm_config.parallel_config
    return Layout(
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        expert_parallel=parallel.enable_expert_parallel,
        draft=is_own_draft(vllm_config.speculative_config),
        data_parallel_size=parallel.data_parallel_size,
    )


def is_own_draft(speculative: SpeculativeConfig | None) -> bool:
    """Whether speculative decoding drafts with the model's own next-token predictors (MTP).

    Raises:
        UnsupportedError: it drafts with the predictors of another checkpoint.
    """
    if speculative is None or speculative.method != "mtp":
        return False
    target, draft = speculative.target_model_config, speculative.draft_model_config
    own = (target.model, target.model_weights)
    if draft is not None and draft.model not in own:
        raise UnsupportedError(
            f"--speculative-config: an MTP draft from {draft.model}, beside a mixed model; "
            "expected the model's own MTP layers, which the plan routes. Leave the draft's model "
            "out, and make that checkpoint a source of the plan"
        )
    return True


def dtype_of(vllm_config: VllmConfig) -> str:
    """Return the format that the model computes in, after ``--dtype`` and vLLM's own choice.

    Raises:
        UnsupportedError: it is none of bf16, fp16, fp32.
    """
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    dtype = vllm_config.model_config.dtype
    if dtype not in names:
        raise UnsupportedError(
            f"the model computes in {dtype}; expected bfloat16, float16 or float32. Set --dtype"
        )
    return names[dtype]


def load_table(vllm_config: VllmConfig, plan: Path) -> RouteTable:
    """Resolve a plan for an engine's layout, dtype and machine; reads its checkpoints' headers.

    Raises:
        MixPrecError: the plan or its checkpoints cannot be read, do not fit together, or are not
            what was checked when the engine started.
    """
    table = load_route_table(
        Plan.from_yaml(plan),
        layout=layout_of(vllm_config),
        platform=usable_platform(),
        dtype=dtype_of(vllm_config),
    )
    require_checked(vllm_config, table)
    return table


class MixPrecConfig(QuantizationConfig):
    """Gives each layer the method of the format that the plan routes it to."""

    def __init__(self, plan: Path | None = None) -> None:
        super().__init__()
        self.plan = plan
        self._mappers: list[WeightsMapper] = []
        self._table: RouteTable | None = None
        self._base_names: dict[str, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Workers resolve the plan themselves: reading headers is quicker than pickling a table.
        return self.__dict__ | {"_table": None, "_base_names": None}

    def __repr__(self) -> str:
        return f"MixPrecConfig(plan={str(self.plan)!r})"

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # each format's own need is in routing.kernels.KERNELS

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MixPrecConfig":
        return cls()  # maybe_update_config knows the model's directory, this does not

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a model whose base is itself quantised when the user asks for ``mixprec``."""
        return METHOD if user_quant == METHOD else None

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: "PretrainedConfig | None" = None,
        revision: str | None = None,
    ) -> None:
        assert hf_config is not None
        self.plan = plan_path(model_name, hf_config)

    def begin_model(self) -> None:
        """Forget the names of the model built before: a draft is served by the same object."""
        self._mappers = []
        self._base_names = None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        self._mappers.append(hf_to_vllm_mapper)
        self._base_names = None

    @property
    def table(self) -> RouteTable:
        """Where every tensor comes from; resolved once a process, from headers only.

        Raises:
            MixPrecError: as :func:`load_table`, or a shard was written to since the start.
        """
        if self._table is None:
            assert self.plan is not None, "vLLM calls maybe_update_config before a layer is built"
            vllm_config = get_current_vllm_config()
            if vllm_config.load_config.load_format != LOAD_FORMAT:
                raise PlanError(
                    f"{self.plan}: a mixed model with load format "
                    f"{vllm_config.load_config.load_format!r}; expected {LOAD_FORMAT!r}, which the "
                    "start-up hook of vllm-mixprec sets. Run `vllm-mixprec doctor`"
                )
            table = load_table(vllm_config, self.plan)
            require_checked_files(vllm_config, table)
            self._table = table
        return self._table

    @property
    def base_names(self) -> dict[str, str]:
        """vLLM's module name -> the base checkpoint's; equal for most models."""
        if self._base_names is None:
            self._base_names = {}
            config = self.table.base_config
            for module in self.table.routes:
                name: str | None = f"{class_name(module, config)}.weight"
                for mapper in self._mappers:
                    name = mapper.map_name(name) if name is not None else None
                if name is not None:
                    self._base_names[name.removesuffix(".weight")] = module
        return self._base_names

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            if not prefix:
                raise UnsupportedError(
                    f"this model builds a {type(layer).__name__} without a name, so no format can "
                    "be told for it. Serve it with one source's own quantization, and report the "
                    "architecture"
                )
            return linear_method(*self._served(prefix), layer, prefix)
        if isinstance(layer, RoutedExperts):
            base_layer = self.base_prefix(prefix)
            if base_layer not in self.table.expert_layers:
                return self._whole_experts(layer, base_layer)
            groups = self.table.expert_groups(base_layer)
            if len(groups) == 1:
                return experts_method(groups[0].scheme, self.table.platform, layer, prefix)
            return MixedExpertsMethod(groups, self.table.platform, layer)
        return None  # embeddings, the head and attention hold their weights unquantised

    def _whole_experts(self, layer: RoutedExperts, base_layer: str) -> QuantizeMethodBase:
        """The method of experts that the base stores in a way that cannot be told apart."""
        for module, route in self.table.routes.items():
            if f"{module}.".startswith(f"{base_layer}.") and route.served.is_quantized:
                raise UnsupportedError(
                    f"{module}: {route.served.label}, in one tensor for all experts; expected one "
                    "module an expert, or unquantised ones. Choose a source that stores experts "
                    "one by one"
                )
        return experts_method(self.table.base_scheme, self.table.platform, layer, base_layer)

    def _served(self, prefix: str) -> tuple[Scheme, str | None]:
        """The one scheme and kernel of a linear layer's parts; routing has made them equal."""
        parent, _, leaf = prefix.rpartition(".")
        # Phi3's own mapping names the fused layer, as its checkpoints do: the table has its parts.
        parts = {leaf, *self.packed_modules_mapping.get(leaf, ()), *_FUSED_PARTS.get(leaf, ())}
        names = [f"{parent}.{part}" if parent else part for part in sorted(parts)]
        found = [self.table.routes.get(self.base_names.get(name, "")) for name in names]
        routes = [route for route in found if route is not None]
        served_by = {(route.served, route.kernel) for route in routes}
        if len(served_by) > 1:
            served = ", ".join(f"{route.module} ({route.served.label})" for route in routes)
            raise RouteError(
                f"{prefix}: vLLM fuses {served} into one layer that routing does not know, so "
                "options.mixed_fused has no effect; expected one format. Route them to one source, "
                f"by a first rule such as {_one_rule([route.module for route in routes])}"
            )
        # No tensor at all: the loader reports every parameter that nothing filled, with its name.
        return served_by.pop() if served_by else (self.table.base_scheme, None)

    def base_prefix(self, prefix: str) -> str:
        """The base's name of a layer that is no module of its own, such as ``mlp.experts``."""
        if prefix in self.table.expert_layers:
            return prefix
        for name, module in self.base_names.items():
            if name.startswith(f"{prefix}."):
                expert = parse_expert(module)  # its projection may have another name there
                return expert.layer if expert else module[: len(prefix) - len(name)]
        return prefix


def _one_rule(modules: list[str]) -> str:
    """Spell a rule of a plan that matches these modules and no others, but for its source."""
    parent = os.path.commonprefix(modules).rpartition(".")[0]
    parts = ",".join(module[len(parent) :].removeprefix(".") for module in modules)
    return f'{{match: "{parent}.{{{parts}}}", source: ...}}'
