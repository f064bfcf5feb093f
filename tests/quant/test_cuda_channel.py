# SPDX-License-Identifier: Apache-2.0
"""FP8 with a scale a row on CUDA: vLLM's compressed-tensors methods, filled by the real loader.

Their kernels do not run here: what is tested is which methods vLLM chooses and what they hold.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors,
    compressed_tensors_moe,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
)

from tests.engine.test_channel import BASE, LAYERS, source_of, write_sources
from tests.loading.serving import needs_cpu, serve_plan
from vllm_mixprec import Plan
from vllm_mixprec.checkpoint import Scheme
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.quant import methods
from vllm_mixprec.quant.experts import _mapped_backend
from vllm_mixprec.routing import Platform

pytestmark = needs_cpu

CHANNEL = Scheme("fp8_channel", 8)
HOPPER, AMPERE = Platform("cuda-90"), Platform("cuda-80")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """The model as it is before vLLM's post-processing, and the weights that the tools read."""
    folder: Path = tmp_path_factory.mktemp("cuda-channel")
    written = write_sources(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "_vllm_platform", lambda: HOPPER)
        methods.usable_platform.cache_clear()
        with serve_plan(folder, BASE, Plan.from_dict(written["plan"])) as serving:
            built = serving.build()
            serving.loader.load_weights(built.model, built.model_config)
            yield built.model, serving.config, written["weights"]
        methods.usable_platform.cache_clear()


def dequantised(layer: torch.nn.Module, prefix: str = "") -> torch.Tensor:
    weight, scale = getattr(layer, f"{prefix}weight"), getattr(layer, f"{prefix}weight_scale")
    assert (weight.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert scale.shape == (*weight.shape[:-1], 1)
    return weight.float() * scale


def test_nothing_is_widened(loaded) -> None:
    _, config, weights = loaded
    routes = config.quant_config.table.routes
    quantised = {name.removesuffix(".weight") for name in weights}
    quantised = {module for module in quantised if source_of(module) is not None}
    assert {module for module in routes if routes[module].served == CHANNEL} == quantised
    assert not any(route.widened for route in routes.values())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("self_attn.o_proj", ("o_proj",)),
        ("mlp.shared_experts.gate_up_proj", ("gate_proj", "up_proj")),
        ("mlp.shared_experts.down_proj", ("down_proj",)),
    ],
)
def test_linear_layers_hold_the_tools_numbers(loaded, name: str, parts: tuple[str, ...]) -> None:
    model, _, weights = loaded
    prefix = f"model.layers.{LAYERS - 1}.{name}"
    layer = model.get_submodule(prefix)
    assert type(layer.quant_method) is compressed_tensors.CompressedTensorsLinearMethod
    assert layer.scheme.strategy == "channel" and not layer.scheme.is_static_input_scheme
    parent = prefix.rpartition(".")[0]
    expected = torch.cat([weights[f"{parent}.{part}.weight"] for part in parts])
    assert torch.equal(dequantised(layer), expected)
    assert not torch.equal(dequantised(layer), expected.roll(1, 0))  # negative control


def test_experts_hold_the_tools_numbers(loaded) -> None:
    model, _, weights = loaded
    prefix = f"model.layers.{LAYERS - 1}.mlp.experts"
    layer = model.get_submodule(prefix).routed_experts
    assert type(layer.quant_method).__name__ == "CompressedTensorsW8A8Fp8MoEMethod"
    assert isinstance(layer.quant_method, compressed_tensors_moe.CompressedTensorsMoEMethod)
    assert layer.quant_method.weight_quant.strategy == "channel"
    assert layer.quant_method.input_quant.strategy == "token"

    def expected(expert: int, *parts: str) -> torch.Tensor:
        return torch.cat([weights[f"{prefix}.{expert}.{part}_proj.weight"] for part in parts])

    for expert in range(layer.local_num_experts):
        w13 = expected(expert, "gate", "up")
        assert torch.equal(dequantised(layer, "w13_")[expert], w13)
        assert torch.equal(dequantised(layer, "w2_")[expert], expected(expert, "down"))
        assert not torch.equal(dequantised(layer, "w13_")[expert], w13.roll(1, 0))


def test_a_group_of_a_layer_is_served_by_kernels_that_take_a_map() -> None:
    assert _mapped_backend(CHANNEL, HOPPER) == "triton"
    assert _mapped_backend(CHANNEL, AMPERE) == "marlin"
    assert MarlinExperts._supports_quant_scheme(kFp8StaticChannelSym, kFp8DynamicTokenSym)
    with pytest.raises(UnsupportedError, match="fp8_channel experts on compute capability 7.5"):
        _mapped_backend(CHANNEL, Platform("cuda-75"))


@pytest.mark.parametrize("backend", ["triton", "marlin"])
def test_vllm_is_asked_for_that_kernel(loaded, backend: str) -> None:
    """Which it cannot give on a CPU, and says so by name."""
    model, config, _ = loaded
    layer = model.get_submodule(f"model.layers.{LAYERS - 1}.mlp.experts").routed_experts
    moe, before = layer.moe_config, layer.moe_config.moe_backend
    try:
        moe.moe_backend = backend
        with set_current_vllm_config(config), pytest.raises(ValueError, match=f"(?i){backend}"):
            methods.experts_method(CHANNEL, HOPPER, layer, "model.layers.2.mlp.experts")
    finally:
        moe.moe_backend = before
