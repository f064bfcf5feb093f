# SPDX-License-Identifier: Apache-2.0
"""Compose plans and run real vLLM engines on them, in one child process a layout."""

import json
import os
import subprocess
import sys
import uuid
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
EAGER = {"enforce_eager": True}  # an engine starts in 2 to 3 s instead of 12


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


def run_stages(folder: Path, jobs: list[dict], **options) -> dict:
    """Run ``jobs`` in two pipeline stages, each an engine in a process that stays for all of them.

    The way of vLLM's ``external_launcher``, for torchrun: it spares the 20 s in which the workers
    of every engine import vLLM again. Log-probabilities are the last stage's, which alone has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = {
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "external_launcher",
        "worker_cls": "tests.engine.stages.StageWorker",
        "distributed_timeout_seconds": 120,  # when one stage fails and the other waits for it
        "enable_prefix_caching": False,  # both stages must schedule alike
    }
    run = uuid.uuid4().hex
    jobs = [
        job | {"environment": {"STAGES_MEET_AT": str(folder / f"{run}-{number}")}}
        for number, job in enumerate(jobs)
    ]
    work = {"engine": ENGINE | layout | options, "jobs": jobs}
    (folder / "jobs.json").write_text(json.dumps(work))
    stages = []
    for rank in ("0", "1"):
        environment = ENVIRONMENT | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        with (folder / f"stage{rank}.log").open("w") as log:
            stages.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.engine.runner"]
                    + [folder / "jobs.json", folder / f"stage{rank}.json"],
                    cwd=ROOT,
                    env=os.environ | environment | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [stage.wait(timeout=1800) for stage in stages]
    finally:
        for stage in stages:
            stage.kill()
        # What a stage that was killed leaves behind.
        for left in Path("/dev/shm").glob(f"{run}-*"):
            left.unlink(missing_ok=True)
    if any(codes):
        logs = "\n".join((folder / f"stage{r}.log").read_text()[-3000:] for r in (0, 1))
        raise AssertionError(f"the stages' processes exited {codes}:\n{logs}")
    first, last = (json.loads((folder / f"stage{r}.json").read_text()) for r in (0, 1))
    return {
        name: first[name]
        if "error" in first[name]
        else result | {"workers": first[name]["workers"] + result.get("workers", [])}
        for name, result in last.items()
    }
