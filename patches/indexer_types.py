# SPDX-License-Identifier: Apache-2.0
"""vLLM does not read ``indexer_types``.

GLM-5.2 lists for each layer whether it runs its own indexer ("full") or reuses the selection of the
layer before ("shared"), and ships indexers for the former only. ``DeepseekV2MLAAttention`` of vLLM
0.32 reads ``index_topk_pattern`` and ``index_topk_freq`` and nothing else, and builds an
indexer that no tensor fills where a config gives ``indexer_types`` alone.
"""

import inspect
from typing import TYPE_CHECKING

from vllm_mixprec.patches import Patch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LETTERS = {"full": "F", "shared": "S"}


def needed() -> bool:
    """Whether vLLM's attention layer never looks at ``indexer_types``."""
    from vllm.model_executor.models import deepseek_v2  # too much for a front end's start

    return "indexer_types" not in inspect.getsource(deepseek_v2.DeepseekV2MLAAttention)


def spell_pattern(config: "PretrainedConfig") -> None:
    """Give a config that has ``indexer_types`` the ``index_topk_pattern`` that vLLM reads.

    A pattern or a frequency of its own stays; ``vllm-mixprec check`` finds where they disagree.
    """
    kinds = getattr(config, "indexer_types", None)
    if not kinds or not set(kinds) <= _LETTERS.keys():
        return
    for key in ("index_topk_pattern", "index_topk_freq"):
        if getattr(config, key, None) is not None:
            return
    if "shared" in kinds:
        config.index_topk_pattern = "".join(_LETTERS[kind] for kind in kinds)


PATCH = Patch(
    name="indexer_types",
    issues=("vllm#46600", "mlx-lm#1418"),
    broken="layers that share another's indexer are built with one when config.json says so by "
    "indexer_types only",
    mended="the start-up hook spells it as index_topk_pattern",
    needed=needed,
    apply=None,
    remove_when="DeepseekV2MLAAttention reads indexer_types",
)
