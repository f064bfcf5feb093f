# SPDX-License-Identifier: Apache-2.0
"""Latent attention multiplies by its own copy of kv_b_proj, also after a reload."""

from pathlib import Path

import pytest
import torch
from torch.nn import Module
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from tests.loading.indexers import FIXTURES
from tests.loading.serving import needs_cpu, serve

pytestmark = needs_cpu

LATENT = FIXTURES / "architectures" / "deepseek_v2"
PROJECTION = "model.layers.*.self_attn.kv_b_proj"


def copies(model: Module) -> list[torch.Tensor]:
    """Return attention's copies of keys' and values' halves, with AMX as it packs them."""
    found = []
    for module in model.modules():
        if isinstance(module, MLAAttention):
            if module.is_amx_bmm_enabled:
                found += [module.impl._w_uk_packed, module.impl._w_uv_packed]
            else:
                found += [module.W_UK_T, module.W_UV]
    return [tensor.clone() for tensor in found]


@pytest.mark.parametrize(
    ("source", "scaled"), [(None, "weight"), ("fp8", "weight_scale_inv"), ("int4", "scales")]
)
def test_reload_replaces_attentions_copy(tmp_path: Path, source: str | None, scaled: str) -> None:
    sources = {name: LATENT / name for name in ("fp8", "int4")}
    rules = {PROJECTION: source} if source else {}
    with serve(tmp_path, LATENT / "bf16", sources, rules, has_draft=False) as serving:
        built = serving.build()
        model, config = built.model, built.model_config
        serving.loader.load_weights(model, config)
        process_weights_after_loading(model, config, torch.device("cpu"))
        first = copies(model)
        assert first and all(tensor.any() for tensor in first)
        doubled = [
            (name, tensor * 2 if name.endswith(f".kv_b_proj.{scaled}") else tensor.clone())
            for name, tensor in serving.loader.get_all_weights(config, model)
        ]
        reload_weights(serving.config, model, doubled, None, True)
        assert all(map(torch.equal, copies(model), (2 * tensor for tensor in first)))
        rest = [(name, tensor) for name, tensor in doubled if ".kv_b_proj." not in name]
        reload_weights(serving.config, model, rest, None, True)  # brings nothing for it
        assert all(map(torch.equal, copies(model), (2 * tensor for tensor in first)))
        reload_weights(serving.config, model, None, None, True)
        assert all(map(torch.equal, copies(model), first))
