# SPDX-License-Identifier: Apache-2.0
"""The one-launch kernel on a GPU: the interpreter's cases, larger layers, CUDA graphs."""

from itertools import combinations

import pytest
import torch

from tests.gpu.weights import FORMATS, Experts, Shape, on, relative_error, route
from tests.quant.test_grouped_kernel import CASES
from vllm_mixprec.quant.grouped_tiles import TileConfig, align_tokens, choose_config
from vllm_mixprec.quant.grouped_weights import ExpertTable

MIXES = [mix for size in (1, 2, 3) for mix in combinations(FORMATS, size)]
SHAPE = Shape(experts=16, hidden=512, inner=256, top_k=4)
# The layers that scripts/bench_experts.py measures, with fewer experts.
QWEN = Shape(experts=32, hidden=2048, inner=768, top_k=8)
DEEPSEEK = Shape(experts=32, hidden=7168, inner=256, top_k=8)

# x and the weights are exact, products are summed in float32. The inner state, a pair's row and the
# sum are rounded to bfloat16, each off by 2^-7 / 12 ** 0.5 / 1.44 of its size in the mean square:
# 0.0027 in all.
BOUND = 2**-8


@pytest.fixture(scope="module")
def grouped_experts():
    from vllm_mixprec.quant.grouped_kernel import grouped_experts

    return grouped_experts


@pytest.mark.parametrize("name", CASES)
def test_the_interpreters_cases(grouped_experts, name, device):
    case = CASES[name]
    loaded = [expert and [stored.load("cuda") for stored in expert] for expert in case.experts]
    w13, w2 = ([weights and weights[which] for weights in loaded] for which in (0, 1))
    table = ExpertTable(w13, w2, case.x.dtype)
    x, weights, ids = (on(device, tensor) for tensor in (case.x, case.weights, case.ids))
    config = case.config or choose_config(*ids.shape, len(case.experts), table.intermediate_size)
    aligned = align_tokens(ids, config.block_m, table.experts) if case.aligned else None
    found = grouped_experts(x, weights, ids, table, config=config, aligned=aligned)
    assert found.dtype == case.x.dtype
    assert case.fits(found.cpu())


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 300])
@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_every_mix_is_float32s(grouped_experts, mix, rows):
    experts = Experts(SHAPE, mix, "cuda")
    x, weights, ids = route(rows, SHAPE, "cuda")
    found = grouped_experts(x, weights, ids, experts.table())
    assert relative_error(found, experts.reference(x, weights, ids)) < BOUND


@pytest.mark.parametrize("shape", [QWEN, DEEPSEEK], ids=["qwen3", "deepseek-v3-tp8"])
def test_the_layers_of_real_models(grouped_experts, shape):
    experts = Experts(shape, ("bf16", "fp8", "int4"), "cuda")
    for rows in (1, 64):
        x, weights, ids = route(rows, shape, "cuda")
        found = grouped_experts(x, weights, ids, experts.table())
        assert relative_error(found, experts.reference(x, weights, ids)) < BOUND


@pytest.mark.parametrize(
    "config",
    [
        TileConfig(16, 32, 64, 2, 2),
        TileConfig(16, 64, 128, 4, 4),
        TileConfig(32, 128, 128, 4, 3),
        TileConfig(64, 128, 64, 8, 3),
        TileConfig(128, 128, 64, 8, 3),
    ],
    ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}",
)
def test_every_tile_gives_the_same(grouped_experts, config):
    experts = Experts(SHAPE, FORMATS, "cuda")
    x, weights, ids = route(200, SHAPE, "cuda")
    found = grouped_experts(x, weights, ids, experts.table(), config=config)
    assert relative_error(found, experts.reference(x, weights, ids)) < BOUND


def test_absent_experts_and_no_expert_add_nothing(grouped_experts):
    experts = Experts(SHAPE, FORMATS, "cuda")
    x, weights, ids = route(20, SHAPE, "cuda")
    ids[::3, 1] = -1
    here = range(0, SHAPE.experts, 2)
    found = grouped_experts(x, weights, ids, experts.table(present=here))
    expected = experts.reference(x, weights, ids, present=here)
    assert relative_error(found, expected) < BOUND
    nobody = torch.full_like(ids, 1)
    assert not grouped_experts(x, weights, nobody, experts.table(present=here)).any()


def test_everything_on_one_expert(grouped_experts):
    experts = Experts(SHAPE, FORMATS, "cuda")
    x, weights, _ = route(130, SHAPE, "cuda")
    for expert in (0, 1, 2):
        ids = torch.full((130, SHAPE.top_k), expert, dtype=torch.int32, device="cuda")
        found = grouped_experts(x, weights, ids, experts.table())
        assert relative_error(found, experts.reference(x, weights, ids)) < BOUND


@pytest.mark.parametrize("damage", ["another expert", "another scale"])
def test_what_is_wrong_is_noticed(grouped_experts, damage):
    """The control: the bound is not one that anything passes."""
    experts = Experts(SHAPE, ("fp8", "int4"), "cuda")
    x, weights, ids = route(64, SHAPE, "cuda")
    expected = experts.reference(x, weights, ids)
    if damage == "another expert":
        ids = (ids + 2) % SHAPE.experts  # of the same format
    else:
        experts.stored[0]["down_proj"]["weight_scale_inv"].div_(2)
    found = grouped_experts(x, weights, ids, experts.table())
    assert relative_error(found, expected) > 2 * BOUND


def test_a_graph_replays_with_new_tokens(grouped_experts):
    experts = Experts(SHAPE, FORMATS, "cuda")
    table = experts.table()
    x, weights, ids = route(8, SHAPE, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles outside the graph
        grouped_experts(x, weights, ids, table)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = grouped_experts(x, weights, ids, table)
    for seed in range(1, 5):
        for old, new in zip((x, weights, ids), route(8, SHAPE, "cuda", seed), strict=True):
            old.copy_(new)
        graph.replay()
        assert relative_error(found, experts.reference(x, weights, ids)) < BOUND


def test_alignment_is_the_cpus(device):
    for rows, block in ((1, 16), (7, 16), (64, 32), (300, 64)):
        ids = route(rows, SHAPE, "cpu", seed=rows)[2]
        ids[rows // 2 :, 0] = -1
        found = align_tokens(ids.to(device), block, SHAPE.experts)
        expected = align_tokens(ids, block, SHAPE.experts)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.cpu(), other)


def test_vllms_alignment_serves_as_well(grouped_experts, device):
    pytest.importorskip("vllm", reason="needs vLLM for CUDA, which is not installed")
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    experts, config = Experts(SHAPE, FORMATS, "cuda"), TileConfig(16, 64, 128, 4, 4)
    for rows in (1, 8, 64):
        x, weights, ids = route(rows, SHAPE, "cuda")
        aligned = moe_align_block_size(ids, config.block_m, SHAPE.experts)
        found = grouped_experts(x, weights, ids, experts.table(), config=config, aligned=aligned)
        assert relative_error(found, experts.reference(x, weights, ids)) < BOUND
