# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_mixprec.routing.kinds import kind_of, layer_of, spell_ranges


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.self_attn.q_norm", "attention"),
        ("model.layers.0.self_attn.indexer.wk", "attention"),
        ("model.layers.0.mlp.gate_proj", "dense_mlp"),
        ("model.layers.3.mlp.shared_expert.up_proj", "shared_experts"),
        ("model.layers.3.mlp.shared_experts.down_proj", "shared_experts"),
        ("model.layers.3.mlp.shared_expert_gate", "router"),
        ("model.layers.3.mlp.gate", "router"),
        ("model.layers.3.block_sparse_moe.gate", "router"),
        ("model.layers.3.mlp.experts.7.gate_proj", "routed_experts"),
        ("model.layers.3.block_sparse_moe.experts.7.w1", "routed_experts"),
        ("model.embed_tokens", "embeddings"),
        ("lm_head", "embeddings"),
        ("model.norm", "other"),
        ("model.layers.0.input_layernorm", "other"),
        ("visual.blocks.0.attn.qkv", "other"),
    ],
)
def test_kind_of_a_module(module, kind):
    assert kind_of(module) == kind


def test_layer_of_a_module():
    assert layer_of("model.layers.12.mlp.experts.3.w1") == 12
    assert layer_of("model.norm") is None


@pytest.mark.parametrize(
    ("numbers", "spelt"), [([], ""), ([4], "4"), ([7, 0, 1, 2, 12], "0-2,7,12"), ([1, 1, 2], "1-2")]
)
def test_ranges_are_spelt_as_in_a_plan(numbers, spelt):
    assert spell_ranges(numbers) == spelt
