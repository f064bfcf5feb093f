# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest

from tests.cli.conftest import MODELS
from tests.routing.models import edit_tensors


def test_sound_plan(run, mixed_plan):
    result = run("check", mixed_plan)
    assert result.code == 0
    assert "no findings on cpu-avx512" in result.out
    assert "weights in memory" in result.out and "bytes read" in result.out


def test_json(run, mixed_plan):
    result = run("check", mixed_plan, "-tp", "2", "-pp", "2", "-ep", "--json")
    report = result.json
    assert result.code == 0 and result.err == ""
    assert report["ok"] is True and report["findings"] == []
    assert len(report["bytes_per_rank"]) == 4
    assert (report["tensor_parallel_size"], report["pipeline_parallel_size"]) == (2, 2)
    assert report["expert_parallel"] is True
    assert report["platform"] == "cpu-avx512"
    assert {(item["source"], item["format"]) for item in report["bytes_by_source"]} == {
        ("bf16", "bf16"),
        ("fp8", "fp8_block"),
        ("int4", "gptq"),
    }


def test_long_options_are_the_short_ones(run, mixed_plan):
    short = run("check", mixed_plan, "-tp", "2", "-pp", "2", "-ep", "--json")
    sizes = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"]
    spelt = run("check", mixed_plan, *sizes, "--enable-expert-parallel", "--json")
    assert spelt.json == short.json


def test_mtp_asks_for_the_draft(run, mixed_plan):
    assert run("check", mixed_plan, "--json").json["draft"] is False
    result = run("check", mixed_plan, "--mtp", "--json")
    assert result.json["draft"] is True
    assert [finding["code"] for finding in result.json["findings"]] == ["mtp-missing"]
    assert result.code == 1


def test_every_finding_at_once_with_place_found_expected_and_remedy(run, write_plan):
    plan = write_plan(
        ("model.layers.*.self_atn.q_proj", "fp8"),
        ("model.layers.{8-9}.mlp.experts", "int4"),
        fp8=MODELS / "absent",
    )
    result = run("check", plan)
    assert result.code == 1
    assert "errors (3)" in result.out
    lines = plan.read_text().splitlines()
    typo = next(number for number, line in enumerate(lines, 1) if "self_atn" in line)
    # The fixture's JSON has a rule's brace on the line before its match.
    assert f"plan.yaml:{typo - 1} [rule-unmatched]" in result.out
    assert "Nearest: model.layers.*.self_attn.q_proj" in result.out
    declared = next(number for number, line in enumerate(lines, 1) if '"fp8": {' in line)
    assert f"plan.yaml:{declared}: source 'fp8' [source-unreadable]" in result.out
    assert "absent: no such directory" in result.out
    assert "from model.layers.0.mlp.experts to model.layers.1.mlp.experts" in result.out
    assert "The plan cannot be served" in result.out


def test_warning_fails_only_under_strict(run, write_plan):
    plan = write_plan(("model.layers.0.self_attn.q_proj", "fp8"))
    result = run("check", plan)
    assert result.code == 0
    assert "q_proj" in result.out and "warnings (1)" in result.out
    assert run("check", plan, "--strict").code == 1


def test_strict_passes_without_findings(run, mixed_plan):
    assert run("check", mixed_plan, "--strict").code == 0


def test_platform_decides_which_kernels_count(run, mixed_plan):
    report = run("check", mixed_plan, "--platform", "cpu-other", "--json").json
    assert report["platform"] == "cpu-other"
    assert any("no gptq kernel on cpu-other" in found["message"] for found in report["findings"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-tp", "0"], "expected 1 or more"),
        (["-pp", "two"], "expected 1 or more"),
        (["--platform", "tpu"], "expected cpu-avx512"),
    ],
)
def test_wrong_usage(run, mixed_plan, flags, said):
    result = run("check", mixed_plan, *flags)
    assert result.code == 2
    assert said in result.err


def test_malformed_plan_is_a_list_of_findings(run, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("version: 1\nbase: a\nsources:\n  a: {path: x, colour: red}\nrulez: []\n")
    result = run("check", plan, "--json")
    assert result.code == 1
    assert result.json["ok"] is False
    findings = result.json["findings"]
    assert [finding["code"] for finding in findings] == ["plan-invalid"] * 2
    assert {finding["where"] for finding in findings} == {f"{plan}:4", f"{plan}:5"}
    assert any("Nearest: rules" in finding["message"] for finding in findings)
    assert "errors (2)" in run("check", plan).out


def test_absent_plan(run, tmp_path):
    result = run("check", tmp_path / "absent.yaml")
    assert result.code == 1
    heading, message, verdict = result.out.splitlines()[1:]
    assert heading == f"  {tmp_path / 'absent.yaml'} [plan-invalid]"
    assert message == "    cannot be read (No such file or directory). Correct the plan's path."
    assert verdict.endswith("1 error. The plan cannot be served.")


def test_composed_directory_is_checked_by_its_plan(run, mixed_plan, tmp_path):
    assert run("compose", mixed_plan, "-o", tmp_path / "mixed").code == 0
    result = run("check", tmp_path / "mixed")
    assert result.code == 0
    assert f"{tmp_path / 'mixed' / 'mixprec_plan.yaml'}: no findings" in result.out


def test_composed_directory_whose_plan_was_edited_is_refused(run, mixed_plan, tmp_path):
    """As the engine's start refuses it; other findings are told, too."""
    assert run("compose", mixed_plan, "-o", tmp_path / "mixed").code == 0
    file = tmp_path / "mixed" / "mixprec_plan.yaml"
    file.write_text(file.read_text().replace("self_attn.*_proj", "self_attn.q_proj"))
    report = run("check", tmp_path / "mixed", "--json")
    assert report.code == 1 and report.json["ok"] is False
    changed, *others = report.json["findings"]
    assert (changed["level"], changed["where"]) == ("error", str(file))
    assert "it was edited or cut short. Compose the directory again." in changed["message"]
    assert [finding["code"] for finding in others] == ["fused-mixed"]
    assert "The plan cannot be served." in run("check", tmp_path / "mixed").out


def test_shard_in_place_of_a_plan(run):
    result = run("check", MODELS / "fp8" / "model.safetensors")
    assert result.code == 1
    assert "a shard of a checkpoint, expected a plan's YAML file." in result.out


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "b.yml", "a.yaml"], "Name the file: {0}/a.yaml, {0}/b.yml."),
        (["config.json"], "It looks like a checkpoint: vllm-mixprec inspect"),
        ([], "Correct the plan's path."),
    ],
)
def test_directory_in_place_of_a_plan(run, tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_text("{}")
    result = run("check", tmp_path)
    assert result.code == 1
    message = result.out.splitlines()[2].strip()
    assert message.startswith("a directory, expected a plan's YAML file. ")
    assert said.format(tmp_path) in message


def test_deep_reads_the_tensors(run, write_plan, tmp_path):
    """A scale that no header shows, and a bar on stderr that stdout does not see."""
    broken = tmp_path / "fp8"
    shutil.copytree(MODELS / "fp8", broken)
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"

    def zero(tensors):
        dtype, shape, data = tensors[scale]
        tensors[scale] = (dtype, shape, bytes(len(data)))

    edit_tensors(broken / "model.safetensors", zero)
    plan = write_plan(("model.layers.*.self_attn.*_proj", "fp8"), fp8=broken)
    assert run("check", plan, "--json").json["deep"] is False
    result = run("check", plan, "--deep", "--json")
    assert result.code == 1 and result.json["deep"] is True
    assert [found["code"] for found in result.json["findings"]] == ["scale-zero"]
    assert "Reading tensors" in result.err
