# SPDX-License-Identifier: Apache-2.0
"""Traffic of many kinds through real engines, one after the other, and what was counted of it.

python -m tests.experts.counting JOBS.json OUT.json

JOBS: {"engine": {LLM options}, "jobs": [{"name", "model", "options": {more}, "scenarios": [names of
functions below], "environment": {variables}}]}. OUT: for each name and scenario what the counters
say of it, next to two things that the counters know nothing of: the tokens that the scheduler
handed to the workers, and the sequences that went through the model. An engine that failed has
{"error": "..."}.
"""

import numpy as np
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from tests.engine.runner import engine, run_jobs
from vllm_mixprec import ExpertSnapshot, expert_stats

VOCABULARY = 64  # the least that a model of the tests has


def watch_scheduler(worker) -> None:
    """Runs inside each worker: add up what the scheduler asks for."""
    worker.scheduled = 0
    execute = worker.execute_model

    def execute_model(scheduler_output):
        worker.scheduled += scheduler_output.total_num_scheduled_tokens
        return execute(scheduler_output)

    worker.execute_model = execute_model


def scheduled_tokens(worker) -> int:
    return worker.scheduled


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, size=length).tolist() for length in lengths]


def generate(llm: LLM, token_ids: list[list[int]], **parameters) -> list[list[int]]:
    """Return every sequence that went through the model whole: all but the last token sampled."""
    parameters = {"temperature": 0, "max_tokens": 8} | parameters
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in token_ids],
        SamplingParams(ignore_eos=True, detokenize=False, **parameters),
        use_tqdm=False,
    )
    return [
        [*output.prompt_token_ids, *completion.token_ids[:-1]]
        for output in outputs
        for completion in output.outputs
    ]


def plain(llm: LLM) -> list[list[int]]:
    """Prompts of several lengths at once; the longest takes several steps where steps are short."""
    return generate(llm, prompts(5, 17, 50, 40))


def nothing(llm: LLM) -> list[list[int]]:
    return []


def cached_prefix(llm: LLM) -> list[list[int]]:
    """The same prompt again: its whole blocks, of 128, come from the cache and pass no router."""
    ids = prompts(300, seed=7)
    generate(llm, ids)
    before = expert_stats(llm).tokens
    generate(llm, ids)
    assert expert_stats(llm).tokens - before == 300 + 7 - 256, "no block came from the cache"
    return []


def preempted(llm: LLM) -> list[list[int]]:
    """More sequences than the KV cache holds: some are thrown out and computed anew."""
    generate(llm, prompts(100, 101, 102, 103, seed=3), max_tokens=60)
    return []


def sampled_in_parallel(llm: LLM) -> list[list[int]]:
    generate(llm, prompts(30, 20, seed=5), n=3, temperature=1.0, seed=1)
    return []


def aborted(llm: LLM) -> list[list[int]]:
    """Requests that are taken back half way; what they computed was routed all the same."""
    engine = llm.llm_engine
    parameters = SamplingParams(max_tokens=50, ignore_eos=True, detokenize=False)
    for number, ids in enumerate(prompts(20, 30, 25, seed=9)):
        engine.add_request(f"abort-{number}", TokensPrompt(prompt_token_ids=ids), parameters)
    for _ in range(6):
        engine.step()
    engine.abort_request(["abort-0", "abort-2"])
    while engine.has_unfinished_requests():
        engine.step()
    return []


def as_dict(snapshot: ExpertSnapshot) -> dict:
    return {
        "layers": list(snapshot.layers),
        "top_k": snapshot.experts_per_token,
        "counts": snapshot.counts.tolist(),
        "tokens": snapshot.tokens,
        "requests": snapshot.requests,
        "draft": as_dict(snapshot.draft) if snapshot.draft else None,
    }


def run(job: dict, options: dict) -> dict:
    options = options | job["options"]
    with engine(job["model"], options, job.get("environment")) as llm:
        mode = llm.llm_engine.vllm_config.compilation_config.mode
        assert bool(mode) != options.get("enforce_eager", False), f"compilation mode {mode}"
        at_start = expert_stats(llm)
        assert at_start.tokens == 0 and not at_start.counts.any(), "warm-up was counted"
        llm.collective_rpc(watch_scheduler)
        results = {}
        for name in job["scenarios"]:
            before, scheduled = expert_stats(llm), llm.collective_rpc(scheduled_tokens)
            sequences = globals()[name](llm)
            after = llm.collective_rpc(scheduled_tokens)
            results[name] = as_dict(expert_stats(llm) - before) | {
                "sequences": sequences,
                "scheduled": [now - then for now, then in zip(after, scheduled, strict=True)],
            }
        if not options["disable_log_stats"]:
            metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
            results["preemptions"] = metrics["vllm:num_preemptions"]
        return results


if __name__ == "__main__":
    run_jobs(run)
