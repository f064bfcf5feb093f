# SPDX-License-Identifier: Apache-2.0
"""Whether a source's config.json computes as the base's does, by which the model is served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.plan.plan import Plan
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.structure import text_config

# Keys of config.json that change what the same weights compute. Sizes are in sources.MODEL_SIZES.
_KEYS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "clip_qkv",
    "use_qk_norm",
    "use_sliding_window",
    "rope_interleave",
    "indexer_rope_interleave",
    "norm_topk_prob",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
)
_SAME_ACTIVATION = {"swish": "silu"}  # transformers, activations.py, ACT2FN
# transformers' modeling_rope_utils.py, the older name; vLLM's transformers_utils/config.py, which
# spells the others so in the config that it serves.
_SAME_ROPE = {"su": "longrope", "mrope": "default", "telchat3-yarn": "yarn"}


def compare_arithmetic(plan: Plan, checkpoints: Mapping[str, Checkpoint], log: FindingLog) -> None:
    """Warn of sources whose config.json has the same weights compute something else.

    What is absent or null in either config is not compared.
    """
    for name, checkpoint in checkpoints.items():
        differences = arithmetic_differences(checkpoints[plan.base].config, checkpoint.config)
        if differences:
            log.add(
                "warning",
                "config-differs",
                str(checkpoint.path / "config.json"),
                f"source {name!r} computes otherwise than base {plan.base!r}, by whose config the "
                f"model is served: {'; '.join(differences)}. Make sure that it was made from the "
                "base, not from a fine-tune of it.",
                noun="sources",
            )


def arithmetic_differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Compare two config.json by what the same weights compute; keys of both that are no null.

    Returns lines such as ``rope_theta is 10000.0, not 1000000.0``; none where they agree.
    """
    expected, found = _arithmetic(base), _arithmetic(other)
    return [
        f"{key} is {found[key]!r}, not {expected[key]!r}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]


def _arithmetic(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says of the arithmetic, in one spelling and without nulls."""
    text = text_config(config)
    said = {key: text.get(key) for key in _KEYS}
    activation = text.get("hidden_act")
    said["hidden_act"] = _SAME_ACTIVATION.get(str(activation), activation)
    said["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if text.get("use_sliding_window") is not False:
        said["sliding_window"] = text.get("sliding_window")
    said |= _rope(text)
    return {key: value for key, value in said.items() if value is not None}


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding's parameters: transformers 5 has them in one object.

    Before, ``rope_theta`` and ``partial_rotary_factor`` stood beside ``rope_scaling``.
    """
    older = {key: text.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    for key in ("rope_scaling", "rope_parameters"):
        given = text.get(key)
        if isinstance(given, Mapping):
            for name, value in given.items():  # values, or such objects by a layer's type
                inner = value if isinstance(value, Mapping) else {"": value}
                prefix = f"{name}." if isinstance(value, Mapping) else name
                older |= {f"{prefix}{key}": each for key, each in inner.items() if each is not None}
    kind = older.pop("type", None)
    kind = older.pop("rope_type", None) or kind
    return {**older, "rope_type": _SAME_ROPE.get(str(kind), kind)}
