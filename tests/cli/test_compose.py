# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest

from tests.cli.conftest import MODELS
from vllm_mixprec.plan import Plan


def test_compose_says_where_it_went_and_how_to_serve(run, mixed_plan, tmp_path):
    result = run("compose", mixed_plan, "-o", tmp_path / "a mix")
    assert result.code == 0
    assert f"wrote {tmp_path / 'a mix'}" in result.out
    assert f"vllm serve '{tmp_path / 'a mix'}'" in result.out
    config = json.loads((tmp_path / "a mix" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mixprec"


def test_json(run, mixed_plan, tmp_path):
    result = run("compose", mixed_plan, "-o", tmp_path / "mixed", "--json")
    found = result.json
    assert result.code == 0 and result.err == ""
    assert found["directory"] == str(tmp_path / "mixed")
    assert found["serve"] == f"vllm serve {tmp_path / 'mixed'}"
    assert found["ok"] is True
    composed = Plan.from_yaml(tmp_path / "mixed" / "mixprec_plan.yaml")
    assert found["plan_sha256"] == composed.sha256


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_plan_with_errors_writes_nothing(run, write_plan, tmp_path, flags):
    plan = write_plan(("model.layers.*.self_attn", "fp8"), fp8=MODELS / "absent")
    result = run("compose", plan, "-o", tmp_path / "mixed", *flags)
    assert result.code == 1
    assert not (tmp_path / "mixed").exists()
    assert "absent: no such directory" in result.out
    if flags:
        assert result.json["ok"] is False and result.json["directory"] is None


def test_foreign_directory_is_replaced_only_by_force(run, mixed_plan, tmp_path):
    out = tmp_path / "mixed"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    result = run("compose", mixed_plan, "-o", out)
    assert result.code == 1
    assert "not empty" in result.err
    assert (out / "thesis.txt").exists()
    assert run("compose", mixed_plan, "-o", out, "--force").code == 0
    assert not (out / "thesis.txt").exists()


@pytest.mark.parametrize("flags", [[], ["--json"]])
@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("a file/x", "File exists: .*a file"),
        ("a file/x/y", "Not a directory: .*a file/x"),
        ("/proc/xx/y", "No such file or directory: /proc/xx"),
        ("x" * 300, "File name too long"),
    ],
)
def test_output_that_cannot_be_written(run, mixed_plan, tmp_path, out, reason, flags):
    (tmp_path / "a file").write_text("mine")
    result = run("compose", mixed_plan, "-o", tmp_path / out, *flags)
    assert result.code == 1
    message = rf"{tmp_path / out}: cannot be written \({reason}\), expected .* Choose another\."
    assert re.fullmatch(f"error: {message}\n", result.err)
    if flags:
        assert result.json["ok"] is False
        assert re.fullmatch(message, result.json["error"]["message"])
    else:
        assert result.out == ""


def test_relative_output_from_a_directory_that_was_removed(run, mixed_plan, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = run("compose", mixed_plan, "-o", "mixed")
    assert result.code == 1
    assert result.err.startswith("error: mixed: cannot be written (No such file or directory)")
    assert run("compose", mixed_plan, "-o", tmp_path / "mixed").code == 0


def test_plan_s_own_directory_is_not_replaced(run, mixed_plan, tmp_path, monkeypatch):
    """Though a plan of that name is all that compose would write there."""
    plan = mixed_plan.rename(tmp_path / "mixprec_plan.yaml")
    monkeypatch.chdir(tmp_path)
    result = run("compose", plan.name, "-o", ".", "--json")
    assert result.code == 1 and result.json["ok"] is False
    assert "the working directory, expected outside of" in result.err
    assert plan.exists()


def test_malformed_plan_is_explained(run, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("base: a\n")
    result = run("compose", plan, "-o", tmp_path / "mixed")
    assert result.code == 1
    assert f"error: {plan}:1" in result.err


def test_platform_that_will_serve_it_is_named(run, mixed_plan, tmp_path):
    result = run("compose", mixed_plan, "-o", tmp_path / "mixed", "--platform", "cuda-90", "--json")
    assert result.code == 0 and result.json["platform"] == "cuda-90"
