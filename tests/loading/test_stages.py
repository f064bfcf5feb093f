# SPDX-License-Identifier: Apache-2.0
"""GLM-5's real layout over eight pipeline stages: each holds and reads its own, and no more.

The stages' own account is compared with one written out here, and with what vLLM's model class
for each stage asks for.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.routing.headers import GLM_5, TINY_GLM, glm_header, write_checkpoint
from tests.routing.models import CPU
from vllm_mixprec import compose
from vllm_mixprec.checkpoint import TensorSpec
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Layout, Route, RouteTable, load_route_table
from vllm_mixprec.routing.parallel import Placement
from vllm_mixprec.routing.structure import ModelDims

ROOT = Path(__file__).parents[2]
STAGES = 8
LAST = STAGES - 1
PARTITIONS = {
    "even": (9, 10, 10, 10, 10, 10, 10, 9),  # vLLM's own choice for 78 layers
    "uneven": (6, 12, 10, 10, 1, 14, 15, 10),
}
SHARDS = 160
# Three of four layers reuse a selection, as in GLM-5.2.
SHARED = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
OWN_SELECTION = {0, 1, *range(2, 78, 4)}
MTP_COPIES = ("model.layers.78.embed_tokens", "model.layers.78.shared_head.head")


def make_plan(folder: Path, config: dict[str, Any], shards: int) -> Plan:
    """Write a model in bf16 and FP8, and a plan that mixes them."""
    for name in ("bf16", "fp8"):
        write_checkpoint(folder / name, config, glm_header(config, name == "fp8"), shards)
    experts = config["n_routed_experts"]
    return Plan.from_dict(
        {
            "version": 1,
            "base": "bf16",
            "sources": {name: {"path": str(folder / name)} for name in ("bf16", "fp8")},
            "rules": [
                {"match": f"**.experts.{{{experts // 8}-{experts - 1}}}", "source": "fp8"},
                {"match": "model.layers.{0-77}.self_attn", "source": "fp8"},
                {"match": "**.shared_experts", "source": "fp8"},
            ],
        }
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Headers of 1.4 and 0.7 TiB of weights; the data is a hole."""
    return make_plan(tmp_path_factory.mktemp("glm-5"), GLM_5 | SHARED, SHARDS)


@pytest.fixture(scope="module")
def target_table(plan: Plan) -> RouteTable:
    return load_route_table(plan, Layout(pipeline_parallel_size=STAGES), CPU)


@pytest.fixture(scope="module")
def draft_table(plan: Plan) -> RouteTable:
    return load_route_table(plan, Layout(pipeline_parallel_size=STAGES, draft=True), CPU)


@pytest.fixture(params=["target", "draft"])
def table(request: pytest.FixtureRequest) -> RouteTable:
    return request.getfixturevalue(f"{request.param}_table")


@pytest.fixture(params=list(PARTITIONS))
def partition(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION", raising=False)
    if request.param != "even":
        counts = ",".join(map(str, PARTITIONS[request.param]))
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", counts)
    return PARTITIONS[request.param]


def stages_by_hand(module: str, partition: tuple[int, ...], draft: bool) -> tuple[int, ...]:
    """Which stages hold a module of GLM-5 with SHARED, from its name."""
    if module == "model.embed_tokens":
        return (0, LAST) if draft else (0,)
    if module in ("model.norm", "lm_head"):
        return (LAST,)
    layer = int(module.split(".")[2])
    if layer == 78:
        return (LAST,) if draft and module not in MTP_COPIES else ()
    if ".indexer." in module and layer not in OWN_SELECTION:
        return ()
    return next((s,) for s in range(STAGES) if sum(partition[: s + 1]) > layer)


def routes_by_stage(table: RouteTable) -> list[list[Route]]:
    """Return what each stage holds, as Placement says."""
    placement = Placement(table.layout, ModelDims.from_config(table.base_config))
    held: list[list[Route]] = [[] for _ in range(STAGES)]
    for module, route in table.routes.items():
        for stage in placement.stages(module):
            held[stage].append(route)
    return held


def specs_of(routes: Iterable[Route]) -> list[TensorSpec]:
    return [spec for route in routes for spec in route.tensors.values()]


def test_every_tensor_is_in_exactly_the_stages_that_hold_it(
    table: RouteTable, partition: tuple[int, ...]
) -> None:
    found: dict[str, tuple[int, ...]] = dict.fromkeys(table.routes, ())
    for stage, routes in enumerate(routes_by_stage(table)):
        for route in routes:
            found[route.module] += (stage,)
    by_hand = {
        module: stages_by_hand(module, partition, table.layout.draft) for module in table.routes
    }
    assert found == by_hand


def test_every_kind_of_tensor_is_among_them(table: RouteTable, partition: tuple[int, ...]) -> None:
    names = {spec.name for routes in routes_by_stage(table) for spec in specs_of(routes)}
    assert names >= {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.77.mlp.experts.0.down_proj.weight",
        "model.layers.77.mlp.experts.255.down_proj.weight",
        "model.layers.77.mlp.experts.255.down_proj.weight_scale_inv",
        "model.layers.40.self_attn.q_a_proj.weight_scale_inv",
        "model.layers.40.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
        "model.layers.40.mlp.shared_experts.gate_proj.weight_scale_inv",
        "model.layers.40.mlp.gate.weight",
        "model.layers.40.mlp.gate.e_score_correction_bias",
        "model.layers.42.self_attn.indexer.wk.weight_scale_inv",
        "model.norm.weight",
        "lm_head.weight",
    }
    mtp = {name for name in names if name.startswith("model.layers.78.")}
    assert ("model.layers.78.eh_proj.weight" in mtp) == bool(mtp) == table.layout.draft


def test_stages_share_no_byte_and_leave_none_of_what_is_served(
    table: RouteTable, partition: tuple[int, ...]
) -> None:
    ranges: dict[Path, list[tuple[int, int]]] = {}
    held = routes_by_stage(table)
    for stage, routes in enumerate(held):
        for spec in specs_of(routes):
            # The draft's copy of the embeddings is the one tensor that two stages read.
            if stage == 0 or spec.name != "model.embed_tokens.weight":
                ranges.setdefault(spec.file, []).append((spec.start, spec.end))
    for spans in ranges.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    served = {route.module: route for routes in held for route in routes}
    total_bytes = sum(end - start for spans in ranges.values() for start, end in spans)
    assert total_bytes == sum(route.stored_bytes for route in served.values())


def test_bytes_per_rank_are_those_of_the_stages(
    table: RouteTable, partition: tuple[int, ...]
) -> None:
    held = routes_by_stage(table)
    sizes = tuple(sum(route.served_bytes for route in routes) for routes in held)
    assert table.bytes_per_rank() == sizes


def test_a_stage_reads_its_own_bytes_only(
    tmp_path: Path, partition: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All reads of a small model of the same 78 layers, as the operating system sees them."""
    small = make_plan(tmp_path, TINY_GLM | SHARED | {"num_hidden_layers": 78}, shards=16)
    table = load_route_table(small, Layout(pipeline_parallel_size=STAGES), CPU)
    reads: list[tuple[Path, int, int]] = []
    preadv = os.preadv

    def spy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        reads.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", spy)
    for routes in routes_by_stage(table):
        reads.clear()
        specs = specs_of(routes)
        assert sum(1 for _ in read_tensors(specs)) == len(specs)
        wanted = [(spec.file.resolve(), spec.start, spec.end) for spec in specs]
        assert _joined(reads) == _joined(wanted)


# Against vLLM's own classes. The CPU has no sparse attention: models/dsa.py serves GLM-5 as dense
# MLA with its indexers beside, so that all of them, but those of sparse attention, are vLLM's.

STACKED = {
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "wk": "wk_weights_proj",
    "weights_proj": "wk_weights_proj",
}


@pytest.fixture(scope="module")
def vllm_stages(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    """What vLLM's model of each stage has for parameters, and the loader would read for it."""
    folder = tmp_path_factory.mktemp("vllm")
    compose(plan, folder / "mixed")
    partitions = {
        "" if name == "even" else ",".join(map(str, counts)): counts
        for name, counts in PARTITIONS.items()
    }
    environment = {
        name: value for name, value in os.environ.items() if name != "VLLM_PP_LAYER_PARTITION"
    } | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.loading.stage_modules"]
    command += [str(folder / "mixed"), str(STAGES), str(folder / "out.json"), *partitions]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    found = json.loads((folder / "out.json").read_text())
    return {partitions[spelt]: stages for spelt, stages in found.items()}


def test_loader_reads_what_each_stage_of_vllm_holds(
    target_table: RouteTable, partition: tuple[int, ...], vllm_stages: dict
) -> None:
    for found, routes in zip(vllm_stages[partition], routes_by_stage(target_table), strict=True):
        assert found["modules"] == [route.module for route in routes]


def test_another_partition_is_told_apart(
    target_table: RouteTable, partition: tuple[int, ...], vllm_stages: dict
) -> None:
    (other,) = set(PARTITIONS.values()) - {partition}
    for found, routes in zip(vllm_stages[other], routes_by_stage(target_table), strict=True):
        assert found["modules"] != [route.module for route in routes]


def test_each_stage_of_vllm_has_a_place_for_what_is_read_and_no_other(
    partition: tuple[int, ...], vllm_stages: dict
) -> None:
    for found in vllm_stages[partition]:
        places = {_vllm_layer(parameter.rpartition(".")[0]) for parameter in found["parameters"]}
        assert {_vllm_layer(module) for module in found["modules"]} == places


def test_draft_holds_the_mtp_layer_on_the_last_stage(
    draft_table: RouteTable, partition: tuple[int, ...], vllm_stages: dict
) -> None:
    target, draft = vllm_stages[partition][LAST], vllm_stages[partition][LAST]["draft"]
    held = {route.module for route in routes_by_stage(draft_table)[LAST]} - set(target["modules"])
    # The MTP layer's own copies of embeddings and head may be read; vLLM puts the model's in
    # their place.
    assert set(draft["modules"]) - held <= set(MTP_COPIES)
    assert held - set(draft["modules"]) <= {"model.embed_tokens"}


def _vllm_layer(name: str) -> str:
    """Name the layer of vLLM that a module of the base, or of vLLM, is part of."""
    if ".experts" in name and ".shared_experts" not in name:
        return name[: name.index(".experts")] + ".experts"
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{STACKED.get(leaf, leaf)}"


def _joined(spans: Iterable[tuple[Path, int, int]]) -> list[tuple[Path, int, int]]:
    """Sort spans of bytes and join those that touch; those that overlap stay apart."""
    joined: list[tuple[Path, int, int]] = []
    for file, start, end in sorted(spans):
        if joined and joined[-1][0] == file and joined[-1][2] == start:
            file, start, _ = joined.pop()
        joined.append((file, start, end))
    return joined
