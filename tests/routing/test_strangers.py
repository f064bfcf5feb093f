# SPDX-License-Identifier: Apache-2.0
"""What a start tells from a few rows in each file: other models' files, and other places."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.routing.models import ARCHITECTURES, CPU, OF_ARCHITECTURES, make_plan
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Finding
from vllm_mixprec.routing.check import examine
from vllm_mixprec.routing.sampling import compare_samples
from vllm_mixprec.routing.strangers import MISPLACED

LINEARS = "re:.*_proj"

Tensors = dict[str, torch.Tensor]


def misplaced(plan: Plan) -> list[Finding]:
    report, checkpoints = examine(plan, platform=CPU)
    assert report.table is not None, report.findings
    found = compare_samples(report.table, checkpoints)
    return [finding for finding in found if finding.code == MISPLACED]


def edit(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change each shard's tensors."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


def split(folder: Path) -> tuple[str, str]:
    """Put a model of one file into two shards, the last layer's experts in the second."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ("one.safetensors", "two.safetensors")
    shards: dict[str, Tensors] = {name: {} for name in names}
    for name, tensor in whole.items():
        shards[names[name.startswith("model.layers.1.mlp.experts")]][name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    places = {name: file for file, tensors in shards.items() for name in tensors}
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)
    return names


def estrange(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix of the same entries in other places."""
    raw = tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int16)
    places = torch.randperm(raw.numel(), generator=torch.Generator().manual_seed(0))
    return raw.flatten()[places].view(raw.shape).view(tensor.dtype)


@pytest.mark.parametrize("source", ["fp8", "gptq", "gptq-asym"])
def test_sound_source_is_none(source: str) -> None:
    assert misplaced(make_plan((LINEARS, source))) == []


@pytest.mark.parametrize(
    "folder",
    sorted(path for path in ARCHITECTURES.iterdir() if path.is_dir()),
    ids=lambda p: p.name,
)
def test_sound_architecture_is_none(folder: Path) -> None:
    for source in OF_ARCHITECTURES[1:]:
        rules = ("re:.*(_proj|_proj_with_mqa|indexer\\.wk|\\.w[123])", source)
        assert misplaced(make_plan(rules, folder=folder, sources=OF_ARCHITECTURES)) == []


def test_shard_of_another_model_is_told_by_the_others(models: Path) -> None:
    """No router and no norm is in it, and its header is the same."""
    _, second = split(models / "fp8")
    tensors = load_file(models / "fp8" / second)
    for name, tensor in tensors.items():
        tensors[name] = estrange(tensor) if name.endswith(".weight") else tensor
    save_file(tensors, models / "fp8" / second)
    finding, *_ = misplaced(make_plan((LINEARS, "fp8"), folder=models))
    assert finding.level == "error"
    assert finding.where.startswith("model.layers.1.mlp.experts.")
    assert "the same ones in model.layers.0.mlp.experts." in finding.message
    assert str(models / "fp8" / second) in finding.message


def test_shard_of_another_model_in_the_base_is_too(models: Path) -> None:
    shard = models / "bf16" / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    experts = [name for name in tensors if ".mlp.experts." in name]
    assert experts
    save_file({n: estrange(t) if n in experts else t for n, t in tensors.items()}, shard)
    found = misplaced(make_plan((LINEARS, "gptq"), folder=models))
    assert found and all(str(shard) in finding.message for finding in found)


@pytest.mark.parametrize("source", ["fp8", "gptq"])
def test_experts_in_another_order_are_named(models: Path, source: str) -> None:
    def change(tensors: Tensors) -> None:
        before = dict(tensors)
        for name in tensors:
            if ".experts." in name:
                head, _, tail = name.partition(".experts.")
                expert, _, rest = tail.partition(".")
                tensors[name] = before[f"{head}.experts.{(int(expert) + 1) % 8}.{rest}"]

    edit(models / source, change)
    found = misplaced(make_plan((LINEARS, source), folder=models))
    assert {finding.where.rpartition(".")[2] for finding in found} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert any(
        f"holds weights of {finding.where.replace('experts.0', 'experts.1')} of" in finding.message
        for finding in found
    )


def test_gate_and_up_in_another_order_are_named(models: Path) -> None:
    def change(tensors: Tensors) -> None:
        before = dict(tensors)
        for name in tensors:
            for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
                if one in name:
                    tensors[name] = before[name.replace(one, other)]

    edit(models / "fp8", change)
    found = misplaced(make_plan(("model.layers.*.mlp.experts.*", "fp8"), folder=models))
    assert [finding.where.rpartition(".")[2] for finding in found] == ["gate_proj", "up_proj"]
    assert "of model.layers.0.mlp.experts.0.up_proj of base" in found[0].message


def test_layers_in_another_order_are_named(models: Path) -> None:
    def change(tensors: Tensors) -> None:
        before = dict(tensors)
        for name in tensors:
            if "o_proj" in name:
                other = name.replace("layers.0.", "layers.*.").replace("layers.1.", "layers.0.")
                tensors[name] = before[other.replace("layers.*.", "layers.1.")]

    edit(models / "fp8", change)
    found = misplaced(make_plan((LINEARS, "fp8"), folder=models))
    assert found and found[0].where == "model.layers.0.self_attn.o_proj"
    assert "holds weights of model.layers.1.self_attn.o_proj of" in found[0].message


# What an operator may mean.


def test_fine_tuned_weights_are_not_misplaced(models: Path) -> None:
    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight") and ".layers.1." in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = (tensor.float() + noise * tensor.float().std()).to(tensor.dtype)

    edit(models / "bf16", change)
    assert misplaced(make_plan((LINEARS, "fp8"), folder=models)) == []


def test_factors_of_rows_and_columns_are_not(models: Path) -> None:
    """Of the size at which the plain cosine falls to 0.15."""

    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight") and ".layers.1." in name:
                n, k = tensor.shape
                rows = torch.empty(n, 1).log_normal_(generator=generator)
                columns = torch.empty(k).log_normal_(generator=generator)
                tensors[name] = (tensor.float() * rows * columns).to(tensor.dtype)

    edit(models / "bf16", change)
    assert misplaced(make_plan((LINEARS, "gptq"), folder=models)) == []


def test_a_kind_that_is_unrelated_throughout_is_not(models: Path) -> None:
    """As values are where a tool turned them, which its output projection takes back."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith((".v_proj.weight", ".o_proj.weight")):
                tensors[name] = estrange(tensor)

    edit(models / "bf16", change)
    assert misplaced(make_plan((LINEARS, "fp8"), folder=models)) == []
