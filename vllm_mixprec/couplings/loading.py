# SPDX-License-Identifier: Apache-2.0
"""Couplings of the loader and of the models with an override: loading/, models/."""

from vllm_mixprec.couplings.base import Coupling

_LINEAR = "vllm.model_executor.layers.linear"
_LOADER = "vllm.model_executor.model_loader"
_MODELS = "vllm.model_executor.models"

LOADING: tuple[Coupling, ...] = (
    # Loading: loading/, models/.
    Coupling(
        f"{_LOADER}.base_loader:BaseModelLoader",
        "builds the model and has it load weights",
        ("load_config",),
        ("create_model", "download_model", "load_model", "load_weights"),
    ),
    Coupling(
        f"{_LOADER}.base_loader:BaseModelLoader.create_model",
        "builds the model before any weight is read",
        ("vllm_config", "model_config", "prefix"),
    ),
    Coupling(
        f"{_LOADER}.weight_utils:default_weight_loader",
        "fills a parameter that has no loader of its own",
        ("param", "loaded_weight"),
    ),
    Coupling(
        f"{_LOADER}.mtp_validation:disable_mtp_completeness_check",
        "lets a draft take its layers' weights over several calls",
    ),
    Coupling(f"{_MODELS}.utils:PPMissingLayer", "stands for a layer of another pipeline stage"),
    Coupling(f"{_MODELS}.utils:StageMissingLayer", "stands for a part that is not loaded"),
    Coupling(
        "vllm.distributed:get_pp_group",
        "knows this rank's pipeline stage",
    ),
    Coupling("vllm.distributed:get_tensor_model_parallel_rank", "numbers this rank"),
    # Sparse attention served dense: models/dsa.py, models/dense_dsa.py.
    Coupling(
        f"{_MODELS}.deepseek_v2:DeepseekV2ForCausalLM",
        "serves MLA, dense where the config has no index_topk",
        ("vllm_config", "prefix"),
    ),
    Coupling(
        f"{_MODELS}.deepseek_mtp:DeepSeekMTP",
        "serves the next-token predictors of the same models",
        ("vllm_config", "prefix"),
    ),
    Coupling(
        "vllm.v1.attention.selector:AttentionSelectorConfig",
        "asks the platform for an attention backend",
        members=("head_size", "dtype", "kv_cache_dtype", "block_size", "use_mla", "use_sparse"),
    ),
    Coupling(
        "vllm.model_executor.layers.layernorm:LayerNorm",
        "holds the indexer's k_norm",
        ("hidden_size", "eps", "dtype"),
    ),
    Coupling(f"{_LINEAR}:ReplicatedLinear", "holds a whole weight on each rank", ("prefix",)),
)
