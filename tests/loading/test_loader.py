# SPDX-License-Identifier: Apache-2.0
"""What loading checks in the data, because no header tells it, and what the loader refuses."""

import re
from pathlib import Path

import pytest
import torch
from vllm.config import LoadConfig, VllmConfig

from tests.engine.dense import write_dense
from tests.loading.serving import needs_cpu, serve
from tests.routing.models import CPU, make_plan
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import PlanError, RouteError
from vllm_mixprec.loading.intake import check_order, check_zeros
from vllm_mixprec.loading.loader import MixPrecLoader, summarise
from vllm_mixprec.routing import load_route_table

MODULE = "model.layers.0.mlp.experts.0.gate_proj"


def route_of(source: str):
    table = load_route_table(make_plan(("**.experts", source)), None, CPU)
    return table.routes[MODULE]


def read(route, suffix: str) -> torch.Tensor:
    [(_, tensor)] = read_tensors([route.tensors[suffix]])
    return tensor


def test_rows_in_order_pass():
    route = route_of("gptq")
    check_order(route, read(route, "g_idx"))


def test_rows_out_of_order_stop_the_load():
    route = route_of("gptq")
    g_idx = read(route, "g_idx").flip(0).contiguous()
    name = re.escape(f"{MODULE}.g_idx")
    with pytest.raises(RouteError, match=rf"{name} in .*: rows are not grouped in order"):
        check_order(route, g_idx)


@pytest.mark.parametrize("source", ["gptq", "gptq-asym"])
def test_zero_points_that_keep_the_config_s_promise_pass(source):
    route = route_of(source)
    check_zeros(route, read(route, "qzeros"))


def test_zero_points_that_vary_under_sym_stop_the_load():
    route = route_of("gptq")
    qzeros = read(route, "qzeros").clone()
    qzeros[0, 0] += 1
    name = re.escape(f"{MODULE}.qzeros")
    with pytest.raises(RouteError, match=rf"{name} in .*: zero points vary .* expected 7"):
        check_zeros(route, qzeros)


def test_summary_names_sources_formats_and_what_is_widened(tmp_path: Path):
    plan = make_plan(("**.gate_proj", "fp8"))
    lines = summarise(load_route_table(plan, None, CPU).routes.values())
    assert any(re.match(r"from bf16: \d+ modules bf16", line) for line in lines)
    assert any(re.match(r"from fp8: 16 modules fp8_block 128x128", line) for line in lines)
    assert any(re.match(r"widened: 16 modules, \+0\.5 MiB in memory: ", line) for line in lines)


def test_model_without_a_plan_is_refused():
    with pytest.raises(PlanError, match=r"--load-format mixprec for a model without a plan"):
        MixPrecLoader(LoadConfig()).create_model(VllmConfig(), None)


@needs_cpu
@pytest.mark.parametrize("is_shown", [True, False])
def test_progress_is_shown_as_vllm_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_shown: bool
) -> None:
    sources = write_dense(tmp_path, "qwen3")
    base = sources.pop("bf16")
    rules = {"model.layers.*.mlp.*_proj": "fp8"}
    with serve(tmp_path, base, sources, rules, has_draft=False) as serving:
        serving.loader.load_config.use_tqdm_on_load = is_shown
        built = serving.build()
        capsys.readouterr()
        serving.loader.load_weights(built.model, built.model_config)
    bar = capsys.readouterr().err.split("\r")[-1]
    if not is_shown:
        assert "Loading mixprec weights" not in bar
        return
    routes = built.model.mixprec_intake.held.values()
    size = sum(route.stored_bytes for route in routes)
    shown = re.search(r"Loading mixprec weights: 100%.* ([\d.]+)k/([\d.]+)k ", bar)
    assert shown is not None, bar
    assert float(shown[1]) == float(shown[2]) == pytest.approx(size / 1024, abs=0.6)
