# SPDX-License-Identifier: Apache-2.0
"""The patterns of a plan's rules, compiled to regular expressions over module names."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vllm_mixprec.errors import PlanError
from vllm_mixprec.expressions import Expression, compile_expression

_TOKEN = re.compile(r"\*+|\{[^{}]*\}|[\w.\-/:]+|.", re.DOTALL)
_BRACES = re.compile(r"\{[^{}]*\}")
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")
_BELOW = r"(?:\..+)?"
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled ``match``: call it with a module's name. It can be pickled.

    Attributes:
        components: so many components at the beginning of a name decide whether it matches; None
            where it takes the whole name.
    """

    expression: Expression
    may_name_weight: bool
    components: int | None = None

    def __call__(self, name: str) -> bool:
        """Whether the pattern matches a module, or for ``re:`` the module's weight.

        Raises:
            PlanError: as ``match`` does.
        """
        return self.match(name) is not None or (
            self.may_name_weight and self.match(f"{name}.weight") is not None
        )

    def depth(self, longest: int) -> int:
        """Return how many components decide of names of at most ``longest`` characters.

        More than any name has where it takes the whole name, or where a name may be too long.
        """
        if self.components is None or self.expression.longest < longest:
            return sys.maxsize
        return self.components

    def match(self, name: str) -> re.Match[str] | None:
        """Match a whole name.

        Raises:
            PlanError: the name is too long for a pattern with so many repeats.
        """
        try:
            return self.expression.fullmatch(name)
        except ValueError as error:
            raise PlanError(str(error)) from error


class Siblings(NamedTuple):
    """Names that follow each other and lie below one parent.

    ``depth`` counts the parent's components: a pattern of no more matches all of the names or none,
    as it does the parent. It is 0 where the parent tells nothing of a name.
    """

    parent: str
    depth: int
    names: list[str]


def gather_siblings(names: Iterable[str]) -> list[Siblings]:
    """Put names together that follow each other below one parent, such as an expert's."""
    gathered: list[Siblings] = []
    last: str | None = None
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if not leaf or "\n" in name or ".." in name:  # of which not every pattern's end has it
            gathered.append(Siblings(parent, 0, [name]))
            last = None
        elif parent == last:
            gathered[-1].names.append(name)
        else:
            gathered.append(Siblings(parent, parent.count(".") + 1 if parent else 0, [name]))
            last = parent
    return gathered


def compile_pattern(match: str) -> Pattern:
    r"""Compile the ``match`` of a rule to a predicate over a module's name.

    ``*`` matches inside one dotted component, ``**`` across components, ``{a,b}`` alternatives,
    each of which may be a range of numbers, ``{0-7,12}``. What matches a module matches all
    modules below it too: ``model.layers.*.mlp.experts.{0-7}`` the projections of those experts.
    ``re:`` starts a Python regular expression that must match the whole name, and nothing below
    it. A trailing ``.weight`` may be written or left out.

    Raises:
        PlanError: the pattern is empty or malformed; without file and line, which the caller
            knows.
    """
    if match.startswith("re:"):
        return _compile(match.removeprefix("re:"), match, may_name_weight=True)
    pattern = match.removesuffix(".weight")
    if not pattern:
        raise PlanError(
            f'match is "{match}", expected a module name or a pattern. Write "**" to match all.'
        )
    components = _count_components(pattern)
    return _compile(_translate(pattern, match) + _BELOW, match, False, components)


def numbered_braces(match: str) -> Iterator[tuple[str, int, Pattern]]:
    """Yield (the brace, its largest number, a pattern) of each brace that holds numbers.

    The pattern is the given one with that brace opened to any number, its group 1: it tells
    how far the names go. ``re:`` patterns have none.

    Raises:
        PlanError: as compile_pattern does.
    """
    tokens = [] if match.startswith("re:") else _TOKEN.findall(match.removesuffix(".weight"))
    for index, token in enumerate(tokens):
        if token[0] != "{" or len(token) == 1:
            continue
        numbers = re.findall(r"(?<![^,{\s-])[0-9]+(?![^,}\s-])", token)
        if numbers:
            before, after = ("".join(part) for part in (tokens[:index], tokens[index + 1 :]))
            opened = f"{_translate(before, match)}(?<![0-9])([0-9]+){_translate(after, match)}"
            components = _count_components("".join(tokens))
            pattern = _compile(opened + _BELOW, match, False, components)
            yield token, max(map(int, numbers)), pattern


def _count_components(pattern: str) -> int | None:
    """Return how many dotted components a pattern spells; None where that depends on the name."""
    has_no_depth = "**" in pattern or any("." in part for part in _BRACES.findall(pattern))
    return None if has_no_depth else pattern.count(".") + 1


def _compile(
    expression: str, match: str, may_name_weight: bool, components: int | None = None
) -> Pattern:
    try:
        return Pattern(compile_expression(expression), may_name_weight, components)
    except ValueError as error:
        shown = match if len(match) <= _SHOWN else f"{match[: _SHOWN - 3]}..."
        shown = shown.encode("utf-8", "backslashreplace").decode()
        raise PlanError(
            f'match "{shown}": cannot be a regular expression ({error}). Correct it, or write '
            "several simpler rules."
        ) from error


def _translate(pattern: str, match: str) -> str:
    """Translate a pattern, or an alternative of one, to a regular expression."""
    parts = []
    for token in _TOKEN.findall(pattern):
        if token == "*":
            parts.append("[^.]*")
        elif token == "**":
            parts.append(".*")
        elif token[0] == "{" and len(token) > 1:
            parts.append(_translate_alternatives(token[1:-1], match))
        elif token[0] == "*":
            raise PlanError(f'match "{match}": found {token}, expected * or **. Shorten it.')
        elif token in "{}":
            raise PlanError(
                f'match "{match}": a brace without its partner, or braces inside braces; '
                "expected {a,b}. Write the alternatives side by side."
            )
        elif len(token) == 1 and not re.fullmatch(r"[\w.\-/:]", token):
            raise PlanError(
                f'match "{match}": found {token!r}, which no module name has; expected names, '
                "*, ** and {a,b}. For a regular expression begin with re:."
            )
        else:
            parts.append(re.escape(token))
    return "".join(parts)


def _translate_alternatives(body: str, match: str) -> str:
    alternatives = []
    for alternative in body.split(","):
        alternative = alternative.strip()
        if not alternative:
            raise PlanError(
                f'match "{match}": an empty alternative in {{{body}}}, expected {{a,b}}. '
                "Remove the comma too many."
            )
        numbers = _RANGE.fullmatch(alternative)
        if numbers is None:
            alternatives.append(_translate(alternative, match))
            continue
        low, high = int(numbers[1]), int(numbers[2])
        if low > high:
            raise PlanError(
                f'match "{match}": range {alternative} runs backwards, expected {high}-{low}. '
                "Swap its ends."
            )
        alternatives += _range_regexes(low, high)
    return f"(?:{'|'.join(alternatives)})"


def _range_regexes(low: int, high: int) -> Iterator[str]:
    """Yield expressions that together match the numbers ``low`` to ``high`` inclusive.

    A few digit classes in place of one alternative a number: a range of 512 experts is tried on
    each of 100,000 modules.
    """
    while low <= high:
        # The largest block of 10 ** digits numbers that begins at low and stays within high.
        digits = 0
        while low % 10 ** (digits + 1) == 0 and low + 10 ** (digits + 1) - 1 <= high:
            if low == 0:
                break  # 00 is not how 0 is written
            digits += 1
        step = 10**digits
        first = low // step % 10
        count = min(10 - first, (high - low + 1) // step)
        prefix = str(low // step // 10) if low >= 10 * step else ""
        last = f"[{first}-{first + count - 1}]" if count > 1 else str(first)
        yield prefix + last + "[0-9]" * digits
        low += count * step
