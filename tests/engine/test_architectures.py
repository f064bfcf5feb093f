# SPDX-License-Identifier: Apache-2.0
"""Every architecture, mixed, against transformers in float32: log-probabilities and who holds what.

Layouts: "one-process"; "pp2", two pipeline stages; "uneven", two stages in vLLM's own worker
processes, split by ``VLLM_PP_LAYER_PARTITION``; "default", one process, compiled if vLLM does so.
docs/architectures.md is the table of it.
"""

import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engine.architectures import (
    ARCHITECTURE_MIXES,
    ARCHITECTURES,
    BY_NAME,
    MAX_MODEL_LEN,
    ArchitectureMix,
)
from tests.engine.conftest import expected, prompts, reference_weights
from tests.engine.harness import EAGER, compose_plan, run_engines, run_stages
from tests.engine.mixes import SOURCES, layer
from tests.engine.reference import mtp_layer

pytestmark = pytest.mark.engine

ALL = list(BY_NAME)
UNEVEN = [f"{name}/layers" for name, has in ARCHITECTURES.items() if has.uneven]
DEFAULT = ["deepseek_v1/layers", "deepseek_v3/layers", "glm_moe_dsa/layers", "glm4_moe/layers"]
# A config of these models turns compilation off (VLLM_USE_BREAKABLE_CUDAGRAPH).
NEVER_COMPILED = ("glm_moe_dsa/layers",)
CASES = {"one-process": ALL, "pp2": ALL, "uneven": UNEVEN, "default": DEFAULT}
every_case = pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout, names in CASES.items() for name in names]
)


@pytest.fixture(scope="session")
def composed(tmp_path_factory) -> dict[str, str]:
    """Compose every mix once; returns the directories by mix."""
    folder = tmp_path_factory.mktemp("architectures")
    return {
        mix.name: str(compose_plan(folder / mix.name.replace("/", "-"), mix.plan()))
        for mix in ARCHITECTURE_MIXES
    }


@pytest.fixture(scope="session")
def results(composed, tmp_path_factory):
    """Return a function that runs all mixes of a layout, once, and returns results by mix."""

    @cache
    def run(layout: str) -> dict:
        jobs = []
        for name in CASES[layout]:
            mix, architecture = BY_NAME[name], ARCHITECTURES[BY_NAME[name].model]
            job = {"name": name, "model": composed[name], "prompts": prompts(mix.model)}
            if layout == "uneven":
                split = ",".join(map(str, architecture.uneven))
                job["environment"] = {"VLLM_PP_LAYER_PARTITION": split}
            jobs.append(job | {"options": architecture.options})
        folder = tmp_path_factory.mktemp(layout)
        if layout == "pp2":
            return run_stages(folder, jobs, max_model_len=MAX_MODEL_LEN, **EAGER)
        options = {"max_model_len": MAX_MODEL_LEN} | ({} if layout == "default" else EAGER)
        if layout == "uneven":
            options |= {"workers": 2, "pipeline_parallel_size": 2}
        return run_engines(folder, jobs, **options)

    return run


def served(result: dict) -> dict:
    assert "error" not in result, result["error"]
    return result


def difference(result: dict, mix: ArchitectureMix) -> float:
    """Mean absolute difference in nats a token between an engine and the reference."""
    found = torch.tensor(served(result)["log_probs"])
    return (found - expected(mix)).abs().mean().item()


@every_case
def test_log_probs_match_float32(results, layout, name):
    mix = BY_NAME[name]
    result = results(layout)[name]
    found = difference(result, mix)
    print(f"{layout:12} {name:22} {found:.4f} nats a token (at most {mix.bound})")
    assert found <= mix.bound
    assert result["compiled"] == (layout == "default" and name not in NEVER_COMPILED)


def loaded(mix: ArchitectureMix) -> set[str]:
    """Modules that a server without a draft loads, by the base's names."""
    folder = SOURCES[mix.model]["bf16"]
    last = mtp_layer(folder)
    skipped = ARCHITECTURES[mix.model].without_indexer
    return {
        name.rpartition(".")[0]
        for name in reference_weights(mix)
        if (last is None or layer(name) < last)
        and not (".indexer." in name and layer(name) in skipped)
    }


@every_case
def test_workers_hold_their_part_and_no_more(results, layout, name):
    """Stages apart, together all; no multi-token prediction, no indexer of a layer without."""
    workers = served(results(layout)[name])["workers"]
    held = [set(worker["modules"]) for worker in workers]
    assert set().union(*held) == loaded(BY_NAME[name])
    if len(held) == 1:
        return
    assert not held[0] & held[1]
    assert "model.embed_tokens" in held[0] and "lm_head" in held[1]
    assert not any("embed_tokens" in parameter for parameter in workers[1]["parameters"])
    architecture = ARCHITECTURES[BY_NAME[name].model]
    if layout == "uneven":
        layers = [{layer(f"{module}.") for module in part} - {-1} for part in held]
        assert [len(part) for part in layers] == list(architecture.uneven)


@cache
def packed(source: Path) -> frozenset[str]:
    """Modules that a checkpoint stores quantised."""
    names: set[str] = set()
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    scales = (".qweight", ".weight_scale_inv")
    return frozenset(name.rpartition(".")[0] for name in names if name.endswith(scales))


@every_case
def test_fused_parts_apart_are_widened_and_nothing_else(results, layout, name):
    mix = BY_NAME[name]
    workers = served(results(layout)[name])["workers"]
    assert {module for worker in workers for module in worker["widened"]} == {
        module
        for module in loaded(mix)
        if mix.widened
        and re.search(mix.widened, module)
        and module in packed(SOURCES[mix.model][mix.choose(f"{module}.weight")])
    }


def _halve(tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Halve the scales of the first expert that the mix takes from FP8."""
    for part in ("gate_proj", "up_proj"):
        tensors[f"{prefix}.1.{part}.weight_scale_inv"] /= 2


def _swell(tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Make the output of that expert four times as large."""
    tensors[f"{prefix}.1.down_proj.weight_scale_inv"] *= 4


DAMAGES = {"halved-scale": _halve, "swollen-expert": _swell}
DAMAGED = {"deepseek_v3": "model.layers.1.mlp.experts", "olmoe": "model.layers.0.mlp.experts"}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Serve mixes of experts over copies of an FP8 source in which one thing is wrong each."""
    folder = tmp_path_factory.mktemp("damaged-architectures")
    jobs = []
    for model, prefix in DAMAGED.items():
        for name, damage in DAMAGES.items():
            source = folder / f"{model}-{name}" / "fp8"
            shutil.copytree(SOURCES[model]["fp8"], source)
            tensors = load_file(source / "model.safetensors")
            damage(tensors, prefix)
            save_file(tensors, source / "model.safetensors")
            plan = BY_NAME[f"{model}/experts"].plan()
            plan["sources"]["fp8"]["path"] = str(source)
            mixed = compose_plan(source.parent / "mixed", plan)
            job = {"name": f"{model} {name}", "model": str(mixed), "prompts": prompts(model)}
            jobs.append(job | {"options": ARCHITECTURES[model].options})
    return run_engines(folder, jobs, max_model_len=MAX_MODEL_LEN, **EAGER)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("model", DAMAGED)
def test_a_damaged_source_is_noticed(damaged, model, damage):
    """Negative control: the engine serves it, and the comparison above fails."""
    mix = BY_NAME[f"{model}/experts"]
    found = difference(damaged[f"{model} {damage}"], mix)
    print(f"{model} {damage}: {found:.4f} nats a token, against at most {mix.bound}")
    assert found > mix.bound
