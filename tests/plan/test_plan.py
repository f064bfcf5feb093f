# SPDX-License-Identifier: Apache-2.0
"""Reading and writing plans; every error says where."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan import Plan

CONTRACT = r"""version: 1
base: bf16                      # the source that gives config.json
sources:
  bf16: {path: /models/Qwen3-30B-A3B}
  fp8:  {path: /models/Qwen3-30B-A3B-FP8}
  int4: {path: Qwen/Qwen3-30B-A3B-GPTQ-Int4, revision: main}
rules:                          # the first match wins
  - {match: "model.layers.*.mlp.experts.{0-7,12}", source: int4}
  - {match: "model.layers.{0-3}.self_attn.*_proj", source: fp8}
  - {match: "re:model\\.layers\\.\\d+\\.mlp\\.shared_experts\\..*", source: fp8}
options:
  mixed_fused: widen
  missing_kernel: dequantize
"""
SHORT = "version: 1\nbase: a\nsources:\n  a: {path: x}\n"


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "plan.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def error_of(folder: Path, text: str | bytes) -> str:
    file = write(folder, text)
    with pytest.raises(PlanError, match=f"^{re.escape(str(file))}:[0-9]+: ") as caught:
        Plan.from_yaml(file)
    return str(caught.value).replace(f"{file}:", "")


def test_plan_of_the_contract_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, CONTRACT)
    plan = Plan.from_yaml(file)
    assert (plan.version, plan.base, list(plan.sources)) == (1, "bf16", ["bf16", "fp8", "int4"])
    assert plan.sources["int4"].path == "Qwen/Qwen3-30B-A3B-GPTQ-Int4"
    assert (plan.sources["int4"].revision, plan.sources["fp8"].revision) == ("main", None)
    assert [(rule.source, rule.line) for rule in plan.rules] == [
        ("int4", 8),
        ("fp8", 9),
        ("fp8", 10),
    ]
    assert plan.rules[0].matches("model.layers.5.mlp.experts.12.up_proj")
    assert plan.rules[2].matches("model.layers.5.mlp.shared_experts.up_proj")
    assert (plan.options.mixed_fused, plan.options.missing_kernel) == ("widen", "dequantize")
    assert (plan.path, plan.base_dir) == (file, tmp_path)


def test_rules_and_options_may_be_left_out(tmp_path: Path) -> None:
    plan = Plan.from_yaml(write(tmp_path, SHORT))
    assert plan.rules == []
    assert (plan.options.mixed_fused, plan.options.missing_kernel) == ("widen", "dequantize")


def test_path_is_absolute_though_the_plan_is_read_by_a_relative_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, SHORT)
    monkeypatch.chdir(tmp_path)
    plan = Plan.from_yaml("plan.yaml")
    assert (plan.path, plan.base_dir) == (tmp_path / "plan.yaml", tmp_path)


def test_weight_mapping_stands_for_rules(tmp_path: Path) -> None:
    text = SHORT + 'weight_mapping:\n  "model.layers.*": a\n  lm_head.weight: a\n'
    plan = Plan.from_yaml(write(tmp_path, text))
    assert [(rule.match, rule.source, rule.line) for rule in plan.rules] == [
        ("model.layers.*", "a", 6),
        ("lm_head.weight", "a", 7),
    ]
    rules = [{"match": "model.layers.*", "source": "a"}, {"match": "lm_head.weight", "source": "a"}]
    same = Plan.from_dict(
        {"version": 1, "base": "a", "sources": {"a": {"path": "x"}}, "rules": rules}
    )
    assert plan.sha256 == same.sha256


def test_written_plan_reads_back_the_same(tmp_path: Path) -> None:
    plan = Plan.from_yaml(write(tmp_path, CONTRACT))
    again = Plan.from_yaml(write(tmp_path, plan.to_yaml()))
    assert again.sha256 == plan.sha256
    assert again.to_yaml() == plan.to_yaml()
    assert "revision: null" not in plan.to_yaml()


def test_sha256_ignores_layout_and_follows_content(tmp_path: Path) -> None:
    digest = Plan.from_yaml(write(tmp_path, CONTRACT)).sha256
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert Plan.from_yaml(write(tmp_path, "# a comment\n" + CONTRACT)).sha256 == digest
    without_options = CONTRACT.partition("options:")[0]
    assert Plan.from_yaml(write(tmp_path, without_options)).sha256 == digest
    for old, new in [("{0-7,12}", "{0-7}"), ("widen", "error"), ("base: bf16", "base: fp8")]:
        changed = Plan.from_yaml(write(tmp_path, CONTRACT.replace(old, new)))
        assert changed.sha256 != digest
    for value in ("warn", "error"):  # which the contract leaves out
        plan = Plan.from_yaml(write(tmp_path, f"{CONTRACT}  weights_differ: {value}\n"))
        assert (plan.sha256 == digest) == (value == "warn")
        again = Plan.from_yaml(write(tmp_path, plan.to_yaml()))
        assert again.options == plan.options
    rules = CONTRACT.splitlines(keepends=True)
    rules[7], rules[8] = rules[8], rules[7]
    assert Plan.from_yaml(write(tmp_path, "".join(rules))).sha256 != digest


def test_plan_is_frozen_and_can_be_pickled(tmp_path: Path) -> None:
    plan = Plan.from_yaml(write(tmp_path, CONTRACT))
    with pytest.raises(ValueError, match="frozen"):
        plan.base = "fp8"
    again = pickle.loads(pickle.dumps(plan))
    assert (again.sha256, again.path, again.rules[1].line) == (plan.sha256, plan.path, 9)
    assert again.rules[0].matches("model.layers.5.mlp.experts.12.up_proj")


def test_anchors_and_merge_keys_are_fine(tmp_path: Path) -> None:
    text = (
        "version: 1\nbase: a\nsources:\n  a: &a {path: x}\n  b: {<<: *a, revision: y}\n"
        "rules:\n  - &r {match: lm_head, source: b}\n  - {<<: *r, match: model.norm}\n"
    )
    plan = Plan.from_yaml(write(tmp_path, text))
    assert (plan.sources["b"].path, plan.sources["b"].revision) == ("x", "y")
    assert [(rule.match, rule.source) for rule in plan.rules] == [
        ("lm_head", "b"),
        ("model.norm", "b"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("version: 1", "version: 2", r"1: version: found 2, expected 1, .* Write version: 1\.$"),
        ("version: 1", "version: true", "1: version: found True, expected 1"),
        ("version: 1", "version: '1'", '1: version: found "1", expected 1'),
        ("version: 1\n", "", '1: no key "version", expected version, base, sources'),
        (
            "base: bf16",
            "base: b16",
            '2: base: source "b16" is not among the sources, .* Nearest: bf16',
        ),
        ("base: bf16", "base: [bf16]", r"2: base: found \['bf16'\], expected a string"),
        ("source: int4", "source: int8", '8: rules.0: source "int8" .* Nearest: int4'),
        ("source: int4", "sorce: int4", "8: rules.0.sorce: unknown key.* Nearest: source"),
        ("source: int4}", "source: int4, line: 3}", "8: rules.0.line: unknown key"),
        (
            '{match: "model.layers.*.mlp.experts.{0-7,12}", source: int4}',
            "int4",
            '8: rules.0: found "int4", expected a mapping with match',
        ),
        ('"model.layers.{0-3}.self_attn.*_proj"', "3", "9: rules.1.match: found 3, expected a str"),
        ("{0-7,12}", "{7-0}", "8: rules.0: match .*range 7-0 runs backwards"),
        ("shared_experts", "(", "10: rules.2: match .*cannot be a regular expression"),
        (
            "widen",
            "widn",
            "12: options.mixed_fused: found .widn., expected 'widen' or 'error'. Corr",
        ),
        ("mixed_fused", "mixd_fused", "12: options.mixd_fused: unknown key.* Nearest: mixed_fused"),
        (
            "options:\n  mixed_fused: widen",
            "options: 3\nx:",
            r"11: options: found 3, expected a mapping\. Correct it\.$",
        ),
        (
            "options:\n  mixed_fused: widen",
            "options:\nx:",
            r"11: options: found None, expected a mapping\. Remove the empty key\.$",
        ),
        ("options:", "path: /x\noptions:", "11: path: unknown key, expected one of version, base"),
        ("{path: /models/Qwen3-30B-A3B}", "/models", '4: sources.bf16: found "/models", expected'),
        (
            "path: /models/Qwen3-30B-A3B}",
            "path: ''}",
            '4: sources.bf16.path: found "", expected text in one',
        ),
        ("path: /models/Qwen3-30B-A3B}", "path: 3}", "4: sources.bf16.path: found 3, expected a"),
        ("  fp8: ", "  8: ", "5: sources.8: found the name 8, expected a string of letters"),
        ("  fp8: ", "  ../fp8: ", '5: sources.../fp8: found the name "../fp8", expected'),
        ("  fp8: ", "  bf16: ", '5: key "bf16" is also in line 4, expected once'),
        ("source: int4", "source: int4, source: fp8", '8: key "source" is also in line 8'),
        ("  fp8: ", "  ? [1]\n  : ", "5: a key that is a list or a mapping"),
        ("options:", "weight_mapping: {}\noptions:", "11: weight_mapping: found beside rules:"),
        ("options:", "options: [", "[0-9]+: not valid YAML"),
        ("base: bf16", "base: *nobody", "2: not valid YAML .found undefined alias"),
        ("base: bf16", "base: !!python/name:os.system x", "2: not valid YAML .could not determine"),
        ("base: bf16", "base: 2021-13-45", "[0-9]+: not valid YAML .month must be in"),
        ("base: bf16", "base: bf16\n---", "[0-9]+: not valid YAML .but found another document"),
        ("base: bf16", "base: \x00", "[0-9]+: not valid YAML"),
    ],
)
def test_error_says_file_and_line(tmp_path: Path, old: str, new: str, error: str) -> None:
    assert old in CONTRACT
    assert re.search(f"(?m)^{error}", error_of(tmp_path, CONTRACT.replace(old, new, 1)))


def test_every_error_is_reported_at_once(tmp_path: Path) -> None:
    text = CONTRACT.replace("source: int4", "source: int8").replace("source: fp8", "source: f8")
    assert [line.partition(":")[0] for line in error_of(tmp_path, text).splitlines()] == [
        "8",
        "9",
        "10",
    ]
    text = CONTRACT.replace("{0-7,12}", "{").replace("*_proj", "{")
    assert len(error_of(tmp_path, text).splitlines()) == 2
    text = CONTRACT.replace("mixed_fused", "a").replace("missing_kernel", "b")
    assert len(error_of(tmp_path, text).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "[]", "plan", "3"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    expected = "1: found .*, expected a mapping with version:.* vllm-mixprec plan write"
    assert re.match(expected, error_of(tmp_path, text))


@pytest.mark.parametrize(
    ("mapping", "error"),
    [
        ("[a, b]", "5: weight_mapping: found .*, expected a mapping"),
        ("\n  lm_head: 3", "6: weight_mapping.lm_head: found .*, expected a pattern and the name"),
        ("\n  lm_head: b", '6: weight_mapping.lm_head: source "b" is not among'),
        ("\n  lm_head: a\n  '{': a", "7: weight_mapping.{: match .*a brace"),
    ],
)
def test_malformed_weight_mapping_is_refused(tmp_path: Path, mapping: str, error: str) -> None:
    assert re.match(error, error_of(tmp_path, f"{SHORT}weight_mapping: {mapping}\n"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: &a [*a]", "an alias inside its own anchor"),
        ("a: &a {b: *a}", "an alias inside its own anchor"),
        ("[" * 100_000, "nested more than 32 deep"),
        ("{a: " * 100_000, "nested more than 32 deep"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
            "aliases repeat more than 100000 nodes",
        ),
        (
            "a0: &a0 {x: 1}\n"
            + "".join(
                f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
            ),
            "aliases repeat more than 100000 nodes",
        ),
        ("# " + "x" * (8 << 20), "larger than 8388608 bytes"),
    ],
)
def test_hostile_yaml_is_refused_quickly(tmp_path: Path, text: str, error: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(PlanError, match=error):
        Plan.from_yaml(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"gone.yaml: cannot be read \(No such file"):
        Plan.from_yaml(tmp_path / "gone.yaml")


def test_plan_from_a_dict_has_a_folder_but_no_file(tmp_path: Path) -> None:
    content = {
        "version": 1,
        "base": "a",
        "sources": {"a": {"path": "x"}},
        "rules": [{"match": "lm_head", "source": "a"}],
    }
    plan = Plan.from_dict(content, base_dir=tmp_path)
    assert (plan.path, plan.base_dir, plan.rules[0].line) == (None, tmp_path, None)
    assert Plan.from_dict(content).base_dir is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"base": "b"}, r'^plan: base: source "b" is not among the sources, expected one of a\.'),
        ({"rules": [{"match": "{", "source": "a"}]}, r"^plan: rules\.0: match .*brace"),
        ({"rules": {"match": "x"}}, r"^plan: rules: found .*, expected a list\. Correct it\.$"),
        ({"rules": None}, r"^plan: rules: found None, expected a list\. Remove the empty key\.$"),
        ({"extra": 1}, "^plan: extra: unknown key"),
        ({"sources": {}}, r"^plan: sources: found {}: .* Correct it\.$"),
    ],
)
def test_error_of_a_dict_says_the_key(change: dict[str, Any], error: str) -> None:
    content = {"version": 1, "base": "a", "sources": {"a": {"path": "x"}}} | change
    with pytest.raises(PlanError, match=error):
        Plan.from_dict(content)


def test_what_is_no_mapping_is_no_plan() -> None:
    with pytest.raises(PlanError, match=r"^plan: found \[\], expected a mapping"):
        Plan.from_dict([])  # type: ignore[arg-type]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, len(CONTRACT) - 1), st.characters()), max_size=5))
def test_damaged_plan_gives_a_plan_or_a_plan_error(
    tmp_path: Path, edits: list[tuple[int, str]]
) -> None:
    text = list(CONTRACT)
    for position, character in edits:
        text[position] = character
    file = write(tmp_path, "".join(text).encode("utf-8", "surrogatepass"))
    try:
        Plan.from_yaml(file)
    except PlanError as error:
        assert str(file) in str(error)
