# SPDX-License-Identifier: Apache-2.0
"""vLLM's MoE layers in this process, with the package's methods, on weights made on the device.

Imports vLLM: only for what runs where there is one. Also runs on a CPU, whose kernels then serve.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.v1.worker import workspace

from tests.gpu.weights import GROUP, ROWS, Experts
from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.quant.experts import MixedExpertsMethod, _mapped_backend, load_expert
from vllm_mixprec.quant.methods import experts_method
from vllm_mixprec.quant.one_launch import VARIABLE
from vllm_mixprec.routing.platform import Platform
from vllm_mixprec.routing.table import ExpertGroup

MODEL = Path(__file__).parent.parent / "fixtures" / "random-moe" / "bf16"

SCHEMES = {
    "bf16": Scheme("bf16", 16),
    "fp8": Scheme("fp8_block", 8, block=(128, 128)),
    ROWS: Scheme("fp8_channel", 8),
    "int4": Scheme("gptq", 4, group_size=GROUP),
}


class FixedFormats(QuantizationConfig):
    """Gives a layer the method of the package for the formats of some experts."""

    def __init__(self, experts: Experts, platform: Platform) -> None:
        super().__init__()
        self.groups = tuple(
            ExpertGroup(SCHEMES[format], ids) for format, ids in experts.groups().items()
        )
        self.platform = platform

    def get_name(self) -> str:
        return "mixprec"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FixedFormats":
        raise NotImplementedError("made for one layer, never from a config.json")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase:
        assert isinstance(layer, RoutedExperts)
        if len(self.groups) > 1:
            return MixedExpertsMethod(self.groups, self.platform, layer)
        scheme = self.groups[0].scheme
        if self.platform.family == "cuda":  # the kernel of the same experts in a mixed layer
            layer.moe_config.moe_backend = _mapped_backend(scheme, self.platform)
        return experts_method(scheme, self.platform, layer, prefix)


@contextmanager
def one_rank(folder: Path, device: torch.device) -> Iterator[VllmConfig]:
    """Make this process the one rank of an engine, as far as a MoE layer asks for it."""
    config = EngineArgs(
        str(MODEL), skip_tokenizer_init=True, max_model_len=512, enforce_eager=True
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, backend="gloo")
        try:
            initialize_model_parallel(1, 1, backend="gloo")
            if device.type == "cuda":
                workspace.init_workspace_manager(device)
            yield config
        finally:
            workspace.reset_workspace_manager()
            destroy_model_parallel()
            destroy_distributed_environment()


def build(
    experts: Experts,
    platform: Platform,
    device: torch.device,
    name: str,
    kernel: str = "groups",
) -> RoutedExperts:
    """Build a layer, load the experts as the package's loader does, and have vLLM finish it.

    Args:
        name: of the layer, unlike that of any other in this :func:`one_rank`.
        kernel: of a layer of several formats: "groups" or "one-launch".
    """
    sizes: dict[str, Any] = {
        "hidden_size": experts.shape.hidden,
        "intermediate_size": experts.shape.inner,
    }
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = kernel
    try:
        with device:
            runner = FusedMoEFactory(
                num_experts=experts.shape.experts,
                top_k=experts.shape.top_k,
                params_dtype=torch.bfloat16,
                quant_config=FixedFormats(experts, platform),
                prefix=name,
                **sizes,
            )
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
    layer = runner.routed_experts
    for number, projections in enumerate(experts.stored):
        for projection, tensors in projections.items():
            for suffix, tensor in tensors.items():
                load_expert(layer, number, projection, suffix, tensor)
    for module in runner.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
    for module in runner.modules():
        if isinstance(module, RoutedExperts):
            module._ensure_moe_quant_config_init()
    return layer


@torch.inference_mode()
def run(layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """Run the routed experts on chosen ids, past the router."""
    return layer.forward_modular(x, topk_weights, topk_ids)
