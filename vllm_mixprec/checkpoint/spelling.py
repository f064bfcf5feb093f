# SPDX-License-Identifier: Apache-2.0
"""One module under several names: what to compare names by, and what vLLM's classes call it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from vllm_mixprec.checkpoint.formats import Module

# What stands before the layers of a language model, and differs with what is built around it:
# ``model.layers``, ``language_model.model.layers``, ``model.language_model.layers``.
_WRAPPERS = frozenset({"model", "language_model"})

# Mixtral's names of an expert's projections, transformers' own for those of every other family.
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# Model types whose block of experts vLLM 0.32's class calls ``block_sparse_moe`` (mixtral.py,
# phimoe.py, minimax_m2.py). transformers 5 calls it ``mlp``, and so do exports made with it.
_SPARSE_BLOCK_TYPES = frozenset({"mixtral", "phimoe", "minimax_m2"})

# What is in a text of names, a line each, of which any loses or changes more than ``model.``.
_RESPELT = (
    "language_model.",
    "\nmodel.model.",
    ".block_sparse_moe",
    *(f".{leaf}\n" for leaf in _PROJECTIONS),
)

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def canonical_name(module: str) -> str:
    """Return the name by which spellings of one module are equal; it is no checkpoint's own.

    ``language_model.model.layers.0.block_sparse_moe.experts.3.w1`` and
    ``model.layers.0.mlp.experts.3.gate_proj`` both become ``layers.0.mlp.experts.3.gate_proj``.
    """
    head, dot, rest = module.partition(".")
    while dot and head in _WRAPPERS:
        module = rest
        head, dot, rest = module.partition(".")
    if ".block_sparse_moe" in module:
        module = module.replace(".block_sparse_moe", ".mlp", 1)
    if ".experts." in module:
        parent, _, leaf = module.rpartition(".")
        if leaf in _PROJECTIONS:
            return f"{parent}.{_PROJECTIONS[leaf]}"
    return module


def class_name(module: str, config: Mapping[str, Any]) -> str:
    """Return a base's module name as the class of its architecture spells it.

    transformers renames what it loads, vLLM's classes take one spelling each; ``WeightsMapper``
    covers the rest. A name, a tensor's or a module's, that needs no change is returned as it is.
    """
    if config.get("model_type") in _SPARSE_BLOCK_TYPES and ".mlp" in module:
        module = module.replace(".mlp.", ".block_sparse_moe.", 1)
    if "text_config" not in config and "language_model." in module:
        inner = module
        while inner.partition(".")[0] in _WRAPPERS:
            inner = inner.partition(".")[2]
        module = inner if inner.startswith("lm_head") else f"model.{inner}"
    return module


def mark_clashes(modules: Iterable[Module]) -> dict[str, Module]:
    """Index modules by name, in their order.

    A module that is there in two spellings has a problem that names both: which of them counts,
    nothing tells. It is an error once the module is served. Clashes that differ in layer and expert
    numbers have one problem.
    """
    modules = list(modules)
    by_name = {module.name: module for module in modules}
    if len(by_name) == len(modules) and not _may_clash(by_name):
        return by_name
    by_name = {}
    by_key: dict[str, Module] = {}
    problems: dict[str, str] = {}
    for module in modules:
        key = canonical_name(module.name)
        other = by_key.setdefault(key, module)
        if other is module:
            by_name[module.name] = module
            continue
        names = sorted((other.fused or other.name, module.fused or module.name))
        clash = problems.setdefault(
            _NUMBER.sub("*", " ".join(names)),
            f"{names[0]}: the same module as {names[1]}, which these files hold too; expected one "
            "spelling of it. Remove one of the two, or choose another source.",
        )
        marked = replace(other, problems=(*other.problems, clash))
        by_key[key] = by_name[other.name] = marked
        if module.name != other.name:
            by_name[module.name] = replace(module, problems=(*module.problems, clash))
    return by_name


def _may_clash(names: Collection[str]) -> bool:
    """Whether two of the names could have one canonical name; never wrongly False.

    Most checkpoints have one spelling throughout: all that ``canonical_name`` does to any name is
    to strip ``model.``. It is ten times as fast to make sure of that than to ask for every name.
    """
    text = "\n".join(["", *names, ""])
    if any(part in text for part in _RESPELT):
        return True
    return any(f"model.{name}" in names for name in names if not name.startswith("model."))


def index_by_key(modules: Iterable[Module]) -> dict[str, Module]:
    """Index modules by canonical name; of several with one the first."""
    by_key: dict[str, Module] = {}
    for module in modules:
        by_key.setdefault(canonical_name(module.name), module)
    return by_key
