# SPDX-License-Identifier: Apache-2.0
"""``generate`` and ``batch_generate``: text in, text out, through vLLM's engine client."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind

from vllm_mixprec.serving.errors import ApiError
from vllm_mixprec.serving.requests import Sampling

LIMIT_S = 600.0
"""How long one request may generate; what is longer is for ``/v1/completions`` and its stream."""


async def generate(
    client: EngineClient, prompts: Sequence[str], sampling: Sampling
) -> list[dict[str, Any]]:
    """Continue every prompt, all of them at once; what is left ends when one fails.

    Raises:
        VLLMClientError: vLLM refuses a parameter, or a prompt with its tokens is too long.
        TimeoutError: it takes more than :data:`LIMIT_S`.
        EngineDeadError: the engine died.
    """
    parameters = SamplingParams(
        temperature=sampling.temperature if sampling.do_sample else 0.0,
        top_p=sampling.top_p,
        top_k=max(sampling.top_k, 0),
        max_tokens=sampling.max_new_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    tokenization = replace(
        client.renderer.default_cmpl_tok_params,
        max_output_tokens=sampling.max_new_tokens,
        max_total_tokens_param="max_model_len",
        max_output_tokens_param="max_new_tokens",
    )
    parsed = [parse_model_prompt(client.model_config, prompt) for prompt in prompts]
    inputs = await client.renderer.render_cmpl_async(parsed, tokenization)
    runs = [asyncio.ensure_future(_run(client, one, parameters)) for one in inputs]
    try:
        await asyncio.wait(runs, timeout=LIMIT_S, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((run for run in runs if run.done() and run.exception()), None)
        if failed is not None:
            await failed
        if not all(run.done() for run in runs):
            raise TimeoutError(f"not all was generated within {LIMIT_S:g} s. Ask for fewer tokens")
        return [_describe(run.result()) for run in runs]
    finally:
        for run in runs:
            run.cancel()  # makes vLLM abort it; nothing to one that is done
        await asyncio.gather(*runs, return_exceptions=True)


async def _run(client: EngineClient, prompt: Any, parameters: SamplingParams) -> RequestOutput:
    last = None
    async for output in client.generate(prompt, parameters, f"mixprec-{uuid.uuid4().hex}"):
        last = output
    if last is None:
        raise ApiError(500, "internal", "the engine ended the request without an answer")
    return last


def _describe(output: RequestOutput) -> dict[str, Any]:
    (completion,) = output.outputs
    prompt_tokens = len(output.prompt_token_ids or ())
    completion_tokens = len(completion.token_ids)
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
