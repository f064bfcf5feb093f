# SPDX-License-Identifier: Apache-2.0
"""A quantization_config that is not what its tool writes is refused."""

from typing import Any

import pytest

from tests.checkpoint.formats.stored import GPTQ, gptq_specs
from vllm_mixprec.checkpoint.formats import QuantizationConfig, recognise
from vllm_mixprec.errors import CheckpointError


def groups(targets: Any = ("Linear",), **weights: Any) -> dict[str, Any]:
    group = {"targets": list(targets) if isinstance(targets, tuple) else targets}
    made = {"quant_method": "compressed-tensors"}
    return {**made, "config_groups": {"group_0": {**group, "weights": weights}}}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("gptq", " is 'gptq', expected an object"),
        ({**GPTQ, "dynamic": [1]}, r"dynamic is \[1\], expected an object of objects"),
        ({**GPTQ, "extra_config": {"a": 8}}, "extra_config is .*, expected an object of objects"),
        ({"quant_method": 3}, "quant_method is 3, expected of type str"),
        ({**GPTQ, "bits": "4"}, "bits is '4', expected of type int"),
        ({**GPTQ, "sym": "yes"}, "sym is 'yes', expected of type bool"),
        ({**GPTQ, "bits": None}, "bits and group_size is .None, 128., expected two integers"),
        ({**GPTQ, "group_size": 0}, "group_size is 0, expected -1 or a positive"),
        ({**GPTQ, "dynamic": {"+:(": {"bits": 8}}}, "dynamic is '.*', expected a regular expr"),
        (
            {**GPTQ, "dynamic": {"+:a{99999999999999999999}": {"bits": 8}}},
            "dynamic is 'a{9{20}}', expected a regular expression .*too large",
        ),
        (
            {**GPTQ, "extra_config": {"(" * 1500 + ")" * 1500: {"bits": 8}}},
            r"extra_config is '.*\(+\.\.\., expected a regular expression .*recursion",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "expected two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "expected two positive integers"),
        ({**GPTQ, "extra_config": {"(": {"bits": 8}}}, "extra_config is '.*', expected a regular"),
        ({"quant_method": "awq", "zero_point": 1}, "zero_point is 1, expected of type bool"),
        (groups(targets="Linear"), "group_0.targets is 'Linear', expected a list of strings"),
        (groups(targets=("re:(",)), "group_0.targets is '.*', expected a regular expression"),
        (groups(num_bits="4"), "group_0.weights.num_bits is '4', expected of type int"),
        (groups(group_size="32"), "weights.group_size is '32', expected of type int"),
        (groups(strategy="group"), "weights.group_size is None, expected a positive integer"),
        (groups(strategy="block"), "weights.block_structure is None, expected two positive"),
        (
            {**groups(), "config_groups": {"g": {"weights": "int4"}}},
            "config_groups.g.weights is 'int4', expected an object",
        ),
        ({**groups(), "ignore": "lm_head"}, "ignore is 'lm_head', expected a list of strings"),
    ],
)
def test_malformed_quantization_config_is_refused(config: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config.*{match}"):
        recognise("m", gptq_specs(256, 96, 128), config)


def test_parsed_config_may_be_passed_for_many_modules() -> None:
    config = QuantizationConfig.parse(GPTQ)
    tensors = gptq_specs(256, 96, 128)
    assert recognise("m", tensors, config) == recognise("m", tensors, GPTQ)
