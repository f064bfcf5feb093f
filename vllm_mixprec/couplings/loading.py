# SPDX-License-Identifier: Apache-2.0
"""Couplings of routing, loading and the layers' methods."""

from vllm_mixprec.couplings.base import Coupling

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_LINEAR = "vllm.model_executor.layers.linear"
_LOADER = "vllm.model_executor.model_loader"
_MODELS = "vllm.model_executor.models"
_PARAMETER = "vllm.model_executor.parameter"
_QUANT = "vllm.model_executor.layers.quantization"

_EXPERT_CALL = ("layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input")
_CREATE_EXPERTS = (
    "layer",
    "num_experts",
    "hidden_size",
    "intermediate_size_per_partition",
    "params_dtype",
    "extra_weight_attrs",
)
_CREATE_LINEAR = (
    "layer",
    "input_size_per_partition",
    "output_partition_sizes",
    "input_size",
    "output_size",
    "params_dtype",
    "extra_weight_attrs",
)

LOADING: tuple[Coupling, ...] = (
    # Registries and the start-up hook: plugin.py, start.py.
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
            "load_config",
            "model_config",
            "parallel_config",
            "quant_config",
        ),
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
        "names the load format",
        members=("load_format", "use_tqdm_on_load"),
    ),
    Coupling(
        "vllm.config:ParallelConfig",
        "says how many ranks cut the model, and how",
        members=(
            "data_parallel_size",
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
    # Quantization config: quant/config.py, quant/methods.py.
    Coupling(
        f"{_QUANT}.base_config:QuantizationConfig",
        "asks one object for the method of each layer, and tells it model and name mapping",
        members=(
            "apply_vllm_mapper",
            "from_config",
            "get_config_filenames",
            "get_min_capability",
            "get_name",
            "get_quant_method",
            "get_supported_act_dtypes",
            "maybe_update_config",
            "override_quantization_method",
            "packed_modules_mapping",
        ),
    ),
    Coupling(
        f"{_QUANT}.base_config:QuantizationConfig.maybe_update_config",
        "is told the model's directory and its Hugging Face config",
        ("model_name", "hf_config", "revision"),
    ),
    Coupling(
        f"{_QUANT}.base_config:QuantizationConfig.override_quantization_method",
        "may claim a base that is itself quantised",
        ("hf_quant_cfg", "user_quant", "hf_config"),
    ),
    Coupling(
        f"{_QUANT}.base_config:QuantizationConfig.get_quant_method",
        "is called once a layer with its full name",
        ("layer", "prefix"),
    ),
    Coupling(
        f"{_QUANT}.base_config:QuantizeMethodBase",
        "is what serves a layer",
        members=("apply", "create_weights", "process_weights_after_loading"),
    ),
    Coupling(
        f"{_QUANT}.fp8:Fp8Config",
        "serves FP8 block weights on a GPU",
        ("is_checkpoint_fp8_serialized", "activation_scheme", "weight_block_size"),
        ("get_quant_method",),
        family="cuda",
    ),
    Coupling(
        f"{_QUANT}.auto_gptq:AutoGPTQConfig",
        "serves GPTQ weights on a GPU, from the fields of a checkpoint's config.json",
        members=("from_config", "get_quant_method"),
        family="cuda",
    ),
    Coupling(
        f"{_QUANT}.auto_awq:AutoAWQConfig",
        "serves AWQ weights on a GPU, from the fields of a checkpoint's config.json",
        members=("from_config", "get_quant_method"),
        family="cuda",
    ),
    Coupling(
        f"{_MODELS}.utils:WeightsMapper",
        "turns the checkpoint's names into vLLM's",
        members=("map_name",),
    ),
    # Linear layers: quant/methods.py, quant/cpu.py, loading/ledger.py.
    Coupling(f"{_LINEAR}:LinearBase", "is the class of every linear layer", ("prefix",)),
    Coupling(f"{_LINEAR}:UnquantizedLinearMethod", "serves bf16, fp16 and fp32 linears"),
    Coupling(
        f"{_LINEAR}:LinearMethodBase.create_weights",
        "is told the sizes that one rank holds",
        _CREATE_LINEAR,
    ),
    Coupling(f"{_LINEAR}:LinearMethodBase", "is the base of the CPU's linear methods"),
    Coupling(
        f"{_LINEAR}:register_weight_loader_v2_supported_method",
        "lets a method's parameters cut their own tensor-parallel shards",
    ),
    Coupling(
        f"{_LINEAR}:MergedColumnParallelLinear",
        "fills one parameter from several tensors",
        members=("output_sizes",),
    ),
    Coupling(f"{_LINEAR}:QKVParallelLinear", "fills one parameter from q, k and v"),
    Coupling(
        f"{_PARAMETER}:ModelWeightParameter",
        "cuts a weight by its dims",
        ("data", "input_dim", "output_dim", "weight_loader"),
    ),
    Coupling(
        f"{_PARAMETER}:BlockQuantScaleParameter",
        "cuts block scales by their dims",
        ("data", "input_dim", "output_dim", "weight_loader"),
    ),
    Coupling(
        f"{_PARAMETER}:GroupQuantScaleParameter",
        "cuts group scales by their dims",
        ("data", "input_dim", "output_dim", "weight_loader"),
    ),
    Coupling(
        f"{_PARAMETER}:PackedvLLMParameter",
        "cuts packed words by their dims",
        ("data", "input_dim", "output_dim", "packed_dim", "packed_factor", "weight_loader"),
    ),
    Coupling("vllm.model_executor.utils:set_weight_attrs", "marks a parameter for its loader"),
    # Routed experts: quant/experts.py, quant/cpu.py, loading/.
    Coupling(
        f"{_FUSED_MOE}:RoutedExperts",
        "holds the experts of one layer, and can be a child of another for one precision group",
        (
            "layer_name",
            "params_dtype",
            "moe_config",
            "quant_config",
            "expert_map_manager",
            "ckpt_gate_proj_name",
            "ckpt_down_proj_name",
            "ckpt_up_proj_name",
            "renormalize",
            "scoring_func",
            "routed_scaling_factor",
            "swiglu_limit",
            "swiglu_alpha",
            "swiglu_beta",
            "apply_router_weight_on_input",
        ),
        (
            "_ensure_moe_quant_config_init",
            "activation",
            "expert_map",
            "expert_map_manager",
            "forward_modular",
            "global_num_experts",
            "layer_name",
            "load_weights",
            "moe_config",
            "quant_method",
            "weight_loader",
        ),
    ),
    Coupling(
        f"{_FUSED_MOE}:RoutedExperts.weight_loader",
        "loads one tensor of one expert and says whether it did",
        ("param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success"),
    ),
    Coupling(
        f"{_FUSED_MOE}:RoutedExperts.forward_modular",
        "runs one group on tokens that are already routed",
        ("x", "topk_weights", "topk_ids"),
    ),
    Coupling(
        f"{_FUSED_MOE}.runner.moe_runner:MoERunner",
        "is the module of a layer's experts, and knows which of them a rank holds",
        members=("expert_map_manager", "layer_name", "routed_experts"),
    ),
    Coupling(
        f"{_FUSED_MOE}.expert_map_manager:ExpertMapManager",
        "says where an expert lies; a group stands in for it with these members",
        members=(
            "expert_map",
            "expert_mask",
            "global_num_experts",
            "is_local_expert",
            "local_num_experts",
            "map_global_to_local",
            "num_fused_shared_experts",
            "placement_strategy",
            "routing_tables",
        ),
    ),
    Coupling(f"{_FUSED_MOE}:UnquantizedFusedMoEMethod", "serves unquantised experts", ("moe",)),
    Coupling(
        f"{_FUSED_MOE}.fused_moe_method_base:FusedMoEMethodBase",
        "is the base of methods of routed experts",
        ("moe",),
        ("get_fused_moe_quant_config", "is_monolithic", "topk_indices_dtype"),
    ),
    Coupling(
        f"{_FUSED_MOE}.moe_align_block_size:moe_align_block_size",
        "sorts tokens by expert for the one-launch kernel",
        ("topk_ids", "block_size", "num_experts"),
    ),
    Coupling(
        f"{_FUSED_MOE}.fused_moe_method_base:FusedMoEMethodBase.create_weights",
        "is told the sizes that one rank holds",
        _CREATE_EXPERTS,
    ),
    Coupling(
        f"{_FUSED_MOE}.fused_moe_method_base:FusedMoEMethodBase.apply",
        "is called with tokens that are already routed",
        _EXPERT_CALL,
    ),
    Coupling(
        f"{_FUSED_MOE}.config:FusedMoEConfig",
        "tells the sizes and dtype of a layer's experts, and may choose their kernel",
        members=(
            "experts_per_token",
            "has_bias",
            "hidden_dim",
            "in_dtype",
            "intermediate_size",
            "intermediate_size_per_partition",
            "is_act_and_mul",
            "moe_backend",
            "moe_parallel_config",
            "num_local_experts",
            "num_logical_experts",
            "sp_size",
        ),
    ),
    Coupling(
        f"{_FUSED_MOE}.config:FusedMoEQuantConfig",
        "describes a method that handles its own scales",
        members=("make",),
    ),
    Coupling(
        f"{_FUSED_MOE}:FusedMoeWeightScaleSupported",
        "tells the expert loader how scales are cut",
        members=("BLOCK", "GROUP"),
    ),
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
    # Compiled CPU kernels: quant/cpu_ops.py, quant/cpu.py.
    Coupling(
        "vllm.utils.torch_utils:direct_register_custom_op",
        "registers the operator that runs the groups of a layer",
        ("op_name", "op_func", "fake_impl", "target_lib", "dispatch_key"),
    ),
    Coupling(
        "vllm.utils.torch_utils:set_default_torch_dtype",
        "sets torch's default dtype for a while",
        ("dtype",),
    ),
    Coupling(
        "vllm.platforms:current_platform",
        "says whether vLLM computes on a CPU or CUDA, the compute capability, the memory",
        members=(
            "device_name",
            "device_type",
            "get_attn_backend_cls",
            "get_device_capability",
            "get_device_total_memory",
            "is_cpu",
            "is_cuda",
        ),
    ),
    Coupling(
        "vllm.utils.import_utils:import_pynvml",
        "asks an NVIDIA driver for its version",
    ),
    Coupling(
        "vllm._custom_ops:CPUQuantAlgo",
        "numbers the int4 layouts; its module loads vLLM's compiled operators into torch.ops",
    ),
    Coupling(
        "vllm._custom_ops:convert_weight_packed_scale_zp",
        "reorders int4 weights, zero points and scales",
        ("qweight", "qzeros", "scales", "quant_method_4bit"),
        family="cpu",
    ),
    Coupling(
        "vllm._custom_ops:int4_scaled_mm_cpu",
        "multiplies by int4 weights",
        ("x", "w", "w_zeros", "w_scales", "bias"),
        family="cpu",
    ),
    Coupling(
        "torch:ops._C.convert_weight_packed",
        "reorders bf16 and FP8 weights",
        ("weight",),
        family="cpu",
    ),
    Coupling(
        "torch:ops._C.fp8_scaled_mm_cpu",
        "multiplies by FP8 block weights",
        ("mat1", "mat2", "scales2", "block_size", "bias", "out_dtype", "is_vnni"),
        family="cpu",
    ),
    Coupling(
        "torch:ops._C.fused_experts_cpu",
        "runs bf16, FP8 block and int4 experts",
        (
            "out",
            "hidden_states",
            "w1",
            "w2",
            "topk_weights",
            "topk_ids",
            "moe_comp_method",
            "w1_scale",
            "w2_scale",
            "w1_zero",
            "w2_zero",
            "a1_scale",
            "block_size",
            "w1_bias",
            "w2_bias",
            "alpha",
            "limit",
            "is_vnni",
        ),
        family="cpu",
    ),
)
