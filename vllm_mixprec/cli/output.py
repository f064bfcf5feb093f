# SPDX-License-Identifier: Apache-2.0
"""What the commands print: JSON, tables, findings, progress."""

import json
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mixprec.routing import Finding
from vllm_mixprec.routing.findings import LEVELS, format_bytes

_PIPED_WIDTH = 200  # a table is only as wide as its cells; 80 would fold them for no reader
_QUIET_S = 2.0
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_json(content: Mapping[str, Any]) -> None:
    """Print one object on stdout."""
    print(json.dumps(content, indent=2, ensure_ascii=False), flush=True)


def console(to_stderr: bool = False) -> Console:
    """Return a console; colour is off unless it is a terminal."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(
        file=stream,
        width=None if stream.isatty() else _PIPED_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[str] = (),
    title: str | None = None,
    to_stderr: bool = False,
) -> None:
    """Print a table; the columns named in ``right`` are flush right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    right = frozenset(right)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console(to_stderr).print(table)


def print_bytes_by_source(sizes: Mapping[tuple[str, str], int], *, to_stderr: bool = False) -> None:
    """Print what is read from each source, by stored format."""
    rows = [[source, stored, format_bytes(size)] for (source, stored), size in sizes.items()]
    rows.append(["all", "", format_bytes(sum(sizes.values()))])
    print_table(
        ["source", "stored as", "bytes read"], rows, right=["bytes read"], to_stderr=to_stderr
    )


def bytes_by_source_list(sizes: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Return the same as JSON types, spelt as in ``Report.to_dict``."""
    return [
        {"source": source, "format": stored, "bytes": size}
        for (source, stored), size in sizes.items()
    ]


def print_findings(findings: Sequence[Finding], *, to_stderr: bool = False) -> None:
    """Print findings under one heading a level; nothing when there are none."""
    out = console(to_stderr)
    for level in LEVELS:
        found = [finding for finding in findings if finding.level == level]
        if not found:
            continue
        out.print(Text(f"{level}s ({len(found)})", style=_STYLES[level]))
        for finding in found:
            # Whole lines: they are pasted into issues and searched with grep.
            out.print(f"  {finding.where} [{finding.code}]", soft_wrap=True)
            for line in finding.message.splitlines():
                out.print(f"    {line}", soft_wrap=True)


def count_findings(findings: Iterable[Finding]) -> str:
    """Say how many findings there are: ``2 errors, 1 note``; empty without any."""
    levels = [finding.level for finding in findings]
    counts = [(level, levels.count(level)) for level in LEVELS]
    return ", ".join(f"{n} {level}{'s' if n > 1 else ''}" for level, n in counts if n)


class Progress:
    """Says on stderr what a command is doing once it has run for over two seconds.

    It is called as ``check`` calls its ``progress``: (what is done next, steps done, in all).
    """

    def __init__(self) -> None:
        self._step = ""
        self._shown = threading.Event()
        self._timer = threading.Timer(_QUIET_S, self._show)
        self._timer.daemon = True

    def __call__(self, what: str, done: int, steps: int) -> None:
        self._step = f"[{done + 1}/{steps}] {what} ..." if done < steps else ""
        if self._shown.is_set():
            self._show()

    def _show(self) -> None:
        self._shown.set()
        if self._step:
            print(self._step, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
