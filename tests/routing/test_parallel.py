# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_mixprec.errors import RouteError
from vllm_mixprec.routing import Layout
from vllm_mixprec.routing.parallel import (
    ModelDims,
    Placement,
    Shard,
    shard_weight,
    split_experts,
    split_layers,
)

DIMS = ModelDims(num_layers=4, num_heads=8, num_kv_heads=2, num_experts=16, tied_embeddings=False)


def shard(leaf: str, shape: tuple[int, ...], tp_size: int, expert: bool = False, ep: bool = False):
    return shard_weight(leaf, shape, expert, Layout(tp_size, expert_parallel=ep), DIMS)


@pytest.mark.parametrize(
    ("leaf", "shape", "tp_size", "expected"),
    [
        ("q_proj", (512, 256), 4, Shard(128, 256, rows_cut=True)),
        ("o_proj", (256, 512), 4, Shard(256, 128, columns_cut=True)),
        ("k_proj", (128, 256), 2, Shard(64, 256, rows_cut=True)),
        ("gate", (16, 256), 4, Shard(16, 256)),
        # Of Qwen3.5's linear attention: q, k and v; z; b; a. Qwen3-Next's are stored stacked.
        ("in_proj_qkv", (1024, 256), 4, Shard(256, 256, rows_cut=True)),
        ("in_proj_z", (512, 256), 4, Shard(128, 256, rows_cut=True)),
        ("in_proj_b", (16, 256), 4, Shard(4, 256, rows_cut=True)),
        ("in_proj_a", (16, 256), 4, Shard(4, 256, rows_cut=True)),
        ("in_proj_qkvz", (1536, 256), 4, Shard(384, 256, rows_cut=True)),
        ("in_proj_ba", (32, 256), 4, Shard(8, 256, rows_cut=True)),
        # Such as could not be taken apart; with more ranks than key-value heads these are copied.
        ("gate_up_proj", (512, 256), 4, Shard(128, 256, rows_cut=True)),
        ("qkv_proj", (768, 256), 2, Shard(384, 256, rows_cut=True)),
        ("qkv_proj", (768, 256), 4, Shard(768, 256)),
        ("input_layernorm", (256,), 4, Shard(256, 1)),
        ("lm_head", (100, 256), 4, Shard(32, 256, rows_cut=True)),
    ],
)
def test_weights_are_cut_as_vllm_cuts_them(
    leaf: str, shape: tuple[int, ...], tp_size: int, expected: Shard
) -> None:
    assert shard(leaf, shape, tp_size) == expected


def test_kv_heads_are_replicated_when_there_are_more_ranks() -> None:
    head_dim = 64
    assert shard("v_proj", (2 * head_dim, 256), 8) == Shard(head_dim, 256, rows_cut=True)


@pytest.mark.parametrize(
    ("leaf", "shape", "tp_size", "problem"),
    [
        ("q_proj", (512, 256), 3, "8 attention heads"),
        ("k_proj", (128, 256), 3, "2 key-value heads"),
        ("down_proj", (256, 100), 8, "100 columns"),
        ("up_proj", (100, 256), 8, "100 rows"),
        ("embed_tokens", (100, 256), 3, "padded to 128"),
    ],
)
def test_weight_that_cannot_be_cut_has_a_problem(
    leaf: str, shape: tuple[int, ...], tp_size: int, problem: str
) -> None:
    found = shard(leaf, shape, tp_size)
    assert problem in (found.problem or "")
    assert (found.rows_cut, found.columns_cut) == (False, False)


def test_experts_are_whole_under_expert_parallelism() -> None:
    assert shard("gate_proj", (100, 256), 8, expert=True, ep=True) == Shard(100, 256)
    assert shard("gate_proj", (128, 256), 8, ep=True).rows == 16  # a shared expert is cut


def test_data_parallel_replicas_share_one_set_of_experts() -> None:
    layout = Layout(tensor_parallel_size=2, data_parallel_size=2)
    assert shard_weight("gate_proj", (128, 256), True, layout, DIMS).rows == 32
    assert shard_weight("gate_proj", (128, 256), False, layout, DIMS).rows == 64
    assert shard_weight("q_proj", (512, 256), False, Layout(data_parallel_size=2), DIMS).rows == 512
    whole = Layout(data_parallel_size=2, expert_parallel=True)
    assert shard_weight("down_proj", (256, 100), True, whole, DIMS) == Shard(256, 100)


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (8, 2, (4, 4)),
        (9, 2, (5, 4)),
        (10, 4, (2, 3, 3, 2)),
        (11, 4, (3, 3, 3, 2)),
        (92, 3, (31, 31, 30)),
    ],
)
def test_layers_are_split_as_vllm_splits_them(
    layers: int, stages: int, expected: tuple[int, ...]
) -> None:
    assert split_layers(layers, stages) == expected


def test_layer_partition_of_the_environment_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    assert split_layers(4, 2) == (1, 3)


@pytest.mark.parametrize("partition", ["1,2", "4", "a,b", "-1,5"])
def test_layer_partition_that_does_not_fit_is_an_error(
    monkeypatch: pytest.MonkeyPatch, partition: str
) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", partition)
    with pytest.raises(RouteError, match="expected 2 comma-separated layer counts that add up to"):
        split_layers(4, 2)


def test_more_stages_than_layers_is_an_error() -> None:
    with pytest.raises(RouteError, match="size 5 is more than the model's 4 layers"):
        split_layers(4, 5)


def test_first_ranks_hold_the_experts_left_over() -> None:
    assert split_experts(10, 4) == (0, 3, 6, 8, 10)


def test_embeddings_head_and_layers_go_to_their_stages() -> None:
    placement = Placement(Layout(pipeline_parallel_size=2), DIMS)
    stages = {
        name: placement.stages(name)
        for name in (
            "model.embed_tokens",
            "model.layers.1.self_attn.q_proj",
            "model.layers.2.self_attn.q_proj",
            "model.norm",
            "lm_head",
        )
    }
    assert list(stages.values()) == [(0,), (0,), (1,), (1,), (1,)]


def test_tied_embeddings_are_on_first_and_last_stage() -> None:
    tied = ModelDims(4, 8, 2, 16, tied_embeddings=True)
    placement = Placement(Layout(pipeline_parallel_size=2), tied)
    assert placement.stages("model.embed_tokens") == (0, 1)
    assert placement.stages("lm_head") == ()


MTP = ModelDims(4, 8, 2, 16, tied_embeddings=False, num_mtp_layers=1)


@pytest.mark.parametrize(
    ("module", "target", "draft"),
    [
        ("model.layers.4.eh_proj", (), (1,)),
        ("model.layers.4.mlp.experts.3.up_proj", (), (1,)),
        ("mtp.layers.0.self_attn.q_proj", (), (1,)),
        ("model.layers.4.embed_tokens", (), ()),  # vLLM puts the model's own in their place
        ("model.layers.4.shared_head.head", (), ()),
        ("model.layers.5.eh_proj", (), ()),  # beyond what the config promises
        ("model.embed_tokens", (0,), (0, 1)),
        ("lm_head", (1,), (1,)),
    ],
)
def test_draft_is_on_the_last_stage(
    module: str, target: tuple[int, ...], draft: tuple[int, ...]
) -> None:
    for with_draft, expected in ((False, target), (True, draft)):
        layout = Layout(pipeline_parallel_size=2, draft=with_draft)
        assert Placement(layout, MTP).stages(module) == expected


def test_draft_on_the_only_stage_shares_the_embeddings() -> None:
    assert Placement(Layout(draft=True), MTP).stages("model.embed_tokens") == (0,)


def test_indexers_that_vllm_does_not_build_are_on_no_stage() -> None:
    dims = ModelDims(4, 8, 2, 16, tied_embeddings=False, indexer_layers=frozenset({0, 1, 3}))
    placement = Placement(Layout(pipeline_parallel_size=2), dims)
    indexers = [placement.stages(f"model.layers.{i}.self_attn.indexer.wk") for i in range(4)]
    assert indexers == [(0,), (0,), (), (1,)]
    assert placement.stages("model.layers.2.self_attn.o_proj") == (1,)


def test_towers_are_not_cut_with_the_layers() -> None:
    placement = Placement(Layout(pipeline_parallel_size=2), DIMS)
    assert placement.stages("vision_tower.encoder.layers.3.mlp.fc1") == (0,)
    assert placement.stages("model.visual.merger.norm") == (0,)
