# SPDX-License-Identifier: Apache-2.0
"""Fused tensors taken apart: each expert and each projection is a module, by its byte range.

Two kinds of fusing are known. All experts of a layer in one tensor of three dimensions, gate and up
maybe in one, ``(experts, N, K)`` or, as in Llama 4 and Qwen3-VL-MoE, ``(experts, K, N)``. And
linears that are stacked along N, ``qkv_proj`` and ``gate_up_proj``. No data is read or copied here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from vllm_mixprec.checkpoint.cutting import Stored, cut_rows, make_part
from vllm_mixprec.checkpoint.formats import Module, QuantizationConfig, recognise
from vllm_mixprec.checkpoint.formats.base import WEIGHTS, Looks
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import CheckpointError

Groups = Mapping[str, dict[str, TensorSpec]]
"""Module -> suffix -> spec, as the files name them."""

# A fused linear -> its parts along N.
_LINEARS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_LINEAR_LEAVES = tuple(_LINEARS)

# A tensor of all experts -> the projections that lie in it along N.
_STACKS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    **{leaf: (leaf,) for leaf in ("gate_proj", "up_proj", "down_proj", "w1", "w3", "w2")},
}
_DOWN = frozenset({"down_proj", "w2"})

# What follows such a name where it is a bare parameter of ``experts`` -> the suffix that it is
# (transformers, integrations/finegrained_fp8.py, FP8Experts).
_BARE_SUFFIXES = {
    "": "weight",
    "_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    "_weight_scale_inv": "weight_scale_inv",
    "_weight_scale": "weight_scale",
    "_bias": "bias",
    "_activation_scale": "input_scale",
    "_input_scale": "input_scale",
}

# Model types that lay gate and up out in turns, row by row, so that neither is a range.
_INTERLEAVED_TYPES = frozenset({"gpt_oss"})

_TOWER = re.compile(r"(?:^|\.)(?:visual|vision|audio)")
_kind_of = attrgetter("dtype", "shape")


@dataclass(slots=True)
class _Stack:
    """The tensors of all experts of one layer: projection(s) -> suffix -> spec."""

    name: str
    members: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)


def read_modules(
    groups: Groups, quantization: QuantizationConfig, config: Mapping[str, Any]
) -> Iterator[Module]:
    """Recognise the modules of a checkpoint, fused ones as the parts that they are made of.

    What cannot be told apart stays one module: an ``experts`` whose layout is not known, a
    ``qkv_proj`` of other sizes than config.json's heads.

    Raises:
        UnsupportedError, CheckpointError: as ``recognise`` does; or experts are stored twice.
    """
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, Mapping) else config
    by_group: dict[str, _Stack] = {}
    for stack in _gather_stacks(groups, text):
        by_group |= dict.fromkeys(stack.groups, stack)
    seen: set[str] = set()
    sound: dict[Looks, Module] = {}
    for name, tensors in groups.items():
        found = by_group.get(name) if by_group else None
        if found is None:
            looks: Looks = (*tensors, *map(_kind_of, tensors.values()))
            twin = sound.get(looks)
            if twin is not None and twin.looks is not None:
                module = Module(name, tensors, twin.scheme, twin.shape, ())
                module.set_looks(twin.looks)
            else:
                module = recognise(name, tensors, quantization)
                if quantization.is_uniform and not module.problems:
                    module.set_looks(looks)
                    sound[looks] = module
            if name.endswith(_LINEAR_LEAVES) and (parts := _split_linear(module, text)):
                yield from parts
            else:
                yield module
        elif found.name not in seen:
            seen.add(found.name)
            yield from _split_stack(found, quantization, text)


# All experts in one tensor.


def _gather_stacks(groups: Groups, text: Mapping[str, Any]) -> list[_Stack]:
    """Find the layers whose experts can be told apart."""
    if text.get("model_type") in _INTERLEAVED_TYPES:
        return []
    stacks: dict[str, _Stack] = {}
    for name, tensors in groups.items():
        parent, _, leaf = name.rpartition(".")
        if leaf == "experts":
            members = _bare_members(tensors)
        elif leaf in _STACKS and parent.endswith(".experts") and _num_experts(tensors):
            parent, members = parent.removesuffix(".experts"), {leaf: tensors}
        else:
            continue
        if not members:
            continue
        stack = stacks.setdefault(f"{parent}.experts", _Stack(f"{parent}.experts"))
        twice = stack.members.keys() & members.keys()
        if twice:
            raise CheckpointError(
                f"{stack.name}.{min(twice)}: stored both as a parameter of {stack.name} and as a "
                "module below it, expected one of the two. Remove one."
            )
        stack.groups.append(name)
        stack.members |= members
    return [stack for stack in stacks.values() if _can_be_split(stack, text)]


def _can_be_split(stack: _Stack, text: Mapping[str, Any]) -> bool:
    experts = {_num_experts(tensors) for tensors in stack.members.values()}
    return len(experts) == 1 and 0 not in experts and _is_transposed(stack, text) is not None


def _bare_members(tensors: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """Sort the bare parameters of ``experts`` by projection; none where one is not known."""
    members: dict[str, dict[str, TensorSpec]] = {}
    for parameter, spec in tensors.items():
        for leaf in _STACKS:
            suffix = _BARE_SUFFIXES.get(parameter.removeprefix(leaf))
            if parameter.startswith(leaf) and suffix is not None:
                members.setdefault(leaf, {})[suffix] = spec
                break
        else:
            return {}
    return members


def _num_experts(tensors: Mapping[str, TensorSpec]) -> int:
    """Return how many experts a weight of three dimensions holds, 0 when there is none."""
    weight = _weight(tensors)
    return weight.shape[0] if weight is not None and len(weight.shape) == 3 else 0


def _weight(tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    return next((tensors[suffix] for suffix in WEIGHTS if suffix in tensors), None)


def whole_stacks(module: Module) -> dict[str, tuple[TensorSpec, int]]:
    """Return the weights of all experts that ``read_modules`` left in one module, whole.

    Returns:
        ``gate_up_proj`` or another projection -> its weight, and how many projections lie in it
        along N.
    """
    parent, _, leaf = module.name.rpartition(".")
    if leaf == "experts":
        named = {name: module.tensors[name] for name in _STACKS if name in module.tensors}
    elif leaf in _STACKS and parent.endswith(".experts"):
        weight = _weight(module.tensors)
        named = {} if weight is None else {leaf: weight}
    else:
        return {}
    return {
        name: (spec, len(_STACKS[name])) for name, spec in named.items() if len(spec.shape) == 3
    }


def _is_transposed(stack: _Stack, text: Mapping[str, Any]) -> bool | None:
    """Tell ``(experts, K, N)`` from ``(experts, N, K)`` by the sizes; None where neither fits."""
    shapes = {
        leaf: tensors["weight"].shape[1:]
        for leaf, tensors in stack.members.items()
        if "weight" in tensors
    }
    if not shapes:
        return False  # packed integers, which have one layout
    fitting = [
        transposed
        for transposed in (False, True)
        if _sizes_agree(shapes, transposed, text.get("hidden_size"))
    ]
    return fitting[0] if len(fitting) == 1 else None


def _sizes_agree(
    shapes: Mapping[str, tuple[int, ...]], transposed: bool, hidden: int | None
) -> bool:
    """Whether all weights have the same hidden and inner size in one of the two layouts."""
    sizes = set()
    for leaf, shape in shapes.items():
        n, k = reversed(shape) if transposed else shape
        if leaf in _DOWN:
            sizes.add((n, k))
            continue
        inner, left = divmod(n, len(_STACKS[leaf]))
        if left:
            return False
        sizes.add((k, inner))
    return len(sizes) == 1 and hidden in (None, next(iter(sizes))[0])


def _split_stack(
    stack: _Stack, quantization: QuantizationConfig, text: Mapping[str, Any]
) -> Iterator[Module]:
    transposed = _is_transposed(stack, text) is True
    for leaf, tensors in stack.members.items():
        fused, experts = f"{stack.name}.{leaf}", _num_experts(tensors)
        # transformers, integrations/fbgemm_fp8.py: beside weights (experts, K, N) the scales of
        # down_proj are (experts, N, 1), as if they were not transposed.
        weight = tensors.get("weight")
        upright = (experts, weight.shape[-1], 1) if weight is not None else None
        stored = {
            suffix: _of_one_expert(spec, experts, transposed and spec.shape != upright)
            for suffix, spec in tensors.items()
        }
        one = recognise(
            fused,
            {
                suffix: piece.spec._replace(name=f"{fused}.{suffix}", shape=piece.shape)
                for suffix, piece in stored.items()
            },
            quantization,
        )
        rows = one.shape[0] // len(_STACKS[leaf])
        cuts = [
            (part, *cut_rows(one, stored, part, range(number * rows, (number + 1) * rows)))
            for number, part in enumerate(_STACKS[leaf])
        ]
        for expert in range(experts):
            for part, pieces, problems in cuts:
                name = f"{stack.name}.{expert}.{part}"
                yield make_part(one, name, expert, rows, pieces, problems)


def _of_one_expert(spec: TensorSpec, experts: int, transposed: bool) -> Stored:
    """Describe what one expert has of a tensor: its slice, or all of what they share."""
    if spec.shape[:1] != (experts,):
        return Stored(spec, spec.shape)
    shape, stride = spec.shape[1:], (spec.end - spec.start) // experts
    swapped = transposed and len(shape) == 2
    return Stored(spec, shape[::-1] if swapped else shape, stride, swapped)


# Linears stacked along N.


def _split_linear(module: Module, text: Mapping[str, Any]) -> list[Module]:
    """Take a fused linear of the language model apart; nothing for any other module."""
    parent, _, leaf = module.name.rpartition(".")
    if leaf not in _LINEARS or len(module.shape) != 2:
        return []
    if "layers." not in module.name or _TOWER.search(module.name):
        return []
    sizes = _part_sizes(leaf, module.shape[0], text)
    stored = {suffix: Stored(spec, spec.shape) for suffix, spec in module.tensors.items()}
    parts, first = [], 0
    for part, rows in zip(_LINEARS[leaf], sizes, strict=False):
        pieces, problems = cut_rows(module, stored, part, range(first, first + rows))
        parts.append(make_part(module, f"{parent}.{part}", 0, rows, pieces, problems))
        first += rows
    return parts


def _part_sizes(leaf: str, rows: int, text: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the rows of each part; none where they cannot be told."""
    if leaf == "gate_up_proj":
        return () if rows % 2 else (rows // 2, rows // 2)
    heads, head_dim = text.get("num_attention_heads"), text.get("head_dim")
    kv_heads = text.get("num_key_value_heads", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads + 2 * kv_heads <= 0:
        return ()
    size, left = divmod(rows, heads + 2 * kv_heads)
    if left or head_dim not in (None, size):
        return ()
    return heads * size, kv_heads * size, kv_heads * size
