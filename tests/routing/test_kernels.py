# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

from vllm_mixprec.checkpoint.formats import FORMATS, Scheme
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.routing import Platform, detect_platform, missing_kernel

CPU, CUDA = Platform("cpu-avx512"), Platform("cuda-90")
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
        (CPU, Scheme("gptq", 4, group_size=16), (256, 256), "group size 16"),
        (CPU, replace(INT4, group_size=192), (256, 384), "192 is over 128 and not a multiple"),
        (CPU, INT4, (256, 192), "K=192"),
        (CPU, INT4, (40, 256), "N=40"),
        (CUDA, Scheme("fp8_block", 8, block=(64, 128)), (256, 256), "not 64x128"),
        (CUDA, Scheme("gptq", 4, group_size=64, symmetric=False), (256, 256), "symmetric"),
        (CUDA, Scheme("gptq", 2, group_size=64), (256, 256), "not 2"),
        (CUDA, Scheme("gptq", 4, group_size=512), (256, 1024), "not 512"),
        (CUDA, INT4, (96, 256), "N=96"),
        (CUDA, replace(AWQ, group_size=256), (256, 256), "groups of 32, 64 or 128, not 256"),
        (CUDA, AWQ, (256, 192), "K=192"),
        (CPU, replace(AWQ, group_size=16), (256, 256), "group size 16"),
        (Platform("cuda-75"), AWQ, (256, 256), "compute capability"),
        (CUDA, FP8, (2048, DENSE_K), f"K={DENSE_K} on a rank is not a multiple of 128"),
        (CUDA, INT4, (2048, DENSE_K), f"K={DENSE_K} on a rank is not a multiple of the group size"),
        (CUDA, replace(INT4, bits=8), (2048, DENSE_K), "the group size 128"),
        (CUDA, FP8, (256, 192), "K=192"),
        (CUDA, replace(INT4, group_size=64), (256, 96), "the group size 64"),
        (Platform("cuda-75"), INT4, (256, 256), "compute capability"),
        (Platform("cpu-other"), INT4, (256, 256), "no gptq kernel on cpu-other"),
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


def test_cpu_kernels_compute_in_bf16_only() -> None:
    assert missing_kernel(CUDA, INT4, "linear", (512, 1024), "fp16") is None
    assert "computes in fp16" in (missing_kernel(CPU, INT4, "linear", (512, 1024), "fp16") or "")


def test_platform_without_a_broken_kernel_says_why() -> None:
    platform = CPU.without({"gptq": "wrong on the known case"})
    found = missing_kernel(platform, INT4, "linear", (512, 1024))
    assert found == "the gptq kernel of cpu-avx512 is not used: wrong on the known case"
    assert missing_kernel(platform, FP8, "linear", (512, 1024)) is None


def test_environment_overrides_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MIXPREC_PLATFORM", "cuda-80")
    platform = detect_platform()
    assert (platform.name, platform.family, platform.compute_capability) == ("cuda-80", "cuda", 80)


def test_unknown_platform_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MIXPREC_PLATFORM", "tpu")
    with pytest.raises(UnsupportedError, match="VLLM_MIXPREC_PLATFORM is 'tpu'; expected cpu-avx"):
        detect_platform()


def test_this_machine_is_detected_as_one_of_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_MIXPREC_PLATFORM", raising=False)
    assert detect_platform().family in ("cpu-avx512", "cpu-other", "cuda", "other")


def test_groups_that_the_cpu_kernel_gets_wrong_have_a_finer_layout() -> None:
    stored = replace(INT4, group_size=192)
    ways = [
        layout
        for layout in FORMATS["gptq"].layouts(stored)
        if missing_kernel(CPU, layout, "experts", (256, 384)) is None
    ]
    assert ways[0] == replace(INT4, group_size=64)
