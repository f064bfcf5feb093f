# SPDX-License-Identifier: Apache-2.0
"""Answers ``/metrics``: what vLLM answers, and the experts' text behind it.

vLLM formats all of its samples anew for every scrape, four milliseconds in the process that streams
the tokens. Here those who scrape at about the same time get one answer, and formatting rests after
it is done: that takes a hundredth of the process's time, or happens twice a second, however many
ask.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_mixprec.experts.exposition import PublishedText, left_out

SENT_BYTES = 1 << 16  # handed to a connection at a time, so that a slow reader is waited for
# As many times as long as formatting took it rests: it has a hundredth of the time at most.
_REST = 99
_LONGEST_REST_S = 0.5

_NEGOTIATED = (b"accept-encoding", b"accept")


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    async def send(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status,
            "headers": list(self.headers),
        }
        await send(start)
        for part in self._parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _parts(self) -> Iterator[bytes]:
        for start in range(0, len(self.body), SENT_BYTES):
            yield self.body[start : start + SENT_BYTES]


class Scrapes:
    """Stands around the app that answers vLLM's ``/metrics``.

    A scrape waits for formatting that has not begun, so no answer is older than its question: for
    what is under way, for at most ``_LONGEST_REST_S``, and for its own. A lone scraper never waits.
    Who asks in other words, with a query or another method, has an answer of his own at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._published = PublishedText()
        self._to_come: asyncio.Task[_Answer] | None = None
        self._turn = asyncio.Lock()
        self._rested_at = 0.0  # of the monotonic clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (
            scope["method"] != "GET"
            or scope["query_string"]
            or not scope["path"].rstrip("/").endswith("/metrics")
        ):
            await (await self._make(scope, receive)).send(send)
            return
        if self._to_come is None or self._to_come.done():
            self._to_come = asyncio.create_task(self._take_turn(scope))
            self._to_come.add_done_callback(_retrieve)
        # A scraper that goes away does not end the others' answer.
        answer = await asyncio.shield(self._to_come)
        await answer.send(send)

    async def _take_turn(self, scope: Scope) -> _Answer:
        async with self._turn:
            await asyncio.sleep(max(0.0, self._rested_at - time.monotonic()))
            self._to_come = None
            begun = time.monotonic()
            try:
                return await self._make(_without_negotiation(scope), _receive_nothing)
            finally:
                ended = time.monotonic()
                self._rested_at = ended + min(_REST * (ended - begun), _LONGEST_REST_S)

    async def _make(self, scope: Scope, receive: Receive) -> _Answer:
        text = await self._published.read()
        status, headers, parts = 500, [], []

        async def keep(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message.get("headers", ()))
            else:
                parts.append(message.get("body", b""))

        if text:
            with left_out():
                await self._app(_without_negotiation(scope), receive, keep)
            if status == 200:
                parts.append(text)
        else:
            await self._app(scope, receive, keep)
        body = b"".join(parts)
        kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
        return _Answer(status, (*kept, (b"content-length", str(len(body)).encode())), body)


def _without_negotiation(scope: Scope) -> Scope:
    """Ask for text that is not compressed, nor in the format that ends with a line of its own."""
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in _NEGOTIATED]
    return {**scope, "headers": kept}


async def _receive_nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _retrieve(answer: "asyncio.Task[Any]") -> None:
    if not answer.cancelled():
        answer.exception()  # or asyncio logs it as never retrieved when all scrapers left
