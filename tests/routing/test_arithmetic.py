# SPDX-License-Identifier: Apache-2.0
"""Configs of one size that have the same weights compute something else."""

from pathlib import Path
from typing import Any

import pytest

from tests.routing.models import CPU, edit_json, make_plan, only
from vllm_mixprec.routing import Report, check

BY_TYPE = {"rope_theta": 1e4}  # of layers of one type
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def compare(models: Path, base: dict[str, Any], source: dict[str, Any]) -> Report:
    """Check a plan over two fixtures whose configs were changed; None removes a key."""
    edit_json(models / "bf16" / "config.json", **base)
    edit_json(models / "gptq" / "config.json", **source)
    return check(make_plan(("**.experts", "gptq"), folder=models), platform=CPU)


@pytest.mark.parametrize(
    ("base", "source", "said"),
    [
        ({}, {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, not 1e-06"),
        ({}, {"norm_topk_prob": False}, "norm_topk_prob is False, not True"),
        ({}, {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({}, {"tie_word_embeddings": True}, "tie_word_embeddings is True, not False"),
        (
            {"routed_scaling_factor": 2.5},
            {"routed_scaling_factor": 1.0},
            "routed_scaling_factor is 1.0, not 2.5",
        ),
        ({"scoring_func": "sigmoid"}, {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        (
            {},
            {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
            "rope_theta is 5000000.0, not 10000.0",
        ),
        ({}, {"rope_parameters": None, "rope_theta": 5e6}, "rope_theta is 5000000.0, not 10000.0"),
        (
            {},
            {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": YARN},
            "rope_type is 'yarn', not 'default'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}},
            {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": YARN},
            "factor is 4.0, not 8.0",
        ),
        (
            {"rope_parameters": {"full": BY_TYPE}},
            {"rope_parameters": {"full": BY_TYPE | {"rope_theta": 5e6}}},
            "full.rope_theta is 5000000.0, not 10000.0",
        ),
    ],
)
def test_other_arithmetic_is_a_warning(
    models: Path, base: dict[str, Any], source: dict[str, Any], said: str
) -> None:
    report = compare(models, base, source)
    finding = only(report, "config-differs")
    assert finding.level == "warning" and report.ok
    assert finding.where == str(models / "gptq" / "config.json")
    assert "source 'gptq' computes otherwise than base 'bf16'" in finding.message
    assert f": {said}" in finding.message


@pytest.mark.parametrize(
    ("base", "source"),
    [
        ({}, {}),
        ({}, {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": None}),
        ({}, {"rope_parameters": None}),
        ({}, {"rms_norm_eps": None, "norm_topk_prob": None, "hidden_act": "swish"}),
        ({}, {"sliding_window": 4096, "max_position_embeddings": 4096}),
        (
            {"rope_parameters": {**YARN, "type": None, "rope_type": "yarn", "rope_theta": 1e4}},
            {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": YARN},
        ),
        # As vLLM and transformers spell them in the config that is served.
        (
            {"rope_parameters": {"rope_type": "mrope"}},
            {"rope_parameters": {"rope_type": "default"}},
        ),
        ({"rope_parameters": {"full": BY_TYPE}}, {"rope_parameters": {"full": BY_TYPE | YARN}}),
    ],
)
def test_other_spelling_and_absence_are_none(
    models: Path, base: dict[str, Any], source: dict[str, Any]
) -> None:
    assert "config-differs" not in {f.code for f in compare(models, base, source).findings}


def test_unused_source_is_not_compared(models: Path) -> None:
    edit_json(models / "gptq" / "config.json", rms_norm_eps=1e-5)
    assert check(make_plan(("**.experts", "fp8"), folder=models), platform=CPU).findings == ()
