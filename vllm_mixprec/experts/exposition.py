# SPDX-License-Identifier: Apache-2.0
"""Counters of thousands of series on ``/metrics``, at next to no cost a poll or a scrape.

``prometheus_client`` writes each series on its own, and formats every sample anew for every scrape,
about ten microseconds each, with the interpreter's lock held that the tokens' front end needs. Here
a poll hands over whole rows of numbers, and nothing is formatted until somebody scrapes: then what
changed is, a row in one go, and :mod:`.scrapes` puts the text behind what vLLM answers.
"""

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, Metric

SLICE_SERIES = 1024  # formatted before the event loop gets its turn; about 100 microseconds

_STORE = "mixprec_series.txt"
_left_out: ContextVar[bool] = ContextVar("left_out", default=False)
_registered: dict[CollectorRegistry, dict[str, Any]] = {}


class _Form:
    """The lines of series that differ in their last label alone, but for the values."""

    def __init__(self, name: str, labels: Sequence[str], shared: Sequence[str], ids: Sequence[int]):
        self._name, self._labels = name, labels
        self.shared, self.ids = shared, ids

    @cached_property
    def template(self) -> bytes:
        """What ``%`` makes the lines of: first of the ids, then of the values."""
        escaped = [_escape(value).replace("%", "%%%%") for value in self.shared]
        pairs = zip(self._labels, [*escaped, "%d"], strict=True)
        inside = ",".join(f'{label}="{value}"' for label, value in sorted(pairs))
        line = f"{self._name}{{{inside}}} %%d\n"
        return "".join([line % number for number in self.ids]).encode()


class _Lines:
    """A form with values. Never changes, so that whoever writes it down may take his time."""

    def __init__(self, form: _Form, values: NDArray[np.int64]) -> None:
        self.form, self.values = form, values

    @cached_property
    def text(self) -> bytes:
        return self.form.template % tuple(self.values.tolist())  # bytes: a third of str's time


class _Edition:
    """What a family stood at when it was published."""

    def __init__(self, head: bytes, lines: Mapping[tuple[str, ...], _Lines]) -> None:
        self._head, self.lines = head, lines
        self._text: bytes | None = None

    async def text(self) -> bytes:
        """Return the family in Prometheus' text format 0.0.4; lets the event loop turn."""
        if self._text is None:
            done = 0
            for lines in self.lines.values():
                if "text" not in lines.__dict__:
                    done += len(lines.values)
                    if done > SLICE_SERIES:
                        done = 0
                        await asyncio.sleep(0)
                lines.text  # noqa: B018  formats it
            self._text = self._head + b"".join(lines.text for lines in self.lines.values())
        return self._text


class CounterFamily:
    """A counter of many series, without the ``_created`` twin of each.

    A collector as any other, too, for scrapes that :mod:`.scrapes` does not see.

    Args:
        name: without ``_total``.
        about: what it counts.
        labels: their names; the last is a number.
    """

    def __init__(
        self,
        name: str,
        about: str,
        labels: tuple[str, ...],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._head = f"# HELP {name}_total {about}\n# TYPE {name}_total counter\n".encode()
        self._edition = _Edition(self._head, {})
        self._next: dict[tuple[str, ...], _Lines] = {}
        self._changed = False
        register(name, self, registry)

    def set(self, shared: tuple[str, ...], ids: Sequence[int], values: NDArray[np.int64]) -> None:
        """Say what the series stand at that share all labels but the last.

        Args:
            shared: values of the labels that they share.
            ids: values of the last label; other series of these labels end.
            values: int64, one an id, not to be changed any more.
        """
        before = self._next.get(shared)
        if before is not None and (before.form.ids is ids or np.array_equal(before.form.ids, ids)):
            form = before.form
        else:
            form = _Form(f"{self._name}_total", self._labels, shared, ids)
        self._next[shared] = _Lines(form, values)
        self._changed = True

    def end(self, shared: tuple[str, ...]) -> None:
        """End the series that share these labels."""
        self._changed |= self._next.pop(shared, None) is not None

    def publish(self) -> None:
        """Have the next scrape see what was said since the last time, all of it."""
        if self._changed:
            self._edition = _Edition(self._head, dict(self._next))
            self._changed = False

    async def text(self) -> bytes:
        """Return what was published in Prometheus' text format 0.0.4."""
        return await self._edition.text()

    def describe(self) -> Iterable[Metric]:
        return [CounterMetricFamily(self._name, self._about, labels=self._labels)]

    def collect(self) -> Iterable[Metric]:
        if _left_out.get():
            return
        metric = CounterMetricFamily(self._name, self._about, labels=self._labels)
        for lines in self._edition.lines.values():
            for number, value in zip(lines.form.ids, lines.values.tolist(), strict=True):
                metric.add_metric([*lines.form.shared, str(number)], value)
        yield metric


@contextmanager
def left_out() -> Iterator[None]:
    """While the body runs, families are no part of their registry: their text comes otherwise."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


def _escape(value: str) -> str:
    """Escape a label's value as Prometheus' text format has it."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def register(name: str, collector: Any, registry: CollectorRegistry = REGISTRY) -> None:
    """Register in place of what an earlier engine of this process exported under that name."""
    known = _registered.setdefault(registry, {})
    if name in known:
        registry.unregister(known[name])
    registry.register(collector)
    known[name] = collector


def unregister_metrics(registry: CollectorRegistry = REGISTRY) -> None:
    """Take off what an earlier engine of this process exported, as vLLM does with its own."""
    for collector in _registered.pop(registry, {}).values():
        registry.unregister(collector)
    store = _store()
    if store is not None:
        store.unlink(missing_ok=True)


# Where several API servers answer, one exports: its text lies in the folder that vLLM makes for
# the files of prometheus_client, which know no series that ends and take a scrape milliseconds.


def _store() -> Path | None:
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) / _STORE if folder else None


def metrics_route_missing() -> str:
    """Say what it costs that nobody appends the text, with a place for the reason."""
    if _store() is None:  # the series are in vLLM's own answer then
        return "scrapes of experts' metrics cost more: %s"
    return "of several API servers none exports experts' metrics: %s. Start one, or report this"


async def share_text(registry: CollectorRegistry = REGISTRY) -> None:
    """Have the other API servers see what was published, if there are any."""
    store = _store()
    if store is not None:
        await asyncio.to_thread(_replace, store, await _write(registry))


def _replace(store: Path, text: bytes) -> None:
    new = store.with_suffix(f".{os.getpid()}")
    new.write_bytes(text)
    new.replace(store)


async def _write(registry: CollectorRegistry) -> bytes:
    known = list(_registered.get(registry, {}).values())
    editions = [family._edition for family in known if isinstance(family, CounterFamily)]
    return b"".join([await edition.text() for edition in editions])


class PublishedText:
    """What is published, by this process or by the API server that does so for all."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._seen: tuple[int, int] | None = None
        self._text = b""

    async def read(self) -> bytes:
        """Return the families as text."""
        store = _store()
        if store is None:
            return await _write(self._registry)
        try:
            found = store.stat()
            seen = (found.st_ino, found.st_mtime_ns)
            if seen != self._seen:
                self._text = await asyncio.to_thread(store.read_bytes)
                self._seen = seen
        except FileNotFoundError:  # nothing was polled so far
            return b""
        return self._text
