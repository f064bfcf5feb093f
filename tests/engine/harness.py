# SPDX-License-Identifier: Apache-2.0
"""Compose a plan and run a real vLLM engine on it."""

import gc
from pathlib import Path

import torch

from vllm_mixprec.compose import compose
from vllm_mixprec.plan import Plan

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo-moe"
RANDOM = ROOT / "tests" / "fixtures" / "random-moe"


def compose_plan(
    folder: Path, base: str, sources: dict[str, Path], rules: list[dict], **options
) -> Path:
    """Compose into ``folder``/mixed and return that."""
    plan = {
        "version": 1,
        "base": base,
        "sources": {name: {"path": str(path)} for name, path in sources.items()},
        "rules": rules,
        "options": options,
    }
    compose(Plan.from_dict(plan), folder / "mixed")
    return folder / "mixed"


def start(model: Path, **options):
    """Start ``LLM(model)`` small enough for this machine."""
    from vllm import LLM

    defaults = {
        "max_model_len": 512,
        "max_num_seqs": 4,
        "seed": 0,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    return LLM(str(model), **{**defaults, **options})


def stop(llm) -> None:
    """End the engine's processes; ``del`` alone leaves them to the garbage collector."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def engine_log_probs(llm, prompts: list[list[int]]) -> torch.Tensor:
    """Return what :func:`tests.engine.reference.log_probs` returns, from the engine."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parameters = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False
    )
    found = []
    for output in outputs:
        for token, entry in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        ):
            found.append(entry[token].logprob)
    return torch.tensor(found)
