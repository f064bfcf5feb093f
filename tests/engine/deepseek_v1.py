# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-MoE-16B (``DeepseekForCausalLM``) put together from parts of transformers.

transformers has no class for it. Attention, norms and residuals are Llama's; its experts, shared
experts and softmax router (greedy top-k, weights not normalised again, scale 1) are those of
DeepSeek-V2, whose first configuration value for them is this model. Importing this module makes
``AutoConfig`` and ``AutoModelForCausalLM`` know ``model_type`` "deepseek".
"""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2MLP,
    DeepseekV2TopkRouter,
)

from tests.engine.configuration_deepseek import DeepseekConfig


class DeepseekMoE(nn.Module):
    """A module an expert, as the public checkpoint names them."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate = DeepseekV2TopkRouter(
            SimpleNamespace(
                num_experts_per_tok=config.num_experts_per_tok,
                num_experts=config.n_routed_experts,
                hidden_size=config.hidden_size,
                routed_scaling_factor=1.0,
                topk_method="greedy",
                n_group=None,
                topk_group=None,
            )
        )
        self.experts = nn.ModuleList(
            DeepseekV2MLP(config, intermediate_size=width) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = DeepseekV2MLP(
            config, intermediate_size=width * config.n_shared_experts
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.flatten(0, -2)
        _, weights, chosen = self.gate(flat)
        result = self.shared_experts(flat)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True).to(flat.dtype)
            result = result + share * expert(flat)
        return result.view_as(hidden_states)


class DeepseekForCausalLM(LlamaForCausalLM):
    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers[config.first_k_dense_replace :]:
            layer.mlp = DeepseekMoE(config)
        self.post_init()


AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
