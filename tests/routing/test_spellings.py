# SPDX-License-Identifier: Apache-2.0
"""Sources that spell or fuse modules otherwise than the base are the same model."""

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_parts import read_module
from tests.routing.models import CPU, FIXTURES, edit_json, only
from tests.spellings import (
    MIXTRAL,
    RANDOM,
    as_auto_round,
    as_mlp,
    nested,
    qkv,
    read_all,
    respell,
    stack,
    wrapped,
    write,
)
from vllm_mixprec.checkpoint import Module
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Layout, Report, Route, RouteTable, check, load_route_table

EXPERTS = "model.layers.0.mlp.experts"
BASE = {
    "apart": (),
    "stacked": (stack(),),
    "transposed": (stack(is_transposed=True), qkv),
    "fused": (stack(is_dotted=True), qkv),
    "nested": (nested,),
}


def make_plan(sources: dict[str, Path], *rules: tuple[str, str]) -> Plan:
    return Plan.from_dict(
        {
            "version": 1,
            "base": "base",
            "sources": {name: {"path": str(path)} for name, path in sources.items()},
            "rules": [{"match": match, "source": source} for match, source in rules],
        }
    )


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """random-moe in several spellings, BF16 and FP8."""
    folder, made = tmp_path_factory.mktemp("spelled"), {}
    for name, how in BASE.items():
        made[name] = respell(folder / name, RANDOM / "bf16", *how)
        made[f"{name}-fp8"] = respell(folder / f"{name}-fp8", RANDOM / "fp8", *how)
    return made


def same(one: Route, other: Route) -> bool:
    """Whether two routes feed the same tensors, whatever files they come from."""
    if (one.stored, one.served, one.shape) != (other.stored, other.served, other.shape):
        return False
    mine, theirs = read_tensors_of(one), read_tensors_of(other)
    return mine.keys() == theirs.keys() and all(
        (mine[key].float() == theirs[key].float()).all() for key in mine
    )


def read_tensors_of(route: Route) -> dict[str, torch.Tensor]:
    tensors = dict(route.tensors)
    return read_module(Module(route.module, tensors, route.stored, route.shape, ()))


def route_all(base: Path, fp8: Path, prefix: str = "model") -> RouteTable:
    plan = make_plan(
        {"base": base, "fp8": fp8},
        (f"{prefix}.layers.*.mlp.experts.{{0-2}}", "fp8"),
        (f"{prefix}.layers.0.self_attn.*_proj", "fp8"),
    )
    return load_route_table(plan, platform=CPU)


@pytest.mark.parametrize(
    ("base", "fp8"),
    [("apart", name) for name in BASE]
    + [(name, "apart") for name in BASE if name != "apart"]
    + [("transposed", "fused"), ("nested", "stacked")],
)
def test_any_spelling_of_base_and_source_gives_the_same_routes(
    spelled: dict[str, Path], base: str, fp8: str
) -> None:
    expected = route_all(spelled["apart"], spelled["apart-fp8"]).routes
    prefix = "model.language_model" if base == "nested" else "model"
    found = route_all(spelled[base], spelled[f"{fp8}-fp8"], prefix).routes
    found = {name.replace("language_model.", ""): route for name, route in found.items()}
    assert found.keys() == expected.keys()
    assert {route.source for route in found.values()} == {"base", "fp8"}
    assert [name for name in expected if not same(found[name], expected[name])] == []
    # The comparison can fail: an expert is not its neighbour.
    assert not same(found[f"{EXPERTS}.1.up_proj"], expected[f"{EXPERTS}.2.up_proj"])
    assert not same(found[f"{EXPERTS}.1.up_proj"], expected[f"{EXPERTS}.1.gate_proj"])


# Rules speak of the base's names, and of the experts in a tensor of all.


@pytest.mark.parametrize(
    ("match", "routed"),
    [
        (f"{EXPERTS}", 24),
        (f"{EXPERTS}.gate_up_proj", 16),
        (f"{EXPERTS}.gate_up_proj.weight", 16),
        (f"{EXPERTS}.{{2,5-7}}", 12),
        (f"{EXPERTS}.*.down_proj", 8),
        (r"re:model\.layers\.0\.mlp\.experts\.down_proj", 8),
        (r"re:model\.layers\.0\.mlp\.experts\.[01]\..*", 6),
        ("model.layers.0.self_attn.qkv_proj", 3),
        ("model.layers.0.self_attn.*_proj", 4),
        ("model.layers.0.self_attn", 4),
    ],
)
def test_rules_over_a_fused_base(spelled: dict[str, Path], match: str, routed: int) -> None:
    sources = {"base": spelled["fused"], "fp8": spelled["apart-fp8"]}
    if match.endswith("self_attn"):
        sources["fp8"] = spelled["fused-fp8"]
    plan = make_plan(sources, (match, "fp8"))
    routes = load_route_table(plan, platform=CPU).routes.values()
    quantized = [route for route in routes if route.source == "fp8" and route.stored.bits == 8]
    assert len(quantized) == routed


def test_names_of_the_source_match_nothing(spelled: dict[str, Path]) -> None:
    sources = {"base": spelled["apart"], "fp8": spelled["fused-fp8"]}
    report = check(make_plan(sources, (f"{EXPERTS}.gate_up_proj", "fp8")), platform=CPU)
    finding = only(report, "rule-unmatched")
    assert "Nearest: model.layers.*.mlp.experts" in finding.message


def test_the_nearest_names_are_the_files_own_too(spelled: dict[str, Path]) -> None:
    plan = make_plan({"base": spelled["fused"]}, ("model.layers.*.self_attn.qkv_pro", "base"))
    assert "self_attn.qkv_proj" in only(check(plan, platform=CPU), "rule-unmatched").message


# What is found.


def check_spelled(sources: dict[str, Path], *rules: tuple[str, str], **layout: int) -> Report:
    return check(make_plan(sources, *rules), platform=CPU, **layout)


def test_a_fused_base_is_checked_like_one_with_parts(spelled: dict[str, Path]) -> None:
    """Tensor parallelism cuts the parts, and finds the same to say of them."""
    rules = (("model.layers.*.mlp.experts.{0-3}", "fp8"), ("**.self_attn.*_proj", "fp8"))
    reports = [
        check_spelled(
            {"base": spelled[name], "fp8": spelled[f"{name}-fp8"]}, *rules, tensor_parallel_size=2
        )
        for name in ("apart", "fused", "transposed")
    ]
    assert reports[0].ok and reports[0].bytes_per_rank[0] > 0
    assert {report.bytes_per_rank for report in reports} == {reports[0].bytes_per_rank}
    codes = [sorted(finding.code for finding in report.findings) for report in reports]
    assert codes[0] == codes[1] == codes[2] and "parallel-cut" in codes[0]
    assert not any(finding.code == "experts-fused" for r in reports for finding in r.findings)


def test_findings_speak_of_the_fused_name(spelled: dict[str, Path], tmp_path: Path) -> None:
    """A source that lacks attention, and a fused layer that is widened."""
    tensors = {k: v for k, v in read_all(RANDOM / "fp8").items() if ".experts." in k}
    partial = write(tmp_path / "partial", RANDOM / "fp8", tensors)
    sources = {"base": spelled["fused"], "fp8": partial}
    finding = only(check_spelled(sources, ("**.self_attn.qkv_proj", "fp8")), "module-missing")
    assert finding.where == "model.layers.*.self_attn.qkv_proj"

    half = {k: v for k, v in read_all(RANDOM / "bf16").items() if "k_proj" not in k}
    fp8 = {k: v for k, v in read_all(RANDOM / "fp8").items() if "k_proj" in k}
    sources["fp8"] = write(tmp_path / "half", RANDOM / "fp8", half | fp8)
    finding = only(check_spelled(sources, ("**.self_attn.qkv_proj", "fp8")), "fused-mixed")
    assert finding.where == "model.layers.*.self_attn.qkv_proj"
    assert finding.message.startswith("q_proj and v_proj are bf16, k_proj is fp8_block")


def test_a_partial_source_serves_what_it_has(spelled: dict[str, Path], tmp_path: Path) -> None:
    """A directory with nothing but int4 experts, those of a layer in one file of its own."""
    tensors = {k: v for k, v in read_all(RANDOM / "gptq").items() if ".experts." in k}
    partial = write(tmp_path / "partial", RANDOM / "gptq", tensors)
    for base in ("apart", "stacked"):
        sources = {"base": spelled[base], "int4": partial}
        report = check_spelled(sources, ("model.layers.*.mlp.experts.{0-3}", "int4"))
        assert report.ok, report.findings
        finding = only(check_spelled(sources, ("model.layers.*.mlp", "int4")), "module-missing")
        assert finding.where == "model.layers.*.mlp.gate"


def test_two_spellings_in_one_source_are_an_error_once_served(
    spelled: dict[str, Path], tmp_path: Path
) -> None:
    tensors = read_all(RANDOM / "fp8")
    both = stack()(tensors) | {k: v for k, v in tensors.items() if ".layers.0." in k}
    sources = {"base": spelled["apart"], "fp8": write(tmp_path / "both", RANDOM / "fp8", both)}
    report = check_spelled(sources, (EXPERTS, "fp8"))
    found = [finding for finding in report.findings if finding.code == "module-tensors"]
    for leaf in ("gate_up_proj", "down_proj"):
        names = [f"{finding.where} {finding.message}" for finding in found]
        assert any(f"{EXPERTS}.{leaf}" in n and "experts.0." in n for n in names), names
    assert len(found) <= 3  # gate and up of one tensor, and down
    elsewhere = check_spelled(sources, ("model.layers.1.mlp.experts", "fp8"))
    assert elsewhere.ok, elsewhere.findings


def test_a_router_of_another_model_is_found_under_another_name(
    spelled: dict[str, Path], tmp_path: Path
) -> None:
    tensors = read_all(RANDOM / "fp8")
    tensors["model.layers.1.mlp.gate.weight"][3, 5] += 1
    for how in ((), (nested,), (wrapped,)):
        for change in how:
            tensors = change(tensors)
        folder = tmp_path / (how[0].__name__ if how else "plain") / str(id(how))
        sources = {"base": spelled["apart"], "fp8": write(folder, RANDOM / "fp8", tensors)}
        report = check_spelled(sources, (EXPERTS, "fp8"))
        assert only(report, "router-mismatch").where == "model.layers.1.mlp.gate"


def test_a_language_model_is_the_same_inside_a_multimodal_one(
    spelled: dict[str, Path], tmp_path: Path
) -> None:
    outer = respell(tmp_path / "outer", RANDOM / "fp8", nested)
    text = json.loads((outer / "config.json").read_text())
    config = {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": text,
        "quantization_config": text.pop("quantization_config"),
    }
    (outer / "config.json").write_text(json.dumps(config))
    sources = {"base": spelled["apart"], "fp8": outer}
    assert check_spelled(sources, (EXPERTS, "fp8")).ok
    edit_json(outer / "config.json", text_config=text | {"hidden_size": 512})
    report = check_spelled(sources, (EXPERTS, "fp8"))
    assert "hidden_size is 512" in only(report, "architecture-mismatch").message


# Mixtral, whose experts every tool calls something else.


@pytest.mark.parametrize("how", [as_auto_round, as_mlp, wrapped, stack()])
def test_mixtral_in_other_words(tmp_path: Path, how) -> None:
    base = MIXTRAL / "bf16"
    experts = "model.layers.{0,1}.block_sparse_moe.experts.{1,2}"
    rules = ((experts, "fp8"), ("model.layers.0.block_sparse_moe.gate", "fp8"))
    fp8 = respell(tmp_path / "fp8", MIXTRAL / "fp8", how)
    found = load_route_table(make_plan({"base": base, "fp8": fp8}, *rules), platform=CPU).routes
    plan = make_plan({"base": base, "fp8": MIXTRAL / "fp8"}, *rules)
    expected = load_route_table(plan, platform=CPU).routes
    assert [name for name in expected if not same(found[name], expected[name])] == []
    routed = {name for name, route in found.items() if route.source == "fp8"}
    assert len(routed) == 2 * 2 * 3 + 1
    one, other = (f"model.layers.0.block_sparse_moe.experts.1.{w}" for w in ("w1", "w3"))
    assert not same(found[one], expected[other])


def test_layout_of_a_stacked_base_under_expert_parallelism(spelled: dict[str, Path]) -> None:
    plan = make_plan({"base": spelled["stacked"]})
    layout = Layout(tensor_parallel_size=2, expert_parallel=True)
    sizes = load_route_table(plan, layout, CPU).bytes_per_rank()
    plan = make_plan({"base": FIXTURES / "bf16"})
    assert sizes == load_route_table(plan, layout, CPU).bytes_per_rank()
