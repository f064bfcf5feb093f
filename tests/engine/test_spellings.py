# SPDX-License-Identifier: Apache-2.0
"""Mixes of sources that are spelled apart, in part or alike, against transformers in float32.

Every source is also there as its tool wrote it: of those the reference is made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.engine import reference
from tests.engine.conftest import prompts
from tests.engine.dense import write_dense
from tests.engine.harness import EAGER, compose_plan, run_engines
from tests.engine.mixes import ROUNDED_ACTIVATIONS, attention, expert, layer
from tests.spellings import MIXTRAL, RANDOM, gate_up, qkv, read_all, respell, stack, write

pytestmark = pytest.mark.engine

GLM = MIXTRAL.parent / "glm4_moe"


@dataclass(frozen=True)
class Case:
    """A mix: what is served, and the checkpoints that the reference takes its tensors from.

    ``choose`` names the checkpoint of a tensor, under ``apart``; ``model`` is whose prompts.
    """

    served: dict[str, Path]
    rules: tuple[tuple[str, str], ...]
    apart: dict[str, Path]
    choose: Callable[[str], str]
    bound: float
    model: str

    def plan(self) -> dict:
        return {
            "version": 1,
            "base": "base",
            "sources": {name: {"path": str(path)} for name, path in self.served.items()},
            "rules": [{"match": match, "source": source} for match, source in self.rules],
        }

    def expected(self, choose: Callable[[str], str] | None = None) -> torch.Tensor:
        weights = {name: reference.dequantised(path) for name, path in self.apart.items()}
        mixed = reference.mix(weights, "base", choose or self.choose)
        return reference.log_probs(self.apart["base"], mixed, prompts(self.model))


def only_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".experts." in name}


def grown(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make all weights half as large again: another int4 source of the same format."""
    return {
        name: tensor * 1.5 if name.endswith(".scales") else tensor
        for name, tensor in tensors.items()
    }


def renewed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings and head of other numbers; the router of the same, in float32."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, tensor in tensors.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            noise = torch.randn(tensor.shape, generator=generator)
            made[name] = (tensor.float() + 0.03 * noise).to(tensor.dtype)
        elif name.endswith(".mlp.gate.weight"):
            made[name] = tensor.float()
    return made


def _random(name: str) -> str:
    if name in ("model.embed_tokens.weight", "lm_head.weight") or ".mlp.gate." in name:
        return "renewed"
    if attention(name) and "o_proj" not in name:
        return "asym" if layer(name) == 0 else "fp8"
    if expert(name) < 0:
        return "base"
    if layer(name) == 1:
        return "gptq" if expert(name) <= 3 else "grown" if expert(name) <= 6 else "base"
    if expert(name) == 5:
        return "gptq" if "down_proj" in name else "fp8" if "gate_proj" in name else "base"
    return {0: "gptq", 1: "gptq", 2: "asym", 3: "fp8", 4: "fp8"}.get(expert(name), "base")


def random_case(folder: Path) -> Case:
    """Experts of all in one tensor and fused attention in the base; five sources, two in part.

    Layer 0 has four formats, and an expert whose projections have three; layer 1 two int4 sources.
    """
    apart = {
        "base": RANDOM / "bf16",
        "fp8": RANDOM / "fp8",
        "gptq": RANDOM / "gptq",
        "asym": RANDOM / "gptq-asym",
        "grown": respell(folder / "grown", RANDOM / "gptq", grown),
        "renewed": write(folder / "renewed", RANDOM / "bf16", renewed(read_all(RANDOM / "bf16"))),
    }
    served = apart | {
        "base": respell(folder / "base", RANDOM / "bf16", stack(), qkv),
        "asym": respell(folder / "asym", RANDOM / "gptq-asym", stack(is_dotted=True), qkv),
        "gptq": respell(folder / "int4-experts", RANDOM / "gptq", only_experts),
        "grown": respell(folder / "grown-experts", apart["grown"], only_experts),
    }
    first, second = (f"model.layers.{number}.mlp.experts" for number in (0, 1))
    rules = (
        ("{model.embed_tokens,lm_head,model.layers.*.mlp.gate}", "renewed"),
        ("model.layers.0.self_attn.qkv_proj", "asym"),
        ("model.layers.1.self_attn.qkv_proj", "fp8"),
        (f"{first}.{{0,1}}", "gptq"),
        (f"{first}.2", "asym"),
        (f"{first}.{{3,4}}", "fp8"),
        (f"{first}.5.down_proj", "gptq"),
        (f"{first}.5.gate_proj", "fp8"),
        (f"{second}.{{0-3}}", "gptq"),
        (f"{second}.{{4-6}}", "grown"),
    )
    return Case(served, rules, apart, _random, ROUNDED_ACTIVATIONS, "random")


def _shared(name: str) -> str:
    if layer(name) == 0 and ".mlp." in name:
        return "fp8"
    if ".shared_experts." in name and layer(name) <= 2:  # the MTP layer is not in int4
        return "int4"
    return "fp8" if expert(name) in (0, 1) else "base"


def shared_case(folder: Path) -> Case:
    """Shared experts, a dense layer and two experts, of which the base fuses gate and up."""
    apart = {"base": GLM / "bf16", "fp8": GLM / "fp8", "int4": GLM / "int4"}
    served = apart | {"base": respell(folder / "glm", GLM / "bf16", gate_up, stack())}
    rules = (
        ("model.layers.0.mlp", "fp8"),
        ("model.layers.{0-2}.mlp.shared_experts", "int4"),
        ("model.layers.*.mlp.experts.{0,1}", "fp8"),
    )
    return Case(served, rules, apart, _shared, ROUNDED_ACTIVATIONS, "glm4_moe")


def _dense(name: str) -> str:
    if attention(name):
        return "fp8" if layer(name) == 0 else "base"
    return "int4" if "_proj." in name and layer(name) == 1 else "base"


def dense_case(folder: Path, name: str) -> Case:
    sources = write_dense(folder, name)
    apart = {"base": sources["bf16"], "fp8": sources["fp8"], "int4": sources["int4"]}
    served = apart | {"int4": respell(folder / f"{name}-int4", sources["int4"], gate_up)}
    rules = (("model.layers.0.self_attn.*_proj", "fp8"), ("model.layers.1.mlp", "int4"))
    return Case(served, rules, apart, _dense, ROUNDED_ACTIVATIONS, name)


NAMES = ("random", "shared", "llama", "qwen3")


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("sources")
    dense = {name: dense_case(folder, name) for name in ("llama", "qwen3")}
    return {"random": random_case(folder), "shared": shared_case(folder)} | dense


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("served")
    jobs = [
        {
            "name": name,
            "model": str(compose_plan(folder / name, case.plan())),
            "prompts": prompts(case.model),
        }
        for name, case in cases.items()
    ]
    return run_engines(folder, jobs, **EAGER)


def distance(result: dict, expected: torch.Tensor) -> float:
    assert "error" not in result, result["error"]
    return (torch.tensor(result["log_probs"]) - expected).abs().mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_match_float32(cases, results, name, record_property):
    found = distance(results[name], cases[name].expected())
    record_property(name, round(found, 4))
    print(f"{name:8} {found:.4f} nats a token (at most {cases[name].bound})")
    assert found <= cases[name].bound


# One tensor's source named wrongly, for each thing that the mixes are to prove.
WRONG = {
    "the grown source": (
        "random",
        lambda name: "gptq" if _random(name) == "grown" else _random(name),
    ),
    "embeddings of the base": (
        "random",
        lambda name: "base" if "embed_tokens" in name else _random(name),
    ),
    "the base's head": ("random", lambda name: "base" if "lm_head" in name else _random(name)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_source_is_noticed(cases, results, mistake):
    name, choose = WRONG[mistake]
    found = distance(results[name], cases[name].expected(choose))
    print(f"{mistake}: {found:.4f} nats a token, against at most {cases[name].bound}")
    assert found > cases[name].bound


def test_widened_is_what_comes_in_several_formats_and_nothing_else(results):
    (worker,) = results["random"]["workers"]
    expert = "model.layers.0.mlp.experts.5"
    assert set(worker["widened"]) == {f"{expert}.gate_proj", f"{expert}.down_proj"}
    (worker,) = results["llama"]["workers"]
    assert worker["widened"] == [] and "lm_head" not in worker["modules"]
