# SPDX-License-Identifier: Apache-2.0
"""Run several composed models through real vLLM engines, one after the other, in one process.

python -m tests.engine.runner JOBS.json OUT.json

JOBS: {"engine": {LLM options}, "jobs": [{"name", "model", "prompts", "options": {more},
"environment": {variables}, "new_tokens": continue instead of score}]}. OUT: for each name what
:func:`log_probs` or :func:`greedy` returns, with the seconds it took and whether vLLM compiled the
model, or {"error": "..."}.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def loaded_modules(worker) -> dict:
    """Runs inside each worker: what it holds, by the base's names."""
    from vllm.config import set_current_vllm_config

    from vllm_mixprec.loading.loader import rank_routes

    config = worker.model_runner.vllm_config.quant_config
    if config is None:  # stock vLLM
        return {}

    with set_current_vllm_config(worker.model_runner.vllm_config):
        routes = rank_routes(worker.model_runner.get_model(), config)
    return {
        "modules": [route.module for route in routes],
        "widened": [route.module for route in routes if route.widened],
        "parameters": [name for name, _ in worker.model_runner.get_model().named_parameters()],
    }


def log_probs(llm, job: dict) -> dict:
    """Score the prompts, all in one batch; a first stage in its own engine only lends a hand.

    Of two data-parallel engines the first scores the first prompt, the second all others, so that
    their batches differ and the first is idle at the end.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parallel = llm.llm_engine.vllm_config.parallel_config
    replicas = parallel.data_parallel_size
    scores = parallel.pipeline_parallel_size == 1 or os.environ.get("RANK", "1") == "1"
    own = slice(None)
    if replicas > 1:
        own = slice(1, None) if parallel.data_parallel_rank else slice(1)
    parameters = SamplingParams(
        prompt_logprobs=0 if scores else None, max_tokens=1, detokenize=False
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"][own]]
    found = [
        entry[token].logprob
        for output in llm.generate(prompts, parameters, use_tqdm=False)
        for token, entry in zip(
            output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=scores
        )
    ]
    workers = llm.collective_rpc(loaded_modules)
    return {"log_probs": found, "workers": workers, "replicas": replicas}


def greedy(llm, job: dict) -> dict:
    """Continue one prompt after the other; counts what a draft proposed and had accepted."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parameters = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False
    )
    tokens = []
    for prompt in job["prompts"]:
        request = [TokensPrompt(prompt_token_ids=prompt)]
        (output,) = llm.generate(request, parameters, use_tqdm=False)
        tokens.append(list(output.outputs[0].token_ids))
    counted = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    drafts = {
        name: counted.get(f"vllm:spec_decode_num_{name}")
        for name in ("draft_tokens", "accepted_tokens")
    }
    return {"tokens": tokens, **drafts}


@contextmanager
def engine(model: str, options: dict, environment: dict | None = None) -> Iterator[Any]:
    """Start an engine in this process, and take back what it leaves there."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models.utils import _model_to_pp_missing_layer_names

    gc.collect()  # the engine before, which its user held until now
    before = os.environ.copy()  # vLLM sets variables that would outlast the engine
    os.environ |= environment or {}
    llm = None
    try:
        llm = LLM(model, **options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        # Keyed by id(model), which the next job's model may get (models/utils.py, 0.32): it would
        # take the last one's layers of other stages for its own.
        _model_to_pp_missing_layer_names.clear()
        cleanup_dist_env_and_memory()
        os.environ.clear()
        os.environ |= before


def run(job: dict, options: dict) -> dict:
    begun = time.monotonic()
    with engine(job["model"], options | job.get("options", {}), job.get("environment")) as llm:
        started = time.monotonic()
        result = greedy(llm, job) if "new_tokens" in job else log_probs(llm, job)
        mode = llm.llm_engine.vllm_config.compilation_config.mode
        return result | {
            "compiled": bool(mode),  # CompilationMode.NONE is 0
            "start_s": started - begun,
            "run_s": time.monotonic() - started,
        }


def run_jobs(run_one: Callable[[dict, dict], dict]) -> None:
    """Run every job of the file that the command line names first, and write the other.

    Args:
        run_one: called with a job and the engine options of all; what it raises is its result.
    """
    work = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for job in work["jobs"]:
        print(f"== {job['name']}", flush=True)
        try:
            results[job["name"]] = run_one(job, work["engine"])
        except Exception as error:
            traceback.print_exc()
            results[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    run_jobs(run)
