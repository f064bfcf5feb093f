# SPDX-License-Identifier: Apache-2.0
import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.routing.models import CPU, FIXTURES, edit_json, edit_tensors, make_plan
from tests.routing.test_kernels import UNSERVED
from vllm_mixprec.checkpoint import Checkpoint, Module, Scheme, TensorSpec, open_checkpoint
from vllm_mixprec.errors import CheckpointError, RouteError
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import ExpertGroup, Layout, Platform, RouteTable, resolve
from vllm_mixprec.routing import load_route_table as load
from vllm_mixprec.routing.table import dtype_scheme

BF16 = Scheme("bf16", 16)
FP8 = Scheme("fp8_block", 8, block=(128, 128))
INT4 = Scheme("gptq", 4, group_size=128)
ATTENTION = "model.layers.0.self_attn"
EXPERTS = "model.layers.0.mlp.experts"
ROUTER = "model.layers.0.mlp.gate"


def load_here(
    *rules: tuple[str, str],
    layout: Layout | None = None,
    platform: Platform = CPU,
    **options: str,
) -> RouteTable:
    return load(make_plan(*rules, **options), layout, platform)


def test_every_module_of_the_base_is_routed_in_its_order() -> None:
    table = load_here(("**.experts.{0-3}", "gptq"))
    base = open_checkpoint(FIXTURES / "bf16")
    assert list(table.routes) == list(base.modules)
    assert table.base_scheme == BF16
    assert table.notes == ()


def test_first_matching_rule_wins_and_the_rest_is_the_base() -> None:
    table = load_here(
        (f"{EXPERTS}.3", "fp8"), ("model.layers.*.mlp.experts.{2-5}.*.weight", "gptq")
    )
    sources = {e: table.routes[f"{EXPERTS}.{e}.up_proj"].source for e in range(8)}
    assert sources == {0: "bf16", 1: "bf16", 2: "gptq", 3: "fp8", 4: "gptq", 5: "gptq"} | {
        6: "bf16",
        7: "bf16",
    }


def test_route_carries_the_tensors_of_its_source() -> None:
    route = load_here((f"{ATTENTION}.*_proj", "gptq")).routes[f"{ATTENTION}.q_proj"]
    assert (route.stored, route.served, route.widened, route.reason) == (INT4, INT4, False, None)
    assert set(route.tensors) == {"qweight", "qzeros", "scales", "g_idx"}
    assert route.tensors["qweight"].file == FIXTURES / "gptq" / "model.safetensors"
    assert route.shape == (256, 256)
    assert route.served_bytes == route.stored_bytes == 256 * 256 // 2 + 2 * 128 + 2 * 512 + 1024


def test_quantised_base_routes_its_own_packed_modules() -> None:
    table = load(make_plan((f"{EXPERTS}.0", "bf16"), base="fp8"), None, CPU)
    assert table.routes[f"{EXPERTS}.1.up_proj"].served == FP8
    assert table.routes[f"{EXPERTS}.0.up_proj"].served == BF16
    assert table.routes["lm_head"].source == "fp8"


def test_fp16_base_casts_bf16_weights_and_says_so() -> None:
    table = load(make_plan((f"{EXPERTS}.0", "bf16"), base="gptq"), None, CPU)
    route = table.routes[f"{EXPERTS}.0.up_proj"]
    assert (route.stored.format, route.served.format) == ("bf16", "fp16")
    assert not route.widened
    casts = [note for note in table.notes if note.code == "cast"]
    assert {note.level for note in casts} == {"note"}
    assert any("'bf16' stores bf16, served as fp16" in note.message for note in casts)


def test_module_that_only_another_source_has_is_not_routed(models: Path) -> None:
    base = open_checkpoint(models / "bf16", "bf16")
    modules = {k: m for k, m in base.modules.items() if k != "lm_head"}
    other = open_checkpoint(models / "fp8", "fp8")
    plan = make_plan(("model.layers.**", "fp8"), folder=models)
    table = resolve(plan, {"bf16": dataclasses.replace(base, modules=modules), "fp8": other})
    assert "lm_head" not in table.routes


# Fused layers.


def test_fused_parts_of_unlike_schemes_are_widened_with_the_reason() -> None:
    table = load_here((f"{ATTENTION}.q_proj", "gptq"))
    route = table.routes[f"{ATTENTION}.q_proj"]
    assert (route.served, route.widened) == (BF16, True)
    assert route.reason == "q_proj is gptq int4 g128, k_proj and v_proj are bf16: one fused layer"
    assert table.routes[f"{ATTENTION}.k_proj"].reason is None
    assert route.served_bytes == 2 * 256 * 256


def test_fused_parts_are_compared_as_schemes_not_as_formats() -> None:
    table = load_here((f"{ATTENTION}.v_proj", "gptq-asym"), (f"{ATTENTION}.{{q,k}}_proj", "gptq"))
    assert {table.routes[f"{ATTENTION}.{part}_proj"].served for part in "qkv"} == {BF16}


def test_equal_schemes_of_two_sources_are_not_widened(models: Path) -> None:
    plan = Plan.from_dict(
        {
            "version": 1,
            "base": "bf16",
            "sources": {"bf16": {"path": "bf16"}, "a": {"path": "gptq"}, "b": {"path": "gptq"}},
            "rules": [
                {"match": f"{EXPERTS}.0.gate_proj", "source": "a"},
                {"match": f"{EXPERTS}.0", "source": "b"},
            ],
        },
        base_dir=models,
    )
    table = load(plan, None, CPU)
    assert table.expert_groups(EXPERTS)[0] == ExpertGroup(INT4, (0,))
    assert {r.source for n, r in table.routes.items() if n.startswith(f"{EXPERTS}.0.")} == {
        "a",
        "b",
    }


def test_mixed_fused_error_refuses_to_widen() -> None:
    with pytest.raises(RouteError, match=r"q_proj is gptq .* options.mixed_fused is error"):
        load_here((f"{ATTENTION}.q_proj", "gptq"), mixed_fused="error")


# Experts.


def test_experts_are_grouped_by_scheme_with_the_unquantised_last() -> None:
    table = load_here(("**.experts.{1,6}", "gptq"), ("**.experts.{2-3}", "fp8"))
    assert table.expert_layers == (EXPERTS, "model.layers.1.mlp.experts")
    assert table.expert_groups(EXPERTS) == (
        ExpertGroup(INT4, (1, 6)),
        ExpertGroup(FP8, (2, 3)),
        ExpertGroup(BF16, (0, 4, 5, 7)),
    )


def test_widened_expert_joins_the_unquantised_group() -> None:
    table = load_here((f"{EXPERTS}.0.down_proj", "fp8"), (f"{EXPERTS}.0", "gptq"))
    assert table.expert_groups(EXPERTS) == (ExpertGroup(BF16, tuple(range(8))),)
    route = table.routes[f"{EXPERTS}.0.up_proj"]
    assert route.reason is not None
    assert "gate_proj and up_proj are gptq int4 g128, down_proj is fp8_block 128x128" in (
        route.reason
    )


def test_layer_of_one_scheme_is_one_group() -> None:
    table = load_here(("**.experts", "fp8"))
    assert table.expert_groups(EXPERTS) == (ExpertGroup(FP8, tuple(range(8))),)


def test_groups_over_all_of_k_are_one_scheme_for_projections_of_unlike_k() -> None:
    per_channel = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    modules = {}
    for leaf, (n, k) in per_channel.items():
        name = f"{EXPERTS}.0.{leaf}"
        tensors = {"qweight": TensorSpec(f"{name}.qweight", "I32", (k // 8, n), Path("x"), 0, 0)}
        modules[name] = Module(name, tensors, Scheme("gptq", 4, group_size=k), (n, k), ())
    base = Checkpoint("base", Path("."), {"dtype": "bfloat16"}, {}, modules, ())
    plan = Plan.from_dict({"version": 1, "base": "base", "sources": {"base": {"path": "."}}})
    table = resolve(plan, {"base": base}, Layout(), Platform("cuda-90"))
    (group,) = table.expert_groups(EXPERTS)
    assert group == ExpertGroup(Scheme("gptq", 4, group_size=-1), (0,))
    assert not any(route.widened or route.relaid for route in table.routes.values())
    # The CPU's kernel takes one size for all: the longer groups become two with one scale.
    table = resolve(plan, {"base": base}, Layout(), CPU)
    (group,) = table.expert_groups(EXPERTS)
    assert group == ExpertGroup(Scheme("gptq", 4, group_size=128), (0,))
    assert [r.module for r in table.routes.values() if not r.relaid] == [f"{EXPERTS}.0.down_proj"]


@pytest.mark.parametrize("scheme", UNSERVED, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("tp_size", [1, 4])
def test_formats_without_a_kernel_are_widened(scheme: Scheme, tp_size: int) -> None:
    modules = {}
    for leaf, shape in {
        "gate_proj": (128, 256),
        "up_proj": (128, 256),
        "down_proj": (256, 128),
    }.items():
        name = f"{EXPERTS}.0.{leaf}"
        tensors = {"weight": TensorSpec(f"{name}.weight", "U8", shape, Path("x"), 0, 128 * 256)}
        modules[name] = Module(name, tensors, scheme, shape, ())
    base = Checkpoint("base", Path("."), {"dtype": "bfloat16"}, {}, modules, ())
    plan = Plan.from_dict({"version": 1, "base": "base", "sources": {"base": {"path": "."}}})
    table = resolve(plan, {"base": base}, Layout(tp_size), CPU)
    assert table.expert_groups(EXPERTS) == (ExpertGroup(BF16, (0,)),)
    assert all(route.widened for route in table.routes.values())
    assert table.bytes_per_rank() == (3 * 2 * 128 * 256 // tp_size,) * tp_size


def test_formats_that_share_a_layout_share_a_kernel_call() -> None:
    """An expert in AWQ and compressed-tensors int4, beside one in AWQ alone."""
    awq = Scheme("awq", 4, group_size=32, symmetric=False, zero_offset=0)
    packed = dataclasses.replace(awq, format="ct_pack")
    modules = {}
    for expert, schemes in enumerate([(awq, packed, awq), (awq, awq, awq)]):
        for leaf, scheme in zip(("gate_proj", "up_proj", "down_proj"), schemes, strict=True):
            name = f"{EXPERTS}.{expert}.{leaf}"
            tensors = {"qweight": TensorSpec(f"{name}.qweight", "I32", (1,), Path("x"), 0, 4)}
            modules[name] = Module(name, tensors, scheme, (128, 128), ())
    base = Checkpoint("base", Path("."), {"dtype": "bfloat16"}, {}, modules, ())
    options = {"mixed_fused": "error", "missing_kernel": "error"}
    plan = Plan.from_dict(
        {"version": 1, "base": "base", "sources": {"base": {"path": "."}}, "options": options}
    )
    table = resolve(plan, {"base": base}, Layout(), CPU)
    assert table.expert_groups(EXPERTS) == (ExpertGroup(awq, (0, 1)),)
    (relaid,) = (route for route in table.routes.values() if route.relaid)
    assert relaid.module == f"{EXPERTS}.0.up_proj"
    assert table.notes == ()
    with pytest.raises(
        RouteError, match="gate_proj and down_proj are awq .*options.mixed_fused is error"
    ):
        modules[relaid.module] = dataclasses.replace(
            modules[relaid.module], scheme=dataclasses.replace(packed, desc_act=True)
        )
        resolve(plan, {"base": base}, Layout(), CPU)


def test_unknown_expert_layer_is_an_error() -> None:
    with pytest.raises(RouteError, match="model.layers.9.mlp.experts: no layer of routed experts"):
        load_here().expert_groups("model.layers.9.mlp.experts")


# Tensor parallelism and kernels.


def test_cut_group_widens_the_whole_expert() -> None:
    layout = Layout(tensor_parallel_size=4)
    table = load_here(("**.experts.0", "gptq"), layout=layout, platform=Platform("cuda-90"))
    route = table.routes[f"{EXPERTS}.0.gate_proj"]
    assert route.reason == "down_proj: a tensor-parallel shard of 32 columns cuts a group of 128"
    assert route.served == BF16


def test_cut_group_is_served_as_groups_that_are_not() -> None:
    table = load_here(("**.experts.0", "gptq"), layout=Layout(tensor_parallel_size=2))
    finer = Scheme("gptq", 4, group_size=64)
    assert table.expert_groups(EXPERTS)[0] == ExpertGroup(finer, (0,))
    route = table.routes[f"{EXPERTS}.0.down_proj"]
    assert (route.stored, route.relaid, route.widened) == (INT4, True, False)
    # Codes, zero points, and scales in float32, of which there are twice as many.
    assert route.served_bytes == 256 * 128 // 2 + 2 * 256 // 2 + 2 * 256 * 4


def test_group_that_still_fits_stays_packed() -> None:
    table = load_here(("**.experts.0", "gptq-asym"), layout=Layout(tensor_parallel_size=2))
    assert table.expert_groups(EXPERTS)[0].scheme.label == "gptq int4 g64 asym"


def test_cut_block_widens_the_whole_fused_layer() -> None:
    table = load_here((f"{ATTENTION}.*_proj", "fp8"), layout=Layout(tensor_parallel_size=4))
    assert table.routes[f"{ATTENTION}.o_proj"].reason == (
        "o_proj: a tensor-parallel shard of 64 columns cuts a block of 128"
    )
    # Of rows, which are cut too, blocks of 32 with the same scales make a whole number.
    assert {table.routes[f"{ATTENTION}.{part}_proj"].served for part in "qkv"} == {
        Scheme("fp8_block", 8, block=(32, 128))
    }
    table = load_here(
        (f"{ATTENTION}.*_proj", "fp8"),
        layout=Layout(tensor_parallel_size=4),
        platform=Platform("cuda-90"),
    )
    assert {table.routes[f"{ATTENTION}.{part}_proj"].served for part in "qkvo"} == {BF16}
    assert table.routes[f"{ATTENTION}.k_proj"].reason == (
        "q_proj: a tensor-parallel shard of 64 rows cuts a block of 128"
    )


def test_expert_parallelism_cuts_no_expert() -> None:
    table = load_here(
        ("**.experts.0", "gptq"), layout=Layout(tensor_parallel_size=2, expert_parallel=True)
    )
    assert table.routes[f"{EXPERTS}.0.gate_proj"].served == INT4


def test_size_that_divides_no_heads_is_an_error() -> None:
    with pytest.raises(RouteError, match="tensor parallel size 3 does not fit"):
        load_here(layout=Layout(tensor_parallel_size=3))


def test_missing_kernel_widens_or_is_an_error() -> None:
    rules = (("**.experts.0", "gptq"),)
    table = load(make_plan(*rules), None, Platform("other"))
    assert table.routes[f"{EXPERTS}.0.up_proj"].reason == "no gptq kernel on other"
    with pytest.raises(RouteError, match="no gptq kernel on other, and options.missing_kernel is"):
        load(make_plan(*rules, missing_kernel="error"), None, Platform("other"))


def test_kernel_that_computes_in_another_dtype_widens() -> None:
    routes = load(make_plan(base="gptq"), None, CPU).routes
    route = routes["model.layers.0.mlp.experts.0.down_proj"]
    assert (route.served.format, route.kernel) == ("fp16", None)
    assert route.reason == (
        "no expert kernel on cpu-avx512 for gptq int4 g128: int4_scaled_mm_cpu: it computes in "
        "bf16, not in fp16"
    )
    linear = routes[f"{ATTENTION}.o_proj"]
    assert (linear.served, linear.kernel) == (linear.stored, "cpu_gemm_wna16")


def test_part_that_ends_inside_a_block_widens_its_fused_layer(models: Path) -> None:
    plan = make_plan((f"{ATTENTION}.*_proj", "fp8"), folder=models)
    checkpoints = {name: open_checkpoint(models / name, name) for name in ("bf16", "fp8")}
    for checkpoint in checkpoints.values():
        k_proj = checkpoint.modules[f"{ATTENTION}.k_proj"]
        checkpoint.modules[k_proj.name] = dataclasses.replace(k_proj, shape=(208, 256))
    route = resolve(plan, checkpoints, None, CPU).routes[f"{ATTENTION}.q_proj"]
    assert route.reason == "k_proj ends inside a block: its 208 rows are no multiple of 128"


# The table itself.


@pytest.mark.parametrize(
    ("module", "what"), [("lm_head", "output head"), ("model.embed_tokens", "embeddings")]
)
def test_packed_vocabulary_is_widened(models: Path, module: str, what: str) -> None:
    """vLLM asks no method of ours for these two, so they cannot be served packed."""

    def pack(tensors: dict) -> None:
        rows, columns = tensors[f"{module}.weight"][1]
        tensors[f"{module}.weight"] = ("F8_E4M3", [rows, columns], bytes(rows * columns))
        scales = [rows // 128, columns // 128]
        tensors[f"{module}.weight_scale_inv"] = ("F32", scales, bytes(4 * scales[0] * scales[1]))

    edit_tensors(models / "fp8" / "model.safetensors", pack)
    table = load(make_plan((module, "fp8"), folder=models), None, CPU)
    route = table.routes[module]
    assert route.stored == FP8 and route.served == BF16
    assert route.reason == f"vLLM holds the {what} in plain weights only"


def pack_router(models: Path) -> None:
    """Store a router as FP8 in source fp8, as no exporter should."""

    def pack(tensors: dict) -> None:
        rows, columns = tensors[f"{ROUTER}.weight"][1]
        tensors[f"{ROUTER}.weight"] = ("F8_E4M3", [rows, columns], bytes(rows * columns))
        tensors[f"{ROUTER}.weight_scale_inv"] = ("F32", [1, columns // 128], bytes(columns // 32))

    edit_tensors(models / "fp8" / "model.safetensors", pack)


def test_what_vllm_holds_plain_is_widened_whatever_the_kernels(models: Path) -> None:
    pack_router(models)
    table = load(make_plan((ROUTER, "fp8"), folder=models), None, CPU)
    assert table.routes[ROUTER].reason == "vLLM holds a router in plain weights only"
    assert [note.code for note in table.notes] == ["layer-unquantized"]


def test_missing_kernel_error_refuses_what_vllm_holds_plain(models: Path) -> None:
    pack_router(models)
    plan = make_plan((ROUTER, "fp8"), folder=models, missing_kernel="error")
    with pytest.raises(RouteError, match="a router in plain weights only, and options.missing_k"):
        load(plan, None, CPU)


def test_bytes_by_source_counts_the_stored_tensors() -> None:
    table = load_here(("**.experts.{0-3}", "gptq"), ("**.self_attn.*_proj", "fp8"))
    sizes = table.bytes_by_source()
    assert set(sizes) == {("bf16", "bf16"), ("gptq", "gptq"), ("fp8", "fp8_block")}
    assert sizes["fp8", "fp8_block"] == 2 * 4 * (256 * 256 + 2 * 2 * 2)
    assert sum(sizes.values()) == sum(route.stored_bytes for route in table.routes.values())


def test_same_input_gives_the_same_table() -> None:
    rules = (("**.experts.{0-3}", "gptq"), (f"{ATTENTION}.q_proj", "fp8"))
    assert load_here(*rules).routes == load_here(*rules).routes


def test_table_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        load_here().layout = Layout(2)  # type: ignore[misc]


def test_source_that_was_not_opened_is_an_error() -> None:
    plan = make_plan(("lm_head", "fp8"))
    with pytest.raises(RouteError, match="source 'fp8' is used by the plan but was not opened"):
        resolve(plan, {"bf16": open_checkpoint(FIXTURES / "bf16", "bf16")})


def test_missing_source_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bf16: .*no such directory|bf16: .*not a hub id"):
        load(make_plan(folder=tmp_path))


def test_parallel_size_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="pipeline_parallel_size is 0; expected 1 or more"):
        Layout(pipeline_parallel_size=0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float16"}, "fp16"),
        ({"text_config": {"torch_dtype": "torch.float32"}}, "fp32"),
        ({}, "bf16"),
    ],
)
def test_base_scheme_is_the_dtype_of_the_config(config: dict, expected: str) -> None:
    assert dtype_scheme(config, {}).format == expected


def test_base_scheme_without_a_dtype_is_what_most_weights_have(models: Path) -> None:
    edit_json(models / "bf16" / "config.json", dtype=None)
    checkpoint = open_checkpoint(models / "bf16")
    assert dtype_scheme(checkpoint.config, checkpoint.modules) == BF16


@pytest.mark.parametrize(
    ("source", "platform"),
    [("bf16", "cpu-avx512"), ("fp8", "cpu-avx512"), ("fp8", "cuda-90"), ("gptq", "cuda-90")],
)
def test_whole_model_from_one_source(source: str, platform: str) -> None:
    table = load(make_plan(base=source), None, Platform(platform))
    assert {route.source for route in table.routes.values()} == {source}
    assert not any(route.widened for route in table.routes.values())


def test_fingerprint_tells_formats_apart_that_one_plan_can_have(models: Path) -> None:
    """vLLM reuses a compiled graph by it; a plan's own hash does not see its sources."""

    def fingerprint(**options: object) -> str:
        plan = make_plan(("**.experts.{0-3}", "gptq"), folder=models)
        return load(plan, None, **{"platform": CPU, **options}).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(platform=Platform("cpu-other")) != first
    assert fingerprint(platform=CPU.without({"gptq": "its probe failed"})) != first
    assert fingerprint(dtype="fp16") != first
    shutil.rmtree(models / "gptq")
    shutil.copytree(models / "gptq-asym", models / "gptq")
    assert fingerprint() != first


def test_dtype_that_is_served_overrides_the_config() -> None:
    table = load(make_plan(("**.experts", "gptq")), None, CPU, dtype="fp16")
    assert table.base_scheme == Scheme("fp16", 16)
    assert table.routes[f"{EXPERTS}.0.up_proj"].widened
