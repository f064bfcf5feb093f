# SPDX-License-Identifier: Apache-2.0
"""One test for each thing that DESIGN.md section 2 says ``check`` finds."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.routing.models import (
    ARCHITECTURES,
    CPU,
    OF_ARCHITECTURES,
    Tensor,
    edit_json,
    edit_tensors,
    make_plan,
    only,
)
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Finding, Platform, Report, check

EXPERTS = "model.layers.0.mlp.experts"
PLAN_TEXT = """\
version: 1
base: bf16
sources:
  bf16: {path: bf16}
  fp8: {path: fp8}
  gptq: {path: gptq}
rules:
"""


def check_here(
    plan: Plan, *sizes: int, expert_parallel: bool = False, data_parallel_size: int = 1
) -> Report:
    return check(
        plan,
        *sizes,
        expert_parallel=expert_parallel,
        data_parallel_size=data_parallel_size,
        platform=CPU,
    )


def check_yaml(models: Path, *rules: str) -> Report:
    file = models / "plan.yaml"
    file.write_text(PLAN_TEXT + "".join(f"  - {{{rule}}}\n" for rule in rules))
    return check_here(Plan.from_yaml(file))


def expect_error(report: Report, code: str, where: str, *parts: str) -> Finding:
    finding = only(report, code)
    assert finding.level == "error"
    assert finding.where.endswith(where)
    for part in parts:
        assert part in finding.message
    assert not report.ok
    assert report.table is None
    return finding


def test_sound_plan_has_no_findings() -> None:
    report = check_here(make_plan(("**.experts.{0-3}", "gptq"), ("**.self_attn.*_proj", "fp8")))
    assert report.ok
    assert report.findings == ()
    assert report.table is not None
    total = sum(route.served_bytes for route in report.table.routes.values())
    assert report.bytes_per_rank == (total,)


# Sources.


def test_missing_source(models: Path) -> None:
    plan = make_plan(("**.experts.0", "gptq"), folder=models)
    (models / "gptq").rename(models / "elsewhere")
    expect_error(check_here(plan), "source-unreadable", "source 'gptq'", "no such directory")


def test_missing_base(models: Path) -> None:
    (models / "bf16" / "config.json").unlink()
    report = check_here(make_plan(folder=models))
    expect_error(report, "source-unreadable", "source 'bf16'", "config.json")
    assert report.bytes_per_rank == ()


def test_truncated_shard(models: Path) -> None:
    shard = models / "gptq" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    plan = make_plan(("**.experts.0", "gptq"), folder=models)
    expect_error(check_here(plan), "source-unreadable", "source 'gptq'", "model.safetensors")


def test_unknown_format(models: Path) -> None:
    def to_packed(tensors: dict[str, Tensor]) -> None:
        name = f"{EXPERTS}.0.up_proj"
        tensors[f"{name}.weight_packed"] = tensors.pop(f"{name}.qweight")

    edit_tensors(models / "gptq" / "model.safetensors", to_packed)
    plan = make_plan(("**.experts.0", "gptq"), folder=models)
    expect_error(check_here(plan), "source-unsupported", "source 'gptq'", "0.up_proj")


def test_source_of_another_architecture(models: Path) -> None:
    edit_json(models / "fp8" / "config.json", architectures=["LlamaForCausalLM"])
    plan = make_plan(("**.experts.0", "fp8"), folder=models)
    expect_error(
        check_here(plan), "architecture-mismatch", "fp8/config.json", "['LlamaForCausalLM']"
    )


def test_source_of_other_sizes(models: Path) -> None:
    edit_json(models / "fp8" / "config.json", hidden_size=512, num_local_experts=16)
    plan = make_plan(("**.experts.0", "fp8"), folder=models)
    expect_error(
        check_here(plan),
        "architecture-mismatch",
        "fp8/config.json",
        "hidden_size is 512, expected 256",
        "number of experts is 16, expected 8",
    )


def test_what_another_model_lacks_is_not_listed(models: Path) -> None:
    edit_json(models / "fp8" / "config.json", architectures=["LlamaForCausalLM"])
    edit_tensors(models / "fp8" / "model.safetensors", lambda tensors: tensors.clear())
    edit_tensors(
        models / "fp8" / "model.safetensors", lambda t: t.update({"x.weight": ("BF16", [1], b"00")})
    )
    report = check_here(make_plan(("**.experts.0", "fp8"), folder=models))
    assert [finding.code for finding in report.findings] == ["architecture-mismatch"]


@pytest.mark.parametrize("key", ["kv_lora_rank", "n_group", "index_topk", "first_k_dense_replace"])
def test_source_of_other_sizes_of_deepseek(models: Path, key: str) -> None:
    for source, size in (("bf16", 4), ("fp8", 2)):
        edit_json(models / source / "config.json", **{key: size})
    report = check_here(make_plan(("**.experts.0", "fp8"), folder=models))
    assert f"{key} is 2, expected 4" in only(report, "architecture-mismatch").message


def test_head_dim_of_a_model_with_mla_is_not_compared(models: Path) -> None:
    for source, size in (("bf16", 64), ("fp8", 192)):
        edit_json(models / source / "config.json", head_dim=size, kv_lora_rank=4)
    assert check_here(make_plan(("**.experts.0", "fp8"), folder=models)).ok


def test_unused_missing_source_is_only_a_warning(tmp_path: Path, models: Path) -> None:
    sources = {"bf16": {"path": "bf16"}, "old": {"path": str(tmp_path / "gone")}}
    plan = Plan.from_dict({"version": 1, "base": "bf16", "sources": sources}, base_dir=models)
    report = check_here(plan)
    assert report.ok
    finding = only(report, "source-unreadable")
    assert finding.level == "warning"
    assert "No rule uses it" in finding.message


# Routers.


def change_router(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.gate.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, bytes([data[0] ^ 0x40]) + data[1:])


def test_router_weights_that_differ(models: Path) -> None:
    edit_tensors(models / "gptq" / "model.safetensors", change_router)
    plan = make_plan(("**.experts.0", "gptq"), folder=models)
    expect_error(
        check_here(plan),
        "router-mismatch",
        "model.layers.1.mlp.gate",
        "router weights differ between source 'gptq' and base 'bf16'",
    )


def test_routers_of_unused_sources_are_not_compared(models: Path) -> None:
    edit_tensors(models / "gptq" / "model.safetensors", change_router)
    assert check_here(make_plan(("**.experts.0", "fp8"), folder=models)).ok


def cast_router(scale: float, dtype: str) -> Callable[[dict[str, Tensor]], None]:
    def cast(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.gate.weight"
        _, shape, data = tensors[name]
        words = struct.unpack(f"<{len(data) // 2}H", data)
        floats = [struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words]
        code = {"F32": "f", "F16": "e"}[dtype]
        content = struct.pack(f"<{len(floats)}{code}", *(value * scale for value in floats))
        tensors[name] = (dtype, shape, content)

    return cast


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_same_router_in_another_dtype_is_the_same(models: Path, dtype: str) -> None:
    edit_tensors(models / "gptq" / "model.safetensors", cast_router(1.0, dtype))
    assert check_here(make_plan(("**.experts.0", "gptq"), folder=models)).ok


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_another_router_in_another_dtype_differs(models: Path, dtype: str) -> None:
    edit_tensors(models / "gptq" / "model.safetensors", cast_router(1.05, dtype))
    report = check_here(make_plan(("**.experts.0", "gptq"), folder=models))
    only(report, "router-mismatch")


def test_router_of_another_shape(models: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.gate.weight"
        dtype, (rows, columns), data = tensors[name]
        tensors[name] = (dtype, [rows // 2, columns], data[: len(data) // 2])

    edit_tensors(models / "fp8" / "model.safetensors", cut)
    expect_error(
        check_here(make_plan(("**.experts.0", "fp8"), folder=models)),
        "router-mismatch",
        "model.layers.1.mlp.gate",
        "source 'fp8' has a router of shape [4, 256], expected [8, 256] as base 'bf16'",
    )


def quantize_router(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.gate.weight"
    _, shape, data = tensors[name]
    tensors[name] = ("F8_E4M3", shape, data[1::2])
    scales = struct.pack("<8f", *[1.0] * 8)
    tensors[f"{name}_scale"] = ("F32", [8, 1], scales)


@pytest.mark.parametrize("quantized", ["base", "source"])
def test_quantized_router_cannot_be_compared(models: Path, quantized: str) -> None:
    shards = {"base": "model-00003-of-00003.safetensors", "source": "model.safetensors"}
    folder = models / {"base": "bf16", "source": "gptq"}[quantized]
    edit_tensors(folder / shards[quantized], quantize_router)
    if quantized == "base":
        edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
        index = folder / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map["model.layers.1.mlp.gate.weight_scale"] = shards[quantized]
        edit_json(index, weight_map=weight_map)
    report = check_here(make_plan(("**.experts.0", "gptq"), folder=models))
    finding = only(report, "router-quantized")
    assert (finding.level, finding.where) == ("warning", "model.layers.1.mlp.gate")
    source, whose = {
        "base": ("bf16", "that of source 'gptq'"),
        "source": ("gptq", "the base's"),
    }[quantized]
    assert finding.message.startswith(f"source {source!r} stores this router as fp8_channel")
    assert f"it cannot be compared with {whose}" in finding.message


def change_bias(scale: float, dtype: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        stored, shape, data = tensors[name]
        assert stored == "F32"
        values = [value * scale for (value,) in struct.iter_unpack("<f", data)]
        code = {"F32": "f", "F16": "e", "F64": "d"}[dtype]
        tensors[name] = (dtype, shape, struct.pack(f"<{len(values)}{code}", *values))

    return change


@pytest.mark.parametrize(
    ("scale", "dtype", "codes"),
    [
        (1.0, "F32", set()),
        (1.0, "F16", set()),
        (1.05, "F32", {"router-mismatch"}),
        (1.05, "F16", {"router-mismatch"}),
        (1.0, "F64", {"router-mismatch"}),
    ],
)
def test_correction_bias_is_compared_like_the_router(
    tmp_path: Path, scale: float, dtype: str, codes: set[str]
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(ARCHITECTURES / "deepseek_v3", folder)
    edit_tensors(folder / "fp8" / "model.safetensors", change_bias(scale, dtype))
    plan = make_plan(("**.experts", "fp8"), folder=folder, sources=OF_ARCHITECTURES)
    report = check_here(plan)
    assert {finding.code for finding in report.findings if finding.level == "error"} == codes
    if codes:
        expect_error(
            report,
            "router-mismatch",
            "model.layers.1.mlp.gate.e_score_correction_bias",
            "the router's correction bias differs between source 'fp8' and base 'bf16'",
        )


# Rules.


def test_rule_that_matches_nothing_names_the_nearest(models: Path) -> None:
    report = check_yaml(models, 'match: "model.layers.*.mlp.expert.*", source: fp8')
    expect_error(
        report,
        "rule-unmatched",
        "plan.yaml:8",
        "\"model.layers.*.mlp.expert.*\" matches no module of base 'bf16'",
        "Nearest: model.layers.*.mlp.experts.*",
    )


@pytest.mark.parametrize("match", ["attention", "*.attention", "attn"])
def test_rule_of_one_word_names_the_component_that_is_called_so(models: Path, match: str) -> None:
    report = check_yaml(models, f'match: "{match}", source: fp8')
    assert "Nearest: model.layers.*.self_attn." in only(report, "rule-unmatched").message


def test_rule_whose_numbers_are_out_of_range_says_what_there_is(models: Path) -> None:
    report = check_yaml(
        models, 'match: "**.self_attn.*", source: fp8', 'match: "model.layers.7", source: fp8'
    )
    expect_error(
        report,
        "rule-unmatched",
        "plan.yaml:9",
        "The base has model.layers.* from model.layers.0 to model.layers.1",
    )


def test_regular_expression_that_matches_nothing_names_the_nearest(models: Path) -> None:
    report = check_yaml(
        models, r'match: "re:model\\.layers\\.\\d+\\.mlp\\.shared_experts\\..*", source: fp8'
    )
    assert "Nearest: model.layers.*.mlp" in only(report, "rule-unmatched").message


def test_regular_expression_that_stops_at_a_parent_says_what_it_lacks(models: Path) -> None:
    report = check_yaml(models, r"match: 're:model\.layers\.\d+\.mlp\.experts\.[0-3]', source: fp8")
    finding = only(report, "rule-unmatched")
    assert r"modules below a parent need \..* at the end" in finding.message


def test_shadowed_rule_is_a_warning(models: Path) -> None:
    report = check_yaml(
        models, 'match: "**.experts.{0-3}", source: gptq', 'match: "**.experts.2", source: fp8'
    )
    finding = only(report, "rule-shadowed")
    assert (finding.level, finding.where.endswith("plan.yaml:9")) == ("warning", True)
    assert report.ok


def test_partly_shadowed_rule_is_fine(models: Path) -> None:
    report = check_yaml(
        models, 'match: "**.experts.2", source: gptq', 'match: "**.experts.{2-3}", source: fp8'
    )
    assert report.findings == ()


def test_module_that_its_source_lacks(models: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{EXPERTS}.2.up_proj.")]:
            del tensors[name]

    edit_tensors(models / "gptq" / "model.safetensors", drop)
    report = check_yaml(models, 'match: "**.experts.{0-3}", source: gptq')
    expect_error(
        report,
        "module-missing",
        f"{EXPERTS}.2.up_proj",
        "plan.yaml:8 routes it to source 'gptq'",
    )
    assert report.bytes_per_rank == ()


# Shapes and companions.


def test_shape_that_is_not_the_base_s(models: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        dtype, shape, data = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = (dtype, [shape[0] // 2, shape[1]], data[: len(data) // 2])

    edit_tensors(models / "fp8" / "model.safetensors", halve)
    report = check_here(make_plan(("lm_head", "fp8"), folder=models))
    expect_error(report, "shape-mismatch", "lm_head", "shape [192, 256], expected [384, 256]")


def test_missing_scale(models: Path) -> None:
    name = f"{EXPERTS}.0.up_proj.weight_scale_inv"
    edit_tensors(models / "fp8" / "model.safetensors", lambda tensors: tensors.pop(name) and None)
    report = check_here(make_plan(("**.experts.0", "fp8"), folder=models))
    expect_error(report, "module-tensors", name, "source 'fp8': missing")


def test_scales_of_the_wrong_count(models: Path) -> None:
    name = f"{EXPERTS}.0.down_proj.scales"

    def cut(tensors: dict[str, Tensor]) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, [shape[0], shape[1] // 2], data[: len(data) // 2])

    edit_tensors(models / "gptq" / "model.safetensors", cut)
    report = check_here(make_plan(("**.experts.0", "gptq"), folder=models))
    expect_error(report, "module-tensors", name, "[1, 128]", "[1, 256]")


def test_scales_of_the_wrong_layout(models: Path) -> None:
    name = f"{EXPERTS}.0.up_proj.weight_scale_inv"

    def transpose(tensors: dict[str, Tensor]) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape[::-1], data)

    edit_tensors(models / "fp8" / "model.safetensors", transpose)
    report = check_here(make_plan(("**.experts.0", "fp8"), folder=models))
    expect_error(report, "module-tensors", name, "[2, 1]", "[1, 2]")


def test_scales_of_the_wrong_dtype(models: Path) -> None:
    name = f"{EXPERTS}.0.down_proj.scales"

    def retype(tensors: dict[str, Tensor]) -> None:
        _, shape, data = tensors[name]
        tensors[name] = ("I16", shape, data)

    edit_tensors(models / "gptq" / "model.safetensors", retype)
    report = check_here(make_plan(("**.experts.0", "gptq"), folder=models))
    expect_error(report, "module-tensors", name, "I16")


def test_group_size_that_does_not_fit_the_scales(models: Path) -> None:
    config = json.loads((models / "gptq" / "config.json").read_text())
    config["quantization_config"]["group_size"] = 32
    edit_json(models / "gptq" / "config.json", **config)
    report = check_here(make_plan((f"{EXPERTS}.0.down_proj", "gptq"), folder=models))
    found = [finding for finding in report.findings if finding.code == "module-tensors"]
    assert {finding.where.rpartition(".")[2] for finding in found} == {"scales", "qzeros"}
    assert all("group_size=32" in finding.message for finding in found)


def test_block_that_does_not_fit_the_scales(models: Path) -> None:
    config = json.loads((models / "fp8" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    edit_json(models / "fp8" / "config.json", **config)
    report = check_here(make_plan((f"{EXPERTS}.0.down_proj", "fp8"), folder=models))
    expect_error(report, "module-tensors", f"{EXPERTS}.0.down_proj.weight_scale_inv", "[4, 2]")


def test_damaged_module_that_is_not_routed_does_not_matter(models: Path) -> None:
    name = f"{EXPERTS}.0.up_proj.weight_scale_inv"
    edit_tensors(models / "fp8" / "model.safetensors", lambda tensors: tensors.pop(name) and None)
    assert check_here(make_plan(("**.experts.1", "fp8"), folder=models)).ok


@pytest.mark.parametrize("inner", ["v_input.weight", "lora_A.default.weight"])
def test_module_within_one_that_is_taken_is_an_error(models: Path, inner: str) -> None:
    """A rotation's or an adapter's, without which the weight is another's."""

    def add(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            name = f"model.layers.{layer}.self_attn.q_proj.{inner}"
            tensors[name] = ("F32", [4, 4], bytes(64))

    edit_tensors(models / "gptq" / "model.safetensors", add)
    report = check_here(make_plan(("model.layers.0.self_attn.*_proj", "gptq"), folder=models))
    finding = only(report, "inner-module")
    assert finding.level == "error" and not report.ok
    assert finding.where == f"model.layers.0.self_attn.q_proj.{inner.rpartition('.')[0]}"
    assert "within model.layers.0.self_attn.q_proj, which the plan takes" in finding.message
    assert check_here(make_plan(("**.mlp.experts.*", "gptq"), folder=models)).ok


def test_extra_bias_is_dropped_with_a_warning(models: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for part in "qkv":
            name = f"model.layers.0.self_attn.{part}_proj.bias"
            tensors[name] = ("F16", [256], bytes(512))

    edit_tensors(models / "gptq" / "model.safetensors", add)
    report = check_here(make_plan(("**.self_attn.*_proj", "gptq"), folder=models))
    assert report.ok
    assert report.table is not None
    assert "bias" not in report.table.routes["model.layers.0.self_attn.q_proj"].tensors
    finding = only(report, "extra-tensor")
    assert (finding.level, finding.where) == ("warning", "source 'gptq'")
    assert "it is dropped" in finding.message
    assert "model.layers.0.self_attn.q_proj.bias" in finding.message


def test_bias_that_the_source_lacks(models: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.bias"] = ("BF16", [384], bytes(768))

    edit_tensors(models / "fp8" / "model.safetensors", add)
    report = check_here(make_plan(("lm_head", "bf16"), base="fp8", folder=models))
    expect_error(report, "tensor-missing", "lm_head.bias", "source 'bf16'")


Scales = Callable[[dict[str, Tensor]], None]


def add_scales(*names: str) -> Scales:
    def add(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[name] = ("F32", [1], struct.pack("<f", 0.5))

    return add


ATTENTION = "model.layers.0.self_attn"


def scales_of(suffix: str) -> list[str]:
    return [f"{ATTENTION}.{part}_proj.{suffix}" for part in "qk"]


@pytest.mark.parametrize("base", ["bf16", "fp8"])
@pytest.mark.parametrize("suffix", ["input_scale", "k_scale"])
def test_scales_of_activations_are_left_out_with_one_note(
    models: Path, suffix: str, base: str
) -> None:
    plan = make_plan(("**.self_attn.*_proj", "fp8"), base=base, folder=models)
    plain = check_here(plan)
    assert plain.table is not None
    edit_tensors(models / "fp8" / "model.safetensors", add_scales(*scales_of(suffix)))
    report = check_here(plan)
    assert report.ok
    assert report.table is not None
    for name in scales_of(suffix):
        route = report.table.routes[name.rpartition(".")[0]]
        assert route.tensors.keys() == {"weight", "weight_scale_inv"}
        assert route.served.format == "fp8_block"
    assert report.bytes_per_rank == plain.bytes_per_rank
    finding = only(report, "activation-scale")
    assert report.findings == (*plain.findings, finding)
    assert (finding.level, finding.where) == ("note", "source 'fp8'")
    assert f"has {suffix}: not used" in finding.message
    assert "2 modules" in finding.message


def test_both_scales_of_one_module_are_named(models: Path) -> None:
    names = [f"{ATTENTION}.v_proj.{suffix}" for suffix in ("v_scale", "input_scale")]
    edit_tensors(models / "fp8" / "model.safetensors", add_scales(*names))
    finding = only(
        check_here(make_plan(("**.self_attn.*_proj", "fp8"), folder=models)), "activation-scale"
    )
    assert finding.where == f"{ATTENTION}.v_proj"
    assert "source 'fp8' has input_scale, v_scale: not used" in finding.message


def test_scales_of_a_source_that_is_not_routed_are_no_news(models: Path) -> None:
    edit_tensors(models / "fp8" / "model.safetensors", add_scales(*scales_of("input_scale")))
    assert check_here(make_plan(("**.experts", "fp8"), folder=models)).findings == ()


# Index and shards.


def test_shard_that_the_index_names_and_the_directory_lacks(models: Path) -> None:
    (models / "bf16" / "model-00002-of-00003.safetensors").unlink()
    report = check_here(make_plan(folder=models))
    expect_error(report, "index-mismatch", "model-00002-of-00003.safetensors", "missing")


def test_shard_that_the_index_does_not_name_is_a_warning(models: Path) -> None:
    shard = models / "bf16" / "model-00002-of-00003.safetensors"
    (models / "bf16" / "other.safetensors").write_bytes(shard.read_bytes())
    report = check_here(make_plan(folder=models))
    finding = only(report, "index-mismatch")
    assert (finding.level, report.ok) == ("warning", True)
    assert finding.where.endswith("other.safetensors")


def test_tensor_that_is_not_in_the_shard_that_the_index_says(models: Path) -> None:
    shard = models / "bf16" / "model-00001-of-00003.safetensors"
    edit_tensors(shard, lambda tensors: tensors.pop("lm_head.weight") and None)
    report = check_here(make_plan(folder=models))
    expect_error(report, "index-mismatch", "model-00001-of-00003.safetensors", "lm_head.weight")


# Parallel sizes, fused layers, kernels.


def test_parallel_size_that_cuts_a_group_is_a_warning_with_its_cost() -> None:
    plan = make_plan(("**.experts.0", "gptq"))
    report = check(plan, 4, platform=Platform("cuda-90"))
    finding = only(report, "parallel-cut")
    assert (finding.level, finding.where) == ("warning", "model.layers.*.mlp.experts.*")
    assert "32 columns cuts a group of 128" in finding.message
    assert "2 modules" in finding.message
    assert "costs 279.2 KiB" in finding.message
    assert report.ok


def test_parallel_size_that_cuts_a_block_is_a_warning() -> None:
    report = check_here(make_plan(("**.self_attn.q_proj", "fp8"), ("**.o_proj", "fp8")), 4)
    assert "64 columns cuts a block of 128" in only(report, "parallel-cut").message


def test_tensor_parallel_size_that_does_not_fit() -> None:
    report = check_here(make_plan(), 3)
    found = {finding.where: finding for finding in report.findings}
    assert not report.ok
    finding = found["model.layers.*.mlp.experts.*.down_proj"]
    assert (finding.level, finding.code) == ("error", "parallel-size")
    assert "128 columns cannot be cut into 3 equal parts" in finding.message
    assert "16 modules" in finding.message


def test_pipeline_parallel_size_that_does_not_fit() -> None:
    report = check_here(make_plan(), 1, 3)
    expect_error(report, "parallel-size", "pipeline parallel size", "model's 2 layers")


def test_fused_layer_that_is_widened_is_one_warning_for_all_layers() -> None:
    report = check_here(make_plan(("**.self_attn.q_proj", "gptq")))
    finding = only(report, "fused-mixed")
    assert finding.level == "warning"
    assert finding.where == "model.layers.*.self_attn.{q_proj,k_proj,v_proj}"
    assert "dequantised to bf16 at load (2 modules" in finding.message
    assert report.ok


def test_fused_layer_under_mixed_fused_error() -> None:
    plan = make_plan((f"{EXPERTS}.0.up_proj", "gptq"), mixed_fused="error")
    expect_error(
        check_here(plan), "fused-mixed", f"{EXPERTS}.0", "set mixed_fused: widen", "one expert"
    )


def test_format_without_a_kernel_here() -> None:
    report = check(make_plan(("**.experts", "fp8")), platform=Platform("cpu-other"))
    finding = only(report, "kernel-missing")
    assert finding.level == "warning"
    assert "no fp8_block kernel on cpu-other" in finding.message
    assert "16 modules, e.g. model.layers.0.mlp.experts.0" in finding.message
    assert report.ok


def test_format_without_a_kernel_under_missing_kernel_error() -> None:
    plan = make_plan((f"{EXPERTS}.0", "fp8"), missing_kernel="error")
    report = check(plan, platform=Platform("cpu-other"))
    expect_error(report, "kernel-missing", f"{EXPERTS}.0", "set missing_kernel: dequantize")


def test_cast_is_one_note_for_all_modules() -> None:
    report = check(make_plan(base="gptq"), platform=Platform("cuda-90"))
    finding = only(report, "cast")
    assert (finding.level, finding.where) == ("note", "source 'gptq'")
    assert "stores bf16, served as fp16" in finding.message
    assert "13 modules, e.g. lm_head" in finding.message
    assert report.ok


# The report.


def test_every_finding_is_reported_at_once(models: Path) -> None:
    edit_json(models / "fp8" / "config.json", vocab_size=1)
    edit_tensors(models / "gptq" / "model.safetensors", change_router)
    report = check_yaml(
        models,
        'match: "**.experts.0", source: gptq',
        'match: "**.experts.0.up_proj", source: fp8',
        'match: "model.nothing", source: fp8',
    )
    assert [finding.code for finding in report.findings] == [
        "architecture-mismatch",
        "router-mismatch",
        "rule-unmatched",
        "rule-shadowed",
    ]


def test_bytes_per_rank_follow_stages_cuts_and_replicas() -> None:
    plan = make_plan(("**.experts.{0-3}", "gptq-asym"))
    one, two = check_here(plan), check_here(plan, 2, 2)
    assert two.ok
    assert len(two.bytes_per_rank) == 4
    norms, router = 2 * (256 + 256 + 64 + 64), 8 * 256 * 2
    replicated = 2 * (norms + router) + 512
    g_idx = 4 * 2 * 2 * 256 * 4  # of gate and up: the order of K, which is not cut
    assert sum(two.bytes_per_rank) == sum(one.bytes_per_rank) + replicated + g_idx
    assert two.bytes_per_rank[0] == two.bytes_per_rank[1]


def test_bytes_per_rank_under_expert_parallelism_follow_the_experts() -> None:
    report = check_here(make_plan(("**.experts.{0-3}", "gptq")), 2, expert_parallel=True)
    packed, plain = report.bytes_per_rank
    assert report.table is not None
    experts = [route for module, route in report.table.routes.items() if ".experts." in module]
    sizes = {
        source: sum(route.served_bytes for route in experts if route.source == source)
        for source in ("gptq", "bf16")
    }
    assert plain - packed == sizes["bf16"] - sizes["gptq"]


@pytest.mark.parametrize(("tp_size", "expert_parallel"), [(1, False), (1, True), (2, True)])
def test_bytes_per_rank_of_replicas_share_the_experts(tp_size: int, expert_parallel: bool) -> None:
    """Two replicas of four experts each, or of half of each expert, and all else twice."""
    plan = make_plan(("**.experts.{0-3}", "gptq-asym"))
    one = check_here(plan, tp_size, expert_parallel=expert_parallel)
    two = check_here(plan, tp_size, 2, expert_parallel=expert_parallel, data_parallel_size=2)
    assert one.table is not None and two.table is not None
    experts = [route for module, route in two.table.routes.items() if ".experts." in module]
    experts_bytes = sum(route.served_bytes for route in experts)
    assert len(two.bytes_per_rank) == 4 * tp_size
    # The order of K, which is not cut, is on both ranks that have a part of an expert.
    g_idx = [route.tensors["g_idx"].nbytes for route in experts if "g_idx" in route.tensors]
    twice = 0 if expert_parallel else sum(nbytes for nbytes in g_idx if nbytes == 256 * 4)
    assert sum(two.bytes_per_rank) == 2 * sum(one.bytes_per_rank) - experts_bytes + twice
    first, second = two.bytes_per_rank[: 2 * tp_size], two.bytes_per_rank[2 * tp_size :]
    assert (first == second) is not expert_parallel


def test_cut_over_replicas_widens_experts_and_nothing_else() -> None:
    rules = (("**.experts.0", "fp8"), ("**.self_attn.*_proj", "fp8"))
    report = check_here(make_plan(*rules), data_parallel_size=2)
    assert report.table is not None
    widened = {module for module, route in report.table.routes.items() if route.widened}
    assert widened and all(".experts.0." in module for module in widened)
    assert report.to_dict()["data_parallel_size"] == 2


def test_replicas_that_cannot_share_an_expert_are_an_error() -> None:
    report = check_here(make_plan(), data_parallel_size=3)
    (message,) = {f.message for f in report.findings if "down_proj" in f.where}
    assert message.startswith(
        "tensor parallel size 1 in each of 3 data-parallel replicas does not fit: 128 columns "
        "cannot be cut into 3 equal parts. Choose another size."
    )


@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_one_source_for_all_takes_what_it_takes_in_its_files(source: str) -> None:
    report = check_here(make_plan(base=source))
    assert report.table is not None
    assert report.bytes_per_rank == (sum(report.table.bytes_by_source().values()),)


def test_report_is_json() -> None:
    report = check_here(make_plan(("**.self_attn.q_proj", "gptq")))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True
    assert data["bytes_per_rank"] == list(report.bytes_per_rank)
    assert data["findings"][0]["code"] == "fused-mixed"
    assert {row["source"] for row in data["bytes_by_source"]} == {"bf16", "gptq"}


def test_progress_is_told() -> None:
    steps: list[tuple[str, int, int]] = []
    check(make_plan(("lm_head", "fp8")), progress=lambda *step: steps.append(step), platform=CPU)
    assert steps[0] == ("reading headers of bf16", 0, 4)
    assert steps[-1] == ("done", 4, 4)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_scale", "model.layers.0.mlp.gate.v_scale"]
)
def test_scale_of_the_cache_that_the_model_has_no_place_for(models: Path, name: str) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name] = ("F32", [1], struct.pack("<f", 1.0))

    edit_tensors(models / "fp8" / "model.safetensors", add)
    report = check_here(make_plan(base="fp8", folder=models))
    module, _, suffix = name.rpartition(".")
    expect_error(report, "cache-scale", module, f"source 'fp8' has {suffix} here", "Remove")
    assert check_here(make_plan(base="fp8")).ok
