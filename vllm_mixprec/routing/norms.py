# SPDX-License-Identifier: Apache-2.0
"""Whether modules of one source may stand behind the norms of another."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_mixprec.checkpoint.formats import Module
from vllm_mixprec.checkpoint.hub import is_available
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.errors import CheckpointError
from vllm_mixprec.routing.findings import FindingLog, generalise
from vllm_mixprec.routing.route import Route
from vllm_mixprec.routing.sources import same_values
from vllm_mixprec.routing.structure import ModelDims, layer_name
from vllm_mixprec.routing.table import RouteTable

# Last components of a module's name -> the norm of its layer that gives it its input. The longest
# that fits wins; what the base does not have is no norm of its model.
_FED_BY: dict[str, str] = {
    **dict.fromkeys(
        (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.q_a_proj",
            "self_attn.kv_a_proj_with_mqa",
            "indexer.wk",
            "indexer.weights_proj",
        ),
        "input_layernorm",
    ),
    "self_attn.q_b_proj": "self_attn.q_a_layernorm",
    "indexer.wq_b": "self_attn.q_a_layernorm",
    "self_attn.kv_b_proj": "self_attn.kv_a_layernorm",
    **dict.fromkeys(
        ("gate", "shared_expert_gate", "gate_proj", "up_proj", "w1", "w3"),
        "post_attention_layernorm",
    ),
}

_NORMS = tuple(f".{norm}" for norm in sorted(set(_FED_BY.values())))


def feeding_norm(module: str) -> str | None:
    """Return the name of the norm whose output is a module's input; None where none is known."""
    parts = module.split(".")
    norm = _FED_BY.get(".".join(parts[-2:])) or _FED_BY.get(parts[-1])
    layer = None if norm is None else layer_name(module)
    return None if layer is None else f"{layer}.{norm}"


def is_feeding_norm(module: str) -> bool:
    """Whether a module is such a norm."""
    return module.endswith(_NORMS)


def compare_norms(
    table: RouteTable, checkpoints: Mapping[str, Checkpoint], log: FindingLog
) -> None:
    """Report modules whose own source has another norm before them than the plan does.

    AWQ and SmoothQuant divide a norm's weights by a scale a channel and multiply the columns of
    what it feeds by it. Such columns behind the base's norm compute something else.
    """
    dims = ModelDims.from_config(table.base_config)
    seen: set[tuple[str, str]] = set()
    for alike in table.alike:
        route = alike.example
        module, norm = route.module, feeding_norm(route.module)
        served = table.routes.get(norm) if norm is not None else None
        if norm is None or served is None or served.source == route.source:
            continue
        if (norm, route.source) in seen or not dims.is_loaded(module, table.layout.draft):
            continue
        seen.add((norm, route.source))
        own = checkpoints[route.source].find(norm)
        if own is None:
            continue
        try:
            same = _same_norm(own, served)
        except CheckpointError as error:
            log.add("error", "source-unreadable", norm, str(error))
            continue
        if not same:
            log.add(
                "error",
                "norm-mismatch",
                norm,
                f"comes from source {served.source!r} and feeds {generalise(module)} of source "
                f"{route.source!r}, which has another such norm. Scales are folded into it (AWQ, "
                "SmoothQuant), or it is another model: choose a source that was quantised without, "
                "or take the norm and all that it feeds from one source.",
                noun="norms",
            )


def _same_norm(own: Module, served: Route) -> bool:
    return all(
        own.tensors[suffix].shape == spec.shape and same_values(own.tensors[suffix], spec)
        for suffix, spec in served.tensors.items()
        # What is not here is in a shard that compose did not need, and was compared before that.
        if suffix in own.tensors and is_available(own.tensors[suffix].file)
    )
