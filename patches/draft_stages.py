# SPDX-License-Identifier: Apache-2.0
"""A draft model under pipeline parallelism: only the last stage has one, every stage asks for it.

``GPUModelRunner`` (v1/worker/gpu_model_runner.py, vLLM 0.32), from which the CPU's runner is
derived, makes ``self.drafter`` on the last stage only, and reads it wherever speculative decoding
is on: AttributeError in ``initialize_metadata_builders`` and others on every other stage.
"""

import inspect
from typing import Any

from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_mixprec.patches import Patch


class _NoDraft(EagleProposer):  # type: ignore[misc]
    """What a stage without a draft model has in its place: nothing to load, build or run."""

    draft_attn_groups: tuple[Any, ...] = ()
    kv_cache_gid = -1  # no group of key-value caches is a draft's

    def __init__(self) -> None:
        """Leave everything out that needs a model."""

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    load_model = initialize_attn_backend = initialize_cudagraph_keys = _nothing
    dummy_run = validate_same_kv_cache_group = _nothing


def needed() -> bool:
    """Whether the runner reads the draft model without asking whether its stage has one."""
    source = inspect.getsource(GPUModelRunner.initialize_metadata_builders)
    return "self.drafter" in source and "is_last_rank" not in source and "hasattr" not in source


def apply() -> None:
    """Give runners a draft that does nothing; one of their own hides it."""
    GPUModelRunner.drafter = _NoDraft()


PATCH = Patch(
    name="draft_stages",
    issues=(),
    broken="a draft model with --pipeline-parallel-size over 1: AttributeError 'drafter' on every "
    "stage but the last (V1 model runner)",
    mended="stages without a draft get one that does nothing",
    needed=needed,
    apply=apply,
    remove_when="the V1 runner asks for the last stage wherever it reads the draft, or is gone",
)
