# SPDX-License-Identifier: Apache-2.0
"""A reload on a CPU leaves a tied output head as it was.

The head of a model with tied embeddings shares their weight, and on a CPU computes by a packed copy
of it. A reload (model_executor/model_loader/reload/layerwise.py, vLLM 0.32) brings the embeddings
and nothing for the head, which keeps its copy: "ParallelLMHead: Failed to load weights", and logits
of the weights before.
"""

import inspect

from torch.nn import Module
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.platforms import current_platform

from vllm_mixprec.patches import Patch

_STOCK = layerwise._place_kernel_tensors


def _place_kernel_tensors(layer: Module, info: LayerReloadingInfo) -> None:
    _STOCK(layer, info)
    # At the reload's end, where the embeddings, which come before the head, are in place. Other
    # methods could not process a second time what they have processed.
    is_plain = isinstance(getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod)
    if isinstance(layer, ParallelLMHead) and is_plain and info.load_numel <= 0:
        layer.quant_method.process_weights_after_loading(layer)


def needed() -> bool:
    """Whether vLLM computes on a CPU, and a layer that nothing came for stays as it was."""
    return current_platform.is_cpu() and "quant_method" not in inspect.getsource(_STOCK)


def apply() -> None:
    """Have a head that nothing came for packed anew."""
    layerwise._place_kernel_tensors = _place_kernel_tensors


PATCH = Patch(
    name="tied_head",
    issues=(),
    broken="after a reload on a CPU a tied output head computes with the weights before",
    mended="a reload packs the tied head anew",
    needed=needed,
    apply=apply,
    remove_when="a reload processes layers that share their weight with one that was loaded",
)
