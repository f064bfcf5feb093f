# SPDX-License-Identifier: Apache-2.0
"""Prompt log-probabilities of the real engine against transformers in float32."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import expected, prompts, reference_weights
from tests.engine.harness import EAGER, compose_plan, run_engines, run_stages
from tests.engine.mixes import MIXES, SOURCES, Mix

pytestmark = pytest.mark.engine

# Only one layout is compiled: without that an engine starts in a third of the time.
LAYOUTS = ("one-process", "pp2", "tp2")
BY_NAME = {mix.name: mix for mix in MIXES}


@pytest.fixture(scope="module", params=LAYOUTS)
def engines(request, jobs_of, tmp_path_factory):
    """Run every mix in one layout; returns (layout, results by mix)."""
    layout, folder = request.param, tmp_path_factory.mktemp(request.param)
    if layout == "one-process":
        results = run_engines(folder, jobs_of)
        assert all(result["compiled"] for result in results.values() if "error" not in result)
    elif layout == "pp2":
        results = run_stages(folder, jobs_of, **EAGER)
    else:
        results = run_engines(folder, jobs_of, workers=2, tensor_parallel_size=2, **EAGER)
    return layout, results


def difference(results: dict, mix: Mix, against: torch.Tensor) -> float:
    """Mean absolute difference in nats a token between an engine and a reference."""
    result = results[mix.name]
    assert "error" not in result, result["error"]
    return (torch.tensor(result["log_probs"]) - against).abs().mean().item()


def test_log_probs_match_float32(engines, record_property):
    layout, results = engines
    found = {mix.name: difference(results, mix, expected(mix)) for mix in MIXES}
    for name, value in found.items():
        record_property(f"{layout} {name}", round(value, 4))
        print(f"{layout:12} {name:20} {value:.4f} nats a token (at most {BY_NAME[name].bound})")
    assert {n: v for n, v in found.items() if not v <= BY_NAME[n].bound} == {}


def test_workers_hold_their_part_and_no_more(engines):
    layout, results = engines
    for mix in MIXES:
        workers = results[mix.name]["workers"]
        held = [set(worker["modules"]) for worker in workers]
        every = {name.rpartition(".")[0] for name in reference_weights(mix)}
        assert set().union(*held) == every
        if layout == "pp2":
            assert not held[0] & held[1]
            assert "model.embed_tokens" in held[0] and "lm_head" in held[1]
            assert not any("embed_tokens" in name for name in workers[1]["parameters"])


def test_fused_parts_apart_are_widened_and_nothing_else(engines):
    layout, results = engines
    if layout == "tp2":
        pytest.skip("tensor parallelism widens more: test_tensor_parallel_widens_what_it_cuts")
    for mix in MIXES:
        widened = {name for worker in results[mix.name]["workers"] for name in worker["widened"]}
        if mix.name != "fused-apart":
            assert widened == set()
            continue
        assert all(".self_attn." in name or ".experts." in name for name in widened)
        assert "model.layers.0.self_attn.k_proj" in widened
        assert "model.layers.2.mlp.experts.4.up_proj" in widened


def test_tensor_parallel_widens_what_it_cuts(engines):
    layout, results = engines
    if layout != "tp2":
        pytest.skip("one rank holds whole blocks")
    # Random model: intermediate 128 over two ranks cuts blocks and groups of 128. Such a group is
    # served as two of 64; a block's columns cannot be fewer than 128.
    widened = set(results["four-groups"]["workers"][0]["widened"])
    assert "model.layers.0.mlp.experts.4.gate_proj" in widened
    assert "model.layers.0.mlp.experts.0.down_proj" not in widened
    assert "model.layers.0.mlp.experts.2.down_proj" not in widened
    # Demo model: 256 over two ranks cuts no expert's block.
    widened = results["experts-three-ways"]["workers"][0]["widened"]
    assert not any(".experts." in name for name in widened)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Serve two mixes over copies of a source in which one thing is wrong each."""
    folder = tmp_path_factory.mktemp("damaged")
    mix = BY_NAME["two-groups"]
    prefix = "model.layers.1.mlp.experts"

    def halve(tensors):
        for expert in range(5):
            tensors[f"{prefix}.{expert}.down_proj.weight_scale_inv"] /= 2

    def shift(tensors):
        for name in [name for name in tensors if name.startswith(f"{prefix}.0.")]:
            other = name.replace(".experts.0.", ".experts.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    jobs = []
    for name, damage in (("halved-scale", halve), ("shifted-expert", shift)):
        source = folder / name / "fp8"
        shutil.copytree(SOURCES["random"]["fp8"], source)
        tensors = load_file(source / "model.safetensors")
        damage(tensors)
        save_file(tensors, source / "model.safetensors")
        plan = mix.plan()
        plan["sources"]["fp8"]["path"] = str(source)
        mixed = compose_plan(folder / name / "mixed", plan)
        jobs.append({"name": name, "model": str(mixed), "prompts": prompts(mix.model)})
    return run_engines(folder, jobs, **EAGER)


@pytest.mark.parametrize("damage", ["halved-scale", "shifted-expert"])
def test_a_damaged_source_is_noticed(damaged, damage):
    """Negative control: the engine serves it, and the comparison above fails."""
    mix = BY_NAME["two-groups"]
    result = damaged[damage]
    assert "error" not in result, result["error"]
    difference = (torch.tensor(result["log_probs"]) - expected(mix)).abs().mean().item()
    print(f"{damage}: {difference:.4f} nats a token, against at most {mix.bound}")
    assert difference > mix.bound
