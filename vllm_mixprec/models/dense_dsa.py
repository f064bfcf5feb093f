# SPDX-License-Identifier: Apache-2.0
"""vLLM's dense MLA models with the indexers of sparse ones beside; :mod:`.dsa` says why."""

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_mixprec.models.dsa import INDEXER_KEY
from vllm_mixprec.patches import apply_patches


class StoredIndexer(nn.Module):
    """The weights of one indexer, as vLLM's own ``Indexer`` names and fuses them."""

    def __init__(
        self,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        sizes = getattr(config, INDEXER_KEY)
        head_dim, num_heads = sizes["head_dim"], sizes["num_heads"]
        self.wq_b = ReplicatedLinear(
            config.q_lora_rank,
            head_dim * num_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.wq_b",
        )
        self.wk_weights_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [head_dim, num_heads],
            bias=False,
            quant_config=None,
            disable_tp=True,
            prefix=f"{prefix}.wk_weights_proj",
        )
        self.k_norm = LayerNorm(head_dim, eps=1e-6, dtype=torch.float32)


class MixPrecDenseDsaForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V3.2 or GLM-5.x as dense MLA, with the indexers' weights beside the layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        apply_patches(vllm_config, vllm_config.model_config.architectures)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        base = f"{prefix}." if prefix else ""
        for index, layer in enumerate(self.model.layers):
            if not isinstance(layer, PPMissingLayer):
                _store_indexer(
                    layer.self_attn,
                    index,
                    self.config,
                    vllm_config.quant_config,
                    f"{base}model.layers.{index}.self_attn",
                )


class MixPrecDenseDsaMTP(DeepSeekMTP):
    """The next-token predictors of the same models, served likewise."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        apply_patches(vllm_config, vllm_config.model_config.architectures)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        base = f"{prefix}." if prefix else ""
        for index, layer in self.model.layers.items():
            _store_indexer(
                layer.mtp_block.self_attn,
                int(index),
                self.config,
                vllm_config.quant_config,
                f"{base}model.layers.{index}.self_attn",
            )


def _store_indexer(
    attention: nn.Module,
    index: int,
    config: PretrainedConfig,
    quant_config: QuantizationConfig | None,
    prefix: str,
) -> None:
    if index in getattr(config, INDEXER_KEY)["layers"]:
        attention.indexer = StoredIndexer(config, quant_config, f"{prefix}.indexer")
