# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint modules vLLM runs as one layer, and so must serve in one scheme."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["linear", "experts"]

# Siblings under one parent that vLLM stacks along N into one linear, in stacking order.
FUSED_LAYERS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("wk", "weights_proj"),
    # qwen3_5.py: in_proj_qkvz and in_proj_ba of the linear attention. Qwen3-Next stores them fused.
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    # lfm2_moe.py w13, internlm2.py gate_up_proj. An expert's are told by their parent.
    ("w1", "w3"),
)

# Model types of which vLLM 0.32 stacks siblings that it builds apart in other families. A group may
# hold more than some layer of the family has: only siblings that are there count.
FUSED_BY_MODEL_TYPE: dict[str, tuple[tuple[str, ...], ...]] = {
    "bailing_hybrid": (("q_proj", "k_proj", "v_proj", "b_proj"),),  # bailing_moe_v3.py qkvb_proj
    "olmo_hybrid": (("q_proj", "k_proj", "v_proj", "g_proj"),),  # olmo_hybrid.py in_proj_qkvg
    # vllm/models/minimax_m3 qkv_proj.
    "minimax_m3_text": (("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"),),
}

# Projections of one routed expert in stacking order: w13 is gate and up, w2 is down.
EXPERT_PROJECTIONS: tuple[str, ...] = ("gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")

# Modules, by the last one or two components of their name, that vLLM 0.32 builds with plain
# weights whatever the quantisation config says -> what that is, for a finding.
UNQUANTIZED_LAYERS: dict[str, str] = {
    # model_executor/models/deepseek_v2.py Indexer, models/deepseek_v32/attention.py:
    # wk_weights_proj has quant_config=None.
    "indexer.wk": "the indexer's fused wk and weights_proj",
    "indexer.weights_proj": "the indexer's fused wk and weights_proj",
    # model_executor/models/deepseek_mtp.py, glm4_moe_mtp.py: an nn.Linear.
    "eh_proj": "the MTP layer's eh_proj",
    # model_executor/layers/fused_moe/router/gate_linear.py GateLinear.
    "gate": "a router",
    "router": "a router",
    # model_executor/models/qwen2_moe.py: quant_config=None.
    "shared_expert_gate": "the gate of a shared expert",
    # model_executor/layers/vocab_parallel_embedding.py: quant/config.py gives no method for it.
    "embed_tokens": "the embeddings",
    "lm_head": "the output head",
    "shared_head.head": "the output head",
}

_UNQUANTIZED_LEAVES = frozenset(name.rpartition(".")[2] for name in UNQUANTIZED_LAYERS)
_PROJECTION_ORDER = {name: order for order, name in enumerate(EXPERT_PROJECTIONS)}
_FUSED_BY_PART = {part: parts for parts in FUSED_LAYERS for part in parts}
_FUSED_BY_TYPE = {
    model_type: _FUSED_BY_PART | {part: parts for parts in layers for part in parts}
    for model_type, layers in FUSED_BY_MODEL_TYPE.items()
}


class ExpertName(NamedTuple):
    """A module name taken apart: ``model.layers.3.mlp.experts``, 12, ``gate_proj``."""

    layer: str
    expert: int
    projection: str


class Unit(NamedTuple):
    """Modules that one kernel call serves: a fused layer, one expert, or a single linear.

    ``name`` is a module name, with ``{a,b}`` for a fused layer's parts; ``modules`` come in
    stacking order.
    """

    name: str
    kind: Kind
    modules: tuple[str, ...]


def leaf_name(module: str) -> str:
    """Return the last dotted component of a module name."""
    return module.rpartition(".")[2]


def unquantized_reason(module: str) -> str | None:
    """Say why vLLM can hold a module in plain weights only; None when it can hold it packed."""
    parent, _, leaf = module.rpartition(".")
    if leaf not in _UNQUANTIZED_LEAVES:
        return None
    what = UNQUANTIZED_LAYERS.get(leaf) or UNQUANTIZED_LAYERS.get(f"{leaf_name(parent)}.{leaf}")
    return None if what is None else f"vLLM holds {what} in plain weights only"


@lru_cache(maxsize=1 << 17)  # asked of each of 50,000 modules several times
def parse_expert(module: str) -> ExpertName | None:
    """Take the name of a routed expert's projection apart; None for any other module."""
    parent, _, projection = module.rpartition(".")
    found = parse_expert_parent(parent) if projection in _PROJECTION_ORDER else None
    return None if found is None else ExpertName(*found, projection)


def parse_expert_parent(parent: str) -> tuple[str, int] | None:
    """Return the layer and the number of an expert, of which ``parent`` is the name without its
    projections; None for any other name."""
    layer, _, expert = parent.rpartition(".")
    if not layer.endswith(".experts") or not (expert.isascii() and expert.isdigit()):
        return None
    return layer, int(expert)


def parse_experts(modules: Iterable[str]) -> Iterator[tuple[str, int, str] | None]:
    """Yield what ``parse_expert`` says of each; faster for many, of which none is remembered."""
    last, found = None, None
    for module in modules:
        parent, _, projection = module.rpartition(".")
        if parent != last:  # an expert's projections mostly follow each other
            last, found = parent, parse_expert_parent(parent)
        if found is not None and projection in _PROJECTION_ORDER:
            yield (*found, projection)
        else:
            yield None


def group_units(modules: Iterable[str], model_type: str | None = None) -> tuple[Unit, ...]:
    """Gather modules into the units that vLLM runs as one, in the order of their first module.

    ``model_type`` is the language model's, of config.json.
    """
    fused_by_part = _FUSED_BY_TYPE.get(model_type or "", _FUSED_BY_PART)
    members: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}  # leaf -> module
    last, is_expert = None, False
    expert: dict[str, str] | None = None
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        if parent != last:  # an expert's projections mostly follow each other
            last, is_expert, expert = parent, parse_expert_parent(parent) is not None, None
        if is_expert and leaf in _PROJECTION_ORDER:
            if expert is None:
                expert = members.setdefault((parent, EXPERT_PROJECTIONS), {})
            expert[leaf] = module
            continue
        parts = fused_by_part.get(leaf)
        key = (module, ()) if parts is None else (parent, parts)
        members.setdefault(key, {})[leaf] = module
    return tuple(_make_unit(parent, parts, found) for (parent, parts), found in members.items())


def _make_unit(parent: str, parts: tuple[str, ...], found: dict[str, str]) -> Unit:
    if parts is EXPERT_PROJECTIONS:
        return Unit(parent, "experts", tuple(map(found.__getitem__, _order_projections(*found))))
    if len(found) == 1:
        (module,) = found.values()
        return Unit(module, "linear", (module,))
    leaves = [part for part in parts if part in found]
    prefix = f"{parent}." if parent else ""
    name = f"{prefix}{{{','.join(leaves)}}}"
    return Unit(name, "linear", tuple(found[leaf] for leaf in leaves))


@lru_cache
def _order_projections(*projections: str) -> tuple[str, ...]:
    return tuple(sorted(projections, key=_PROJECTION_ORDER.__getitem__))
