# SPDX-License-Identifier: Apache-2.0
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import MODELS
from vllm_mixprec.checkpoint import Module, Scheme
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.cli.draft import Choice, draft_rules, spell_path
from vllm_mixprec.errors import RouteError
from vllm_mixprec.plan import Plan
from vllm_mixprec.plan.patterns import compile_pattern
from vllm_mixprec.routing import load_route_table

SOURCES = (
    *("--source", f"bf16={MODELS / 'bf16'}"),
    *("--source", f"fp8={MODELS / 'fp8'}"),
    *("--source", f"int4={MODELS / 'gptq'}"),
)

OLD_PLAN = "old.yaml"  # in place of its path


def rules_of(plan: Plan) -> list[tuple[str, str]]:
    return [(rule.match, rule.source) for rule in plan.rules]


def test_plan_by_kind_routes_each_kind(run, tmp_path):
    file = tmp_path / "plan.yaml"
    flags = ["--attention", "fp8", "--experts", "int4", "-o", file]
    result = run("plan", "--base", "bf16", *SOURCES, *flags)
    assert result.code == 0
    assert result.out == ""
    assert "bytes read" in result.err and "int4" in result.err
    plan = Plan.from_yaml(file)
    assert plan.base == "bf16"
    assert rules_of(plan) == [
        ("model.layers.*.self_attn.*_proj", "fp8"),
        ("model.layers.*.mlp.experts", "int4"),
    ]
    formats = {"q_proj": "fp8_block", "down_proj": "gptq", "gate": "bf16", "q_norm": "bf16"}
    for module, route in load_route_table(plan).routes.items():
        assert route.stored.format == formats.get(module.rpartition(".")[2], route.stored.format)
    assert "# attention: 512.1 KiB of fp8_block 128x128" in file.read_text()
    assert run("check", file, "--strict").code == 0


def test_experts_from_several_sources(run, tmp_path):
    file = tmp_path / "plan.yaml"
    flags = ["--experts", "0-2=int4,5=int4,fp8", "-o", file]
    assert run("plan", "--base", "bf16", *SOURCES, *flags).code == 0
    assert rules_of(Plan.from_yaml(file)) == [
        ("model.layers.*.mlp.experts.{0-2}", "int4"),
        ("model.layers.*.mlp.experts.5", "int4"),
        ("model.layers.*.mlp.experts", "fp8"),
    ]
    found = run("inspect", file, "--json").json
    experts = [p for p in found["layers"][0]["parts"] if p["kind"] == "routed_experts"]
    assert {p["source"]: p["experts"] for p in experts} == {
        "int4": [0, 1, 2, 5],
        "fp8": [3, 4, 6, 7],
    }
    # The comment counts what the rule takes: two layers, four experts each, not all eight.
    size = sum(p["stored_bytes"] for p in experts if p["source"] == "fp8") * 2
    assert f"# other routed experts: {size / 1024:.1f} KiB" in file.read_text()


def test_without_output_the_plan_goes_to_stdout(run):
    result = run("plan", "--base", "bf16", *SOURCES, "--attention", "fp8")
    assert result.code == 0
    assert Plan.from_dict(yaml.safe_load(result.out)).base == "bf16"
    assert "bytes read" in result.err


def test_json(run, tmp_path):
    file = tmp_path / "plan.yaml"
    result = run("plan", "--base", "bf16", *SOURCES, "--experts", "int4", "-o", file, "--json")
    found = result.json
    assert result.code == 0 and result.err == ""
    assert found["path"] == str(file)
    assert found["yaml"] == file.read_text()
    assert found["plan_sha256"] == Plan.from_yaml(file).sha256
    assert {item["source"] for item in found["bytes_by_source"]} == {"bf16", "int4"}


def test_what_stays_with_the_base_needs_no_rule(run, tmp_path):
    file = tmp_path / "plan.yaml"
    flags = ["--attention", "int4", "--experts", "int4", "-o", file]
    assert run("plan", "--base", "int4", *SOURCES, *flags).code == 0
    assert Plan.from_yaml(file).rules == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base", "bf61", *SOURCES], "no --source bf61=PATH; given are bf16, fp8, int4"),
        (["--base", "bf16", *SOURCES, "--mlp", "awq"], "no --source awq=PATH"),
        (["--base", "bf16", *SOURCES, "--source", "fp8=x"], "fp8 is given twice"),
        (["--base", "bf16", "--source", "bf16"], "expected N=PATH"),
        (["--base", "bf16", *SOURCES, "--experts", "3-1=int4"], "runs backwards"),
        (["--base", "bf16", *SOURCES, "--experts", "0-3=int4,2=fp8"], "repeats experts"),
        (["--base", "bf16", *SOURCES, "--experts", "int4,0=fp8"], "nothing is left"),
        (["--base", "bf16"], "--source"),
    ],
)
def test_wrong_usage(run, flags, said):
    result = run("plan", *flags)
    assert result.code == 2
    assert said in result.err


def test_kind_that_the_model_lacks(run):
    result = run("plan", "--base", "bf16", *SOURCES, "--mlp", "fp8")
    assert result.code == 1
    assert "--mlp fp8: base 'bf16' (" in result.err
    assert "has no dense MLP; found" in result.err and "Leave the option out" in result.err
    assert "number" not in result.err


def test_shared_experts_that_the_model_lacks(run):
    result = run("plan", "--base", "bf16", *SOURCES, "--shared-experts", "int4")
    assert result.code == 1
    assert "--shared-experts int4: base 'bf16' (" in result.err
    assert "has no shared experts; found" in result.err


@pytest.mark.parametrize("experts", ["90-99=fp8", "0-99=int4,fp8", "0-3=int4,4-99=bf16"])
def test_experts_that_the_model_lacks(run, experts):
    result = run("plan", "--base", "bf16", *SOURCES, "--experts", experts)
    assert result.code == 1
    flag = experts.replace("0-3=int4,", "").removesuffix(",fp8")
    assert f"error: --experts {flag}: no expert 99 in base 'bf16' (" in result.err
    assert "expected numbers of 0-7" in result.err


def test_rest_of_experts_that_are_all_named(run):
    result = run("plan", "--base", "bf16", *SOURCES, "--experts", "0-7=int4,fp8")
    assert result.code == 1
    assert "--experts fp8: the numbers before it take all experts of base 'bf16'" in result.err


@pytest.mark.parametrize("options", [("--base", "bf16", *SOURCES), ("--from", OLD_PLAN)])
def test_file_that_is_there_is_replaced_only_by_force(run, tmp_path, options):
    old, file = tmp_path / "old.yaml", tmp_path / "plan.yaml"
    old.write_text(f"mixed_precision: {{base_model_path: {MODELS / 'bf16'}}}\n")
    file.write_text("by hand")
    options = [old if option is OLD_PLAN else option for option in options]
    result = run("plan", *options, "-o", file)
    assert result.code == 1
    assert f"error: {file}: there already" in result.err and "pass --force" in result.err
    assert file.read_text() == "by hand"
    assert run("plan", *options, "-o", file, "--force").code == 0
    assert Plan.from_yaml(file).base in ("bf16", "base")


def test_comment_at_a_source_begins_with_what_is_quantised(run):
    lines = run("plan", "--base", "bf16", *SOURCES, "--experts", "fp8").out.splitlines()
    comments = {line.split(":")[0].strip(): line.partition("# ")[2] for line in lines[5:8]}
    assert comments == {
        "bf16": "bf16",
        "fp8": "fp8_block 128x128, bf16",
        "int4": "gptq int4 g128, bf16",
    }


def test_output_that_cannot_be_written(run, tmp_path):
    result = run("plan", "--base", "bf16", *SOURCES, "-o", tmp_path / "absent" / "plan.yaml")
    assert result.code == 1
    assert "cannot be written" in result.err


def test_sources_below_a_common_folder_are_relative(run, tmp_path):
    for name in ("bf16", "fp8"):
        shutil.copytree(MODELS / name, tmp_path / "models" / name)
    (tmp_path / "plans").mkdir()
    file = tmp_path / "plans" / "plan.yaml"
    models = tmp_path / "models"
    sources = ["--source", f"bf16={models / 'bf16'}", "--source", f"fp8={models / 'fp8'}"]
    assert run("plan", "--base", "bf16", *sources, "--experts", "fp8", "-o", file).code == 0
    paths = {name: source.path for name, source in Plan.from_yaml(file).sources.items()}
    assert paths == {"bf16": "../models/bf16", "fp8": "../models/fp8"}
    os.rename(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    moved = tmp_path.parent / f"{tmp_path.name}-moved" / "plans" / "plan.yaml"
    assert run("check", moved).code == 0


def test_path_below_the_plan_begins_with_a_dot(tmp_path):
    (tmp_path / "bf16").mkdir()
    assert spell_path(tmp_path / "bf16", tmp_path) == "./bf16"


def test_path_without_a_common_folder_is_absolute():
    assert spell_path(Path("/models/bf16"), Path("/plans")) == "/models/bf16"


def test_path_through_a_link_stays_right(tmp_path):
    """``..`` leaves the folder that a link points to, not the one that holds the link."""
    (tmp_path / "models").mkdir()
    (tmp_path / "deep" / "er" / "plans").mkdir(parents=True)
    (tmp_path / "plans").symlink_to(tmp_path / "deep" / "er" / "plans")
    spelt = spell_path(tmp_path / "models", tmp_path / "plans")
    assert os.path.samefile(tmp_path / "plans" / spelt, tmp_path / "models")


def test_source_names_that_yaml_would_misread_are_quoted(run, tmp_path):
    file = tmp_path / "plan.yaml"
    sources = ["--source", f"on={MODELS / 'bf16'}", "--source", f"8={MODELS / 'fp8'}"]
    assert run("plan", "--base", "on", *sources, "--attention", "8", "-o", file).code == 0
    plan = Plan.from_yaml(file)
    assert plan.base == "on" and set(plan.sources) == {"on", "8"}


BF16 = Scheme("bf16", 16)


def checkpoint(name: str, modules: list[str]) -> Checkpoint:
    """Return a checkpoint of 2-D modules without tensors; norms are 1-D."""
    opened = {
        module: Module(module, {}, BF16, (8,) if module.endswith("norm") else (8, 8), ())
        for module in modules
    }
    return Checkpoint(name, MODELS, {}, {}, opened, ())


def layer(number: int, *leaves: str) -> list[str]:
    return [f"model.layers.{number}.{leaf}" for leaf in leaves]


DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MLA = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
MOE = (
    "mlp.gate",
    "mlp.shared_experts.gate_proj",
    "mlp.shared_experts.up_proj",
    "mlp.experts.0.gate_proj",
    "mlp.experts.1.gate_proj",
)
BASE = [
    "model.embed_tokens",
    *layer(0, *MLA, "self_attn.q_a_norm", *DENSE),
    *layer(1, *MLA, *MOE),
    *layer(2, *MLA, *MOE),
]


@pytest.mark.parametrize(
    ("kind", "matches"),
    [
        ("dense_mlp", ["model.layers.*.mlp.*_proj"]),
        ("shared_experts", ["model.layers.*.mlp.shared_experts.*_proj"]),
        ("routed_experts", ["model.layers.*.mlp.experts"]),
        ("attention", ["model.layers.*.self_attn.{q_a_proj,kv_a_proj_with_mqa,o_proj}"]),
    ],
)
def test_patterns_take_exactly_the_weights_of_a_kind(kind, matches):
    base = checkpoint("base", BASE)
    rules = draft_rules(Choice(kind, "fp8"), base, checkpoint("fp8", BASE))
    assert [rule.match for rule in rules] == matches
    taken = [name for name in BASE if any(compile_pattern(m)(name) for m in matches)]
    words = {"dense_mlp": ".mlp.*_proj", "routed_experts": ".experts.", "attention": "_attn."}
    expected = {
        "dense_mlp": layer(0, *DENSE),
        "shared_experts": [name for name in BASE if "shared" in name],
        "routed_experts": [name for name in BASE if words["routed_experts"] in name],
        "attention": [n for n in BASE if words["attention"] in n and not n.endswith("norm")],
    }
    assert taken == expected[kind]


def test_layers_that_a_source_lacks_stay_with_the_base():
    base = checkpoint("base", BASE)
    fewer = checkpoint("fp8", [name for name in BASE if ".layers.2." not in name])
    [rule] = draft_rules(Choice("attention", "fp8"), base, fewer)
    assert rule.match.startswith("model.layers.{0-1}.self_attn.")
    assert "layers 2 are not in fp8 and stay with base" in rule.comment


def test_source_without_the_kind():
    base, empty = checkpoint("base", BASE), checkpoint("fp8", ["model.embed_tokens"])
    with pytest.raises(RouteError, match="source 'fp8'.*no layer has all of the base's attention"):
        draft_rules(Choice("attention", "fp8"), base, empty)


def test_source_without_one_expert_of_each_layer_has_it_named():
    base = checkpoint("base", BASE)
    fewer = checkpoint("fp8", [name for name in BASE if ".experts.1." not in name])
    with pytest.raises(RouteError, match=r"it lacks e\.g\. model\.layers\.\d\.mlp\.experts\.1\."):
        draft_rules(Choice("routed_experts", "fp8"), base, fewer)


def test_composed_directory_is_no_source(run, mixed_plan, tmp_path):
    assert run("compose", mixed_plan, "-o", tmp_path / "mixed").code == 0
    source = f"a={tmp_path / 'mixed'}"
    result = run("plan", "--base", "a", "--source", source)
    assert result.code == 1
    assert f"Name one of its sources, {tmp_path / 'mixed' / 'sources' / 'NAME'}." in result.err


OLD = """\
mixed_precision:
  base_model_path: models/bf16
  fp8_path: models/fp8
  gptq_int4_path: models/gptq
  weight_mapping:  # by tensor
    "model.layers.0.self_attn.q_proj.weight": fp8
    "model.layers.*.mlp.experts.{0-3}.*_proj.weight": gptq_int4
server: {port: 8080}
"""


@pytest.fixture
def older(tmp_path) -> Path:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "models").symlink_to(MODELS)
    file = tmp_path / "old" / "old.yaml"
    file.write_text(OLD)
    return file


def test_older_plan_is_rewritten_for_another_folder(run, older, tmp_path):
    new = tmp_path / "plan.yaml"
    result = run("plan", "--from", older, "-o", new)
    assert result.code == 0
    assert result.err.endswith("2 rules; dropped: server, comments\n")
    old, plan = Plan.from_yaml(older), Plan.from_yaml(new)
    assert "rules:" in new.read_text() and plan.dropped is None
    assert rules_of(plan) == rules_of(old) and plan.base == old.base == "base"
    assert {source.path for source in plan.sources.values()} == {
        f"./old/models/{name}" for name in ("bf16", "fp8", "gptq")
    }
    sources = [load_route_table(each).bytes_by_source() for each in (old, plan)]
    assert sources[0] == sources[1]
    assert run("check", new).code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("'re:q #': fp8  # not of the name\n", "1 rule; dropped: comments"),
        ('"re:q #": fp8\n', "1 rule; nothing was dropped"),
        ("'re: #': fp8\n    lm_head: fp8\n", "2 rules; nothing was dropped"),
        ("{}\n#", "0 rules; dropped: comments"),
    ],
)
def test_comments_are_dropped_only_where_there_are_some(run, tmp_path, text, said):
    file = tmp_path / "old.yaml"
    paths = f"  base_model_path: {MODELS / 'bf16'}\n  fp8_path: {MODELS / 'fp8'}\n"
    inside = text if text[0] == "{" else f"\n    {text}"
    file.write_text(f"mixed_precision:\n{paths}  weight_mapping: {inside}")
    result = run("plan", "--from", file)
    assert result.code == 0
    assert result.err == f"{file}: {said}\n"
    found = run("plan", "--from", file, "--json").json
    assert found["dropped"] == (["comments"] if "comments" in said else [])


def test_older_plan_is_checked_as_it_is_with_a_note(run, older):
    found = run("check", older, "--json").json
    assert found["ok"]
    (note,) = [f for f in found["findings"] if f["code"] == "older-spelling"]
    assert note["level"] == "note" and "server" in note["message"]


def test_rewriting_takes_no_other_option_and_says_what_it_dropped(run, older):
    assert run("plan", "--from", older, "--base", "fp8").code == 2
    assert run("plan").code == 2
    found = run("plan", "--from", older, "--json").json
    assert found["dropped"] == ["server", "comments"]
    assert yaml.safe_load(found["yaml"]) == found["plan"]
