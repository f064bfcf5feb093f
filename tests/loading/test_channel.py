# SPDX-License-Identifier: Apache-2.0
"""FP8 with a scale a row through vLLM's reload, whose layers hold more than was stored."""

from pathlib import Path

import pytest
import torch
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.engine.test_channel import BASE, write_sources
from tests.loading.serving import needs_cpu, serve_plan
from vllm_mixprec import Plan
from vllm_mixprec.routing.platform import detect_platform

pytestmark = [
    needs_cpu,
    pytest.mark.skipif(detect_platform().name != "cpu-avx512", reason="needs AVX512_BF16"),
]
LAYER = "model.layers.1"


def computed(model: torch.nn.Module) -> list[torch.Tensor]:
    """What a fused linear layer and the experts make of some rows; up and down are linear."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = model.get_submodule(f"{LAYER}.self_attn.qkv_proj")
    experts = model.get_submodule(f"{LAYER}.mlp.experts").routed_experts
    ids, weights = torch.tensor([[0, 1], [2, 3], [1, 3]]).int(), torch.ones(3, 2)
    return [
        linear.quant_method.apply(linear, x).float(),
        experts.quant_method.apply(experts, x, weights, ids, None, None).float(),
    ]


def test_reload_replaces_codes_and_scales(tmp_path: Path) -> None:
    written = write_sources(tmp_path)
    with serve_plan(tmp_path, BASE, Plan.from_dict(written["plan"])) as serving:
        built = serving.build()
        model, config = built.model, built.model_config
        with set_default_torch_dtype(torch.bfloat16):
            serving.loader.load_weights(model, config)
            process_weights_after_loading(model, config, torch.device("cpu"))
        places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
        before = computed(model)
        doubled = [
            (name, tensor * 2 if "scale" in name and "gate" not in name else tensor.clone())
            for name, tensor in serving.loader.get_all_weights(config, model)
        ]
        reload_weights(serving.config, model, reversed(doubled), None, True)
        linear, experts = computed(model)
        assert torch.equal(linear, 2 * before[0])
        assert torch.equal(experts, 4 * before[1])  # up and down
        reload_weights(serving.config, model, None, None, True)
        assert all(map(torch.equal, computed(model), before))
        # In place: compiled graphs hold the addresses.
        assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
