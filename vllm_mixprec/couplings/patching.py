# SPDX-License-Identifier: Apache-2.0
"""Couplings of the patches: what each replaces, or reads to tell whether it is needed."""

from vllm_mixprec.couplings.base import Coupling

_MODELS = "vllm.model_executor.models"
_RUNNER = "vllm.v1.worker"

PATCHING: tuple[Coupling, ...] = (
    Coupling(
        f"{_RUNNER}.worker_base:WorkerWrapperBase",
        "builds the worker, then calls init_device, which is wrapped (worker_hook)",
        members=("init_device",),
    ),
    Coupling(
        "vllm.v1.engine.async_llm:load_stat_logger_plugin_factories",
        "finds the stat loggers, and is wrapped (stat_logger_client)",
    ),
    Coupling(
        "vllm.entrypoints.serve.instrumentator.metrics:attach_router",
        "adds the /metrics route, and is wrapped (metrics_route)",
        ("app",),
    ),
    Coupling(
        "vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_processing",
        "ends a reload, and is wrapped (reload_end)",
        ("model", "model_config"),
    ),
    Coupling(
        "vllm.model_executor.model_loader.reload.layerwise:_copy_and_restore_kernel_tensors",
        "puts what a reload brought into the kernel's tensors, and is wrapped "
        "(amx_latent_attention)",
        ("layer", "info"),
        family="cpu",
    ),
    Coupling(
        "vllm.model_executor.model_loader.reload.layerwise:_place_kernel_tensors",
        "puts a layer back as it was that a reload brought nothing for, and is wrapped (tied_head)",
        ("layer", "info"),
        family="cpu",
    ),
    Coupling(
        "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
        "is the class of the output head (tied_head)",
        family="cpu",
    ),
    Coupling(
        "vllm.model_executor.model_loader.reload.types:LayerReloadingInfo",
        "holds the kernel's tensors of a layer that is reloaded (amx_latent_attention), and how "
        "much came for it (tied_head)",
        members=("kernel_tensors", "load_numel"),
        family="cpu",
    ),
    Coupling(
        "vllm.model_executor.layers.attention.mla_attention:MLAAttention",
        "packs kv_b_proj, marked _cpu_skip_gemm_dispatch, with AMX in a method that is wrapped "
        "(amx_latent_attention); asks apply() for weights that are no FP8 with a weight_block_size",
        members=("is_amx_bmm_enabled", "kv_b_proj", "process_weights_after_loading"),
        family="cpu",
    ),
    Coupling(
        "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding",
        "rotates on a CPU through forward_cpu, which is replaced (cpu_rotary)",
        members=("forward_cpu", "forward_native"),
        family="cpu",
    ),
    Coupling(
        f"{_RUNNER}.cpu_model_runner:CPUModelRunner",
        "hands tensors between pipeline stages through a method that is wrapped (cpu_stages)",
        members=("sync_and_gather_intermediate_tensors", "warming_up_model"),
        family="cpu",
    ),
    Coupling(
        "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator",
        "exchanges tensors between ranks on a CPU; two methods are given to it (cpu_data_parallel)",
        members=("all_gather", "all_gatherv", "all_reduce", "reduce_scatterv", "rank_in_group"),
        family="cpu",
    ),
    Coupling(
        "vllm.distributed.device_communicators.base_device_communicator:DeviceCommunicatorBase",
        "has the methods that a communicator lacks (cpu_data_parallel)",
        members=("all_gatherv", "reduce_scatterv"),
        family="cpu",
    ),
    Coupling(
        f"{_RUNNER}.gpu_model_runner:GPUModelRunner",
        "asks its drafter for metadata on every stage (draft_stages)",
        members=("initialize_metadata_builders",),
    ),
    Coupling(
        "vllm.v1.spec_decode.eagle:EagleProposer",
        "is the drafter; an empty one stands in on stages without (draft_stages)",
    ),
    Coupling(f"{_MODELS}.deepseek_v2:DeepseekAttention", "is replaced (deepseek_mha_names)"),
    Coupling(
        f"{_MODELS}.deepseek_v2:DeepseekV2MLAAttention",
        "builds an indexer or not (indexer_types)",
    ),
    Coupling(
        f"{_MODELS}.deepseek_v2:_try_load_fp8_indexer_wk",
        "is run on known tensors (indexer_wk)",
    ),
    Coupling(
        f"{_MODELS}.deepseek_mtp:DeepSeekMTP.load_weights",
        "is read for what it forgets between calls (indexer_wk)",
        ("weights",),
    ),
    *(
        Coupling(f"{_MODELS}.{name}", "is read for embeddings on every stage (vocabulary)")
        for name in (
            "mixtral:MixtralForCausalLM",
            "olmoe:OlmoeForCausalLM",
            "qwen2_moe:Qwen2MoeForCausalLM",
            "qwen3_moe:Qwen3MoeForCausalLM",
        )
    ),
    Coupling(
        "vllm.model_executor.layers.linear:RowParallelLinear",
        "is told apart from QKVParallelLinear to name it (deepseek_mha_names)",
    ),
)
