# SPDX-License-Identifier: Apache-2.0
"""What routing has to say about a plan: findings, with equal ones folded into one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vllm_mixprec.plan.plan import Plan

Level = Literal["error", "warning", "note"]

LEVELS: tuple[Level, ...] = ("error", "warning", "note")

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_NAMED_IN_FULL = 3  # up to so many names are listed, more are counted


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a plan.

    ``where`` is ``plan.yaml:12`` or the name of a module, tensor or file; for a folded finding
    it is the names' common pattern, such as ``model.layers.*.self_attn.q_proj``.
    """

    level: Level
    code: str
    where: str
    message: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields as plain strings, for JSON."""
        return {
            "level": self.level,
            "code": self.code,
            "where": self.where,
            "message": self.message,
        }


@dataclass(slots=True)
class _Fold:
    noun: str
    cost_bytes: int | None
    names: dict[str, None] = field(default_factory=dict)  # an ordered set

    def details(self) -> str:
        names = list(self.names)
        parts = []
        if len(names) > _NAMED_IN_FULL:
            parts.append(f"{len(names)} {self.noun}, e.g. {names[0]}")
        elif len(names) > 1:
            parts.append(f"{len(names)} {self.noun}: {', '.join(names)}")
        if self.cost_bytes is not None:
            parts.append(f"costs {format_bytes(self.cost_bytes)}")
        return f" ({'; '.join(parts)})" if parts else ""


class FindingLog:
    """Collects findings; those that differ in layer and expert numbers only become one."""

    def __init__(self) -> None:
        self._folds: dict[tuple[Level, str, str, str], _Fold] = {}

    def add(
        self,
        level: Level,
        code: str,
        where: str,
        message: str,
        *,
        noun: str = "modules",
        group: str | None = None,
        cost_bytes: int | None = None,
    ) -> None:
        """Add one finding about ``where``, whose name ``message`` need not repeat.

        Args:
            noun: what a folded finding counts.
            group: what is folded with it, and the folded finding's ``where``; None for names
                that differ in numbers only.
            cost_bytes: memory that it costs, summed over the folded ones; None says nothing.
        """
        key = (level, code, generalise(where) if group is None else group, message)
        fold = self._folds.setdefault(key, _Fold(noun, None))
        fold.names[where] = None
        if cost_bytes is not None:
            fold.cost_bytes = (fold.cost_bytes or 0) + cost_bytes

    @property
    def has_errors(self) -> bool:
        """Whether any finding is an error."""
        return any(level == "error" for level, *_ in self._folds)

    def findings(self) -> tuple[Finding, ...]:
        """Return the folded findings, errors first, each level in the order of discovery."""
        found = [
            Finding(
                level,
                code,
                pattern if len(fold.names) > 1 else next(iter(fold.names)),
                message + fold.details(),
            )
            for (level, code, pattern, message), fold in self._folds.items()
        ]
        return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def generalise(name: str) -> str:
    """Put ``*`` for every dotted component that is a number: layers and experts."""
    return _NUMBER.sub("*", name)


def format_bytes(size_bytes: int) -> str:
    """Spell a size with a binary unit: ``512 B``, ``1.5 MiB``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def rule_place(plan: Plan, index: int) -> str:
    """Say where a plan's rule stands: ``plan.yaml:12``, or ``rule 3`` of a plan without a file."""
    line = plan.rules[index].line
    if plan.path is None or line is None:
        return f"rule {index + 1}"
    return f"{_shown(plan.path)}:{line}"


def source_place(plan: Plan, source: str) -> str:
    """Say where a plan declares a source: ``plan.yaml:4: source 'fp8'``."""
    line = plan.sources[source].line
    if plan.path is None or line is None:
        return f"source {source!r}"
    return f"{_shown(plan.path)}:{line}: source {source!r}"


def _shown(path: Path) -> Path:
    """Shorten a path below the working directory."""
    working = Path.cwd()
    return path.relative_to(working) if path.is_relative_to(working) else path
