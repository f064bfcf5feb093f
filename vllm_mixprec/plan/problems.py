# SPDX-License-Identifier: Apache-2.0
"""How a plan's problems are told: where, what was found, what was expected."""

from collections.abc import Hashable, Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from vllm_mixprec.plan.yaml_file import Location

MAX_PROBLEMS = 100


class Where:
    """Says where in the plan something was found: ``file:line``, or ``plan`` and the key."""

    def __init__(self, file: str | None, lines: Mapping[Location, int]) -> None:
        self.file = file
        self.lines = lines
        self.origins: Mapping[Location, Location] = {}
        """Of a plan in an older spelling: where in the file a part of what it became was."""

    def line(self, location: Location) -> int:
        """Return the line of a location, or of the nearest thing around it."""
        location = self._origin(location)
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)

    def __call__(self, location: Location) -> str:
        key = ".".join(str(part) for part in self._origin(location))
        if self.file is None:
            return f"plan: {key}" if key else "plan"
        return f"{self.file}:{self.line(location)}: {key}".removesuffix(": ")

    def _origin(self, location: Location) -> Location:
        for length in range(len(location), 0, -1):
            if location[:length] in self.origins:
                return self.origins[location[:length]]
        return location


def join(problems: Iterator[str]) -> str:
    """Write problems one a line, not more than anybody reads; making one costs a search."""
    shown = list(islice(problems, MAX_PROBLEMS + 1))
    if len(shown) > MAX_PROBLEMS:
        file = shown[0].partition(": ")[0]
        shown[MAX_PROBLEMS:] = [f"{file}: and more such problems. Correct these first."]
    return "\n".join(shown)


def choices(name: Hashable, names: Any) -> str:
    """List what could have been meant, the nearest first."""
    text = f"one of {', '.join(names)}."
    near = get_close_matches(str(name), list(names), n=1)
    return f"{text} Nearest: {near[0]}." if near else f"{text} Correct the name."


def show(value: Any) -> str:
    """Quote a value for a message, cut to a readable length."""
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair has no UTF-8
    return text if len(text) <= 80 else f"{text[:77]}..."
