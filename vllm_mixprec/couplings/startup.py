# SPDX-License-Identifier: Apache-2.0
"""Couplings of the registries and the start-up hook: plugin.py, start.py."""

from vllm_mixprec.couplings.base import Coupling

_LOADER = "vllm.model_executor.model_loader"
_MODELS = "vllm.model_executor.models"
_QUANT = "vllm.model_executor.layers.quantization"

STARTUP: tuple[Coupling, ...] = (
    Coupling(
        f"{_QUANT}:register_quantization_config",
        "adds the method that config.json names under quant_method",
        ("quantization",),
    ),
    Coupling(
        f"{_LOADER}:register_model_loader",
        "adds the load format that reads each tensor from its source",
        ("load_format",),
    ),
    Coupling(
        f"{_MODELS}:ModelRegistry",
        "lists the architectures that the start-up hook extends",
        members=("get_supported_archs",),
    ),
    Coupling(
        f"{_MODELS}.config:MODELS_CONFIG_MAP",
        "is asked for every architecture before an engine starts, and may be written",
    ),
    Coupling(
        f"{_MODELS}.config:VerifyAndUpdateConfig",
        "is the base of what MODELS_CONFIG_MAP holds",
        members=("verify_and_update_config", "verify_and_update_model_config"),
    ),
    Coupling(
        f"{_MODELS}.config:VerifyAndUpdateConfig.verify_and_update_config",
        "is called once with the whole config, in the front end",
        ("vllm_config",),
    ),
    Coupling(
        f"{_MODELS}.config:VerifyAndUpdateConfig.verify_and_update_model_config",
        "is called once with the model's config, before anything is derived from it",
        ("model_config",),
    ),
    Coupling(
        "vllm.config:VllmConfig",
        "carries the parallel layout, the load format and the compile cache's key",
        members=(
            "additional_config",
            "attention_config",
            "load_config",
            "model_config",
            "parallel_config",
            "quant_config",
        ),
    ),
    Coupling(
        "vllm.v1.attention.backends.registry:AttentionBackendEnum",
        "names the attention that a config may choose, of which one runs latent attention on a CPU "
        "in any dtype",
        members=("CPU_MLA",),
    ),
    Coupling(
        "vllm.config:ModelConfig",
        "names the model, its dtype and its quantization method",
        members=(
            "architecture",
            "architectures",
            "dtype",
            "hf_config",
            "hf_text_config",
            "is_moe",
            "max_model_len",
            "model",
            "quantization",
            "served_model_name",
        ),
    ),
    Coupling(
        "vllm.config:SpeculativeConfig",
        "names the draft's method, and the config and loading of its model",
        members=("draft_load_config", "draft_model_config", "method", "target_model_config"),
    ),
    Coupling(
        "vllm.config:LoadConfig",
        "names the load format, and carries to each worker what the start checked",
        members=("load_format", "model_loader_extra_config", "use_tqdm_on_load"),
    ),
    Coupling(
        "vllm.config:ParallelConfig",
        "says how many ranks cut the model, and how",
        members=(
            "data_parallel_rank",
            "data_parallel_size",
            "data_parallel_size_local",
            "distributed_executor_backend",
            "enable_eplb",
            "enable_expert_parallel",
            "nnodes",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "tensor_parallel_size",
        ),
    ),
    Coupling(
        "vllm.config:get_current_vllm_config",
        "gives the config while a model is built and loaded",
    ),
    Coupling("vllm.logger:init_logger", "gives a logger that vLLM's settings reach", ("name",)),
)
