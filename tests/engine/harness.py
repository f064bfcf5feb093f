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


def run_engines(
    folder: Path,
    jobs: list[dict],
    workers: int = 1,
    runner: str = "tests.engine.runner",
    **options,
) -> dict:
    """Run :mod:`tests.engine.runner`, or a module like it, over ``jobs``: results by name.

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
            [sys.executable, "-m", runner, work_file, result_file],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=1800,
        ).returncode
    if code:
        raise AssertionError(f"the engines' process exited {code}:\n{log.read_text()[-6000:]}")
    return json.loads(result_file.read_text())


def run_ranks(folder: Path, jobs: list[dict], **options) -> dict:
    """Run ``jobs`` on two ranks, each an engine in a process that stays for all of them.

    The way of vLLM's ``external_launcher``, for torchrun: it spares the 20 s in which the workers
    of every engine import vLLM again. What the ranks are to each other, each job may say in its own
    options. Of tensor-parallel ranks the log-probabilities are the last one's, of stages too, which
    alone has them; of data-parallel ranks they are both ranks', in the prompts' order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = {
        "distributed_executor_backend": "external_launcher",
        "worker_cls": "tests.engine.stages.StageWorker",
        "distributed_timeout_seconds": 120,  # when one rank fails and the other waits for it
        "enable_prefix_caching": False,  # both ranks must schedule alike
    }
    run = uuid.uuid4().hex
    jobs = [
        job
        | {
            "environment": job.get("environment", {})
            | {"STAGES_MEET_AT": str(folder / f"{run}-{number}")}
        }
        for number, job in enumerate(jobs)
    ]
    work = {"engine": ENGINE | layout | options, "jobs": jobs}
    (folder / "jobs.json").write_text(json.dumps(work))
    ranks = []
    for rank in ("0", "1"):
        environment = ENVIRONMENT | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        with (folder / f"rank{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.engine.runner"]
                    + [folder / "jobs.json", folder / f"rank{rank}.json"],
                    cwd=ROOT,
                    env=os.environ | environment | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [rank.wait(timeout=1800) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        # What a rank that was killed leaves behind.
        for left in Path("/dev/shm").glob(f"{run}-*"):
            left.unlink(missing_ok=True)
    if any(codes):
        logs = "\n".join((folder / f"rank{r}.log").read_text()[-3000:] for r in (0, 1))
        raise AssertionError(f"the ranks' processes exited {codes}:\n{logs}")
    first, last = (json.loads((folder / f"rank{r}.json").read_text()) for r in (0, 1))
    return {job["name"]: _join(first[job["name"]], last[job["name"]]) for job in jobs}


def _join(first: dict, last: dict) -> dict:
    """Put together what two ranks say of one job."""
    for result in (first, last):
        if "error" in result:
            return result
    joined = last | {"workers": first["workers"] + last["workers"]}
    if last["replicas"] > 1:
        joined["log_probs"] = first["log_probs"] + last["log_probs"]
    return joined


def run_stages(folder: Path, jobs: list[dict], **options) -> dict:
    """Run ``jobs`` in two pipeline stages: :func:`run_ranks`."""
    return run_ranks(folder, jobs, pipeline_parallel_size=2, **options)
