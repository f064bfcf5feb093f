# SPDX-License-Identifier: Apache-2.0
"""Some models build embeddings, norm and head on every pipeline stage."""

import inspect

from vllm.model_executor.models import mixtral, olmoe, qwen2_moe, qwen3_moe

from vllm_mixprec.patches import Patch


def needed() -> bool:
    """Whether one of them still never puts a ``PPMissingLayer`` in an embedding's place."""
    return any(
        "PPMissingLayer()" not in inspect.getsource(module)
        for module in (mixtral, olmoe, qwen2_moe, qwen3_moe)
    )


PATCH = Patch(
    name="vocabulary",
    issues=(),
    broken="Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE load embeddings, norm and head on every stage",
    mended="models/vocabulary.py puts a PPMissingLayer there before loading",
    needed=needed,
    apply=None,
    remove_when="the models ask get_pp_group() as vLLM's others do",
)
