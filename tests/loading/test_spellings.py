# SPDX-License-Identifier: Apache-2.0
"""What reaches vLLM's layers is the same, bit for bit, however base and sources are spelled."""

from pathlib import Path

import pytest
import torch

from tests.loading.serving import needs_cpu, serve
from tests.spellings import (
    MIXTRAL,
    RANDOM,
    Respell,
    as_auto_round,
    as_mlp,
    gate_up,
    qkv,
    respell,
    stack,
    wrapped,
)

pytestmark = needs_cpu

Weights = dict[str, torch.Tensor]


def load(folder: Path, base: Path, sources: dict[str, Path], rules: dict[str, str]) -> Weights:
    """Build vLLM's model of a plan and load it; returns its parameters, and that all were filled.

    The loader's own ledger ends it where a tensor or a parameter is left over.
    """
    with serve(folder, base, sources, rules, has_draft=False) as serving:
        built = serving.build()
        for parameter in built.model.parameters():
            parameter.data.view(torch.uint8).fill_(0x7F)  # no number in any of the formats' types
        serving.loader.load_weights(built.model, built.model_config)
        return {name: p.detach().clone() for name, p in built.model.named_parameters()}


def differing(one: Weights, other: Weights) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name
        for name in one
        if not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
    ]


RANDOM_RULES = {
    "model.layers.*.mlp.experts.{0,1}": "gptq",
    "model.layers.*.mlp.experts.{2,3}": "fp8",
    "model.layers.*.mlp.experts.4": "gptq-asym",
    "model.layers.0.self_attn.qkv_proj": "gptq-asym",
    "model.layers.1.self_attn.qkv_proj": "fp8",
}
APART_RULES = {
    match.replace("qkv_proj", "{q,k,v}_proj"): source for match, source in RANDOM_RULES.items()
}


@pytest.fixture(scope="module")
def random_apart(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    sources = {name: RANDOM / name for name in ("fp8", "gptq", "gptq-asym")}
    return load(tmp_path_factory.mktemp("apart"), RANDOM / "bf16", sources, APART_RULES)


@pytest.mark.parametrize(
    ("base", "source"),
    [
        ((), (stack(is_dotted=True), qkv)),
        ((stack(), qkv), ()),
        ((stack(is_transposed=True), qkv), (stack(is_dotted=True), qkv)),
        ((wrapped,), ()),
    ],
    ids=["source-fused", "base-fused", "both-fused", "base-wrapped"],
)
def test_four_formats_in_a_layer(
    tmp_path: Path,
    random_apart: Weights,
    base: tuple[Respell, ...],
    source: tuple[Respell, ...],
) -> None:
    sources = {
        name: respell(tmp_path / name, RANDOM / name, *source)
        for name in ("fp8", "gptq", "gptq-asym")
    }
    rules = RANDOM_RULES if qkv in base else APART_RULES
    if wrapped in base:
        rules = {f"language_model.{match}": name for match, name in rules.items()}
    respelled = respell(tmp_path / "base", RANDOM / "bf16", *base)
    found = load(tmp_path / "work", respelled, sources, rules)
    assert differing(found, random_apart) == []


def test_the_comparison_sees_scales_of_one_expert(tmp_path: Path, random_apart: Weights) -> None:
    """Negative control."""
    name = "model.layers.0.mlp.experts.1.up_proj.scales"

    def grow(tensors):
        return tensors | {name: tensors[name] * 1.01}

    sources = {name: RANDOM / name for name in ("fp8", "gptq-asym")}
    sources["gptq"] = respell(tmp_path / "gptq", RANDOM / "gptq", grow)
    found = load(tmp_path / "work", RANDOM / "bf16", sources, APART_RULES)
    changed = differing(found, random_apart)
    assert changed and all("layers.0.mlp.experts." in name for name in changed)


MIXTRAL_RULES = {
    "model.layers.*.block_sparse_moe.experts.{0,2}": "int4",
    "model.layers.*.block_sparse_moe.experts.3": "fp8",
    "model.layers.0.self_attn.*_proj": "int4",
    "model.layers.*.block_sparse_moe.gate": "fp8",
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    sources = {name: MIXTRAL / name for name in ("fp8", "int4")}
    return load(tmp_path_factory.mktemp("mixtral"), MIXTRAL / "bf16", sources, MIXTRAL_RULES)


@pytest.mark.parametrize(
    ("base", "source", "block"),
    [
        ((), (as_auto_round,), "block_sparse_moe"),
        ((as_auto_round,), (), "block_sparse_moe"),
        ((), (as_mlp, wrapped), "block_sparse_moe"),
        ((as_mlp,), (), "mlp"),
        ((stack(), as_mlp), (as_auto_round,), "mlp"),
    ],
    ids=["as-auto-round", "base-as-auto-round", "as-mlp", "base-as-mlp", "base-stacked"],
)
def test_mixtral(
    tmp_path: Path,
    mixtral: Weights,
    base: tuple[Respell, ...],
    source: tuple[Respell, ...],
    block: str,
) -> None:
    sources = {name: respell(tmp_path / name, MIXTRAL / name, *source) for name in ("fp8", "int4")}
    rules = {m.replace("block_sparse_moe", block): name for m, name in MIXTRAL_RULES.items()}
    respelled = respell(tmp_path / "base", MIXTRAL / "bf16", *base)
    assert differing(load(tmp_path / "work", respelled, sources, rules), mixtral) == []


def test_gate_up_of_dense_and_shared_experts(tmp_path: Path) -> None:
    glm = MIXTRAL.parent / "glm4_moe"
    rules = {"model.layers.0.mlp": "fp8", "model.layers.*.mlp.shared_experts": "fp8"}
    expected = load(tmp_path / "apart", glm / "bf16", {"fp8": glm / "fp8"}, rules)
    fused = respell(tmp_path / "fp8", glm / "fp8", gate_up)
    found = load(tmp_path / "source-fused", glm / "bf16", {"fp8": fused}, rules)
    assert differing(found, expected) == []
    base = respell(tmp_path / "base", glm / "bf16", gate_up)
    found = load(tmp_path / "base-fused", base, {"fp8": glm / "fp8"}, rules)
    assert differing(found, expected) == []
