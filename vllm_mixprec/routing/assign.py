# SPDX-License-Identifier: Apache-2.0
"""Gives every module of the base its source: the rules, and whether the source fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, reduce
from itertools import repeat
from operator import or_
from typing import NamedTuple

from vllm_mixprec.checkpoint.formats import FORMATS, Module
from vllm_mixprec.checkpoint.formats.base import ACTIVATION_SCALES, WEIGHTS, Looks
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.plan.patterns import Siblings, gather_siblings, numbered_braces
from vllm_mixprec.plan.plan import Plan
from vllm_mixprec.routing.findings import FindingLog, Level, rule_place
from vllm_mixprec.routing.fused import parse_expert
from vllm_mixprec.routing.structure import layer_name
from vllm_mixprec.routing.suggestions import example_names, suggest

_SUGGESTED = 50  # unmatched rules that get a suggestion, which is a search of milliseconds

# How checkpoint/index.py words a file or tensor that is there but that the index leaves out.
_UNREAD = re.compile(r"\bnot read\b")


class Assignment(NamedTuple):
    """One module of the base with the module that stands in for it, tensors already chosen.

    ``fused`` is what the base's files call the module that it is a part of, if any; ``looks`` is
    the module's while it keeps all its tensors.
    """

    source: str
    module: Module
    tensors: Mapping[str, TensorSpec]
    fused: str | None = None
    looks: Looks | None = None


def match_rules(plan: Plan, siblings: list[Siblings]) -> Iterator[int]:
    """Yield for each name the rules that match, a bit mask with the first rule lowest.

    Every pattern was compiled once, and is tried once on all names below a parent where that is
    deep enough to decide: an expert's, or an attention's.
    """
    longest = _longest_name(siblings)
    rules = [
        (1 << index, rule.matches, rule.matches.depth(longest))
        for index, rule in enumerate(plan.rules)
    ]
    for some in siblings:
        mask = 0
        undecided = []
        for bit, matches, depth in rules:
            if depth > some.depth:
                undecided.append((bit, matches))
            elif matches(some.parent):
                mask |= bit
        if not undecided:
            yield from repeat(mask, len(some.names))
            continue
        for name in some.names:
            yield mask | sum(bit for bit, matches in undecided if matches(name))


def _longest_name(siblings: Iterable[Siblings]) -> int:
    return max((len(name) for some in siblings for name in some.names), default=0)


def first_rule(mask: int) -> int | None:
    """Return the index of the rule that wins, None when no rule matches."""
    return (mask & -mask).bit_length() - 1 if mask else None


def used_sources(plan: Plan) -> tuple[str, ...]:
    """Return the sources that routing opens: the base, then those of rules, in plan order."""
    return tuple(dict.fromkeys([plan.base, *(rule.source for rule in plan.rules)]))


def assign_sources(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    is_loaded: Callable[[str, bool], bool],
    draft: bool,
    log: FindingLog,
) -> dict[str, Assignment]:
    """Choose the source of every module of the base, in the base's order.

    Findings go to ``log``: shards that index and directory disagree about, rules that match
    nothing or are shadowed, modules that their source lacks or stores with another shape,
    companions that do not fit. A module whose source is not among ``checkpoints``, or lacks it,
    is left out. ``is_loaded`` tells of a module, without and with a draft, whether it matters: a
    quantised source often lacks the MTP layers.
    """
    base_name = plan.base
    base = checkpoints[base_name]
    for opened in checkpoints.values():
        _report_index(opened, log)
    siblings = gather_siblings(base.modules)
    # A rule that matches a fused module, by the name that the files have for it, matches its parts.
    fused = dict.fromkeys(m.fused for m in base.modules.values() if m.fused is not None)
    fused_masks = dict(zip(fused, match_rules(plan, gather_siblings(fused)), strict=True))
    assignments: dict[str, Assignment] = {}
    fitting: set[tuple[int, int]] = set()
    winners: dict[int, tuple[int | None, str]] = {}  # rules that match -> the one that counts
    masks = match_rules(plan, siblings)
    for (name, module), mask in zip(base.modules.items(), masks, strict=True):
        if module.fused is not None:
            mask |= fused_masks[module.fused]
        winner = winners.get(mask)
        if winner is None:
            first = first_rule(mask)
            source = base_name if first is None else plan.rules[first].source
            winner = winners[mask] = first, source
        rule, source = winner
        chosen = module
        if source != base_name:
            checkpoint = checkpoints.get(source)
            if checkpoint is None:
                continue
            found = checkpoint.modules.get(name) or checkpoint.find(name)
            if found is None:
                spoken = _spoken_name(module)
                if is_loaded(name, False):
                    _report_absent(plan, rule, checkpoint, spoken, "error", log)
                elif is_loaded(name, True):
                    level: Level = "error" if draft else "warning"
                    _report_absent(plan, rule, checkpoint, spoken, level, log)
                continue
            chosen = found
        # Of modules that look like others that fitted nothing need be found out again.
        pair = id(module.looks), id(chosen.looks)
        if pair in fitting:
            assignments[name] = Assignment(
                source, chosen, chosen.tensors, module.fused, chosen.looks
            )
            continue
        if (chosen.problems or chosen.shape != module.shape) and is_loaded(name, draft):
            _report_misfits(plan, source, module, chosen, log)
        tensors = _choose_tensors(plan, source, module, chosen, log)
        tensors = _drop_activation_scales(source, chosen, tensors, log)
        looks = chosen.looks if tensors is chosen.tensors else None
        if looks is not None and module.looks is not None and chosen.shape == module.shape:
            fitting.add(pair)
        assignments[name] = Assignment(source, chosen, tensors, module.fused, looks)
    siblings += gather_siblings(name for name in fused if name not in base.modules)
    matched = reduce(or_, winners, 0)
    won = reduce(or_, (mask & -mask for mask in winners), 0)
    _report_rules(plan, siblings, matched, won, log)
    _report_inner(plan, checkpoints, assignments, log)
    return assignments


def _report_inner(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    assignments: Mapping[str, Assignment],
    log: FindingLog,
) -> None:
    """Report modules that a source holds within one that is taken from it, and the base lacks.

    Such as the matrices of a rotation (``q_proj.v_input``) or of an adapter (``q_proj.lora_A``):
    the weight alone is not what the source computes with.
    """
    base = checkpoints[plan.base].modules
    taken: dict[str, set[str | None]] = {}
    for each in assignments.values():
        if not WEIGHTS.isdisjoint(each.module.tensors):  # not of bare parameters beside modules
            taken.setdefault(each.source, set()).update((each.module.name, each.module.fused))
    for source, names in taken.items():
        for name, inner in checkpoints[source].modules.items():
            if name in base or inner.tensors.keys() <= ACTIVATION_SCALES:
                continue
            parent = name.rpartition(".")[0]
            outer = next((up for up in (parent, parent.rpartition(".")[0]) if up in names), None)
            if outer is not None:
                log.add(
                    "error",
                    "inner-module",
                    name,
                    f"source {source!r} holds it within {outer}, which the plan takes from there; "
                    f"base {plan.base!r} has no such module. What it does to the weight (a "
                    "rotation, an adapter) would be left out: merge it into the weight, or choose "
                    "another source.",
                    noun="modules",
                )


def _spoken_name(module: Module) -> str:
    """Return the base's own name of a module; of an expert in a tensor of all, the expert's."""
    return module.name if module.fused is None or parse_expert(module.name) else module.fused


def _report_index(checkpoint: Checkpoint, log: FindingLog) -> None:
    """Report what a checkpoint lacks as errors, and what lies there unread as warnings."""
    for problem in checkpoint.problems:
        file, separator, text = problem.partition(": ")
        level: Level = "warning" if _UNREAD.search(problem) else "error"
        where = file if separator else str(checkpoint.path)
        log.add(level, "index-mismatch", where, text if separator else problem, noun="shards")


def _report_absent(
    plan: Plan,
    rule: int | None,
    checkpoint: Checkpoint,
    name: str,
    level: Level,
    log: FindingLog,
) -> None:
    place = rule_place(plan, rule) if rule is not None else "the plan"
    lacks = (
        f"{place} routes it to source {checkpoint.name!r}, whose files ({checkpoint.path}) do not "
        "hold it. "
    )
    if level == "error":
        log.add(
            "error",
            "module-missing",
            name,
            f"{lacks}Route it to another source, or narrow the rule.",
        )
    else:
        log.add(
            "warning",
            "module-missing",
            layer_name(name) or name,
            f"{lacks}Nothing loads it unless the model drafts with its own MTP layers (check "
            "--mtp); to draft, narrow the rule.",
            noun="layers",
        )


def _report_misfits(
    plan: Plan, source: str, module: Module, chosen: Module, log: FindingLog
) -> None:
    for problem in chosen.problems:
        tensor, separator, text = problem.partition(": ")
        where = tensor if separator else chosen.name
        log.add(
            "error",
            "module-tensors",
            where,
            f"source {source!r}: {text if separator else problem}",
            noun="tensors",
        )
    if not chosen.problems:
        log.add(
            "error",
            "shape-mismatch",
            module.name,
            f"source {source!r} stores {chosen.scheme.label} of shape {list(chosen.shape)}, "
            f"expected {list(module.shape)} as in base {plan.base!r}. These are checkpoints of "
            "different models: choose another source.",
        )


def _choose_tensors(
    plan: Plan, source: str, module: Module, chosen: Module, log: FindingLog
) -> Mapping[str, TensorSpec]:
    """Return the tensors of a module that the model has a place for."""
    if chosen is module:
        return chosen.tensors
    expected, found = _beside_weight(module), _beside_weight(chosen)
    if expected == found:
        return chosen.tensors
    for suffix in sorted(expected - found):
        log.add(
            "error",
            "tensor-missing",
            f"{module.name}.{suffix}",
            f"base {plan.base!r} has it, source {source!r}, to which the module is routed, does "
            "not. Route the module to another source.",
            noun="tensors",
        )
    for suffix in sorted(found - expected):
        log.add(
            "warning",
            "extra-tensor",
            f"{module.name}.{suffix}",
            f"source {source!r} has it, base {plan.base!r} does not: it is dropped. AutoGPTQ "
            "writes biases of zeros so; if it is not zero, the source is another model.",
            noun="tensors",
            group=f"source {source!r}",
        )
    dropped = found - expected
    return {suffix: spec for suffix, spec in chosen.tensors.items() if suffix not in dropped}


def _drop_activation_scales(
    source: str, chosen: Module, tensors: Mapping[str, TensorSpec], log: FindingLog
) -> Mapping[str, TensorSpec]:
    """Leave out scales of activations and of the key-value cache: no layer has a place for them."""
    if not chosen.scheme.is_quantized or ACTIVATION_SCALES.isdisjoint(tensors):
        return tensors
    dropped = ACTIVATION_SCALES.intersection(tensors)
    log.add(
        "note",
        "activation-scale",
        chosen.name,
        f"source {source!r} has {', '.join(sorted(dropped))}: not used, since activations are "
        "quantised as they come, and the key-value cache without scales",
        group=f"source {source!r}",
    )
    return {suffix: spec for suffix, spec in tensors.items() if suffix not in dropped}


def _beside_weight(module: Module) -> frozenset[str]:
    """Suffixes that are no part of how the weight is stored: bias, e_score_correction_bias."""
    return _suffixes_beside_weight(module.scheme.format, tuple(module.tensors))


@lru_cache
def _suffixes_beside_weight(stored_format: str, suffixes: tuple[str, ...]) -> frozenset[str]:
    storage = FORMATS[stored_format].suffixes or {"weight"}
    return frozenset(suffixes).difference(storage - {"bias"})


def _report_rules(
    plan: Plan, siblings: list[Siblings], matched: int, won: int, log: FindingLog
) -> None:
    """Report rules without effect.

    ``siblings`` are the names of the base's modules, and those of fused ones in the files.
    """
    examples: dict[str, tuple[str, str]] = {}
    longest = _longest_name(siblings)
    unmatched = 0
    for index, rule in enumerate(plan.rules):
        bit = 1 << index
        if not matched & bit:
            names = (name for some in siblings for name in some.names)
            examples = examples or example_names(names)
            unmatched += 1
            suggestion = suggest(rule.match, examples) if unmatched <= _SUGGESTED else "Correct it."
            log.add(
                "error",
                "rule-unmatched",
                rule_place(plan, index),
                f'"{rule.match}" matches no module of base {plan.base!r}. {suggestion}',
                noun="rules",
            )
        elif not won & bit:
            log.add(
                "warning",
                "rule-shadowed",
                rule_place(plan, index),
                f'"{rule.match}" has no effect: rules above it take every module that it '
                "matches. Move it up, or remove it.",
                noun="rules",
            )
        else:
            _report_reach(plan, index, siblings, longest, log)


def _report_reach(
    plan: Plan, index: int, siblings: list[Siblings], longest: int, log: FindingLog
) -> None:
    """Warn of a rule whose braces count further than the layers or experts that there are."""
    for brace, largest, opened in numbered_braces(plan.rules[index].match):
        depth = opened.depth(longest)
        last, example = -1, ""
        for some in siblings:
            for name in [some.parent] if depth <= some.depth else some.names:
                found = opened.match(name)
                if found is not None and int(found[1]) > last:
                    last, example = int(found[1]), name[: found.end(1)]
            if last >= largest and longest <= opened.expression.longest:
                break  # nor is there a name that is too long
        if 0 <= last < largest:
            log.add(
                "warning",
                "rule-beyond",
                rule_place(plan, index),
                f'"{plan.rules[index].match}": {brace} counts to {largest}, but the last that it '
                f"matches is {example}. Write no number above {last}.",
                noun="rules",
            )
