# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3's layers over 8 pipeline stages of 8 tensor-parallel ranks: what one rank reads."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loading.serving import needs_cpu
from tests.routing.headers import DEEPSEEK_V3, glm_header, gptq_experts, write_checkpoint
from tests.routing.models import CPU, make_plan
from vllm_mixprec import compose
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.composition import PLAN_FILE
from vllm_mixprec.loading.rows import rank_rows, shared_tensors
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Layout, RouteTable, load_route_table
from vllm_mixprec.routing.parallel import Placement
from vllm_mixprec.routing.structure import ModelDims

ROOT = Path(__file__).parents[2]
LAYOUT = Layout(tensor_parallel_size=8, pipeline_parallel_size=8)
STAGE, TP_RANK = 3, 5
LAYERS = range(22, 30)  # vLLM splits 61 layers into 7, 7, 8, 8, 8, 8, 8, 7
SHARDS = 122
# DeepSeek-V3 with everything small that may be: eight ranks cut no block and no group.
SMALL = DEEPSEEK_V3 | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "n_routed_experts": 16,
}
INT4_EXPERTS = range(4, 16)

_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_audit)  # cannot be taken off again; it does nothing but in shards_opened


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    plain = glm_header(SMALL)
    write_checkpoint(folder / "fp8", SMALL, glm_header(SMALL, fp8=True), SHARDS)
    write_checkpoint(folder / "int4", SMALL, gptq_experts(plain), SHARDS)
    plan = Plan.from_dict(
        {
            "version": 1,
            "base": "fp8",
            "sources": {name: {"path": str(folder / name)} for name in ("fp8", "int4")},
            "rules": [{"match": "model.layers.{0-60}.mlp.experts.{4-15}", "source": "int4"}],
        }
    )
    compose(plan, folder / "mixed")
    return folder / "mixed"


@pytest.fixture(scope="module")
def table(composed: Path) -> RouteTable:
    return load_route_table(Plan.from_yaml(composed / PLAN_FILE), LAYOUT, CPU)


def shards_opened(action: Any) -> set[str]:
    """Run ``action`` and return the shards that this opened, as SOURCE/FILE."""
    global _opened
    _opened = []
    try:
        action()
        paths = [Path(name) for name in _opened if name.endswith(".safetensors")]
        return {f"{path.parent.name}/{path.name}" for path in paths}
    finally:
        _opened = None


def routes_of_stage(table: RouteTable, stage: int) -> list[Any]:
    placement = Placement(table.layout, ModelDims.from_config(table.base_config))
    return [route for name, route in table.routes.items() if stage in placement.stages(name)]


def source_of(module: str) -> str:
    part = module.split(".mlp.experts.")[1:]
    return "int4" if part and int(part[0].split(".")[0]) in INT4_EXPERTS else "fp8"


def indexed(composed: Path) -> list[tuple[str, str, str]]:
    """(source, tensor, shard) of what the layers of the stage hold, from the indexes alone."""
    found = []
    for source in ("fp8", "int4"):
        index = composed / "sources" / source / "model.safetensors.index.json"
        for tensor, shard in json.loads(index.read_text())["weight_map"].items():
            layer = tensor.partition("model.layers.")[2].partition(".")[0]
            if layer and int(layer) in LAYERS and source_of(tensor) == source:
                found.append((source, tensor, shard))
    return found


def test_resolving_opens_no_shard(composed: Path) -> None:
    def resolve() -> None:
        load_route_table(Plan.from_yaml(composed / PLAN_FILE), LAYOUT, CPU)

    assert shards_opened(resolve) == set()
    for source in ("fp8", "int4"):
        (composed / "sources" / source / "mixprec_headers").rename(composed / source)
    try:
        assert len(shards_opened(resolve)) > SHARDS  # what is counted would be seen
    finally:
        for source in ("fp8", "int4"):
            (composed / source).rename(composed / "sources" / source / "mixprec_headers")


def test_rank_opens_the_shards_of_its_layers_only(composed: Path, table: RouteTable) -> None:
    specs = [spec for route in routes_of_stage(table, STAGE) for spec in route.tensors.values()]
    opened = shards_opened(lambda: list(read_tensors(specs)))
    assert opened == {f"{source}/{shard}" for source, _, shard in indexed(composed)}
    assert len(opened) < 2 * SHARDS / 4


def test_rank_reads_an_eighth_of_what_is_cut_along_rows(
    composed: Path, table: RouteTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = {}
    headers = {"fp8": glm_header(SMALL, fp8=True), "int4": gptq_experts(glm_header(SMALL))}
    item_bytes = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4}
    for source, tensor, _ in indexed(composed):
        dtype, shape = headers[source][tensor]
        nbytes = math.prod(shape) * item_bytes[dtype]
        module, _, suffix = tensor.rpartition(".")
        leaf = module.rpartition(".")[2]
        rows_cut = leaf in ("gate_proj", "up_proj", "q_b_proj", "kv_b_proj")
        if suffix == "qweight":  # (K / 8, N)
            rows_cut = leaf == "down_proj"
        by_hand[tensor] = nbytes // 8 if rows_cut and nbytes >= 65536 else nbytes
    assert sum(by_hand.values()) < 0.6 * sum(
        math.prod(headers[s][t][1]) * item_bytes[headers[s][t][0]] for s, t, _ in indexed(composed)
    )

    asked = []
    real = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(len(buffer) for buffer in buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    routes = routes_of_stage(table, STAGE)
    specs = [spec for route in routes for spec in route.tensors.values()]
    found = dict(read_tensors(specs, rank_rows(routes, table, TP_RANK)))
    assert sum(asked) == sum(by_hand.values())
    spec = table.routes["model.layers.25.mlp.experts.0.gate_proj"].tensors["weight"]
    assert tuple(found[spec].shape) == (1024, 256) and found[spec].ahead[0] == range(640, 768)


@pytest.mark.parametrize(
    "module, suffix, rank, expected",
    [
        ("model.layers.25.self_attn.q_b_proj", "weight", 0, range(0, 384)),
        ("model.layers.25.self_attn.q_b_proj", "weight", 7, range(2688, 3072)),
        ("model.layers.25.mlp.experts.5.down_proj", "qweight", 1, range(16, 32)),
        ("model.embed_tokens", "weight", 2, range(128, 192)),
    ],
)
def test_rows_of_a_rank(
    table: RouteTable, module: str, suffix: str, rank: int, expected: range
) -> None:
    route = table.routes[module]
    assert rank_rows([route], table, rank)[route.tensors[suffix]] == expected


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.25.self_attn.o_proj",  # cut along columns
        "model.layers.25.self_attn.q_a_proj",  # replicated
        "model.layers.25.mlp.experts.5.gate_proj",  # GPTQ: (K / 8, N), cut along N
    ],
)
def test_what_is_not_cut_along_rows_is_read_whole(table: RouteTable, module: str) -> None:
    assert rank_rows([table.routes[module]], table, TP_RANK) == {}


@pytest.mark.parametrize(
    "layout, shared",
    [
        (Layout(), {}),
        (Layout(pipeline_parallel_size=8), {}),
        (
            Layout(tensor_parallel_size=8),
            {"embed": False, "q_b": False, "o": True, "gate": True, "down": False, "norm": True},
        ),
        (
            Layout(tensor_parallel_size=8, expert_parallel=True),
            {"embed": False, "q_b": False, "o": True, "gate": False, "down": False, "norm": True},
        ),
        (
            Layout(data_parallel_size=2, tensor_parallel_size=4),
            {"embed": True, "q_b": True, "o": True, "gate": True, "down": False, "norm": True},
        ),
        (
            Layout(data_parallel_size=2, expert_parallel=True),
            {"embed": True, "q_b": True, "o": True, "gate": False, "down": False, "norm": True},
        ),
    ],
    ids=str,
)
def test_what_other_ranks_read_as_well_is_known(
    composed: Path, layout: Layout, shared: dict[str, bool]
) -> None:
    table = load_route_table(Plan.from_yaml(composed / PLAN_FILE), layout, CPU)
    modules = {
        "embed": ("model.embed_tokens", "weight"),
        "q_b": ("model.layers.25.self_attn.q_b_proj", "weight"),
        "o": ("model.layers.25.self_attn.o_proj", "weight"),
        "gate": ("model.layers.25.mlp.experts.5.gate_proj", "qweight"),  # (K / 8, N), cut along N
        "down": ("model.layers.25.mlp.experts.5.down_proj", "qweight"),
        "norm": ("model.layers.25.input_layernorm", "weight"),
    }
    routes = [table.routes[module] for module, _ in modules.values()]
    found = shared_tensors(routes, table, rank_rows(routes, table, tp_rank=0))
    specs = {
        name: table.routes[module].tensors[suffix] for name, (module, suffix) in modules.items()
    }
    assert {name: spec in found for name, spec in specs.items()} == dict.fromkeys(
        specs, False
    ) | shared


@pytest.mark.parametrize("parts, is_shared", [(8, False), (4, True)])
def test_ranks_that_share_a_key_value_head_read_the_same(
    table: RouteTable, parts: int, is_shared: bool
) -> None:
    """Four heads on eight ranks, as of Qwen3-30B-A3B: each rank reads a quarter."""
    route = table.routes["model.layers.25.self_attn.kv_b_proj"]
    spec = route.tensors["weight"]
    rows = {spec: range(spec.shape[0] // parts)}
    assert (spec in shared_tensors([route], table, rows)) == is_shared


@pytest.mark.parametrize("dp_rank, expected", [(0, range(32, 48)), (1, range(96, 112))])
def test_experts_are_cut_over_the_ranks_of_all_replicas(
    composed: Path, dp_rank: int, expected: range
) -> None:
    layout = Layout(tensor_parallel_size=4, data_parallel_size=2)
    table = load_route_table(Plan.from_yaml(composed / PLAN_FILE), layout, CPU)
    route = table.routes["model.layers.25.mlp.experts.5.down_proj"]
    assert rank_rows([route], table, 2, dp_rank)[route.tensors["qweight"]] == expected


@needs_cpu
def test_models_of_vllm_are_filled_as_from_whole_tensors(tmp_path: Path) -> None:
    plan = make_plan(
        ("model.layers.0.**.experts", "gptq"), ("**.experts.{0-3}", "fp8"), ("**.self_attn", "fp8")
    )
    compose(plan, tmp_path / "mixed")
    environment = dict(os.environ) | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.loading.rank_weights"]
    command += [str(tmp_path / "mixed"), str(tmp_path / "out.json")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    ranks = json.loads((tmp_path / "out.json").read_text())
    for found in ranks:
        assert found["unlike"] == [] and found["parameters"] > 20
        assert found["rows"] > 10 and found["bytes"] < 0.8 * found["whole_bytes"]
    assert ranks[0]["digest"] != ranks[1]["digest"]  # so what is compared tells ranks apart


def test_what_is_laid_out_anew_is_read_whole(table: RouteTable) -> None:
    """All of it is needed at once, however it is cut afterwards."""
    route = table.routes["model.layers.25.mlp.experts.5.down_proj"]
    relaid = route._replace(served=table.routes["model.layers.25.mlp.experts.0.down_proj"].served)
    assert relaid.relaid and rank_rows([route], table, TP_RANK)
    assert rank_rows([relaid], table, TP_RANK) == {}
