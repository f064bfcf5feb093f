# SPDX-License-Identifier: Apache-2.0
"""``check --deep``: one test for each defect, each made in a copy of a real quantiser's export."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.mixes import ROOT
from tests.routing.models import ARCHITECTURES, CPU, OF_ARCHITECTURES, make_plan, only
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Finding, Report, check

EXPERTS = "model.layers.0.mlp.experts"
LINEARS = "re:.*(_proj|_proj_with_mqa|indexer\\.wk)"
"""What quantisers quantise."""

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more, and lose much where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def deep(plan: Plan) -> Report:
    return check(plan, platform=CPU, deep=True)


def edit(model: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a model of one file."""
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


def merge(model: Path) -> Path:
    """Put the shards of a model into one file."""
    shards = sorted(model.glob("*.safetensors"))
    tensors = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    for file in [*shards, *model.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, model / "model.safetensors")
    return model


def expect(report: Report, code: str, where: str, *parts: str) -> Finding:
    finding = only(report, code)
    assert finding.level == "error" and not report.ok
    assert finding.where == where
    for part in parts:
        assert part in finding.message, finding.message
    return finding


# No false alarm.


@pytest.mark.parametrize("source", ["fp8", "gptq", "gptq-asym"])
def test_random_model_agrees_with_its_base(source: str) -> None:
    plan = make_plan(("**.experts", source), ("**.self_attn.*_proj", source))
    report = deep(plan)
    assert [f for f in report.findings if f.level == "error"] == []
    assert [f.code for f in report.findings] == [f.code for f in check(plan, platform=CPU).findings]


MODELS = [ROOT / "examples" / "demo-moe", *sorted(ARCHITECTURES.iterdir())]


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_every_architecture_agrees_with_its_base(folder: Path) -> None:
    rules = (("**.experts", "int4"), (LINEARS, "fp8"))
    report = deep(make_plan(*rules, folder=folder, sources=OF_ARCHITECTURES))
    assert [f for f in report.findings if f.level == "error"] == []
    assert report.table is not None
    formats = {route.stored.format for route in report.table.routes.values()}
    assert formats >= {"fp8_block", "gptq"}


def test_unquantised_source_agrees_with_a_quantised_base() -> None:
    plan = make_plan(("**.experts.{0-3}", "bf16"), ("**.self_attn.*_proj", "gptq"), base="fp8")
    assert [f for f in deep(plan).findings if f.level == "error"] == []


# Broken companions.


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        (float("nan"), "scale-invalid", "NaN or infinite scales"),
        (float("inf"), "scale-invalid", "NaN or infinite scales"),
        (0.0, "scale-zero", "scales that are zero"),
        (-1.0, "scale-invalid", "negative scales"),
    ],
)
def test_broken_fp8_scale(models: Path, value: float, code: str, said: str) -> None:
    name = f"{EXPERTS}.2.up_proj.weight_scale_inv"

    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] *= value

    edit(models / "fp8", change)
    plan = make_plan(("**.experts", "fp8"), folder=models)
    assert check(plan, platform=CPU).ok
    expect(deep(plan), code, name, f"source 'fp8': holds {said}")


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        (float("nan"), "scale-invalid", "NaN or infinite scales"),
        (0.0, "scale-zero", "scales that are zero"),
    ],
)
def test_broken_gptq_scale(models: Path, value: float, code: str, said: str) -> None:
    name = f"{EXPERTS}.2.up_proj.scales"

    def change(tensors: Tensors) -> None:
        tensors[name][0, 5] = value

    edit(models / "gptq", change)
    plan = make_plan(("**.experts", "gptq"), folder=models)
    expect(deep(plan), code, name, said)


def test_gptq_scale_of_the_wrong_sign_disagrees_with_the_base(models: Path) -> None:
    """auto-round writes negative scales on purpose, so only the base can tell."""

    def change(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}.2.up_proj.scales"][0, 5] *= -1

    edit(models / "gptq", change)
    report = deep(make_plan(("**.experts", "gptq"), folder=models))
    expect(report, "weights-differ", f"{EXPERTS}.2.up_proj", "groups are nothing that rounding")


def test_order_out_of_range(models: Path) -> None:
    name = f"{EXPERTS}.1.gate_proj.g_idx"

    def change(tensors: Tensors) -> None:
        tensors[name][3] = 77

    edit(models / "gptq", change)
    report = deep(make_plan(("**.experts", "gptq"), folder=models))
    expect(report, "order-invalid", name, "groups 0 to 77, expected 0 to 1")


def test_order_that_the_config_denies(models: Path) -> None:
    name = f"{EXPERTS}.1.gate_proj.g_idx"

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].flip(0)

    edit(models / "gptq", change)
    report = deep(make_plan(("**.experts", "gptq"), folder=models))
    expect(report, "order-invalid", name, "config.json says desc_act false")


def test_zero_points_that_the_config_denies(models: Path) -> None:
    name = f"{EXPERTS}.1.gate_proj.qzeros"

    def change(tensors: Tensors) -> None:
        tensors[name][0, 0] += 1

    edit(models / "gptq", change)
    report = deep(make_plan(("**.experts", "gptq"), folder=models))
    expect(report, "packing-invalid", name, "expected 7 everywhere since config.json says sym")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weight_that_is_no_number(models: Path, value: float) -> None:
    name = "model.layers.1.self_attn.o_proj"

    def change(tensors: Tensors) -> None:
        tensors[f"{name}.weight"][7, 7] = value

    edit(merge(models / "bf16"), change)
    report = deep(make_plan(("**.experts", "gptq"), folder=models))
    expect(report, "weight-not-finite", name, "source 'bf16': holds NaN or infinite weights")


# Other weights.


def swap(tensors: Tensors, one: str, other: str) -> None:
    """Exchange the tensors of two modules or of all below them."""
    for name in [name for name in tensors if name.startswith(f"{one}.")]:
        twin = other + name.removeprefix(one)
        tensors[name], tensors[twin] = tensors[twin], tensors[name]


@pytest.mark.parametrize("source", ["fp8", "gptq", "gptq-asym"])
def test_swapped_experts_are_named(models: Path, source: str) -> None:
    edit(models / source, lambda tensors: swap(tensors, f"{EXPERTS}.2", f"{EXPERTS}.5"))
    plan = make_plan(("**.experts", source), folder=models)
    assert check(plan, platform=CPU).ok
    found = [f for f in deep(plan).findings if f.level == "error"]
    assert {f.code for f in found} == {"weights-differ"}
    assert {f.where for f in found} == {
        f"model.layers.*.mlp.experts.*.{p}_proj" for p in ("gate", "up", "down")
    }
    for finding in found:
        leaf = finding.where.rpartition(".")[2]
        assert f"{EXPERTS}.2.{leaf} holds {EXPERTS}.5.{leaf}" in finding.message
        assert "2 modules" in finding.message


def test_swapped_gate_and_up_are_named(models: Path) -> None:
    one, other = f"{EXPERTS}.3.gate_proj", f"{EXPERTS}.3.up_proj"
    edit(models / "gptq", lambda tensors: swap(tensors, one, other))
    report = deep(make_plan(("**.experts", "gptq"), folder=models))
    found = {f.where: f.message for f in report.findings}
    assert f"{one} holds {other}" in found[one]
    assert f"{other} holds {one}" in found[other]


def test_layer_of_another_place_is_told_with_numbers(models: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith("model.layers.1.self_attn.q_proj."):
                tensors[name.replace("layers.1", "layers.0")] = tensors[name]

    edit(models / "gptq", change)
    report = deep(make_plan(("**.self_attn.q_proj", "gptq"), folder=models))
    name = "model.layers.0.self_attn.q_proj"
    finding = expect(report, "weights-differ", name, "made from other weights", "gptq int4 g128")
    size = float(finding.message.partition("differs from base 'bf16' by ")[2].partition(" %")[0])
    assert 130 < size < 155  # two unrelated weights: the square root of 2


def test_expert_that_calibration_left_at_zero(models: Path) -> None:
    def change(tensors: Tensors) -> None:
        word = int.from_bytes(b"\x88" * 4, "little", signed=True)
        tensors[f"{EXPERTS}.4.down_proj.qweight"].fill_(word)

    edit(models / "gptq", change)
    report = deep(make_plan(("**.experts", "gptq"), folder=models))
    expect(report, "weights-differ", f"{EXPERTS}.4.down_proj", "all weights are zero")


# Folded scales: algebra on the base, as AWQ and SmoothQuant do it before they quantise.


def fold(tensors: Tensors, layer: int, norm: str, targets: tuple[str, ...]) -> None:
    """Divide a norm by factors, and multiply the columns of what it feeds by them."""
    prefix = f"model.layers.{layer}"
    weight = tensors[f"{prefix}.{norm}.weight"]
    torch.manual_seed(0)
    factors = torch.rand(len(weight)) * 1.5 + 0.5
    tensors[f"{prefix}.{norm}.weight"] = (weight.float() / factors).to(weight.dtype)
    for name in list(tensors):
        if name.startswith(prefix) and name.endswith(targets):
            tensors[name] = (tensors[name].float() * factors).to(tensors[name].dtype)


QKV = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
FED = ("gate_proj.weight", "up_proj.weight", "mlp.gate.weight")


@pytest.fixture
def folded(models: Path) -> Path:
    """A second BF16 export, ``fp8`` by its place in the plan, to fold scales into."""
    shutil.rmtree(models / "fp8")
    shutil.copytree(models / "bf16", models / "fp8")
    return merge(models / "fp8")


def test_norm_of_another_source_is_found_without_reading_weights(
    models: Path, folded: Path
) -> None:
    edit(folded, lambda tensors: fold(tensors, 0, "input_layernorm", QKV))
    report = check(make_plan(("**.self_attn.*_proj", "fp8"), folder=models), platform=CPU)
    norm = "model.layers.0.input_layernorm"
    expect(report, "norm-mismatch", norm, "of source 'fp8'", "AWQ")


def test_norm_that_comes_along_is_right(models: Path, folded: Path) -> None:
    edit(folded, lambda tensors: fold(tensors, 0, "input_layernorm", QKV))
    rules = (("**.self_attn.{q,k,v}_proj", "fp8"), ("**.input_layernorm", "fp8"))
    assert deep(make_plan(*rules, folder=models)).ok


def test_norm_that_comes_alone_is_found(models: Path, folded: Path) -> None:
    edit(folded, lambda tensors: fold(tensors, 0, "input_layernorm", QKV))
    report = check(make_plan(("**.input_layernorm", "fp8"), folder=models), platform=CPU)
    expect(report, "norm-mismatch", "model.layers.0.input_layernorm", "source 'bf16', which has")


def test_folded_columns_are_told_from_other_weights(models: Path, folded: Path) -> None:
    edit(folded, lambda tensors: fold(tensors, 0, "input_layernorm", QKV))
    report = deep(make_plan(("**.self_attn.*_proj", "fp8"), folder=models))
    found = {f.where for f in report.findings if f.code == "weights-rescaled"}
    assert found == {f"model.layers.0.self_attn.{p}_proj" for p in "qkv"}
    assert "weights-differ" not in {f.code for f in report.findings}
    message = next(f.message for f in report.findings if f.code == "weights-rescaled")
    assert "a factor for each of its columns" in message
    assert "in model.layers.*.input_layernorm, which the plan takes from elsewhere" in message


def scale_intermediate(tensors: Tensors) -> None:
    """Move factors from the rows of up_proj to the columns of down_proj, as AWQ does."""
    torch.manual_seed(0)
    for expert in range(8):
        up, down = (f"{EXPERTS}.{expert}.{part}_proj.weight" for part in ("up", "down"))
        factors = torch.rand(len(tensors[up])) * 1.5 + 0.5
        tensors[up] = (tensors[up].float() / factors[:, None]).to(torch.bfloat16)
        tensors[down] = (tensors[down].float() * factors).to(torch.bfloat16)


def test_factors_that_stay_within_an_expert_are_right(models: Path, folded: Path) -> None:
    edit(folded, scale_intermediate)
    assert deep(make_plan(("**.experts", "fp8"), folder=models)).ok


@pytest.mark.parametrize(
    ("leaf", "side", "partner"),
    [("up_proj", "rows", "down_proj"), ("down_proj", "columns", "up_proj")],
)
def test_half_of_an_expert_is_not(
    models: Path, folded: Path, leaf: str, side: str, partner: str
) -> None:
    edit(folded, scale_intermediate)
    report = deep(make_plan((f"**.experts.*.{leaf}", "fp8"), folder=models))
    expect(
        report,
        "weights-rescaled",
        f"model.layers.*.mlp.experts.*.{leaf}",
        f"each of its {side}",
        f"model.layers.*.mlp.experts.*.{partner}",
        "8 modules",
    )


@pytest.mark.parametrize("folder", ["glm4_moe", "deepseek_v3"])
def test_factors_that_stay_within_an_attention_layer_are_right(folder: str, tmp_path: Path) -> None:
    """Where heads share values, and where they lie behind each head's keys."""
    base, source = tmp_path / "bf16", tmp_path / "folded"
    for copy in (base, source):
        shutil.copytree(ARCHITECTURES / folder / "bf16", copy)
    attention = "model.layers.0.self_attn"
    values = f"{attention}.{'v' if folder == 'glm4_moe' else 'kv_b'}_proj.weight"

    def change(tensors: Tensors) -> None:
        torch.manual_seed(0)
        rows, out = tensors[values], tensors[f"{attention}.o_proj.weight"]
        heads = {"glm4_moe": 4, "deepseek_v3": 2}[folder]
        size = out.shape[1] // heads
        factors = torch.rand(2, size) * 1.5 + 0.5  # both have two heads of values
        columns = factors.repeat_interleave(heads // 2, 0).flatten()
        with_keys = torch.ones(2, len(rows) // 2)
        with_keys[:, -size:] = factors
        tensors[values] = (rows.float() / with_keys.flatten()[:, None]).bfloat16()
        tensors[f"{attention}.o_proj.weight"] = (out.float() * columns).bfloat16()

    edit(merge(source), change)
    sources = ("bf16", "folded")
    plan = make_plan(("**.self_attn", "folded"), folder=tmp_path, sources=sources)
    assert [f for f in deep(plan).findings if f.level == "error"] == []
    plan = make_plan(("**.self_attn.o_proj", "folded"), folder=tmp_path, sources=sources)
    expect(deep(plan), "weights-rescaled", f"{attention}.o_proj", values.split(".")[-2])


# Damage that looks like a folded scale: what would take it back is of the same source.


def test_damaged_block_is_no_folded_scale(models: Path) -> None:
    name = f"{EXPERTS}.3.gate_proj"

    def change(tensors: Tensors) -> None:
        tensors[f"{name}.weight_scale_inv"][0, 0] *= 128

    edit(models / "fp8", change)
    for rule in ("model.layers", "**.experts"):  # with the norm before it, and without
        report = deep(make_plan((rule, "fp8"), folder=models))
        expect(report, "weights-differ", name, "scales are damaged")
        assert "weights-rescaled" not in {f.code for f in report.findings}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        (f"{EXPERTS}.3.up_proj", "model.layers.*.mlp.experts.*.down_proj of that source"),
        (f"{EXPERTS}.3.gate_proj", "nothing that the package knows"),
        ("model.layers.0.self_attn.v_proj", "model.layers.*.self_attn.o_proj of that source"),
    ],
)
def test_damaged_rows_are_no_folded_scale(models: Path, name: str, where: str) -> None:
    """Half as large as the weight, that is 4 roundings of what is then stored."""

    def change(tensors: Tensors) -> None:
        torch.manual_seed(0)
        scales = tensors[f"{name}.scales"]
        tensors[f"{name}.scales"] = (scales * (torch.rand(scales.shape[1]) * 1.5 + 0.5)).half()

    edit(models / "gptq", change)
    report = deep(make_plan(("**.*_proj", "gptq"), folder=models))
    expect(report, "weights-differ", name, "a factor for each of its rows that", where)
    assert "weights-rescaled" not in {f.code for f in report.findings}


def test_norm_that_comes_along_without_the_factors_is_found(models: Path, folded: Path) -> None:
    norm = "model.layers.0.input_layernorm.weight"

    def change(tensors: Tensors) -> None:
        before = tensors[norm]
        fold(tensors, 0, "input_layernorm", QKV)
        tensors[norm] = before

    edit(folded, change)
    rules = (("**.self_attn.{q,k,v}_proj", "fp8"), ("**.input_layernorm", "fp8"))
    found = [f for f in deep(make_plan(*rules, folder=models)).findings if f.level == "error"]
    assert {(f.code, f.where) for f in found} == {
        ("weights-differ", f"model.layers.0.self_attn.{part}_proj") for part in "qkv"
    }
    for finding in found:
        said = "its columns that is not taken back in model.layers.*.input_layernorm of"
        assert said in finding.message


def test_other_factors_in_the_other_half_are_found(models: Path, folded: Path) -> None:
    def change(tensors: Tensors) -> None:
        scale_intermediate(tensors)
        down = f"{EXPERTS}.3.down_proj.weight"
        factors = torch.rand(tensors[down].shape[1]) * 1.5 + 0.5
        tensors[down] = (tensors[down].float() * factors).bfloat16()

    edit(folded, change)
    report = deep(make_plan(("**.experts", "fp8"), folder=models))
    assert {(f.code, f.where) for f in report.findings if f.level == "error"} == {
        ("weights-differ", f"{EXPERTS}.3.{part}_proj") for part in ("up", "down")
    }


@pytest.mark.parametrize("factor", [2.0, 1.5, 0.7])
def test_scales_that_grew_alike(models: Path, factor: float) -> None:
    """The bound is in units of the scales that are stored, and grows with them."""

    def change(tensors: Tensors) -> None:
        for part in ("gate", "up", "down"):
            tensors[f"{EXPERTS}.3.{part}_proj.scales"] *= factor

    edit(models / "gptq", change)
    found = deep(make_plan(("**.experts", "gptq"), folder=models)).findings
    errors = {f.where: f.message for f in found if f.level == "error"}
    assert set(errors) == {f"{EXPERTS}.3.{part}_proj" for part in ("gate", "up", "down")}
    for message in errors.values():
        found_percent = float(message.partition(" as a whole ")[2].partition(" %")[0])
        assert found_percent == pytest.approx(100 * factor, rel=0.01)  # but for rounding


def test_vector_that_is_twice_as_large(models: Path, folded: Path) -> None:
    name = "model.layers.0.self_attn.q_norm"

    def change(tensors: Tensors) -> None:
        tensors[f"{name}.weight"] *= 2

    edit(folded, change)
    report = deep(make_plan((name, "fp8"), folder=models))
    expect(report, "weights-differ", name, "as a whole 200 %")


def test_factor_of_a_whole_weight_that_is_taken_back(models: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}.3.up_proj.scales"] *= 2
        tensors[f"{EXPERTS}.3.down_proj.scales"] /= 2

    edit(models / "gptq", change)
    assert deep(make_plan(("**.experts", "gptq"), folder=models)).ok
    report = deep(make_plan(("**.experts.*.up_proj", "gptq"), folder=models))
    expect(
        report, "weights-rescaled", f"{EXPERTS}.3.up_proj", "experts.*.down_proj, which the plan"
    )


# What is not read.


def test_modules_that_nobody_loads_are_not_read(tmp_path: Path) -> None:
    """An MTP layer full of NaN, without and with the draft."""
    base = tmp_path / "bf16"
    shutil.copytree(ARCHITECTURES / "glm4_moe" / "bf16", base)
    mtp = "model.layers.3.self_attn.o_proj.weight"

    def change(tensors: Tensors) -> None:
        assert mtp in tensors, sorted(tensors)
        tensors[mtp].fill_(float("nan"))

    edit(merge(base), change)
    plan = Plan.from_dict({"version": 1, "base": "b", "sources": {"b": {"path": str(base)}}})
    assert check(plan, platform=CPU, deep=True).ok
    report = check(plan, platform=CPU, deep=True, draft=True)
    expect(report, "weight-not-finite", mtp.removesuffix(".weight"))


def test_progress_has_a_step_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[str] = []
    plan = make_plan(("**.experts.0", "gptq"))
    check(plan, platform=CPU, progress=lambda what, done, of: steps.append(what), deep=True)
    assert "reading tensors" in steps
    assert "100%" in capsys.readouterr().err
    check(plan, platform=CPU, deep=True)
    assert capsys.readouterr().err == ""
