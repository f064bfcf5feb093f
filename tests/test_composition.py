# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.routing.models import (
    ARCHITECTURES,
    FIXTURES,
    OF_ARCHITECTURES,
    copy_models,
    edit_json,
    make_plan,
    only,
)
from vllm_mixprec.checkpoint import open_checkpoint
from vllm_mixprec.composition import PLAN_FILE, ComposeRefused, compose, composed_quantization
from vllm_mixprec.errors import CheckpointError, MixPrecError
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import check, load_route_table


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a copy of every fixture checkpoint."""
    return copy_models(tmp_path)


RULES = (("**.experts.{0-3}", "gptq"), ("**.self_attn.*_proj", "fp8"))


def files_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}


def test_composed_directory_holds_config_plan_tokenizer_and_links(tmp_path: Path) -> None:
    report = compose(make_plan(*RULES), tmp_path / "mixed")
    assert report.ok
    assert files_below(tmp_path / "mixed") == {
        "config.json",
        "mixprec_plan.yaml",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "sources/bf16/config.json",
        "sources/bf16/mixprec_headers",
        "sources/bf16/model.safetensors.index.json",
        "sources/bf16/generation_config.json",
        "sources/bf16/tokenizer.json",
        "sources/bf16/tokenizer_config.json",
        "sources/bf16/model-00001-of-00003.safetensors",
        "sources/bf16/model-00002-of-00003.safetensors",
        "sources/bf16/model-00003-of-00003.safetensors",
        "sources/fp8/config.json",
        "sources/fp8/mixprec_headers",
        "sources/fp8/model.safetensors",
        "sources/gptq/config.json",
        "sources/gptq/mixprec_headers",
        "sources/gptq/model.safetensors",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["mixed"]


def test_no_tensor_bytes_are_copied(tmp_path: Path) -> None:
    compose(make_plan(*RULES), tmp_path / "mixed")
    shards = list((tmp_path / "mixed").rglob("*.safetensors"))
    assert len(shards) == 5
    for shard in shards:
        assert shard.is_symlink()
        assert shard.readlink() == FIXTURES.resolve() / shard.parent.name / shard.name


def test_config_is_the_base_s_with_our_quantization_config(tmp_path: Path) -> None:
    compose(make_plan(("**.experts.0", "bf16"), base="fp8"), tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    base = json.loads((FIXTURES / "fp8" / "config.json").read_text())
    plan = Plan.from_yaml(tmp_path / "mixed" / PLAN_FILE)
    ours = config.pop("quantization_config")
    base.pop("quantization_config")
    assert config == base
    assert ours == {
        "quant_method": "mixprec",
        "plan": "mixprec_plan.yaml",
        "plan_sha256": plan.sha256,
    }


def test_nested_quantization_config_is_left_out(models: Path, tmp_path: Path) -> None:
    config = models / "fp8" / "config.json"
    content = json.loads(config.read_text())
    edit_json(config, text_config=content, quantization_config=None)
    compose(make_plan(base="fp8", folder=models), tmp_path / "mixed")
    composed = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert "quantization_config" not in composed["text_config"]
    assert composed["quantization_config"]["quant_method"] == "mixprec"


def test_composed_plan_routes_as_the_plan_does(tmp_path: Path) -> None:
    plan = make_plan(*RULES, mixed_fused="error")
    compose(plan, tmp_path / "mixed")
    composed = Plan.from_yaml(tmp_path / "mixed" / PLAN_FILE)
    assert {source.path for source in composed.sources.values()} == {
        "sources/bf16",
        "sources/fp8",
        "sources/gptq",
    }
    assert composed.options == plan.options
    before, after = load_route_table(plan), load_route_table(composed)
    assert list(before.routes) == list(after.routes)
    for module, route in after.routes.items():
        expected = before.routes[module]
        assert (route.source, route.served) == (expected.source, expected.served)
        for suffix, spec in route.tensors.items():
            assert spec.file.resolve() == expected.tensors[suffix].file.resolve()
    assert check(composed).findings == ()


def test_only_shards_in_use_are_linked_and_indexed(tmp_path: Path) -> None:
    plan = make_plan(("lm_head", "bf16"), base="fp8")
    compose(plan, tmp_path / "mixed")
    source = tmp_path / "mixed" / "sources" / "bf16"
    assert [file.name for file in source.glob("*.safetensors")] == [
        "model-00001-of-00003.safetensors"
    ]
    checkpoint = open_checkpoint(source)
    assert checkpoint.problems == ()
    assert "lm_head" in checkpoint.modules
    assert check(Plan.from_yaml(tmp_path / "mixed" / PLAN_FILE)).ok


def test_links_lead_to_the_files_themselves(models: Path) -> None:
    shard = models / "fp8" / "model.safetensors"
    blob = shard.rename(models / "blob")  # as huggingface_hub's cache keeps it
    shard.symlink_to(blob)
    compose(make_plan(base="fp8", folder=models), models / "mixed")
    link = models / "mixed" / "sources" / "fp8" / "model.safetensors"
    assert link.readlink() == blob.resolve()


def test_source_that_nothing_uses_is_left_out_with_its_rules(tmp_path: Path) -> None:
    plan = make_plan(("**.experts.0", "gptq"), ("**.experts.0.up_proj", "fp8"))
    compose(plan, tmp_path / "mixed")
    composed = Plan.from_yaml(tmp_path / "mixed" / PLAN_FILE)
    assert list(composed.sources) == ["bf16", "gptq"]
    assert [rule.source for rule in composed.rules] == ["gptq"]


def test_rule_for_a_draft_s_layer_that_its_source_lacks_stays(tmp_path: Path) -> None:
    """Without it the layer would come from the source of the next rule that matches."""
    plan = make_plan(
        ("model.layers.2.mlp.experts", "int4"),
        ("model.layers.*.mlp.experts", "fp8"),
        folder=ARCHITECTURES / "deepseek_v3",
        sources=OF_ARCHITECTURES,
    )
    compose(plan, tmp_path / "mixed")
    for _ in range(2):
        composed = Plan.from_yaml(tmp_path / "mixed" / PLAN_FILE)
        assert [rule.source for rule in composed.rules] == ["int4", "fp8"]
        assert only(check(composed), "module-missing").level == "warning"
        assert {f.code for f in check(composed, draft=True).findings} == {"module-missing"}
        assert load_route_table(composed).routes.keys() == load_route_table(plan).routes.keys()
        compose(composed, tmp_path / "mixed")  # in place, where its shards are links


def test_source_folder_has_the_source_s_name(tmp_path: Path) -> None:
    name = "fp8.v1-b"
    plan = Plan.from_dict(
        {
            "version": 1,
            "base": "bf16",
            "sources": {"bf16": {"path": "bf16"}, name: {"path": "fp8"}},
            "rules": [{"match": "lm_head", "source": name}],
        },
        base_dir=FIXTURES,
    )
    compose(plan, tmp_path / "mixed")
    assert {file.name for file in (tmp_path / "mixed" / "sources").iterdir()} == {"bf16", name}
    assert check(Plan.from_yaml(tmp_path / "mixed" / PLAN_FILE)).ok


def test_quantizer_config_of_the_base_stays_behind(models: Path, tmp_path: Path) -> None:
    for name in ("quantize_config.json", "hf_quant_config.json", "chat_template.jinja"):
        (models / "gptq" / name).write_text("{}")
    compose(make_plan(base="gptq", folder=models), tmp_path / "mixed")
    composed = files_below(tmp_path / "mixed")
    assert "chat_template.jinja" in composed
    assert not {"quantize_config.json", "hf_quant_config.json"} & composed


# Refusals.


def test_plan_with_errors_is_refused_and_nothing_written(tmp_path: Path) -> None:
    plan = make_plan(("model.nothing", "fp8"), ("model.neither", "fp8"))
    with pytest.raises(ComposeRefused, match=r'(?s)"model\.nothing" .*"model\.neither"') as raised:
        compose(plan, tmp_path / "mixed")
    assert not raised.value.report.ok
    assert list(tmp_path.iterdir()) == []


def test_composing_again_replaces_the_directory(tmp_path: Path) -> None:
    compose(make_plan(*RULES), tmp_path / "mixed")
    compose(make_plan(("lm_head", "fp8")), tmp_path / "mixed")
    assert not (tmp_path / "mixed" / "sources" / "gptq").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["mixed"]


def test_composed_model_can_be_composed_in_place(tmp_path: Path) -> None:
    compose(make_plan(*RULES), tmp_path / "mixed")
    before = files_below(tmp_path / "mixed")
    compose(Plan.from_yaml(tmp_path / "mixed" / PLAN_FILE), tmp_path / "mixed")
    assert files_below(tmp_path / "mixed") == before
    assert check(Plan.from_yaml(tmp_path / "mixed" / PLAN_FILE)).ok


def test_directory_of_others_is_refused_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MixPrecError, match="not empty, and without a config.json and a plan"):
        compose(make_plan(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    compose(make_plan(), tmp_path, force=True)
    assert not (tmp_path / "notes.txt").exists()


def test_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    compose(make_plan(), tmp_path / "mixed")
    assert (tmp_path / "mixed" / "config.json").is_file()


def test_file_or_link_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(MixPrecError, match="a link or a file, expected a directory"):
        compose(make_plan(), tmp_path / "link", force=True)


def test_directory_with_a_plan_but_no_config_of_compose_is_refused(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / PLAN_FILE).write_text("mine")
    (work / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    for _ in range(2):
        with pytest.raises(MixPrecError, match="not empty"):
            compose(make_plan(), work)
        assert (work / PLAN_FILE).read_text() == "mine"
        (work / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("out", [".", "bf16", "fp8"])
def test_directory_that_holds_a_source_is_never_replaced(models: Path, out: str) -> None:
    """Nor one, here fp8, that no rule uses."""
    before = files_below(models)
    with pytest.raises(MixPrecError, match="source '.*', expected outside of .* would be replaced"):
        compose(make_plan(folder=models), models / out, force=True)
    assert files_below(models) == before


def test_directory_that_holds_a_shard_by_a_link_is_never_replaced(models: Path) -> None:
    shard = models / "fp8" / "model.safetensors"
    (models / "blobs").mkdir()
    blob = shard.rename(models / "blobs" / "blob")
    shard.symlink_to(blob)
    with pytest.raises(MixPrecError, match="a shard that the plan uses, expected outside of"):
        compose(make_plan(base="fp8", folder=models), models / "blobs", force=True)
    assert blob.exists()


@pytest.mark.parametrize("is_inside", [False, True])
def test_directory_that_holds_the_plan_is_never_replaced(tmp_path: Path, is_inside: bool) -> None:
    compose(make_plan(*RULES), tmp_path / "mixed")
    folder = tmp_path / "mixed" / ("plans" if is_inside else ".")
    folder.mkdir(exist_ok=True)
    (folder / "new.yaml").write_text(make_plan(folder=FIXTURES).to_yaml())
    with pytest.raises(MixPrecError, match=r"new\.yaml: the plan, expected outside of"):
        compose(Plan.from_yaml(folder / "new.yaml"), tmp_path / "mixed", force=True)
    assert (folder / "new.yaml").exists()


@pytest.mark.parametrize("out", [".", ".."])
def test_working_directory_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(MixPrecError, match="/a/b: the working directory, expected outside of"):
        compose(make_plan(), out, force=True)
    assert (tmp_path / "a" / "b").is_dir()


def test_source_in_another_composed_directory_is_kept(tmp_path: Path) -> None:
    compose(make_plan(*RULES), tmp_path / "mixed")
    before = files_below(tmp_path / "mixed")
    other = make_plan(folder=tmp_path / "mixed" / "sources", sources=("bf16", "gptq"))
    with pytest.raises(MixPrecError, match="source 'bf16', expected outside of"):
        compose(other, tmp_path / "mixed")
    assert files_below(tmp_path / "mixed") == before


def test_failure_half_way_leaves_the_old_directory(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = models / "mixed"
    compose(make_plan(folder=models), out)
    before = files_below(out)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(MixPrecError, match=r"mixed: cannot be written \(disk full\), expected"):
        compose(make_plan(*RULES, folder=models), out)
    assert files_below(out) == before
    assert not list(models.glob("mixed.*"))


def test_old_directory_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compose(make_plan(*RULES), tmp_path / "mixed")

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(MixPrecError, match=r"\.old: what stood .* the new directory is in place"):
        compose(make_plan(), tmp_path / "mixed")
    assert not (tmp_path / "mixed" / "sources" / "gptq").exists()


def test_small_file_of_gigabytes_is_not_copied(models: Path, tmp_path: Path) -> None:
    tokenizer = models / "bf16" / "tokenizer.json"
    os.truncate(tokenizer, 1 << 40)
    with pytest.raises(CheckpointError, match=f"{tokenizer}: 1099511627776 bytes, expected"):
        compose(make_plan(*RULES, folder=models), tmp_path / "out" / "mixed")
    assert not list((tmp_path / "out").iterdir())


def test_config_of_gigabytes_is_no_composed_directory(tmp_path: Path) -> None:
    """Every command asks so of what it is given, before anything else."""
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1 << 40)
    assert composed_quantization(tmp_path) is None
