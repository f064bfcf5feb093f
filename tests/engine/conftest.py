# SPDX-License-Identifier: Apache-2.0
"""Prompts and references, computed once a session."""

from functools import cache

import torch

from tests.engine import reference
from tests.engine.mixes import DEMO, SOURCES, Mix


@cache
def prompts(model: str) -> list[list[int]]:
    """Four prompts: held-out text for the trained model, noise for the random ones.

    120 tokens each, but 60 for the architectures of 64 tokens and, some of them, 64 of context.
    """
    if model == "demo":
        text = list((DEMO / "heldout.txt").read_bytes()[4000:])
        return [text[start : start + 120] for start in range(0, 4 * 2000, 2000)]
    vocabulary, length = (256, 120) if model == "random" else (64, 60)
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for _ in range(4)]


@cache
def dequantised(model: str) -> dict[str, reference.Weights]:
    return {name: reference.dequantised(path) for name, path in SOURCES[model].items()}


@cache
def reference_weights(mix: Mix) -> reference.Weights:
    return reference.mix(dequantised(mix.model), "bf16", mix.choose)


@cache
def expected(mix: Mix) -> torch.Tensor:
    """Return (tokens,) log-probabilities of transformers in float32 for a mix."""
    config = SOURCES[mix.model]["bf16"]
    return reference.log_probs(config, reference_weights(mix), prompts(mix.model))
