# SPDX-License-Identifier: Apache-2.0
"""Which part of the model a module is, told from its name."""

from collections.abc import Iterable
from typing import Literal, get_args

from vllm_mixprec.routing.fused import leaf_name

Kind = Literal[
    "attention",
    "dense_mlp",
    "shared_experts",
    "routed_experts",
    "router",
    "embeddings",
    "other",
]

KINDS: tuple[Kind, ...] = get_args(Kind)

KIND_LABELS: dict[Kind, str] = {
    "attention": "attention",
    "dense_mlp": "dense MLP",
    "shared_experts": "shared experts",
    "routed_experts": "routed experts",
    "router": "router",
    "embeddings": "embeddings",
    "other": "other",
}

MLPS = frozenset({"mlp", "feed_forward", "ffn"})
SHARED_EXPERTS = frozenset({"shared_expert", "shared_experts"})

# Dotted components that give a kind away, the first row that matches wins: attention may have a
# gate of its own, and experts lie below the MLP.
_COMPONENTS: tuple[tuple[frozenset[str], Kind], ...] = (
    (frozenset({"visual", "vision_tower", "vision_model", "audio_tower"}), "other"),
    (frozenset({"self_attn", "self_attention", "linear_attn", "attn", "attention"}), "attention"),
    (SHARED_EXPERTS, "shared_experts"),
    (frozenset({"experts"}), "routed_experts"),
)
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "word_embeddings", "wte"})


def kind_of(module: str) -> Kind:
    """Return the kind of a module, by the name that Hugging Face checkpoints give it.

    Norms are ``other``, but those inside attention are attention.
    """
    parts = frozenset(module.split("."))
    for components, kind in _COMPONENTS:
        if not parts.isdisjoint(components):
            return kind
    leaf = leaf_name(module)
    if leaf in _ROUTERS:
        return "router"
    if leaf in _EMBEDDINGS:
        return "embeddings"
    return "other" if parts.isdisjoint(MLPS) else "dense_mlp"


def layer_of(module: str) -> int | None:
    """Return the number of the layer that holds a module; None for one outside of the layers."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def spell_ranges(numbers: Iterable[int]) -> str:
    """Spell numbers as a plan does: ``0-7,12``."""
    runs = find_runs(sorted(set(numbers)))
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def find_runs(numbers: Iterable[int]) -> list[list[int]]:
    """Return sorted numbers as [first, last] of each run."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs
