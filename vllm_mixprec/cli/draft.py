# SPDX-License-Identifier: Apache-2.0
"""Drafts a plan by kind: patterns from the base's own module names, and tidy YAML."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from vllm_mixprec.checkpoint import Checkpoint, Module
from vllm_mixprec.errors import RouteError
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing.findings import format_bytes, generalise
from vllm_mixprec.routing.fused import leaf_name, parse_expert
from vllm_mixprec.routing.kinds import KIND_LABELS, Kind, kind_of, layer_of, spell_ranges

_PLAIN = re.compile(r"[A-Za-z0-9_./~@+-]+")


_FLAGS: dict[Kind, str] = {
    "attention": "--attention",
    "dense_mlp": "--mlp",
    "shared_experts": "--shared-experts",
    "routed_experts": "--experts",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Send one kind, or some of the routed experts, to a source.

    ``experts`` None means all, but those of ``except_experts``, which earlier rules take.
    """

    kind: Kind
    source: str
    experts: frozenset[int] | None = None
    except_experts: frozenset[int] = frozenset()

    @property
    def flag(self) -> str:
        """How the choice was made on the command line: ``--experts 0-7=int4``."""
        numbers = "" if self.experts is None else f"{spell_ranges(self.experts)}="
        return f"{_FLAGS[self.kind]} {numbers}{self.source}"

    @property
    def label(self) -> str:
        """What the choice covers, in words."""
        return ("other " if self.except_experts else "") + KIND_LABELS[self.kind]


@dataclass(frozen=True, slots=True)
class DraftRule:
    """One rule and the comment above it."""

    comment: str
    match: str
    source: str


def draft_rules(choice: Choice, base: Checkpoint, source: Checkpoint) -> list[DraftRule]:
    """Return the rules that send the weights of one kind to a source.

    Layers that the source lacks, such as a next-token predictor that a quantizer dropped, stay
    with the base, and the comment says so.

    Raises:
        RouteError: the base has no such modules, or fewer experts, or the source none of them.
    """
    of_kind = [module for module in base.modules.values() if _is_weight(module, choice.kind)]
    if not of_kind:
        raise RouteError(
            f"{choice.flag}: base {base.name!r} ({base.path}) has no {KIND_LABELS[choice.kind]}; "
            f"found {_list_kinds(base)}. Leave the option out."
        )
    if choice.kind == "routed_experts":
        _require_experts(of_kind, choice, base)
    wanted = [module for module in of_kind if _is_chosen(module, choice)]
    label = choice.label
    found = {module.name: source.find(module.name) for module in wanted}
    held = {layer_of(name) for name, module in found.items() if module is not None}
    held -= {layer_of(name) for name, module in found.items() if module is None}
    if not held:
        lacking = next(name for name, module in found.items() if module is None)
        raise RouteError(
            f"source {source.name!r} ({source.path}): no layer has all of the base's {label}; it "
            f"lacks e.g. {lacking}. Choose a checkpoint of the same model."
        )
    taken = [module for module in wanted if layer_of(module.name) in held]
    comment = _describe(label, [m for module in taken if (m := found[module.name]) is not None])
    left = {layer_of(module.name) for module in wanted} - held
    if left:
        layers = spell_ranges(layer for layer in left if layer is not None)
        comment += f"; layers {layers} are not in {source.name} and stay with {base.name}"
    matches = (
        _match_experts(taken, wanted, choice)
        if choice.kind == "routed_experts"
        else _match_linears(taken, wanted, base.modules)
    )
    return [DraftRule(comment if not i else "", m, source.name) for i, m in enumerate(matches)]


def _require_experts(routed: Iterable[Module], choice: Choice, base: Checkpoint) -> None:
    """Refuse numbers that no expert of the base has, and a rest of which nothing is left."""
    there = {expert.expert for module in routed if (expert := parse_expert(module.name))}
    absent = (choice.experts or frozenset()) - there
    if absent:
        raise RouteError(
            f"{choice.flag}: no expert {max(absent)} in base {base.name!r} ({base.path}), expected "
            f"numbers of {spell_ranges(there)}. Correct the numbers."
        )
    if there <= choice.except_experts:
        raise RouteError(
            f"{choice.flag}: the numbers before it take all experts of base {base.name!r} "
            f"({base.path}), {spell_ranges(there)}. Leave it out."
        )


def _is_weight(module: Module, kind: Kind) -> bool:
    """Whether a module is a weight matrix of the kind; norms and bare parameters are not."""
    if kind_of(module.name) != kind or len(module.shape) != 2:
        return False
    return kind != "routed_experts" or parse_expert(module.name) is not None


def _is_chosen(module: Module, choice: Choice) -> bool:
    """Whether a module of the choice's kind is none of the experts that others name."""
    expert = parse_expert(module.name) if choice.kind == "routed_experts" else None
    if expert is None:
        return True
    if choice.experts is None:
        return expert.expert not in choice.except_experts
    return expert.expert in choice.experts


def _list_kinds(base: Checkpoint) -> str:
    return ", ".join(dict.fromkeys(KIND_LABELS[kind_of(name)] for name in base.modules))


def _describe(label: str, modules: Iterable[Module]) -> str:
    sizes: Counter[str] = Counter()
    for module in modules:
        sizes[module.scheme.label] += module.nbytes
    return f"{label}: " + ", ".join(f"{format_bytes(n)} of {form}" for form, n in sizes.items())


def _match_experts(taken: list[Module], wanted: list[Module], choice: Choice) -> list[str]:
    """Return patterns such as ``model.layers.*.mlp.experts.{0-7}``, one an expert container."""
    containers = _by_pattern(taken, wanted, _expert_container)
    if choice.experts is None:
        return list(containers)
    present = {expert.expert for module in taken if (expert := parse_expert(module.name))}
    return [f"{container}.{_braces(spell_ranges(present))}" for container in containers]


def _match_linears(
    taken: list[Module], wanted: list[Module], modules: Mapping[str, Module]
) -> list[str]:
    """Return patterns such as ``model.layers.*.self_attn.*_proj``, one a parent module."""
    siblings: dict[str, set[str]] = {}
    for name in modules:
        siblings.setdefault(generalise(_parent(name)), set()).add(leaf_name(name))
    matches = []
    for parent, members in _by_pattern(taken, wanted, _parent).items():
        leaves = {leaf_name(module.name): None for module in members}
        others = siblings[generalise(_parent(members[0].name))] - leaves.keys()
        if len(leaves) > 1 and _all_proj(leaves) and not any(map(_is_proj, others)):
            leaf = "*_proj"
        else:
            leaf = _braces(",".join(leaves))
        matches.append(f"{parent}.{leaf}" if parent else leaf)
    return matches


def _by_pattern(
    taken: list[Module], wanted: list[Module], parent_of: Callable[[str], str]
) -> dict[str, list[Module]]:
    """Group modules by their parent's pattern: ``*`` for all layers, else the layers' numbers."""
    grouped: dict[str, list[Module]] = {}
    for module in taken:
        grouped.setdefault(generalise(parent_of(module.name)), []).append(module)
    patterns = {}
    for pattern, members in grouped.items():
        layers = {layer_of(module.name) for module in members}
        every = {layer_of(m.name) for m in wanted if generalise(parent_of(m.name)) == pattern}
        if layers != every:
            numbers = spell_ranges(layer for layer in layers if layer is not None)
            pattern = pattern.replace("*", _braces(numbers), 1)
        patterns[pattern] = members
    return patterns


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _expert_container(name: str) -> str:
    expert = parse_expert(name)
    return _parent(name) if expert is None else expert.layer


def _is_proj(leaf: str) -> bool:
    return leaf.endswith("_proj")


def _all_proj(leaves: Iterable[str]) -> bool:
    return all(map(_is_proj, leaves))


def _braces(alternatives: str) -> str:
    is_one = "," not in alternatives and not re.fullmatch(r"\d+-\d+", alternatives)
    return alternatives if is_one else f"{{{alternatives}}}"


@dataclass(frozen=True, slots=True)
class DraftSource:
    """A source as the plan will name it; ``path`` is relative to the plan's folder, or a hub id."""

    name: str
    path: str
    revision: str | None
    checkpoint: Checkpoint


def write_draft(base: str, sources: Iterable[DraftSource], rules: Iterable[DraftRule]) -> str:
    """Return the plan as commented YAML."""
    lines = [
        "# Rules are read from the top, the first match wins. What no rule matches comes from",
        "# the base: config.json, tokenizer, router, norms, embeddings.",
        "version: 1",
        f"base: {_scalar(base)}",
        "sources:",
    ]
    for source in sources:
        revision = "" if source.revision is None else f", revision: {_scalar(source.revision)}"
        schemes = dict.fromkeys(module.scheme for module in source.checkpoint.modules.values())
        ordered = sorted(schemes, key=lambda scheme: not scheme.is_quantized)
        comment = ", ".join(dict.fromkeys(scheme.label for scheme in ordered))
        entry = f"{{path: {_scalar(source.path)}{revision}}}"
        lines.append(f"  {_scalar(source.name)}: {entry}  # {comment}")
    rules = list(rules)
    lines.append("rules:" if rules else "rules: []")
    for rule in rules:
        if rule.comment:
            lines.append(f"  # {rule.comment}")
        match = json.dumps(rule.match, ensure_ascii=False)
        lines.append(f"  - {{match: {match}, source: {_scalar(rule.source)}}}")
    lines += [
        "options:",
        "  mixed_fused: widen          # parts of a fused layer in several formats; or: error",
        "  missing_kernel: dequantize  # a format that no kernel runs here; or: error",
    ]
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """Spell a string plainly where YAML reads it back as that string, else in quotes."""
    if _PLAIN.fullmatch(text) and yaml.safe_load(text) == text:
        return text
    return json.dumps(text, ensure_ascii=False)


def read_draft(text: str, folder: Path) -> Plan:
    """Read a draft as the plan that it will be in ``folder``."""
    return Plan.from_dict(yaml.safe_load(text), base_dir=folder)


def spell_path(directory: Path, folder: Path) -> str:
    """Spell a source's directory for a plan in ``folder``.

    Relative, beginning with ``./`` or ``../``, when both lie below a common directory that is
    not the root, so that they can be moved together; else absolute.
    """
    target, start = os.path.abspath(directory), os.path.realpath(folder)
    relative = os.path.relpath(target, start)
    is_common = os.path.commonpath([target, start]) != os.path.sep
    if is_common and os.path.realpath(os.path.join(start, relative)) == os.path.realpath(target):
        return relative if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)
    return target
