# SPDX-License-Identifier: Apache-2.0
"""DeepSeek sparse attention (DeepSeek-V3.2, GLM-5.x) where no sparse-attention kernel exists.

The indexer of such a model selects ``index_topk`` tokens for each query. While a context is no
longer than that it selects all of them, and sparse attention is multi-head latent attention (MLA)
without a mask of its own: the dense models of vLLM compute the same, exactly. So the context is
capped at ``index_topk``, the layers are built as DeepSeek-V3's, and the indexers' weights lie
beside them, loaded and accounted for, but not used.
"""

from typing import Any

import torch
from transformers import PretrainedConfig
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.routing.structure import ModelDims

logger = init_logger("vllm.mixprec")

# Architecture -> the class of models/dense_dsa.py that serves it dense.
DENSE = {
    "DeepseekV32ForCausalLM": "MixPrecDenseDsaForCausalLM",
    "GlmMoeDsaForCausalLM": "MixPrecDenseDsaForCausalLM",
    "DeepseekV32MTPModel": "MixPrecDenseDsaMTP",
}
# Added to a config made dense: what config.json says, and the sizes of the indexers.
ARCHITECTURES_KEY = "mixprec_architectures"
INDEXER_KEY = "mixprec_indexer"


class DenseDsaConfig(PretrainedConfig):
    """A DSA model's config without the keys that make vLLM build sparse attention.

    A class of its own because transformers' config classes have those keys as class attributes,
    which no ``delattr`` removes. ``model_type`` is the model's.
    """

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"model_type": self.model_type}


def has_sparse_attention() -> bool:
    """Whether vLLM's platform can serve sparse attention at all.

    Only a CPU is asked: GPUs have it, and what one that is too old lacks vLLM says itself.
    """
    if not current_platform.is_cpu():
        return True
    question = AttentionSelectorConfig(
        head_size=576,
        dtype=torch.bfloat16,
        kv_cache_dtype="auto",
        block_size=None,
        use_mla=True,
        use_sparse=True,
    )
    try:
        current_platform.get_attn_backend_cls(None, question)
    except NotImplementedError:
        return False
    return True


def serve_dense(model_config: ModelConfig) -> None:
    """Turn a DSA model's config into one that vLLM serves with dense MLA.

    Raises:
        UnsupportedError: the user asked for more context than the indexer selects.
    """
    config = model_config.hf_config
    sparse = config.to_dict()
    dims = ModelDims.from_config(sparse)
    topk = sparse["index_topk"]
    asked = model_config.original_max_model_len
    if asked not in (None, -1) and asked > topk:
        raise UnsupportedError(
            f"--max-model-len {asked}: no sparse attention on {current_platform.device_name}, "
            f"and without it {model_config.architecture} is exact only while its indexer would "
            f"select every token (index_topk {topk}); expected at most {topk}. Lower "
            "--max-model-len, or serve on a GPU"
        )
    if model_config.runner_type != "draft":  # of which the same was said as the target
        logger.warning(
            "%s: no sparse attention on %s; served with dense MLA, which is exact while the "
            "indexer would select every token: max_model_len %d -> %d (index_topk %d)",
            model_config.architecture,
            current_platform.device_name,
            model_config.max_model_len,
            min(model_config.max_model_len, topk),
            topk,
        )
    model_config.max_model_len = min(model_config.max_model_len, topk)
    kept = {
        key: value
        for key, value in sparse.items()
        if not key.startswith("index") and key not in ("layer_types", "model_type")
    }
    dense = DenseDsaConfig(**kept)
    dense.model_type = config.model_type
    # Ours first, which vLLM builds; others look for the original's name behind it.
    dense.architectures = [DENSE[model_config.architecture], *config.architectures]
    setattr(dense, ARCHITECTURES_KEY, list(config.architectures))
    layers = range((dims.num_layers or 0) + dims.num_mtp_layers)
    setattr(
        dense,
        INDEXER_KEY,
        {
            "num_heads": sparse["index_n_heads"],
            "head_dim": sparse["index_head_dim"],
            "layers": [layer for layer in layers if dims.builds_indexer(layer)],
        },
    )
    model_config.hf_config = model_config.hf_text_config = dense
