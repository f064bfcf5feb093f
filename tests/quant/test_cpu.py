# SPDX-License-Identifier: Apache-2.0
"""Experts that the CPU's kernels cannot compute are refused, or left to stock vLLM."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from tests.loading.serving import moe_layers, serve, write_base
from vllm_mixprec.checkpoint import Scheme
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.quant import cpu
from vllm_mixprec.quant.cpu_ops import ExpertKernel
from vllm_mixprec.quant.experts import MixedExpertsMethod
from vllm_mixprec.quant.methods import experts_method
from vllm_mixprec.routing import ExpertGroup
from vllm_mixprec.routing.platform import Platform

BF16 = Scheme("bf16", 16)
FP8 = Scheme("fp8_block", 8, block=(128, 128))
INT4 = Scheme("gptq", 4, group_size=128)
METHODS = {
    BF16: cpu.CpuBf16ExpertsMethod,
    FP8: cpu.CpuFp8ExpertsMethod,
    INT4: cpu.CpuInt4ExpertsMethod,
}
AVX512 = Platform("cpu-avx512")

every_scheme = pytest.mark.parametrize("scheme", METHODS, ids=lambda scheme: scheme.format)
not_plain = pytest.mark.parametrize(
    ("attribute", "value", "match"),
    [
        ("swiglu_limit", 7.0, "activation 'silu', clamped at 7.0, have no"),
        ("swiglu_alpha", 1.702, "activation 'silu' have no"),
        ("swiglu_beta", 1.0, "activation 'silu' have no"),
        ("activation", MoEActivation.GELU, "activation 'gelu' have no"),
        ("apply_router_weight_on_input", True, "the model weighs expert inputs, not outputs"),
    ],
)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoutedExperts]:
    """The routed experts of one layer, as vLLM builds them."""
    folder = tmp_path_factory.mktemp("experts")
    base = write_base(folder / "base")
    with serve(folder, base, {}, {}) as serving:
        model = serving.build().model
        yield model.model.layers[moe_layers(base)[-1]].mlp.experts.routed_experts


@every_scheme
def test_plain_silu_is_computed(
    experts: RoutedExperts, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("swiglu_limit", 0), ("swiglu_alpha", 1.0), ("swiglu_beta", 0.0)):
        monkeypatch.setattr(experts, name, value)
    assert METHODS[scheme](scheme, experts).scheme == scheme


@every_scheme
@not_plain
def test_other_experts_are_refused(
    experts: RoutedExperts,
    scheme: Scheme,
    attribute: str,
    value: object,
    match: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts, attribute, value)
    with pytest.raises(UnsupportedError, match=rf"^{experts.layer_name}: .*{match}"):
        METHODS[scheme](scheme, experts)


@not_plain
def test_other_experts_are_stock_vllms_when_unquantised(
    experts: RoutedExperts,
    attribute: str,
    value: object,
    match: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts, attribute, value)
    made = experts_method(BF16, AVX512, experts, experts.layer_name)
    assert isinstance(made, UnquantizedFusedMoEMethod)


def test_biases_are_refused(experts: RoutedExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts.moe_config, "has_bias", True)
    match = r"activation 'silu' and biases have no gptq int4 g128 kernel"
    with pytest.raises(UnsupportedError, match=match):
        cpu.CpuInt4ExpertsMethod(INT4, experts)


def test_stock_experts_over_expert_parallel_ranks_are_refused(
    experts: RoutedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's kernel dies there; ours takes the experts of its own rank."""
    parallel = replace(experts.moe_config.moe_parallel_config, use_ep=True, ep_size=2)
    monkeypatch.setattr(experts.moe_config, "moe_parallel_config", parallel)
    made = experts_method(BF16, AVX512, experts, experts.layer_name)
    assert isinstance(made, cpu.CpuBf16ExpertsMethod)
    assert made.kernel is ExpertKernel.BF16
    made = experts_method(BF16, replace(AVX512, has_amx=True), experts, experts.layer_name)
    assert made.kernel is ExpertKernel.BF16_AMX
    monkeypatch.setattr(experts.moe_config, "num_experts", 1 << 24)  # more than 31 bits can count
    made = experts_method(BF16, replace(AVX512, has_amx=True), experts, experts.layer_name)
    assert made.kernel is ExpertKernel.BF16
    monkeypatch.setattr(experts, "swiglu_limit", 7.0)
    with pytest.raises(UnsupportedError, match=r"--enable-expert-parallel with vLLM's own CPU"):
        experts_method(BF16, AVX512, experts, experts.layer_name)


def test_groups_of_a_layer_share_tokens_of_replicas_on_a_cpu_only(
    experts: RoutedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = replace(experts.moe_config.moe_parallel_config, dp_size=2)
    monkeypatch.setattr(experts.moe_config, "moe_parallel_config", parallel)
    groups = (ExpertGroup(BF16, (0, 1)), ExpertGroup(FP8, (2, 3)))
    assert MixedExpertsMethod(groups, AVX512, experts).groups == groups
    with pytest.raises(UnsupportedError, match=r"experts in 2 formats over 2 data-parallel and 1"):
        MixedExpertsMethod(groups, Platform("cuda-90"), experts)
