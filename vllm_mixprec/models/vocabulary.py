# SPDX-License-Identifier: Apache-2.0
"""Embeddings, final norm and head of models that build all three on every pipeline stage."""

from torch.nn import Module
from vllm.distributed import get_pp_group
from vllm.model_executor.models.utils import PPMissingLayer


def drop_vocabulary_of_other_stages(model: Module) -> None:
    """Free the embeddings, final norm and head on the pipeline stages that never use them.

    vLLM 0.32 builds and loads all three on every stage of these models (models/mixtral.py,
    olmoe.py, qwen2_moe.py, qwen3_moe.py), where its other models put a ``PPMissingLayer``: for
    Qwen3-30B-A3B 1.2 GB a stage. Tied embeddings stay, since the last stage's head is the first's
    embedding.
    """
    if model.config.tie_word_embeddings:
        return
    group = get_pp_group()
    if not group.is_first_rank:
        model.model.embed_tokens = PPMissingLayer()
    if not group.is_last_rank:
        model.model.norm = PPMissingLayer()
        model.lm_head = PPMissingLayer()
