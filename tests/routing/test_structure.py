# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest

from tests.routing.headers import GLM_5
from vllm_mixprec.errors import CheckpointError
from vllm_mixprec.routing.structure import ModelDims, indexer_name, layer_index, layer_name


def dims_of(**changes: Any) -> ModelDims:
    config = GLM_5 | {"num_hidden_layers": 8} | changes
    return ModelDims.from_config({k: value for k, value in config.items() if value is not None})


def test_glm_5() -> None:
    dims = ModelDims.from_config(GLM_5)
    assert (dims.num_layers, dims.num_mtp_layers, dims.num_experts) == (78, 1, 256)
    assert (dims.experts_per_token, dims.num_expert_groups, dims.num_chosen_groups) == (8, 1, 1)
    assert (dims.index_topk, dims.num_index_heads, dims.index_head_dim) == (2048, 32, 128)
    assert dims.moe_layers == frozenset(range(3, 79))
    assert dims.indexer_layers == frozenset(range(79))
    assert [dims.is_mtp_layer(index) for index in (77, 78, 79)] == [False, True, False]


def test_text_config_is_read() -> None:
    dims = ModelDims.from_config({"model_type": "glm_vl", "text_config": GLM_5})
    assert dims == ModelDims.from_config(GLM_5)


@pytest.mark.parametrize(
    "key",
    ["num_hidden_layers", "num_nextn_predict_layers", "n_routed_experts", "index_topk_freq"],
)
@pytest.mark.parametrize("value", [10**12, -(10**12), 10**30])
def test_number_that_no_model_has_is_an_error(key: str, value: int) -> None:
    match = rf"^config\.json: {key} is {value}, expected at most 1000000\. Correct config\.json"
    for config in (GLM_5 | {key: value}, {"text_config": GLM_5 | {key: value}}):
        with pytest.raises(CheckpointError, match=match):
            ModelDims.from_config(config)


# What is known and what is loaded, of eight layers and one MTP layer.


@pytest.mark.parametrize(
    ("module", "known"),
    [
        ("model.layers.7.mlp.gate", True),
        ("model.layers.8.eh_proj", True),
        ("model.layers.9.mlp.gate", False),
        ("model.layers.9", False),
        ("lm_head", True),
        ("mtp.layers.9.mlp.gate", True),
        ("model.visual.layers.30.mlp", True),
    ],
)
def test_known_modules_are_those_of_layers_that_the_config_counts(module: str, known: bool) -> None:
    assert dims_of().is_known(module) is known
    assert dims_of(num_hidden_layers=None).is_known(module)


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.3.self_attn.rotary_emb",
        "model.layers.8.self_attn.rotary_emb",
        "model.rotary_emb",
        "transformer.rotary_pos_emb",
    ],
)
def test_rotary_frequencies_are_computed_not_loaded(module: str) -> None:
    for draft in (False, True):
        assert not dims_of().is_loaded(module, draft)
    assert dims_of().is_known(module)


@pytest.mark.parametrize(
    ("module", "target", "draft"),
    [
        ("model.layers.3.self_attn.o_proj", True, True),
        ("model.layers.3.self_attn.rotary_emb_proj", True, True),
        ("model.layers.8.eh_proj", False, True),
        ("model.layers.8.embed_tokens", False, False),
        ("model.layers.9.eh_proj", False, False),
    ],
)
def test_loaded_modules(module: str, target: bool, draft: bool) -> None:
    assert dims_of().is_loaded(module) is target
    assert dims_of().is_loaded(module, draft=True) is draft


# Layers with experts.


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"first_k_dense_replace": 2}, {2, 3, 4, 5}),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, {2, 4}),
        ({"first_k_dense_replace": 4, "num_nextn_predict_layers": 1}, {4, 5, 6}),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4}, {2, 3, 4, 5}),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, {1, 2, 4, 5}),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, {0, 1, 2, 3, 4, 5}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {1, 5}),
        ({"num_experts": None, "first_k_dense_replace": 2}, None),
        ({}, None),
    ],
)
def test_layers_with_experts(config: dict[str, Any], expected: set[int] | None) -> None:
    dims = ModelDims.from_config({"num_hidden_layers": 6, "num_experts": 4} | config)
    assert dims.moe_layers == (None if expected is None else frozenset(expected))


# Layers with an indexer, of eight and one MTP layer.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set(range(9))),
        ({"index_topk_freq": 4}, {0, 1, 5, 8}),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, {0, 1, 2, 6, 8}),
        ({"index_topk_pattern": "FFSSFSSF"}, {0, 1, 4, 7, 8}),
        ({"index_topk_pattern": "FFSSFSSF", "index_topk_freq": 2}, {0, 1, 4, 7, 8}),
        ({"index_topk_pattern": "FS"}, {0, 2, 3, 4, 5, 6, 7, 8}),
        ({"indexer_types": ["full"] * 3 + ["shared"] * 5}, {0, 1, 2, 8}),
        ({"indexer_types": ["full"] * 8, "index_topk_freq": 4}, {0, 1, 5, 8}),
        ({"index_topk": None}, set()),
    ],
)
def test_layers_with_an_indexer(changes: dict[str, Any], expected: set[int]) -> None:
    dims = dims_of(**changes)
    assert dims.indexer_layers == frozenset(expected)
    assert [i for i in range(9) if dims.builds_indexer(i)] == sorted(expected)


def test_frequency_is_what_transformers_makes_of_it() -> None:
    transformers = pytest.importorskip("transformers")
    for changes in ({"index_topk_freq": 4}, {"index_topk_freq": 3, "index_skip_topk_offset": 4}):
        types = transformers.GlmMoeDsaConfig(num_hidden_layers=8, **changes).indexer_types
        assert dims_of(**changes).indexer_layers == dims_of(indexer_types=types).indexer_layers


def test_other_families_keep_their_indexers() -> None:
    dims = dims_of(model_type="deepseek_v4", index_topk_freq=4)
    assert dims.indexer_layers is None
    assert dims.builds_indexer(3)


# Names.


@pytest.mark.parametrize(
    ("module", "name", "index"),
    [
        ("model.layers.12.mlp.gate", "model.layers.12", 12),
        ("model.language_model.layers.3.self_attn", "model.language_model.layers.3", 3),
        ("layers.0", "layers.0", 0),
        ("lm_head", None, None),
        ("mtp.layers.0.mlp.gate", None, None),
        ("model.visual.layers.0.mlp", None, None),
        ("vision_tower.encoder.layers.3.mlp.fc1", None, None),
    ],
)
def test_layer_of_a_module(module: str, name: str | None, index: int | None) -> None:
    assert (layer_name(module), layer_index(module)) == (name, index)


def test_indexer_of_a_module() -> None:
    assert indexer_name("model.layers.3.self_attn.indexer.wk") == "model.layers.3.self_attn.indexer"
    assert indexer_name("model.layers.3.self_attn.indexer_proj") is None
