# SPDX-License-Identifier: Apache-2.0
"""What the weights take on a GPU against what ``check`` says they take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.mixes import MIXES, ROOT
from tests.gpu.serving import KERNEL_VARIABLE, OPTIONS, compose_mix, run_module

pytestmark = pytest.mark.engine

SERVED = [
    ("bf16", "groups"),
    ("fp8", "groups"),
    ("experts-three-ways", "groups"),
    ("experts-three-ways", "one-launch"),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Load each model; (mix, kernel) -> (composed directory's plan, facts)."""
    folder = tmp_path_factory.mktemp("memory")
    mixes = {mix.name: mix for mix in MIXES}
    jobs = []
    for mix, kernel in SERVED:
        path = compose_mix(folder / f"{mix}-{kernel}", mixes[mix])
        jobs.append(
            {"name": f"{mix} {kernel}", "model": str(path), "prompts": [[1, 2, 3]]}
            | {"environment": {KERNEL_VARIABLE: kernel}}
        )
    work = {"engine": OPTIONS | {"enforce_eager": True}, "jobs": jobs}
    results = run_module("tests.gpu.runner", folder / "run", work)
    return {job["name"]: (job["model"], results[job["name"]]) for job in jobs}


@pytest.mark.parametrize("name", [f"{mix} {kernel}" for mix, kernel in SERVED])
def test_weights_take_what_check_says(loaded, name):
    """Of the parameters: buffers and vLLM's workspaces are megabytes, as much as these models."""
    path, result = loaded[name]
    assert "error" not in result, result["error"]
    plan = Path(path) / "mixprec_plan.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "vllm_mixprec", "check", plan, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)["bytes_per_rank"]
    found = result["facts"]["parameter_bytes"]
    assert abs(found - said) <= 0.02 * said, f"{found} bytes of parameters, check says {said}"
