# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest

from tests.cli.conftest import MODELS
from tests.routing.models import FIXTURES, edit_tensors
from vllm_mixprec.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("bf16", "bf16"),
        ("fp8", "fp8_block 128x128"),
        ("gptq", "gptq int4 g128"),
        ("gptq-asym", "gptq int4 g64 asym"),
    ],
)
def test_checkpoint(run, source, label):
    result = run("inspect", MODELS / source)
    assert result.code == 0
    for text in ("Qwen3MoeForCausalLM", label, "routed experts", "embeddings", "no companions"):
        assert text in result.out


def test_checkpoint_as_json(run):
    result = run("inspect", MODELS / "gptq", "--json")
    found = result.json
    assert result.code == 0 and result.err == ""
    assert found["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (found["num_layers"], found["num_moe_layers"]) == (2, 2)
    assert (found["num_experts"], found["num_experts_per_tok"]) == (8, 3)
    assert [item["format"] for item in found["formats"]] == ["gptq int4 g128", "bf16"]
    assert found["problems"] == []
    kinds = found["bytes_by_kind"]
    assert set(kinds) == {
        "attention",
        "dense_mlp",
        "shared_experts",
        "routed_experts",
        "router",
        "embeddings",
        "other",
    }
    specs = open_checkpoint(MODELS / "gptq").tensors.values()
    assert sum(kinds.values()) == found["bytes"] == sum(spec.nbytes for spec in specs)
    # Two untied matrices (384, 256) in bf16.
    assert kinds["embeddings"] == 2 * 384 * 256 * 2
    assert kinds["dense_mlp"] == 0


def test_missing_shard_is_reported_with_exit_code_1(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(MODELS / "bf16", broken)
    (broken / "model-00002-of-00003.safetensors").unlink()
    result = run("inspect", broken)
    assert result.code == 1
    assert "model-00002-of-00003.safetensors: missing" in result.out
    assert "Download the shard" in result.out
    assert len(run("inspect", broken, "--json").json["problems"]) == 1


def test_companions_missing_and_left_over_are_reported(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(MODELS / "fp8", broken)
    scale = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    stray = "model.layers.0.mlp.gate.weight_scale_inv"

    def move_scale(tensors):
        tensors[stray] = tensors.pop(scale)

    edit_tensors(broken / "model.safetensors", move_scale)
    result = run("inspect", broken)
    assert result.code == 1
    assert "missing or left over (2)" in result.out
    assert f"{scale}: missing, though weight is F8_E4M3 [256, 256]" in result.out
    assert f"{stray}: left over" in result.out
    assert "Re-export the module" in result.out


def test_truncated_shard_names_file_and_bytes(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(MODELS / "fp8", broken)
    shard = broken / "model.safetensors"
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    result = run("inspect", broken)
    assert result.code == 1
    assert str(shard) in result.err and "expected" in result.err and "again" in result.err


def test_plan_shows_source_and_format_by_layer(run, mixed_plan):
    result = run("inspect", mixed_plan)
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()]
    assert ["0-1", "attention"] in [row[:2] for row in rows]
    assert any("0-3 int4 gptq int4 g128 as stored" in " ".join(row) for row in rows)
    assert any("4-7 bf16 bf16 as stored" in " ".join(row) for row in rows)


def test_source_that_is_not_there_is_told_with_the_plan_s_line(run, write_plan, tmp_path):
    plan = write_plan(("model.layers.0", "fp8"), fp8=tmp_path / "absent")
    line = next(n for n, text in enumerate(plan.read_text().splitlines(), 1) if '"fp8": {' in text)
    result = run("inspect", plan)
    assert result.code == 1
    assert f"{plan}:{line}: source 'fp8': {tmp_path / 'absent'}: no such directory" in result.err


def test_plan_as_json_says_what_is_widened_and_why(run, write_plan):
    plan = write_plan(("model.layers.1.self_attn.q_proj", "fp8"))
    found = run("inspect", plan, "--json").json
    layers = {layer["layer"]: layer["parts"] for layer in found["layers"]}
    assert list(layers) == [0, 1, None]
    assert all(part["widened"] is None for part in layers[0] + layers[None])
    [widened] = [part for part in layers[1] if part["widened"]]
    assert (widened["kind"], widened["source"], widened["modules"]) == ("attention", "fp8", 1)
    assert (widened["stored"], widened["served"]) == ("fp8_block 128x128", "bf16")
    assert "q_proj" in widened["widened"]
    assert widened["served_bytes"] == 2 * 256 * 256  # bf16
    [experts] = [part for part in layers[0] if part["kind"] == "routed_experts"]
    assert experts["experts"] == list(range(8))
    assert found["findings"]


def test_composed_directory_is_read_as_its_plan(run, mixed_plan, tmp_path):
    assert run("compose", mixed_plan, "-o", tmp_path / "mixed").code == 0
    found = run("inspect", tmp_path / "mixed", "--json").json
    assert found["type"] == "plan"
    assert found["path"] == str(tmp_path / "mixed" / "mixprec_plan.yaml")
    before = run("inspect", mixed_plan, "--json").json
    assert found["layers"] == before["layers"]
    assert found["bytes_by_source"] == before["bytes_by_source"]


def test_composed_directory_whose_plan_was_edited_is_refused(run, mixed_plan, tmp_path):
    assert run("compose", mixed_plan, "-o", tmp_path / "mixed").code == 0
    file = tmp_path / "mixed" / "mixprec_plan.yaml"
    file.write_text(file.read_text().replace("{0-3}", "{0-2}"))
    result = run("inspect", tmp_path / "mixed")
    assert result.code == 1 and result.out == ""
    assert result.err.startswith(f"error: {file}: SHA-256 of its content is ")
    assert "Compose the directory again." in result.err


def test_shard_in_place_of_its_directory(run):
    result = run("inspect", MODELS / "fp8" / "model.safetensors")
    assert result.code == 1
    said = f"vllm-mixprec inspect {MODELS / 'fp8'} shows what its directory holds."
    assert "model.safetensors: a shard of a checkpoint" in result.err and said in result.err


def test_empty_source_is_wrong_usage(run):
    result = run("inspect", "")
    assert result.code == 2
    assert "expected a directory, a hub id or a plan" in result.err


def test_malformed_config_is_explained(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps([1]))
    result = run("inspect", tmp_path)
    assert result.code == 1
    assert "config.json" in result.err and "expected an object" in result.err


def test_plan_is_shown_as_the_options_have_it_served(run, mixed_plan):
    here = run("inspect", mixed_plan, "--platform", "cpu-avx512", "--json").json
    there = run("inspect", mixed_plan, "--platform", "other", "-tp", "2", "-ep", "--json").json
    assert (here["tensor_parallel_size"], here["expert_parallel"]) == (1, False)
    assert (there["tensor_parallel_size"], there["expert_parallel"]) == (2, True)
    assert there["platform"] == "other"
    widened = [
        {part["widened"] is not None for layer in found["layers"] for part in layer["parts"]}
        for found in (here, there)
    ]
    assert widened == [{False}, {False, True}]


def test_checkpoint_has_no_options_of_serving(run):
    result = run("inspect", MODELS / "fp8", "-tp", "2")
    assert result.code == 2 and result.out == ""
    assert "is no plan and no composed directory" in result.err


def test_plan_has_no_revision(run, mixed_plan):
    result = run("inspect", mixed_plan, "--revision", "main")
    assert result.code == 2 and result.out == ""
    assert f"the sources of the plan {mixed_plan} name theirs" in result.err


def test_plan_that_cannot_be_served_so_is_refused(run, mixed_plan):
    result = run("inspect", mixed_plan, "-pp", "5")
    assert result.code == 1 and result.out == ""
    assert "pipeline parallel size 5 is more than the model's" in result.err


def test_dense_model_has_no_experts(run):
    assert "experts       none" in run("inspect", FIXTURES.parent / "formats" / "awq").out
