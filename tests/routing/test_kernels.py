# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

from vllm_mixprec.checkpoint.formats import FORMATS, Scheme
from vllm_mixprec.routing import Platform, missing_kernel
from vllm_mixprec.routing import platform as platforms
from vllm_mixprec.routing.kernels import kernels_for
from vllm_mixprec.routing.platform import INT4_W16

CPU, OTHER, CUDA = Platform("cpu-avx512"), Platform("cpu-other"), Platform("cuda-90")
BF16 = Scheme("bf16", 16)
FP8 = Scheme("fp8_block", 8, block=(128, 128))
CHANNEL = Scheme("fp8_channel", 8)
INT4 = Scheme("gptq", 4, group_size=128)
AWQ = Scheme("awq", 4, group_size=128, symmetric=False, zero_offset=0)
DENSE_K = 10944
"""Of down_proj in the dense first layer of DeepSeek-V2-Lite: 64 times 171."""
UNSERVED = [
    Scheme("ct_pack", 8, group_size=128, symmetric=False, zero_offset=0),
    Scheme("ct_pack", 4, group_size=128, zero_offset=0, desc_act=True),
    Scheme("ct_fp8", 8, block=(1, 32), scale_format="e8m0"),
    Scheme("nvfp4", 4, block=(1, 16)),
    Scheme("mxfp4", 4, block=(1, 32), scale_format="e8m0"),
]
"""In no layout."""


@pytest.mark.parametrize("platform", ["cpu-avx512", "cpu-other", "cuda-75", "cuda-90", "other"])
def test_unquantised_weights_run_everywhere(platform: str) -> None:
    assert missing_kernel(Platform(platform), BF16, "linear", (7, 9)) is None


@pytest.mark.parametrize("platform", [CPU, CUDA])
@pytest.mark.parametrize("kind", ["linear", "experts"])
@pytest.mark.parametrize("scheme", [FP8, CHANNEL, INT4, AWQ], ids=lambda scheme: scheme.label)
def test_common_schemes_have_kernels(platform: Platform, kind, scheme: Scheme) -> None:
    assert missing_kernel(platform, scheme, kind, (512, 1024)) is None


@pytest.mark.parametrize(
    ("platform", "scheme", "shape", "reason"),
    [
        (CPU, Scheme("fp8_block", 8, block=(128, 64)), (256, 256), "not 128x64"),
        (CPU, Scheme("fp8_block", 8, block=(16, 128)), (256, 256), "not 16x128"),
        (CPU, replace(FP8, scale_format="e8m0"), (256, 256), "floating-point scales, not e8m0"),
        (CUDA, replace(FP8, scale_format="e8m0"), (256, 256), "floating-point scales, not e8m0"),
        (CPU, replace(CHANNEL, scale_format="e8m0"), (256, 256), "not e8m0"),
        (CPU, CHANNEL, (264, 256), "N=264"),
        (CPU, CHANNEL, (256, 208), "K=208 on a rank is not a multiple of 32"),
        (CUDA, replace(CHANNEL, scale_format="e8m0"), (256, 256), "not e8m0"),
        (CUDA, CHANNEL, (96, 256), "N=96"),
        (Platform("cuda-75"), CHANNEL, (256, 256), "compute capability"),
        (CPU, FP8, (264, 256), "N=264"),
        (CPU, FP8, (256, 192), "K=192"),
        (CPU, Scheme("gptq", 8, group_size=128), (256, 256), "4 bits, not 8"),
        (CPU, Scheme("gptq", 4, group_size=128, desc_act=True), (256, 256), "act-order"),
        (CPU, Scheme("gptq", 4, group_size=15), (256, 480), "_cpu: the group size 15 is not a mul"),
        (CPU, Scheme("gptq", 4, group_size=15), (256, 480), "_wna16: the group size 15 is odd"),
        (CPU, Scheme("gptq", 4, group_size=16), (256, 272), "K=272 on a rank is not a multiple of"),
        (CPU, INT4, (256, 192), "K=192"),
        (CPU, INT4, (40, 256), "N=40"),
        (CUDA, Scheme("fp8_block", 8, block=(64, 128)), (256, 256), "not 64x128"),
        (CUDA, Scheme("gptq", 4, group_size=64, symmetric=False), (256, 256), "symmetric"),
        (CUDA, Scheme("gptq", 2, group_size=64), (256, 256), "not 2"),
        (CUDA, Scheme("gptq", 4, group_size=512), (256, 1024), "not 512"),
        (CUDA, INT4, (96, 256), "N=96"),
        (CUDA, replace(AWQ, group_size=256), (256, 256), "groups of 32, 64 or 128, not 256"),
        (CUDA, AWQ, (256, 192), "K=192"),
        (Platform("cuda-75"), AWQ, (256, 256), "compute capability"),
        (CUDA, FP8, (2048, DENSE_K), f"K={DENSE_K} on a rank is not a multiple of 128"),
        (CUDA, INT4, (2048, DENSE_K), f"K={DENSE_K} on a rank is not a multiple of the group size"),
        (CUDA, replace(INT4, bits=8), (2048, DENSE_K), "the group size 128"),
        (CUDA, FP8, (256, 192), "K=192"),
        (CUDA, replace(INT4, group_size=64), (256, 96), "the group size 64"),
        (Platform("cuda-75"), INT4, (256, 256), "compute capability"),
        (OTHER, FP8, (256, 256), "no fp8_block kernel on cpu-other"),
        (OTHER, INT4, (256, 192), "K=192 on a rank is not a multiple of the group size 128"),
        (OTHER, INT4, (40, 256), "N=40"),
        (
            OTHER,
            replace(INT4, group_size=48),
            (256, 336),
            "K=336 on a rank is not a multiple of 32",
        ),
        (OTHER, replace(INT4, bits=8), (256, 256), "4 bits, not 8"),
        (OTHER, replace(INT4, desc_act=True), (256, 256), "act-order"),
        (Platform("other"), FP8, (256, 256), "no fp8_block kernel on other"),
    ],
)
def test_unsupported_weight_is_explained(
    platform: Platform, scheme: Scheme, shape: tuple[int, int], reason: str
) -> None:
    found = missing_kernel(platform, scheme, "linear", shape)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("scheme", UNSERVED, ids=lambda scheme: scheme.label)
def test_formats_without_a_kernel_are_named(scheme: Scheme) -> None:
    found = missing_kernel(CPU, scheme, "experts", (512, 1024))
    assert found == f"no {scheme.format} kernel on cpu-avx512"


def test_one_group_over_all_of_k_is_a_marlin_group_size() -> None:
    assert missing_kernel(CUDA, Scheme("gptq", 4, group_size=1024), "linear", (256, 1024)) is None


@pytest.mark.parametrize("group_size", [32, 64, DENSE_K])
def test_whole_groups_need_no_multiple_of_128(group_size: int) -> None:
    scheme = replace(INT4, group_size=group_size)
    assert missing_kernel(CUDA, scheme, "linear", (2048, DENSE_K)) is None


def test_a_scale_a_row_needs_no_whole_blocks_of_columns() -> None:
    assert missing_kernel(CPU, CHANNEL, "linear", (256, DENSE_K)) is None
    assert missing_kernel(CPU, CHANNEL, "experts", (256, 96)) is None


def test_rows_need_no_multiple_of_128() -> None:
    """gate_proj and up_proj of that layer, one of whose sizes is K of the down_proj refused."""
    for scheme in (FP8, INT4):
        assert missing_kernel(CUDA, scheme, "linear", (DENSE_K, 2048)) is None


def kernel_of(platform: Platform, scheme: Scheme, shape: tuple[int, int], dtype: str = "bf16"):
    """Name the first kernel that takes a linear as it is, None for none."""
    return next(
        (
            kernel.name
            for kernel in kernels_for(platform, scheme.format, "linear")
            if missing_kernel(platform, scheme, "linear", shape, dtype, among=(kernel,)) is None
        ),
        None,
    )


@pytest.mark.parametrize("scheme", [INT4, AWQ], ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("group_size", [16, 48, 96, 192, 384])
def test_linears_of_any_even_group_have_a_kernel_on_cpus(scheme: Scheme, group_size: int) -> None:
    scheme = replace(scheme, group_size=group_size)
    by_int8 = group_size in (96, 384)
    shape = (256, 384)
    assert kernel_of(CPU, scheme, shape) == ("int4_scaled_mm_cpu" if by_int8 else INT4_W16)
    assert kernel_of(OTHER, scheme, shape) == INT4_W16


def test_kernel_in_16_bits_takes_zero_points_of_any_kind() -> None:
    for zero_offset in (0, 1):
        scheme = replace(INT4, symmetric=False, zero_offset=zero_offset)
        assert kernel_of(OTHER, scheme, (512, 1024)) == INT4_W16


@pytest.mark.parametrize("scheme", [INT4, AWQ], ids=lambda scheme: scheme.label)
def test_experts_have_no_kernel_on_a_cpu_without_avx512_bf16(scheme: Scheme) -> None:
    found = missing_kernel(OTHER, scheme, "experts", (512, 1024))
    assert found == f"no {scheme.format} kernel on cpu-other for experts"


def test_cpu_kernels_compute_in_16_bits_and_in_fp16_only_one_of_them() -> None:
    assert missing_kernel(CUDA, INT4, "linear", (512, 1024), "fp16") is None
    assert kernel_of(CPU, INT4, (512, 1024), "fp16") == INT4_W16
    found = missing_kernel(CPU, CHANNEL, "linear", (512, 1024), "fp16")
    assert found is not None and found.endswith("it computes in bf16, not in fp16")
    found = missing_kernel(CPU, INT4, "linear", (512, 1024), "fp32")
    assert found is not None and "in bf16 or fp16, not in fp32" in found


def test_platform_without_a_broken_kernel_says_why() -> None:
    broken = {("gptq", "int4_scaled_mm_cpu"): "wrong on the known case"}
    platform = CPU.without(broken)
    found = missing_kernel(platform, INT4, "experts", (512, 1024))
    assert found is not None
    assert found.endswith("int4_scaled_mm_cpu: it is not used: wrong on the known case")
    assert kernel_of(platform, INT4, (512, 1024)) == INT4_W16
    assert kernel_of(platform, AWQ, (512, 1024)) == "int4_scaled_mm_cpu"
    assert kernel_of(platform.without(broken | {("gptq", INT4_W16): ""}), INT4, (512, 1024)) is None
    assert missing_kernel(platform, FP8, "linear", (512, 1024)) is None


@pytest.mark.parametrize(
    ("flags", "name", "kernel"),
    [
        ("avx2", "cpu-other", None),
        ("avx2 avx512f avx512bw avx512dq avx512vl", "cpu-other", INT4_W16),
        ("avx512f avx512_bf16 avx512_vnni", "cpu-avx512", "int4_scaled_mm_cpu"),
    ],
)
def test_int4_kernel_of_a_cpu_by_its_flags(
    monkeypatch: pytest.MonkeyPatch, flags: str, name: str, kernel: str | None
) -> None:
    monkeypatch.setattr(platforms, "_cuda_capability", lambda: None)
    monkeypatch.setattr(platforms, "_cpu_flags", lambda: frozenset(flags.split()))
    platform = platforms._detect.__wrapped__()
    assert platform.name == name
    assert kernel_of(platform, INT4, (512, 1024)) == kernel
    if kernel is None:
        found = missing_kernel(platform, INT4, "linear", (512, 1024))
        assert found is not None and "AVX512F, which this one lacks" in found


def test_groups_that_the_cpu_kernel_gets_wrong_have_a_finer_layout() -> None:
    stored = replace(INT4, group_size=192)
    ways = [
        layout
        for layout in FORMATS["gptq"].layouts(stored)
        if missing_kernel(CPU, layout, "experts", (256, 384)) is None
    ]
    assert ways[0] == replace(INT4, group_size=64)
