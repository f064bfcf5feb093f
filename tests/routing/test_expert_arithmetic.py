# SPDX-License-Identifier: Apache-2.0
"""Experts that compute more than silu(gate) * up, which is all that packed kernels of CPUs do."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.routing.headers import TINY_GLM, Header, glm_header, write_checkpoint
from tests.routing.models import CPU, make_plan, only
from vllm_mixprec.routing import Platform, Report, check
from vllm_mixprec.routing.structure import ExpertArithmetic, ModelDims

EXPERTS = "model.layers.*.mlp.experts.*"
GPU = Platform("cuda-90")
LLAMA4: dict[str, Any] = {"model_type": "llama4_text"}
GELU: dict[str, Any] = {"hidden_act": "gelu"}


def check_experts(
    folder: Path,
    platform: Platform = CPU,
    *,
    biases: bool = False,
    layout: dict[str, Any] | None = None,
    missing_kernel: str = "dequantize",
    match: str = "**.mlp.experts",
    **changes: Any,
) -> Report:
    """Check a GLM whose routed experts, in layers 1 to 3, are FP8, with changes of its config."""
    config = TINY_GLM | {"num_nextn_predict_layers": 0} | changes
    for name in ("bf16", "fp8"):
        header = glm_header(config, fp8=name == "fp8")
        if biases:
            header |= _biases(header)
        write_checkpoint(folder / name, config, header)
    rule = (match, "fp8")
    sources = ("bf16", "fp8")
    plan = make_plan(rule, folder=folder, sources=sources, missing_kernel=missing_kernel)
    return check(plan, platform=platform, **layout or {})


def _biases(header: Header) -> Header:
    return {
        f"{name.removesuffix('weight')}bias": ("BF16", shape[:1])
        for name, (_, shape) in header.items()
        if ".mlp.experts." in name and name.endswith(".weight")
    }


def served(report: Report) -> dict[int, set[str]]:
    """Layer -> the labels in which its routed experts are served."""
    assert report.table is not None, report.findings
    return {
        int(layer.split(".")[2]): {
            group.scheme.label for group in report.table.expert_groups(layer)
        }
        for layer in report.table.expert_layers
    }


def test_plain_experts_are_packed(tmp_path: Path) -> None:
    report = check_experts(tmp_path)
    assert served(report) == dict.fromkeys((1, 2, 3), {"fp8_block 128x128"})
    assert "kernel-missing" not in {finding.code for finding in report.findings}


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        (GELU, "gelu"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        (LLAMA4, "silu of weighed inputs"),
        ({"biases": True}, "silu with biases"),
    ],
)
def test_other_experts_are_widened_on_a_cpu(
    tmp_path: Path, changes: dict[str, Any], computed: str
) -> None:
    report = check_experts(tmp_path, **changes)
    finding = only(report, "kernel-missing")
    assert (finding.level, finding.where) == ("warning", EXPERTS)
    assert f"its experts compute plain silu, not {computed}; dequantised" in finding.message
    assert "costs" in finding.message
    assert served(report) == dict.fromkeys((1, 2, 3), {"bf16"})


@pytest.mark.parametrize("changes", [GELU, LLAMA4, {"biases": True}, {"swiglu_limit": 7.0}])
def test_other_experts_are_packed_on_a_gpu(tmp_path: Path, changes: dict[str, Any]) -> None:
    """By vLLM's own methods, which know these or refuse them."""
    report = check_experts(tmp_path, GPU, **changes)
    assert served(report) == dict.fromkeys((1, 2, 3), {"fp8_block 128x128"})


def test_other_experts_under_missing_kernel_error(tmp_path: Path) -> None:
    report = check_experts(tmp_path, missing_kernel="error", **GELU)
    finding = only(report, "kernel-missing")
    assert (finding.level, report.ok) == ("error", False)
    assert "set missing_kernel: dequantize" in finding.message


@pytest.mark.parametrize("platform", ["cpu-avx512", "cpu-other"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_limit": 7.0}, "compute silu clamped at 7; .* leaves the clamp out. Serve this"),
        ({"mlp_hidden_act": "relu2"}, "compute relu2; .* has no such activation. Serve this"),
    ],
)
def test_experts_that_no_kernel_of_a_cpu_computes_are_an_error(
    tmp_path: Path, platform: str, changes: dict[str, Any], message: str
) -> None:
    finding = only(check_experts(tmp_path, Platform(platform), **changes), "kernel-missing")
    assert finding.level == "error"
    assert re.search(message, finding.message)


def test_clamped_experts_are_an_error_unquantised_too(tmp_path: Path) -> None:
    """vLLM would serve them, and leave the clamp out without a word."""
    experts = "model.layers.1.mlp.experts"
    finding = only(
        check_experts(tmp_path, match=experts, swiglu_limits=[0, 0, 7.0, 0]), "kernel-missing"
    )
    assert finding.level == "error" and "leaves the clamp out" in finding.message
    assert "4 modules, e.g. model.layers.2.mlp.experts.0" in finding.message


def test_clamps_are_told_by_layer(tmp_path: Path) -> None:
    finding = only(check_experts(tmp_path, swiglu_limits=[0, 0, 7.0, None]), "kernel-missing")
    assert finding.level == "error"
    assert "4 modules, e.g. model.layers.2.mlp.experts.0" in finding.message


def test_other_experts_over_expert_parallel_ranks_are_an_error(tmp_path: Path) -> None:
    """vLLM's kernel for CPUs dies there (quant/methods.py refuses it)."""
    layout = {"tensor_parallel_size": 2, "expert_parallel": True}
    finding = only(check_experts(tmp_path, layout=layout, **GELU), "kernel-missing")
    assert finding.level == "error"
    assert "takes other ranks' experts for its own. Leave expert parallelism out." in (
        finding.message
    )
    assert check_experts(tmp_path, layout=layout | {"tensor_parallel_size": 1}, **GELU).ok


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ExpertArithmetic()),
        ({"hidden_act": "swish", "swiglu_limit": None}, ExpertArithmetic()),
        # As Nemotron-H, whose hidden_act would be another part's.
        ({"hidden_act": "silu", "mlp_hidden_act": "relu2"}, ExpertArithmetic("relu2")),
        ({"swiglu_limit": 10}, ExpertArithmetic(limit=10.0)),
        ({"text_config": LLAMA4}, ExpertArithmetic(weighs_inputs=True)),
        ({"moe_apply_router_weight_on_input": True}, ExpertArithmetic(weighs_inputs=True)),
    ],
)
def test_arithmetic_is_read_of_the_config(
    config: dict[str, Any], expected: ExpertArithmetic
) -> None:
    assert ModelDims.from_config(config).expert_arithmetic("model.layers.1.mlp.experts") == expected
