# SPDX-License-Identifier: Apache-2.0
"""Engines for the tests of tests/gpu: options of a GPU, one child process for a list of jobs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.engine.mixes import ROOT, Mix

KERNEL_VARIABLE = "VLLM_MIXPREC_EXPERT_KERNEL"
"""As vllm_mixprec.quant.one_launch has it, whose import needs vLLM; collecting does not."""

CAPTURED = [1, 2, 4, 8, 64, 512]
"""Batch sizes with a CUDA graph; four prompts of 120 tokens are one batch of 480, so padded."""

OPTIONS = {
    "max_model_len": 512,
    "max_num_seqs": 4,
    "seed": 0,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "distributed_executor_backend": "uni",
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.5,
    "enable_prefix_caching": False,
    "compilation_config": {"cudagraph_capture_sizes": CAPTURED},
}


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # workers are asked by passing a function
}


def compose_mix(folder: Path, mix: Mix, **instead: Path) -> Path:
    """Compose a mix into ``folder``, with other paths of some sources; returns what to serve."""
    from vllm_mixprec import Plan, compose  # needs what a bare GPU machine may lack

    plan = mix.plan()
    plan["sources"] |= {name: {"path": str(path)} for name, path in instead.items()}
    compose(Plan.from_dict(plan), folder)
    return folder


def run_module(module: str, folder: Path, work: dict, timeout_s: int = 1800) -> dict:
    """Run ``python -m module JOB OUT`` in a process of its own; returns what it wrote.

    Raises:
        AssertionError: it failed; with the end of what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(work))
    log = folder / "engine.log"
    with log.open("w") as output:
        code = subprocess.run(
            [sys.executable, "-m", module, folder / "job.json", folder / "out.json"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        ).returncode
    if code:
        raise AssertionError(f"{module} exited {code}:\n{log.read_text()[-6000:]}")
    found: dict = json.loads((folder / "out.json").read_text())
    return found
