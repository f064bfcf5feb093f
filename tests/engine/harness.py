# SPDX-License-Identifier: Apache-2.0
"""Compose plans and run real vLLM engines on them, in one child process a layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.engine.mixes import ROOT
from vllm_mixprec import Plan, compose

ENGINE = {
    "max_model_len": 512,
    "max_num_seqs": 4,
    "seed": 0,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the tests ask workers by passing a function
}


def compose_plan(folder: Path, plan: dict) -> Path:
    """Compose ``plan`` into ``folder`` and return the directory to serve."""
    compose(Plan.from_dict(plan), folder)
    return folder


def run_engines(folder: Path, jobs: list[dict], workers: int = 1, **options) -> dict:
    """Run :mod:`tests.engine.runner` over ``jobs``; returns its results by name.

    ``workers`` processes get one core each, as vLLM's CPU backend wants it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    single = {"distributed_executor_backend": "uni"} if workers == 1 else {}
    environment = ENVIRONMENT | ({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if workers == 2 else {})
    work = {"engine": ENGINE | single | options, "jobs": jobs}
    work_file, result_file = folder / "jobs.json", folder / "out.json"
    work_file.write_text(json.dumps(work))
    log = folder / "engines.log"
    with log.open("w") as output:
        code = subprocess.run(
            [sys.executable, "-m", "tests.engine.runner", work_file, result_file],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=1800,
        ).returncode
    if code:
        raise AssertionError(f"the engines' process exited {code}:\n{log.read_text()[-6000:]}")
    return json.loads(result_file.read_text())
