# SPDX-License-Identifier: Apache-2.0
"""What loading checks in the data, because no header tells it, and what the loader refuses."""

import re
from pathlib import Path

import pytest
import torch
from vllm.config import LoadConfig, VllmConfig

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
