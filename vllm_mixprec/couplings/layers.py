# SPDX-License-Identifier: Apache-2.0
"""Couplings of the quantization config and the layers' methods: quant/."""

from vllm_mixprec.couplings.base import Coupling

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
_LINEAR = "vllm.model_executor.layers.linear"
_MODELS = "vllm.model_executor.models"
_PARAMETER = "vllm.model_executor.parameter"
_QUANT = "vllm.model_executor.layers.quantization"
_CT = f"{_QUANT}.compressed_tensors"

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

LAYERS: tuple[Coupling, ...] = (
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
        f"{_CT}.compressed_tensors:CompressedTensorsConfig",
        "serves FP8 weights with a scale a row on a GPU, from the fields of a checkpoint's "
        "config.json",
        members=("from_config", "get_quant_method"),
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
    # Linear layers: quant/methods.py, quant/cpu.py, loading/ledger.py, loading/pack_ahead.py.
    Coupling(f"{_LINEAR}:LinearBase", "is the class of every linear layer", ("prefix",)),
    Coupling(f"{_LINEAR}:UnquantizedLinearMethod", "serves bf16, fp16 and fp32 linears"),
    Coupling(
        f"{_LINEAR}:UnquantizedLinearMethod.process_weights_after_loading",
        "packs a linear for the CPU's kernel, and looks at nothing else",
        ("layer",),
        family="cpu",
    ),
    Coupling(
        f"{_EMBEDDING}:UnquantizedEmbeddingMethod", "serves embeddings and the head, unquantised"
    ),
    Coupling(
        f"{_EMBEDDING}:UnquantizedEmbeddingMethod.process_weights_after_loading",
        "packs embeddings and the head for the CPU's kernel, and looks at nothing else",
        ("layer",),
        family="cpu",
    ),
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
        f"{_PARAMETER}:ChannelQuantScaleParameter",
        "cuts a scale a row by its dim",
        ("data", "output_dim", "weight_loader"),
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
        members=("BLOCK", "CHANNEL", "GROUP"),
    ),
)
