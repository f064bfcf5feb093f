# SPDX-License-Identifier: Apache-2.0
"""A quantization_config that is not what its tool writes, or tells of rotations, is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme

from tests.checkpoint.formats.stored import GPTQ, gptq_specs
from tests.spellings import RANDOM, respell
from vllm_mixprec.checkpoint import open_checkpoint
from vllm_mixprec.checkpoint.formats import QuantizationConfig, recognise
from vllm_mixprec.errors import CheckpointError, UnsupportedError


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
        (
            {**GPTQ, "extra_config": {"(a+)+": {"bits": 8}}},
            "extra_config is .*, expected a regular expression .a repeat of something",
        ),
        ({**GPTQ, "dynamic": {"+:a": None}}, "dynamic is .*, expected an object of objects"),
        ({**GPTQ, "dynamic": {"+:a": True}}, "dynamic is .*, expected an object of objects"),
        ({"quant_method": "awq", "zero_point": 1}, "zero_point is 1, expected of type bool"),
        (groups(targets="Linear"), "group_0.targets is 'Linear', expected a list of strings"),
        (groups(targets=("re:(",)), "group_0.targets is '.*', expected a regular expression"),
        (groups(num_bits="4"), "group_0.weights.num_bits is '4', expected of type int"),
        (groups(group_size="32"), "weights.group_size is '32', expected of type int"),
        (groups(strategy="group"), "weights.group_size is None, expected a positive integer"),
        (groups(strategy="block"), "weights.block_structure is None, expected two positive"),
        (groups(block_structure="128"), "block_structure is '128', expected two positive"),
        (groups(block_structure="0x128"), r"block_structure is \[0, 128\], expected two positive"),
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


HADAMARD = TransformScheme(
    type="hadamard", apply=[TransformArgs(targets=["Linear"], location="weight_input")]
)
TRANSFORM = TransformConfig(config_groups={"v": HADAMARD}).model_dump(mode="json")


@pytest.mark.parametrize("method", ["gptq", "auto-round", "compressed-tensors", "fp8", None])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transform_config", TRANSFORM),
        ("rotation", "hadamard"),
        ("rotation_config", {"hadamard_type": "hadamard", "block_size": 32}),
        ("spinquant_config", {"r1": True}),
    ],
)
def test_rotated_weights_are_refused(method: str | None, key: str, value: Any) -> None:
    match = f"^config.json: quantization_config.{key} is .*, expected none: the weights were multi"
    with pytest.raises(UnsupportedError, match=match) as error:
        QuantizationConfig.parse({**GPTQ, "quant_method": method, key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "own",
    [
        {"transform_config": {}},
        {"transform_config": TransformConfig(config_groups={}).model_dump(mode="json")},
        {"rotation": None, "rotation_config": {}, "spinquant_config": None},
    ],
)
def test_config_that_names_no_rotation_is_read(own: dict[str, Any]) -> None:
    assert QuantizationConfig.parse(GPTQ | own) == QuantizationConfig.parse(GPTQ)


def test_checkpoint_with_rotated_weights_is_refused(tmp_path: Path) -> None:
    folder = respell(tmp_path / "rotated", RANDOM / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["rotation"] = "random"
    (folder / "config.json").write_text(json.dumps(config))
    match = f"^{folder}/config.json: quantization_config.rotation is 'ran"
    with pytest.raises(UnsupportedError, match=match):
        open_checkpoint(folder)


@pytest.mark.parametrize("method", ["GPTQ", "gptq_marlin", "Gptq_Marlin"])
def test_spellings_of_a_method_that_vllm_reads_are_read(method: str) -> None:
    config = QuantizationConfig.parse({**GPTQ, "quant_method": method})
    assert config == QuantizationConfig.parse(GPTQ)
