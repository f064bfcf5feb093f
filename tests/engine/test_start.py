# SPDX-License-Identifier: Apache-2.0
"""How a start ends that must not serve, and the start without a composed directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import expected, prompts
from tests.engine.harness import ENVIRONMENT, compose_plan, run_engines
from tests.engine.mixes import MIXES, SOURCES
from vllm_mixprec import Plan

pytestmark = pytest.mark.engine

MIX = next(mix for mix in MIXES if mix.name == "two-groups")


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Start engines on a plan beside its base, and on models that lie about their size."""
    folder = tmp_path_factory.mktemp("starts")
    plan = folder / "plan.yaml"
    plan.write_text(Plan.from_dict(MIX.plan()).to_yaml())
    jobs = [
        {
            "name": "overrides",
            "model": str(SOURCES["random"]["bf16"]),
            "prompts": prompts("random"),
            "options": {
                "quantization": "mixprec",
                "hf_overrides": {"mixprec_plan": str(plan)},
                "enforce_eager": True,
            },
        }
    ]
    for name, layers in (("layer-too-many", 1), ("layer-too-few", 3)):
        copy = folder / name / "bf16"
        shutil.copytree(SOURCES["random"]["bf16"], copy)
        config = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": layers}
        (copy / "config.json").write_text(json.dumps(config))
        lying = {"version": 1, "base": "bf16", "sources": {"bf16": {"path": str(copy)}}}
        plan = folder / f"{name}.yaml"
        plan.write_text(json.dumps(lying | {"rules": []}))
        options = {"quantization": "mixprec", "hf_overrides": {"mixprec_plan": str(plan)}}
        job = {"name": name, "model": str(copy), "prompts": [[1, 2]]}
        jobs.append(job | {"options": options | {"enforce_eager": True}})
    return run_engines(folder, jobs)


def test_overrides_serve_a_plan_without_composing(starts):
    result = starts["overrides"]
    assert "error" not in result, result["error"]
    difference = (torch.tensor(result["log_probs"]) - expected(MIX)).abs().mean()
    assert difference <= MIX.bound


def test_a_routed_tensor_that_the_model_has_no_place_for_stops_the_start(starts):
    assert "layers.1" in starts["layer-too-many"]["error"]


def test_a_parameter_that_no_tensor_fills_stops_the_start(starts):
    error = starts["layer-too-few"]["error"]
    assert "model.layers.2" in error


def serve(model: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the ``vllm serve`` command of this environment until it ends by itself."""
    command = [Path(sys.executable).parent / "vllm", "serve", model, "--port", "0", *arguments]
    return subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def test_vllm_serve_ends_with_every_finding_and_no_traceback(tmp_path):
    folder = tmp_path / "fp8"
    shutil.copytree(SOURCES["random"]["fp8"], folder)
    plan = MIX.plan()
    plan["sources"]["fp8"]["path"] = str(folder)
    mixed = compose_plan(tmp_path / "mixed", plan)
    shard = folder / "model.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    done = serve(mixed)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("vllm-mixprec: ") :]
    assert "model.safetensors" in message
    assert "truncated" in message or "cut short" in message


def test_vllm_serve_refuses_a_plan_of_another_model(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(Plan.from_dict(MIX.plan()).to_yaml())
    overrides = json.dumps({"mixprec_plan": str(plan)})
    demo = SOURCES["demo"]["bf16"]
    done = serve(demo, "--quantization", "mixprec", "--hf-overrides", overrides)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the plan's base is another model" in done.stderr
    assert "hidden_size is 128, expected 256" in done.stderr
