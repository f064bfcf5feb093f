# SPDX-License-Identifier: Apache-2.0
"""A reload ends without asking whether every part of a layer came.

``finalize_layerwise_processing`` (model_executor/model_loader/reload/layerwise.py, vLLM 0.32) takes
a layer that got only some of its weights for one that is padded, and finishes it with what its
memory held. Where a tensor is left out of the weights that a trainer sends, the FP8 scale of
an indexer's wk for one, the model computes NaN.
"""

import inspect

from torch.nn import Module
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import layerwise

from vllm_mixprec.patches import Patch

_STOCK = layerwise.finalize_layerwise_processing


def _finalize_layerwise_processing(model: Module, model_config: ModelConfig) -> None:
    intake = getattr(model, "mixprec_intake", None)
    if intake is not None:
        intake.close()
    _STOCK(model, model_config)


def needed() -> bool:
    """Whether vLLM's function finishes whatever is there."""
    return "raise " not in inspect.getsource(_STOCK)


def apply() -> None:
    """Put ours where ``finalize_layerwise_reload``, which every reload ends with, looks it up."""
    layerwise.finalize_layerwise_processing = _finalize_layerwise_processing


PATCH = Patch(
    name="reload_end",
    issues=(),
    broken="a reload that lacks a layer's scale or weight ends well, and leaves NaN in the layer",
    mended="a reload through a plan ends with an error that names what never came",
    needed=needed,
    apply=apply,
    remove_when="the reload tells a model's load_weights that it is over, or refuses half a layer",
)
