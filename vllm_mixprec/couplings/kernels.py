# SPDX-License-Identifier: Apache-2.0
"""Couplings of the compiled CPU kernels, and of what tells a platform: quant/, device.py."""

from vllm_mixprec.couplings.base import Coupling

KERNELS: tuple[Coupling, ...] = (
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
        "vllm._custom_ops:cpu_gemm_wna16",
        "multiplies by int4 weights in 16 bits, out of words of eight rows in blocks of 16; of "
        "scales in the activations' dtype, with zero points packed as GPTQ packs them or None for "
        "8",
        ("input", "q_weight", "scales", "zeros", "bias", "pack_factor", "isa_hint"),
        family="cpu",
    ),
    # vLLM's libraries for CPUs without AVX512_BF16 (_C_AVX512, _C_AVX2) lack these.
    Coupling(
        "torch:ops._C.convert_weight_packed",
        "reorders bf16 and FP8 weights",
        ("weight",),
        family="cpu-avx512",
    ),
    Coupling(
        "torch:ops._C.fp8_scaled_mm_cpu",
        "multiplies by FP8 block weights",
        ("mat1", "mat2", "scales2", "block_size", "bias", "out_dtype", "is_vnni"),
        family="cpu-avx512",
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
        family="cpu-avx512",
    ),
)

# Without these bf16 experts run in fused_experts_cpu.
AMX: tuple[Coupling, ...] = (
    Coupling(
        "vllm._custom_ops:cpu_prepack_moe_weight",
        "reorders bf16 weights for AMX; compared with what is done in its place",
        ("weight", "isa"),
        family="cpu-avx512",
    ),
    Coupling(
        "torch:ops._C.cpu_fused_moe",
        "runs bf16 experts with AMX",
        (
            "output",
            "input",
            "w13",
            "w2",
            "w13_bias",
            "w2_bias",
            "topk_weights",
            "topk_id",
            "skip_weighted",
            "act",
            "isa",
        ),
        family="cpu-avx512",
    ),
)
