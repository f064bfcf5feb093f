# SPDX-License-Identifier: Apache-2.0
"""Names of one module that are equal, and those that vLLM's classes take."""

from pathlib import Path

import pytest

from tests.spellings import MIXTRAL, RANDOM, as_auto_round, read_all, respell, stack, write
from vllm_mixprec.checkpoint import open_checkpoint
from vllm_mixprec.checkpoint.spelling import canonical_name, class_name

EXPERT = "layers.3.mlp.experts.12"


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (
            (
                "model.layers.3.mlp.experts.12.gate_proj",
                "model.layers.3.block_sparse_moe.experts.12.w1",
                "model.layers.3.block_sparse_moe.experts.12.gate_proj",
                "language_model.model.layers.3.mlp.experts.12.w1",
                "model.language_model.layers.3.mlp.experts.12.gate_proj",
            ),
            f"{EXPERT}.gate_proj",
        ),
        (("model.layers.3.block_sparse_moe.experts.12.w2",), f"{EXPERT}.down_proj"),
        (("model.layers.3.block_sparse_moe.experts.12.w3",), f"{EXPERT}.up_proj"),
        (("model.layers.3.block_sparse_moe.gate",), "layers.3.mlp.gate"),
        (("lm_head", "language_model.lm_head"), "lm_head"),
        (("model.embed_tokens", "language_model.model.embed_tokens"), "embed_tokens"),
        (("model",), "model"),
        # Not an expert's: such a w1 is a dense layer's own name.
        (("model.layers.3.feed_forward.w1",), "layers.3.feed_forward.w1"),
        (
            ("visual.blocks.0.qkv", "model.visual.blocks.0.qkv"),
            "visual.blocks.0.qkv",
        ),
    ],
)
def test_spellings_of_one_module_have_one_name(spellings: tuple[str, ...], name: str) -> None:
    assert {canonical_name(spelling) for spelling in spellings} == {name}


def test_a_class_is_given_its_own_spelling() -> None:
    mixtral, qwen = {"model_type": "mixtral"}, {"model_type": "qwen3_moe"}
    nested = {"model_type": "qwen3_vl_moe", "text_config": {}}
    gate = "model.layers.0.mlp.gate.weight"
    assert class_name(gate, mixtral) == "model.layers.0.block_sparse_moe.gate.weight"
    assert class_name(gate, qwen) == gate
    wrapped = "language_model.model.layers.0.mlp.gate.weight"
    assert class_name(wrapped, qwen) == gate
    assert class_name(wrapped, nested) == wrapped
    assert class_name("language_model.lm_head.weight", qwen) == "lm_head.weight"
    assert class_name("lm_head.weight", mixtral) == "lm_head.weight"


def test_a_module_is_found_by_any_spelling() -> None:
    checkpoint = open_checkpoint(MIXTRAL / "bf16")
    for projection, spelled in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        found = checkpoint.find(f"language_model.model.layers.1.mlp.experts.2.{projection}")
        assert found is checkpoint.modules[f"model.layers.1.block_sparse_moe.experts.2.{spelled}"]
    assert checkpoint.find("model.layers.1.mlp.experts.4.gate_proj") is None
    assert checkpoint.find("model.layers.1.mlp.experts.2.gate_up_proj") is None


def test_two_spellings_of_one_module_are_a_problem_of_both(tmp_path: Path) -> None:
    def both(tensors):
        expert = "model.layers.0.block_sparse_moe.experts.1."
        one = {k: v.clone() for k, v in tensors.items() if k.startswith(expert)}
        return tensors | as_auto_round(one)

    checkpoint = open_checkpoint(respell(tmp_path / "both", MIXTRAL / "bf16", both))
    sound = open_checkpoint(MIXTRAL / "bf16")
    assert not any(module.problems for module in sound.modules.values())
    experts = "model.layers.0.block_sparse_moe.experts"
    clash = (
        f"{experts}.1.gate_proj: the same module as {experts}.1.w1, which these files hold too; "
        "expected one spelling of it. Remove one of the two, or choose another source."
    )
    assert checkpoint.modules[f"{experts}.1.w1"].problems == (clash,)
    assert checkpoint.modules[f"{experts}.1.gate_proj"].problems == (clash,)
    assert checkpoint.modules[f"{experts}.0.w1"].problems == ()
    found = checkpoint.find("model.layers.0.mlp.experts.1.gate_proj")
    assert found is not None and found.problems == (clash,)


def test_an_expert_both_in_a_stack_and_by_itself_is_a_problem(tmp_path: Path) -> None:
    tensors = read_all(RANDOM / "bf16")
    expert = "model.layers.0.mlp.experts.3.gate_proj"
    both = stack()(tensors) | {f"{expert}.weight": tensors[f"{expert}.weight"]}
    checkpoint = open_checkpoint(write(tmp_path / "both", RANDOM / "bf16", both))
    (problem,) = checkpoint.modules[expert].problems
    names = {expert, "model.layers.0.mlp.experts.gate_up_proj"}
    first, _, text = problem.partition(": ")
    assert first in names and (names - {first}).pop() in text
    assert not checkpoint.modules["model.layers.0.mlp.experts.2.gate_proj"].problems
