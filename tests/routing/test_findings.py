# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from tests.routing.models import make_plan
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing.findings import (
    Finding,
    FindingLog,
    format_bytes,
    generalise,
    rule_place,
    source_place,
)


def test_one_finding_keeps_its_name() -> None:
    log = FindingLog()
    log.add("note", "cast", "model.layers.3.mlp", "cast to fp16")
    assert log.findings() == (Finding("note", "cast", "model.layers.3.mlp", "cast to fp16"),)


def test_findings_that_differ_in_numbers_only_are_folded_with_cost_and_example() -> None:
    log = FindingLog()
    for layer in range(48):
        log.add("warning", "w", f"model.layers.{layer}.mlp", "widened", cost_bytes=1 << 20)
    (finding,) = log.findings()
    assert finding.where == "model.layers.*.mlp"
    assert finding.message == "widened (48 modules, e.g. model.layers.0.mlp; costs 48.0 MiB)"


def test_up_to_three_names_are_listed() -> None:
    log = FindingLog()
    for layer in (7, 9):
        log.add("error", "e", f"layers.{layer}.mlp", "gone", noun="tensors")
    assert log.findings()[0].message == "gone (2 tensors: layers.7.mlp, layers.9.mlp)"


def test_findings_with_other_messages_stay_apart() -> None:
    log = FindingLog()
    log.add("error", "e", "layers.1", "found 3")
    log.add("error", "e", "layers.2", "found 4")
    assert [finding.where for finding in log.findings()] == ["layers.1", "layers.2"]


def test_group_folds_unlike_names() -> None:
    log = FindingLog()
    log.add("note", "cast", "lm_head", "cast", group="source 'a'")
    log.add("note", "cast", "model.norm", "cast", group="source 'a'")
    assert [finding.where for finding in log.findings()] == ["source 'a'"]


def test_errors_come_first() -> None:
    log = FindingLog()
    assert not log.has_errors
    for level in ("note", "warning", "error"):
        log.add(level, "c", level, "m")
    assert [finding.level for finding in log.findings()] == ["error", "warning", "note"]
    assert log.has_errors


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.experts.3.up_proj", "model.layers.*.mlp.experts.*.up_proj"),
        ("model.layers.0.block1.fc2", "model.layers.*.block1.fc2"),
        ("plan.yaml:12", "plan.yaml:12"),
    ],
)
def test_numbers_between_dots_are_generalised(name: str, expected: str) -> None:
    assert generalise(name) == expected


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (-1536, "-1.5 KiB"), (1 << 41, "2.0 TiB")],
)
def test_sizes_have_binary_units(size_bytes: int, expected: str) -> None:
    assert format_bytes(size_bytes) == expected


def test_places_of_a_plan_without_a_file() -> None:
    plan = make_plan(("lm_head", "fp8"))
    assert rule_place(plan, 0) == "rule 1"
    assert source_place(plan, "fp8") == "source 'fp8'"


def test_places_below_the_working_directory_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'version: 1\nbase: a\nsources: {a: {path: a}}\nrules:\n- {match: "**", source: a}\n'
    (tmp_path / "plan.yaml").write_text(text)
    plan = Plan.from_yaml(tmp_path / "plan.yaml")
    assert rule_place(plan, 0) == f"{tmp_path}/plan.yaml:5"
    monkeypatch.chdir(tmp_path)
    assert rule_place(plan, 0) == "plan.yaml:5"
    assert source_place(plan, "a") == "plan.yaml:3: source 'a'"
