# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from tests.routing.headers import TINY_GLM, Header, glm_header, write_checkpoint
from tests.routing.models import CPU, make_plan, only
from vllm_mixprec.routing import Report, check
from vllm_mixprec.routing.fused import Unit, group_units, parse_expert, unquantized_reason


def test_siblings_of_a_fused_layer_are_one_unit_in_stacking_order() -> None:
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "kqov"]
    fused, single = group_units(names)
    assert fused == Unit(
        "model.layers.0.self_attn.{q_proj,k_proj,v_proj}",
        "linear",
        tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv"),
    )
    assert single.modules == ("model.layers.0.self_attn.o_proj",)


def test_all_projections_of_one_expert_are_one_unit() -> None:
    layer = "model.layers.3.mlp.experts"
    names = [f"{layer}.{e}.{p}_proj" for e in (0, 12) for p in ("down", "gate", "up")]
    first, second = group_units(names)
    assert (first.name, first.kind) == (f"{layer}.0", "experts")
    assert second.modules == tuple(f"{layer}.12.{p}_proj" for p in ("gate", "up", "down"))


def test_mixtral_projections_are_ordered_w1_w3_w2() -> None:
    layer = "model.layers.0.block_sparse_moe.experts.7"
    (unit,) = group_units([f"{layer}.w1", f"{layer}.w2", f"{layer}.w3"])
    assert unit.modules == (f"{layer}.w1", f"{layer}.w3", f"{layer}.w2")


def test_shared_expert_is_a_fused_layer_and_no_routed_expert() -> None:
    parent = "model.layers.3.mlp.shared_experts"
    units = group_units([f"{parent}.{p}_proj" for p in ("down", "gate", "up")])
    assert [unit.name for unit in units] == [
        f"{parent}.down_proj",
        f"{parent}.{{gate_proj,up_proj}}",
    ]
    assert {unit.kind for unit in units} == {"linear"}


def test_same_leaf_under_other_parents_is_not_fused() -> None:
    units = group_units(["model.layers.0.a.q_proj", "model.layers.0.b.k_proj"])
    assert [unit.name for unit in units] == ["model.layers.0.a.q_proj", "model.layers.0.b.k_proj"]


@pytest.mark.parametrize("parts", ["in_proj_qkv,in_proj_z", "in_proj_b,in_proj_a"])
def test_linear_attention_of_qwen3_5_is_two_fused_layers(parts: str) -> None:
    parent = "model.language_model.layers.0.linear_attn"
    names = [f"{parent}.{leaf}" for leaf in parts.split(",")]
    assert [unit.name for unit in group_units(reversed(names))] == [f"{parent}.{{{parts}}}"]


def test_w1_and_w3_are_fused_outside_of_an_expert_too() -> None:
    parent = "model.layers.0.feed_forward"
    first, second = group_units([f"{parent}.w{n}" for n in (1, 2, 3)])
    assert first == Unit(f"{parent}.{{w1,w3}}", "linear", (f"{parent}.w1", f"{parent}.w3"))
    assert second.modules == (f"{parent}.w2",)


def test_siblings_that_one_family_fuses_are_told_by_its_model_type() -> None:
    names = [f"model.layers.0.attention.{part}_proj" for part in "qkvb"]
    assert len(group_units(names)) == 2
    assert [unit.modules for unit in group_units(names, "bailing_hybrid")] == [tuple(names)]


def test_mix_of_a_layer_that_one_family_fuses_is_widened(tmp_path: Path) -> None:
    config = TINY_GLM | {"model_type": "bailing_hybrid", "num_hidden_layers": 1}
    config |= {"num_nextn_predict_layers": 0}
    parent = "model.layers.0.attention"
    for source in ("bf16", "fp8"):
        header: Header = {"model.norm.weight": ("BF16", (256,))}
        for part in "qkvb":
            header[f"{parent}.{part}_proj.weight"] = ("BF16", (256, 256))
            if source == "fp8" and part == "b":
                header[f"{parent}.b_proj.weight"] = ("F8_E4M3", (256, 256))
                header[f"{parent}.b_proj.weight_scale_inv"] = ("F32", (2, 2))
        write_checkpoint(tmp_path / source, config, header)
    rule = ("**.b_proj", "fp8")
    plan = make_plan(rule, folder=tmp_path, sources=("bf16", "fp8"))
    finding = only(check(plan, platform=CPU), "fused-mixed")
    assert (finding.level, finding.where) == (
        "warning",
        f"{parent}.{{q_proj,k_proj,v_proj,b_proj}}",
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.experts.x.gate_proj",
        "model.layers.0.mlp.experts.0.norm",
        "model.layers.0.mlp.experts.gate_up_proj",
        "gate_proj",
    ],
)
def test_other_modules_are_no_experts(name: str) -> None:
    assert parse_expert(name) is None


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("model.layers.0.self_attn.indexer.wk", "the indexer's fused wk and weights_proj"),
        ("model.layers.0.self_attn.indexer.weights_proj", "the indexer's fused wk"),
        ("model.layers.78.eh_proj", "the MTP layer's eh_proj"),
        ("model.layers.3.mlp.gate", "a router"),
        ("model.layers.0.block_sparse_moe.gate", "a router"),
        ("model.layers.0.mlp.shared_expert_gate", "the gate of a shared expert"),
        ("model.layers.78.shared_head.head", "the output head"),
        ("lm_head", "the output head"),
        ("model.embed_tokens", "the embeddings"),
    ],
)
def test_modules_that_vllm_never_packs_are_named(module: str, what: str) -> None:
    assert str(unquantized_reason(module)).startswith(f"vLLM holds {what}")


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.self_attn.indexer.wq_b",
        "model.layers.0.self_attn.wk",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.block.head",
    ],
)
def test_modules_that_vllm_packs_have_no_reason(module: str) -> None:
    assert unquantized_reason(module) is None


def check_q_rank(folder: Path, rank: int) -> Report:
    """Check a GLM whose q_a_proj has ``rank`` rows, its attention in FP8 blocks of 128 x 128."""
    config = TINY_GLM | {"q_lora_rank": rank, "num_nextn_predict_layers": 0}
    for name in ("bf16", "fp8"):
        write_checkpoint(folder / name, config, glm_header(config, fp8=name == "fp8"))
    rule = ("**.self_attn.*_proj*", "fp8")
    return check(make_plan(rule, folder=folder, sources=("bf16", "fp8")), platform=CPU)


def test_part_that_ends_inside_a_block_is_a_warning_with_its_cost(tmp_path: Path) -> None:
    """No block of whole 32 rows, as kernels take them, begins where q_a_proj's 144 rows end."""
    finding = only(check_q_rank(tmp_path, 144), "fused-seam")
    assert (finding.level, finding.where) == (
        "warning",
        "model.layers.*.self_attn.{q_a_proj,kv_a_proj_with_mqa}",
    )
    assert "q_a_proj ends inside a block: its 144 rows are no multiple of 128" in finding.message
    # 144 rows and 192 of kv_a_proj_with_mqa, of 256 columns, in BF16 for FP8 and four scales each.
    assert f"costs {4 * (336 * 256 - 2 * 4 * 4) / 1024:.1f} KiB" in finding.message


def test_part_that_ends_where_a_smaller_block_does_is_served_packed(tmp_path: Path) -> None:
    codes = {finding.code for finding in check_q_rank(tmp_path, 160).findings}
    assert "fused-seam" not in codes
