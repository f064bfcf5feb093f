# SPDX-License-Identifier: Apache-2.0
"""FP8 with a scale a row in the real engine: fused layers with biases, experts, every rank's part.

Attention, dense and shared MLPs and all experts of a GLM-4-MoE are FP8. The parts of qkv_proj come
in the three ways of storing it that share the layout: compressed-tensors', plain with scales (N,),
and a scale a tensor.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.formats.tools import FLOAT, FP8, Store, compressed, plain_fp8
from tests.engine import reference
from tests.engine.conftest import prompts
from tests.engine.harness import EAGER, compose_plan, run_engines, run_ranks
from tests.engine.mixes import ARCHITECTURES, WEIGHTS_ONLY

pytestmark = pytest.mark.engine

MODEL = "glm4_moe"
BASE = ARCHITECTURES / MODEL / "bf16"
LAYERS = 3
Tensors = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor], torch.Tensor]

STORES: dict[str, Store] = {
    "ct": compressed(FLOAT, FP8 | {"strategy": "channel"}),
    "rows": plain_fp8("channel"),
    "tensor": plain_fp8("tensor"),
}
TP2 = EAGER | {"tensor_parallel_size": 2}
TWO_RANKS = {"tp2": TP2, "tp2-ep": TP2 | {"enable_expert_parallel": True}}
LAYOUTS = ("eager", "compiled", *TWO_RANKS)


def source_of(module: str) -> str | None:
    if not module.endswith("_proj") or int(module.split(".")[2]) >= LAYERS:
        return None
    return {"k_proj": "rows", "v_proj": "tensor"}.get(module.rpartition(".")[2], "ct")


def write_sources(folder: Path, change: Change = lambda name, tensor: tensor) -> dict:
    """Write a source a way of storing; returns the plan and the weights that the tools read."""
    config = json.loads((BASE / "config.json").read_text())
    base = {k: v for file in BASE.glob("*.safetensors") for k, v in load_file(file).items()}
    tensors: dict[str, Tensors] = {name: {} for name in STORES}
    raw, rules = {}, []
    weights = {name: tensor.float() for name, tensor in base.items()}
    for name, tensor in base.items():
        module, _, suffix = name.rpartition(".")
        source = source_of(module)
        if source is None:
            continue
        if suffix == "bias":
            tensors[source][name] = tensor
            continue
        stored = STORES[source](tensor.float())
        weights[name] = stored.weight.float().contiguous()
        raw[source] = stored.config
        rules.append({"match": module, "source": source})
        for suffix, part in stored.tensors.items():
            if source == "rows" and suffix == "weight_scale":
                suffix, part = "weight_scale_inv", part.reshape(-1)
            part = change(f"{module}.{suffix}", part)
            tensors[source][f"{module}.{suffix}"] = part.contiguous()
    paths = {"base": {"path": str(BASE)}}
    for source, found in tensors.items():
        at = folder / source
        at.mkdir(parents=True)
        save_file(found, at / "model.safetensors")
        (at / "config.json").write_text(
            json.dumps(config | {"quantization_config": raw[source]}, default=str)
        )
        paths[source] = {"path": str(at)}
    plan = {"version": 1, "base": "base", "sources": paths, "rules": rules}
    return {"plan": plan, "weights": weights}


def halved(of: str) -> Change:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2 if of in name and "scale" in name else tensor

    return change


DAMAGES = {
    "values": halved("layers.1.self_attn.v_proj"),
    "experts": halved("layers.1.mlp.experts.1.up_proj"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    return write_sources(tmp_path_factory.mktemp("channel"))


@pytest.fixture(scope="module")
def results(whole, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("engines")
    job = {"name": "eager", "prompts": prompts(MODEL)}
    job["model"] = str(compose_plan(folder / "mixed", whole["plan"]))
    one = [job | {"options": EAGER}, job | {"name": "compiled"}]
    for name, change in DAMAGES.items():
        plan = write_sources(folder / name, change)["plan"]
        model = str(compose_plan(folder / f"mixed-{name}", plan))
        one.append(job | {"name": name, "model": model, "options": EAGER})
    two = [job | {"name": name, "options": options} for name, options in TWO_RANKS.items()]
    short = {"max_model_len": 64}
    return run_engines(folder / "one", one, **short) | run_ranks(folder / "two", two, **short)


@pytest.fixture(scope="module")
def expected(whole) -> torch.Tensor:
    return reference.log_probs(BASE, whole["weights"], prompts(MODEL))


def difference(result: dict, expected: torch.Tensor) -> float:
    assert "error" not in result, result["error"]
    return (torch.tensor(result["log_probs"]) - expected).abs().mean().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_match_float32(results, expected, layout):
    found = difference(results[layout], expected)
    print(f"{layout}: {found:.4f} nats a token (at most {WEIGHTS_ONLY})")
    assert results[layout]["compiled"] == (layout == "compiled")
    assert found <= WEIGHTS_ONLY


@pytest.mark.parametrize("damage", DAMAGES)
def test_halved_scales_are_noticed(results, expected, damage):
    """Negative control: of one projection of one layer."""
    found = difference(results[damage], expected)
    print(f"{damage} halved: {found:.4f} nats a token, against at most {WEIGHTS_ONLY}")
    assert found > WEIGHTS_ONLY


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_widened(results, layout):
    assert all(worker["widened"] == [] for worker in results[layout]["workers"])
