# SPDX-License-Identifier: Apache-2.0
"""Counters of thousands of series on ``/metrics``, at next to no cost a scrape.

``prometheus_client`` formats every sample anew for every scrape, about ten microseconds each, with
the interpreter's lock held that the tokens' front end needs. Here a series is formatted when it
begins, and a family once a poll: :class:`AppendSeries` puts that text behind what vLLM answers.
"""

import os
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.metrics_core import Metric
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_appended: ContextVar[bool] = ContextVar("appended", default=False)
_registered: dict[CollectorRegistry, dict[str, Any]] = {}


class Series:
    """One series of a family; only ever grows.

    Attributes:
        value: what it stands at.
        prefix: its line in the text format, up to the value.
    """

    __slots__ = ("_child", "prefix", "value")

    def __init__(self, child: Counter, prefix: str) -> None:
        self._child = child
        self.prefix = prefix
        self.value = 0

    def inc(self, by: int) -> None:
        self._child.inc(by)
        self.value += by


class CounterFamily:
    """A counter of many series, without the ``_created`` twin of each.

    A collector as any other, too: for scrapes that :class:`AppendSeries` does not see, and, in
    multi-process mode, through ``prometheus_client``'s files.
    """

    def __init__(
        self,
        name: str,
        about: str,
        labels: tuple[str, ...],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._counter = Counter(name, about, labels, registry=None)
        self._labels = labels
        self._name = f"{name}_total"
        self._head = f"# HELP {self._name} {about}\n# TYPE {self._name} counter\n"
        self._series: dict[tuple[str, ...], Series] = {}
        self._writing = False
        self._text: bytes | None = None
        register(name, self, registry)

    def series(self, *values: object) -> Series:
        """Return the series with these values of its labels; begins it at 0."""
        key = tuple(map(str, values))
        if key not in self._series:
            pairs = sorted(zip(self._labels, key, strict=True))
            inside = ",".join(f'{label}="{_escape(value)}"' for label, value in pairs)
            child = self._counter.labels(*key)
            self._series[key] = Series(child, f"{self._name}{{{inside}}} ")
        return self._series[key]

    def remove(self, *values: object) -> None:
        """End a series. In multi-process mode ``prometheus_client`` goes on exporting it."""
        key = tuple(map(str, values))
        del self._series[key]
        self._counter.remove(*key)

    def begin(self) -> None:
        """Until :meth:`publish`, have scrapes see what was published last."""
        self._writing = True

    def publish(self) -> None:
        """Have the next scrape see what the series stand at."""
        self._writing = False
        self._text = None

    def text(self) -> bytes:
        """Return the family in Prometheus' text format 0.0.4."""
        if self._text is None:
            lines = [f"{series.prefix}{series.value}\n" for series in self._series.values()]
            text = (self._head + "".join(lines)).encode()
            if self._writing:  # nothing was ever published
                return text
            self._text = text
        return self._text

    def describe(self) -> Iterable[Metric]:
        return self._counter.describe()

    def collect(self) -> Iterable[Metric]:
        if _appended.get():
            return
        for metric in self._counter.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


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


def published_text(registry: CollectorRegistry = REGISTRY) -> bytes:
    """Return all families of a registry as text.

    Empty in multi-process mode, where the values of all processes lie in files.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return b""
    known = _registered.get(registry, {}).values()
    return b"".join(family.text() for family in known if isinstance(family, CounterFamily))


class AppendSeries:
    """Answers for vLLM's ``/metrics``: what it answers, and the families' text behind that."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = published_text()
        if scope["type"] != "http" or not text:
            await self._app(scope, receive, send)
            return
        served = False

        async def send_both(message: Message) -> None:
            nonlocal served
            if message["type"] == "http.response.start":
                served = message["status"] == 200
                headers = MutableHeaders(raw=list(message["headers"]))
                if served and "content-length" in headers:
                    length = int(headers["content-length"]) + len(text)
                    headers["content-length"] = str(length)
                message = {**message, "headers": headers.raw}
            elif served and not message.get("more_body", False):
                message = {**message, "body": message.get("body", b"") + text}
            await send(message)

        plain = [
            (name, value) for name, value in Headers(scope=scope).raw if name != b"accept-encoding"
        ]
        token = _appended.set(True)
        try:
            await self._app({**scope, "headers": plain}, receive, send_both)
        finally:
            _appended.reset(token)
