# SPDX-License-Identifier: Apache-2.0
"""Regular expressions from plans and checkpoints that strangers wrote, bounded in time.

Python's ``re`` backtracks and cannot be stopped: ``(a+)+b`` over 40 letters takes years. Here an
expression is measured before it is used: in how many ways can it match one name?
"""

import importlib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_LENGTH = 4_000
"""Characters of one expression."""

MAX_WAYS = 10_000_000
"""Ways of matching one name that are tried at most: a second."""

_MANY_BRANCHES = 200

# The parser of ``re``; its nodes are (opcode, argument).
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

# Sets of characters are bit masks: a bit for each of ASCII, one for all others, one for the end.
_OTHER, _END = 1 << 128, 1 << 129
_ALL = (1 << 129) - 1
_LETTERS = sum(1 << ord(c) for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_CATEGORIES = {
    "DIGIT": sum(1 << i for i in range(128) if chr(i).isdigit()) | _OTHER,
    "SPACE": sum(1 << i for i in range(128) if chr(i).isspace()) | _OTHER,
    "WORD": sum(1 << i for i in range(128) if chr(i).isalnum() or i == ord("_")) | _OTHER,
}
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")

_Nodes = Sequence[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression. It can be pickled.

    Attributes:
        longest: characters of the longest name that it may be tried on.
    """

    regex: re.Pattern[str]
    longest: int

    def fullmatch(self, name: str) -> re.Match[str] | None:
        """Match a whole name.

        Raises:
            ValueError: the name is too long for such an expression.
        """
        if len(name) > self.longest:
            raise self._too_long(name)
        return self.regex.fullmatch(name)

    def match(self, name: str) -> re.Match[str] | None:
        """Match a name from its beginning.

        Raises:
            ValueError: the name is too long for such an expression.
        """
        if len(name) > self.longest:
            raise self._too_long(name)
        return self.regex.match(name)

    def _too_long(self, name: str) -> ValueError:
        return ValueError(
            f"the regular expression {_cut(self.regex.pattern)} can match a name of "
            f"{len(name)} characters in more than {MAX_WAYS} ways, expected a name of at most "
            f"{self.longest}: {_cut(name)}. Write fewer repeats into the expression"
        )


def compile_expression(text: str) -> Expression:
    """Compile an expression whose matching ends in bounded time, for names as models have them.

    Raises:
        ValueError: it is not a Python regular expression, too long, or repeats what can itself
            match in several ways, such as ``(a+)+``.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{len(text)} characters, expected at most {MAX_LENGTH}")
    text.encode("utf-8")  # names are UTF-8, and so are the messages that quote it
    try:
        regex = re.compile(text)
        nodes = _parser.parse(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    ways, repeats = _Measure(ignores_case=re.search(r"\(\?\w*i", text) is not None).of(nodes, _END)
    return Expression(regex, _longest(ways, repeats))


def _longest(ways: int, repeats: int) -> int:
    """Return how long a name may be: ``repeats`` share its characters in every possible way."""
    if ways > MAX_WAYS:
        return 0
    if repeats == 0:
        return sys.maxsize
    low, high = 0, MAX_WAYS
    while low < high:
        middle = (low + high + 1) // 2
        if ways * math.comb(middle + repeats, repeats) <= MAX_WAYS:
            low = middle
        else:
            high = middle - 1
    return low


class _Measure:
    """Counts the ways in which an expression can match one name; never too few.

    A count is (ways, repeats): ``ways`` from alternatives, and ``repeats`` that can end in several
    places. Where the next character decides, there is one way: ``[0-9]+`` before a dot.
    """

    def __init__(self, ignores_case: bool) -> None:
        self._ignores_case = ignores_case

    def of(self, nodes: _Nodes, after: int) -> tuple[int, int]:
        """Count the ways of a sequence that is followed by one of the characters ``after``."""
        ways, repeats = 1, 0
        for node in reversed(nodes):
            more_ways, more = self._of_one(node, after)
            ways, repeats = min(ways * more_ways, MAX_WAYS + 1), repeats + more
            after = self._first([node], after)
        return ways, repeats

    def _of_one(self, node: tuple[Any, Any], after: int) -> tuple[int, int]:
        kind, argument = str(node[0]), node[1]
        if kind in _REPEATS:
            low, high, body = argument
            return self._of_repeat(int(low), int(high), body, after)
        if kind == "BRANCH":
            return self._of_branch(argument[1], after)
        if kind == "GROUPREF_EXISTS":
            return self._of_branch([branch or [] for branch in argument[1:]], after)
        ways, repeats = 1, 0
        for inner in _inner(node):
            more_ways, more = self.of(inner, _ALL | _END if kind.startswith("ASSERT") else after)
            ways, repeats = ways * more_ways, repeats + more
        return ways, repeats

    def _of_repeat(self, low: int, high: int, body: _Nodes, after: int) -> tuple[int, int]:
        first = self._first(body, _END)
        ways, repeats = self.of(body, after if high <= 1 else first & ~_END | after)
        has_one_end = not first & ~_END & after and not first & _END  # nor can it be empty
        if high > 1 and (ways > 1 or repeats):
            raise ValueError(
                "a repeat of something that can itself match in several ways, as in (a+)+, which "
                "may search for years; expected one repeat. Write .* or a list of alternatives"
            )
        if high <= 1:
            return ways + (low < high and not has_one_end), repeats
        return ways, int(low != high and not has_one_end)

    def _of_branch(self, branches: Sequence[_Nodes], after: int) -> tuple[int, int]:
        counts = [self.of(branch, after) for branch in branches]
        starts = [self._start(branch, after) for branch in branches]
        at_once = len(branches)
        if at_once <= _MANY_BRANCHES:
            at_once = max(
                sum(all(a & b for a, b in zip(one, other, strict=False)) for other in starts)
                for one in starts
            )
        return at_once * max(ways for ways, _ in counts), max(repeats for _, repeats in counts)

    def _start(self, nodes: _Nodes, after: int) -> list[int]:
        """Return what the first characters can be, as far as their places are certain."""
        start: list[int] = []
        for index, node in enumerate(nodes):
            if str(node[0]) not in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
                return [*start, self._first(nodes[index:], after)]
            start.append(self._characters(node))
        return [*start, after]

    def _first(self, nodes: _Nodes, after: int) -> int:
        """Return the characters that a sequence, followed by ``after``, can begin with."""
        found = 0
        for node in nodes:
            begins: int
            kind, argument = str(node[0]), node[1]
            if kind in _REPEATS:
                begins = self._first(argument[2], _END) | _END * (argument[0] == 0)
            elif kind in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
                begins = self._characters(node)
            elif kind == "BRANCH":
                begins = 0
                for branch in argument[1]:
                    begins |= self._first(branch, _END)
            elif kind in ("SUBPATTERN", "ATOMIC_GROUP"):
                (inner,) = _inner(node)
                begins = self._first(inner, _END)
            elif kind.startswith(("AT", "ASSERT")):
                begins = _END
            else:  # what a group matched before
                return _ALL | _END
            found |= begins & ~_END
            if not begins & _END:  # it cannot be empty
                return found
        return found | after

    def _characters(self, node: tuple[Any, Any]) -> int:
        """Return what one character can be; rather too much than too little."""
        kind, argument = str(node[0]), node[1]
        if kind == "LITERAL":
            mask = 1 << argument if argument < 128 else _OTHER
        elif kind == "NOT_LITERAL":
            mask = _ALL & ~(1 << argument) if argument < 128 else _ALL
        elif kind == "RANGE":
            low, high = argument
            mask = sum(1 << i for i in range(low, min(high, 127) + 1)) | (_OTHER * (high > 127))
        elif kind == "CATEGORY":
            name = str(argument).removeprefix("CATEGORY_")
            known = _CATEGORIES[name.removeprefix("NOT_")]
            mask = _ALL & ~known | _OTHER if name.startswith("NOT_") else known
        elif kind == "IN":
            negated = str(argument[0][0]) == "NEGATE"
            if negated and self._ignores_case:
                return _ALL
            mask = 0
            for item in argument[negated:]:
                mask |= self._characters(item)
            return _ALL & ~mask | _OTHER if negated else mask
        else:  # ANY
            mask = _ALL
        if self._ignores_case and mask & (_LETTERS | _OTHER):
            mask |= _LETTERS | _OTHER
        return mask


def _inner(node: tuple[Any, Any]) -> list[_Nodes]:
    """Return the sequences inside a group, an assertion or an atomic group."""
    kind, argument = str(node[0]), node[1]
    if kind == "SUBPATTERN":
        return [argument[3]]
    if kind.startswith("ASSERT"):
        return [argument[1]]
    return [argument] if kind == "ATOMIC_GROUP" else []


def _cut(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
