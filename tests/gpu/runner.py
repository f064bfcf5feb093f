# SPDX-License-Identifier: Apache-2.0
"""Run models through real engines on a GPU, one after the other, in one process.

python -m tests.gpu.runner JOBS.json OUT.json

JOBS: {"engine": {LLM options}, "jobs": [{"name", "model", "prompts", "options": {more},
"environment": {variables}}]}. OUT: for each name the log-probabilities of the prompts, those of 16
more tokens that decode chose, and what the worker says of itself, or {"error": "..."}. A job with
"routed" is continued only: which experts were counted, and which vLLM returned.
"""

from tests.engine.runner import engine, log_probs, run_jobs

NEW_TOKENS = 16


def facts(worker) -> dict:
    """Runs inside the worker: how its layers are run, and what its weights take."""
    import torch
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    runner = worker.model_runner
    model = runner.get_model()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in model.parameters()
        if tensor.is_cuda
    }
    methods = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            one_launch = getattr(module.quant_method, "one_launch", None) is not None
            methods[name] = [type(module.quant_method).__name__, one_launch]
    compilation = runner.vllm_config.compilation_config
    return {
        "device": torch.cuda.get_device_name(),
        "methods": methods,
        "parameter_bytes": sum(storages.values()),
        "loaded_bytes": int(runner.model_memory_usage),
        "compilation_mode": int(compilation.mode),
        "cudagraph_mode": compilation.cudagraph_mode.name,
        "capture_sizes": list(compilation.cudagraph_capture_sizes or ()),
    }


def decoded(llm, prompts: list) -> list[dict]:
    """Continue each prompt, one after the other, and tell the chosen tokens' log-probabilities."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, detokenize=False
    )
    found = []
    for output in llm.generate(prompts, parameters, use_tqdm=False):
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        entries = zip(tokens, completion.logprobs or [], strict=True)
        found.append({"tokens": tokens, "log_probs": [e[token].logprob for token, e in entries]})
    return found


def routed(llm, prompts: list) -> dict:
    """[layers, experts] of one batch of prompts and what follows them, counted and returned."""
    import numpy as np
    from vllm import SamplingParams

    from vllm_mixprec import expert_stats

    before = expert_stats(llm)
    parameters = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    counted = (expert_stats(llm) - before).counts
    returned = np.zeros_like(counted)
    for output in outputs:
        for layer, ids in enumerate(output.outputs[0].routed_experts.swapaxes(0, 1)):
            returned[layer] += np.bincount(ids.ravel(), minlength=counted.shape[1])
    return {"counted": counted.tolist(), "returned": returned.tolist()}


def run(job: dict, options: dict) -> dict:
    from vllm.inputs import TokensPrompt

    with engine(job["model"], options | job.get("options", {}), job.get("environment")) as llm:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
        if job.get("routed"):
            return routed(llm, prompts)
        result = log_probs(llm, job)
        result["decoded"] = decoded(llm, prompts)
        (result["facts"],) = llm.collective_rpc(facts)
        return result


if __name__ == "__main__":
    run_jobs(run)
