# SPDX-License-Identifier: Apache-2.0
"""What vLLM's models of mixture-of-experts families fuse is what routing holds to one scheme."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm.model_executor.models.registry import ModelRegistry

from vllm_mixprec.routing.fused import group_units

FAMILIES = {
    "AfmoeForCausalLM": "afmoe",
    "BailingMoeV2_5ForCausalLM": "bailing_hybrid",
    "BailingMoeV3ForCausalLM": "bailing_hybrid",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "ExaoneMoEForCausalLM": "exaone_moe",
    "Gemma4ForCausalLM": "gemma4_text",
    "Glm4MoeForCausalLM": "glm4_moe",
    "InternLM2ForCausalLM": "internlm2",
    "K2HorizonForCausalLM": "k2_horizon",
    "Lfm2MoeForCausalLM": "lfm2_moe",
    "Llama4ForCausalLM": "llama4_text",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "MixtralForCausalLM": "mixtral",
    "OlmoHybridForCausalLM": "olmo_hybrid",
    "OlmoeForCausalLM": "olmoe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Step3p5ForCausalLM": "step3p5",
}


def packed_mappings(architecture: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each ``packed_modules_mapping`` in the file of a class, as it is written there.

    The file is not run: some import what is not installed here.
    """
    spec = find_spec(ModelRegistry.models[architecture].module_name)
    assert spec is not None and spec.origin is not None
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if node.targets[0].id == "packed_modules_mapping":
            for written in ast.walk(node.value):
                if isinstance(written, ast.Dict):
                    yield from ast.literal_eval(written).items()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_parts_of_a_fused_layer_are_one_unit(architecture: str) -> None:
    for fused, parts in packed_mappings(architecture):
        units = group_units([f"model.layers.0.m.{part}" for part in parts], FAMILIES[architecture])
        assert len(units) == 1, f"{fused}: {parts}"


def test_mappings_are_found() -> None:
    assert dict(packed_mappings("Qwen3_5MoeForCausalLM"))["in_proj_ba"] == [
        "in_proj_b",
        "in_proj_a",
    ]
