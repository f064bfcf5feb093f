# SPDX-License-Identifier: Apache-2.0
"""The rows that ``inspect``, the log of a start and ``model_info`` show."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.mixes import ROOT
from tests.routing.models import (
    ARCHITECTURES,
    CPU,
    OF_ARCHITECTURES,
    Tensor,
    copy_models,
    edit_tensors,
    make_plan,
)
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Layout, Platform, RouteTable, load_route_table
from vllm_mixprec.routing.parts import describe_layers, fold_layers, layer_parts, spell_layers


def demo(platform: Platform = CPU) -> RouteTable:
    plan = Plan.from_yaml(ROOT / "examples" / "demo-plan.yaml")
    return load_route_table(plan, layout=Layout(), platform=platform)


def glm(draft: bool) -> RouteTable:
    """Experts of the last layer and of the MTP layer in int4, an indexer's wk in FP8."""
    plan = make_plan(
        ("model.layers.0.self_attn.indexer.wk", "fp8"),
        ("model.layers.2.mlp.experts", "int4"),
        folder=ARCHITECTURES / "glm_moe_dsa",
        sources=OF_ARCHITECTURES,
    )
    return load_route_table(plan, layout=Layout(draft=draft), platform=CPU)


def test_line_names_source_format_and_kernel_of_equal_layers_once() -> None:
    layers, outside = spell_layers(demo())
    assert layers.startswith("layers 0-2: ")
    for said in (
        "attention fp8_block 128x128 of fp8, fp8_scaled_mm_cpu",
        "routed experts 0-3 bf16 of bf16, fused_experts_cpu",
        "routed experts 4-9 fp8_block 128x128 of fp8, fused_experts_cpu",
        "routed experts 10-15 gptq int4 g128 of int4, fused_experts_cpu",
        "router bf16 of bf16, vLLM's own",
    ):
        assert said in layers.split(": ", 1)[1].split("; ")
    assert outside.startswith("outside of the layers: embeddings bf16 of bf16")


def test_line_says_what_is_widened_why_and_what_that_costs() -> None:
    layers, _ = spell_layers(demo(Platform("cpu-other")))
    (experts,) = [part for part in layers.split("; ") if "routed experts 10-15" in part]
    assert "gptq int4 g128 of int4, widened to bf16 (" in experts and " more): " in experts
    assert experts.endswith("no gptq kernel on cpu-other for experts")
    assert "fused_experts_cpu" not in layers


def test_kernels_are_those_of_the_platform() -> None:
    table = load_route_table(
        make_plan(("**.experts.{0-3}", "gptq")), platform=Platform("cuda-90"), layout=Layout()
    )
    kernels = {(part.stored, part.kernel) for part in layer_parts(table)[0]}
    assert ("gptq int4 g128", "gptq_marlin") in kernels and ("bf16", "vLLM's own") in kernels


@pytest.mark.parametrize(("ranks", "kernel"), [(4, "fused_experts_cpu"), (8, "vLLM's own")])
def test_experts_that_do_not_fill_the_kernels_tiles_are_vllms_own(ranks: int, kernel: str) -> None:
    """Of 128 rows a rank of eight has 16; ``fused_experts_cpu`` takes multiples of 32."""
    table = load_route_table(make_plan(), platform=CPU)
    table = replace(table, layout=Layout(tensor_parallel_size=ranks))
    (experts,) = [part for part in layer_parts(table)[0] if part.kind == "routed_experts"]
    assert experts.kernel == kernel


@pytest.mark.parametrize(
    ("experts", "ranks", "is_split", "kernel"),
    [
        ((1 << 15) - 1, 1, False, "cpu_fused_moe"),
        (1 << 15, 1, False, "fused_experts_cpu"),  # 2 x 128 x 256 weights each are 2^31
        (1 << 15, 2, False, "cpu_fused_moe"),
        ((1 << 16) - 1, 2, True, "fused_experts_cpu"),
    ],
)
def test_experts_of_a_cpu_with_amx(experts: int, ranks: int, is_split: bool, kernel: str) -> None:
    table = load_route_table(make_plan(), platform=replace(CPU, has_amx=True))
    table = replace(
        table,
        base_config={**table.base_config, "num_experts": experts},
        layout=Layout(tensor_parallel_size=ranks, expert_parallel=is_split),
    )
    (shown,) = [part for part in layer_parts(table)[0] if part.kind == "routed_experts"]
    assert shown.kernel == kernel


def test_an_expert_of_another_rank_than_two_has_a_row(tmp_path: Path) -> None:
    """A damaged base; the loader refuses it."""
    name = "model.layers.1.mlp.experts.6.gate_proj.weight"

    def stretch(tensors: dict[str, Tensor]) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, [1] * 8 + shape, data)

    folder = copy_models(tmp_path)
    edit_tensors(folder / "bf16" / "model-00003-of-00003.safetensors", stretch)
    table = load_route_table(make_plan(folder=folder), platform=CPU)
    (odd,) = [part for part in layer_parts(table)[1] if part.experts == (6,)]
    assert odd.kernel == "vLLM's own"


@pytest.mark.parametrize("draft", [False, True])
def test_mtp_layer_has_rows_of_its_own(draft: bool) -> None:
    table = glm(draft)
    (mtp,) = [layers for layers in fold_layers(table) if layers.is_mtp]
    assert mtp.label == "3 (MTP)"
    loaded = {part.kind for part in mtp.parts if part.is_loaded}
    assert ("routed_experts" in loaded) is draft
    assert any("(MTP)" in line for line in spell_layers(table)) is draft
    assert all(part.served_bytes == 0 for part in mtp.parts if not part.is_loaded)


def test_indexer_has_rows_of_its_own() -> None:
    parts = [part for part in layer_parts(glm(False))[0] if part.kind == "indexer"]
    widened = [part for part in parts if part.source == "fp8"]
    assert [(part.served, part.modules) for part in widened] == [("bf16", 1)]
    assert "the indexer's fused wk" in (widened[0].reason or "")
    assert {part.source for part in parts} == {"bf16", "fp8"}


def test_json_has_runs_of_experts_and_the_reasons() -> None:
    described = describe_layers(demo(Platform("cpu-other")))
    assert [entry["layers"] for entry in described] == [[0, 1, 2], []]
    experts = [p for p in described[0]["parts"] if p["kind"] == "routed_experts"]
    assert {p["source"]: p["experts"] for p in experts} == {
        "bf16": [[0, 3]],
        "fp8": [[4, 9]],
        "int4": [[10, 15]],
    }
    assert {p["source"]: p["widened"] for p in experts} == {
        "bf16": None,
        "fp8": "no fp8_block kernel on cpu-other",
        "int4": "no gptq kernel on cpu-other for experts",
    }
