# SPDX-License-Identifier: Apache-2.0
"""FP8 with a scale a row: what a plan over it is said to be served by, and what a rank holds."""

from pathlib import Path

import pytest

from tests.engine.test_channel import source_of, write_sources
from vllm_mixprec import Plan
from vllm_mixprec.checkpoint.formats.fp8 import CHANNEL
from vllm_mixprec.routing import Layout, Platform, RouteTable, load_route_table
from vllm_mixprec.routing.fused import leaf_name, parse_expert
from vllm_mixprec.routing.parallel import _bytes_on_rank, shard_weight
from vllm_mixprec.routing.parts import spell_layers
from vllm_mixprec.routing.structure import ModelDims

TP2 = Layout(tensor_parallel_size=2)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder: Path = tmp_path_factory.mktemp("channel")
    return Plan.from_dict(write_sources(folder)["plan"])


def resolve(plan: Plan, platform: str, layout: Layout = TP2) -> RouteTable:
    return load_route_table(plan, layout=layout, platform=Platform(platform))


@pytest.mark.parametrize(
    ("platform", "kernel"), [("cpu-avx512", "fp8_scaled_mm_cpu"), ("cuda-90", "fp8 channel")]
)
def test_lines_name_layout_and_kernel(plan: Plan, platform: str, kernel: str) -> None:
    (line,) = [line for line in spell_layers(resolve(plan, platform, Layout())) if "s 1-2" in line]
    said = line.split(": ", 1)[1].split("; ")
    for part in (
        f"attention ct_fp8 channel of ct, as fp8_channel, {kernel}",
        f"attention fp8_channel of rows, {kernel}",
        f"attention fp8_tensor of tensor, as fp8_channel, {kernel}",
        f"routed experts 0-3 ct_fp8 channel of ct, as fp8_channel, {kernel}",
    ):
        assert part in said


def test_elsewhere_it_is_widened(plan: Plan) -> None:
    routes = resolve(plan, "cpu-other").routes
    assert all(routes[module].widened for module in routes if source_of(module) is not None)


def test_ranks_hold_whole_scales_of_what_is_cut_along_k(plan: Plan) -> None:
    table = resolve(plan, "cpu-avx512")
    dims = ModelDims.from_config(table.base_config)
    seen = set()
    for module, route in table.routes.items():
        if source_of(module) is None:
            continue
        assert route.served == CHANNEL
        is_expert = parse_expert(module) is not None
        shard = shard_weight(leaf_name(module), route.shape, is_expert, TP2, dims)
        assert shard.rows_cut != shard.columns_cut
        seen.add(shard.rows_cut)
        bias_bytes = 2 * shard.rows if "bias" in route.tensors else 0
        expected = shard.rows * shard.columns + 4 * shard.rows + bias_bytes
        assert _bytes_on_rank(route, shard) == expected, module
    assert seen == {True, False}
