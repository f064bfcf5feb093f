# SPDX-License-Identifier: Apache-2.0
"""Describes a snapshot as JSON types: in all, by layer, and the busiest and idlest experts."""

import math
from typing import Any

from vllm_mixprec.experts.snapshot import ExpertLoad, ExpertSnapshot, format_utc

__all__ = ["describe", "describe_layers", "describe_load", "summarize"]


def describe(snapshot: ExpertSnapshot, top_k: int) -> dict[str, Any]:
    """Describe a snapshot, and its draft under ``draft`` (null without one).

    Rates are means over the window. A ratio of a layer without activations is null.
    """
    return {
        "model": snapshot.model,
        "summary": summarize(snapshot),
        "layers": describe_layers(snapshot),
        "busiest": [describe_load(load) for load in snapshot.busiest(top_k)],
        "idlest": [describe_load(load) for load in snapshot.idlest(top_k)],
        "draft": None if snapshot.draft is None else describe(snapshot.draft, top_k),
    }


def summarize(snapshot: ExpertSnapshot) -> dict[str, Any]:
    """Describe the whole of a window."""
    activations = snapshot.activations
    return {
        "activations": activations,
        "tokens": snapshot.tokens,
        "requests": snapshot.requests,
        "layers": len(snapshot.layers),
        "experts": snapshot.num_experts,
        "experts_per_token": snapshot.experts_per_token,
        "window": {
            "since": format_utc(snapshot.started_s),
            "seconds": round(snapshot.seconds, 3),
        },
        "activations_per_s": _rate(activations, snapshot.seconds),
        "tokens_per_s": _rate(snapshot.tokens, snapshot.seconds),
    }


def describe_layers(snapshot: ExpertSnapshot) -> list[dict[str, Any]]:
    """Describe each layer, in the model's order."""
    numbers = zip(
        snapshot.layers,
        snapshot.layer_totals.tolist(),
        snapshot.active_experts.tolist(),
        snapshot.jain_fairness.tolist(),
        snapshot.imbalance.tolist(),
        snapshot.counts.argmax(axis=1).tolist(),
        strict=True,
    )
    return [
        {
            "layer": layer,
            "total": total,
            "experts": snapshot.num_experts,
            "active_experts": active,
            "rate_per_s": _rate(total, snapshot.seconds),
            "jain_fairness": _finite(fairness),
            "busiest_over_mean": _finite(imbalance),
            "busiest_expert": busiest if total else None,
        }
        for layer, total, active, fairness, imbalance, busiest in numbers
    ]


def describe_load(load: ExpertLoad) -> dict[str, Any]:
    """Describe one expert."""
    time_s = load.last_activation_s
    return {
        "layer": load.layer,
        "expert": load.expert,
        "count": load.count,
        "share": round(load.share, 6),
        "last_activation": None if time_s is None else format_utc(time_s),
    }


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def _finite(number: float) -> float | None:
    return round(number, 6) if math.isfinite(number) else None
