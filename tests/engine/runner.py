# SPDX-License-Identifier: Apache-2.0
"""Run several composed models through real vLLM engines, one after the other, in one process.

python -m tests.engine.runner JOBS.json OUT.json

JOBS: {"engine": {LLM options}, "jobs": [{"name", "model", "prompts", "options": {more}}]}. OUT:
for each name {"log_probs": [...], "workers": [loaded_modules() of each]} or {"error": "..."}.
"""

import gc
import json
import sys
import traceback
from pathlib import Path


def loaded_modules(worker) -> dict:
    """Runs inside each worker: what it holds, by the base's names."""
    from vllm_mixprec.loading.loader import rank_routes

    config = worker.model_runner.vllm_config.quant_config
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.model_runner.vllm_config):
        routes = rank_routes(worker.model_runner.get_model(), config)
    return {
        "modules": [route.module for route in routes],
        "widened": [route.module for route in routes if route.widened],
        "parameters": [name for name, _ in worker.model_runner.get_model().named_parameters()],
    }


def run(job: dict, options: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    llm = LLM(job["model"], **options | job.get("options", {}))
    parameters = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    found = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        )
    ]
    workers = llm.collective_rpc(loaded_modules)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"log_probs": found, "workers": workers}


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for job in work["jobs"]:
        try:
            results[job["name"]] = run(job, work["engine"])
        except Exception as error:
            traceback.print_exc()
            results[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
