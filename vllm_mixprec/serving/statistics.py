# SPDX-License-Identifier: Apache-2.0
"""One reading of the workers for all who ask at the same time."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Any, TypeVar

from vllm_mixprec.experts.snapshot import ExpertSnapshot

Engines = Mapping[int, ExpertSnapshot]
T = TypeVar("T")

PACE_S = 0.2
"""Least time between the end of a reading and the begin of the next: an engine that serves reads
its counters five times a second at most, whoever asks and however often."""
WAIT_S = 30.0
"""How long a request waits for its turn and its answer."""


class Statistics:
    """Shares readings and their encoded answers among simultaneous requests.

    Nothing is kept: a request joins a reading only if that has not ended, and none that began
    before a reset that has ended. So an answer is never older than its question.

    Args:
        collect: minutes -> data-parallel engine -> what it counted.
        reset: begins a new window, and returns what the one before it had counted to the last.
    """

    def __init__(
        self,
        collect: Callable[[float | None], Awaitable[Engines]],
        reset: Callable[[], Awaitable[Engines]],
        pace_s: float = PACE_S,
    ) -> None:
        self._collect, self._reset, self._pace_s = collect, reset, pace_s
        self._flights: dict[Hashable, asyncio.Task[Any]] = {}
        self._turn = asyncio.Lock()
        self._rested_at = 0.0  # of the monotonic clock

    async def read(self, minutes: float | None = None) -> Engines:
        """Read the counts of the window, or of the last ``minutes``.

        Raises:
            StatsUnavailableError, TimeoutError, EngineDeadError: as ``collect`` does.
        """
        return await self._share(("read", minutes), lambda: self._take_turn(minutes))

    async def render(
        self, minutes: float | None, kind: Hashable, encode: Callable[[Engines], T]
    ) -> T:
        """Read, and encode in a thread; once for all who ask for the same ``kind``.

        Raises:
            StatsUnavailableError, TimeoutError, EngineDeadError: as ``collect`` does.
        """

        async def work() -> T:
            return await asyncio.to_thread(encode, await self.read(minutes))

        return await self._share(("render", minutes, kind), work)

    async def reset(self) -> Engines:
        """Begin a new window; returns the one that ended.

        Raises:
            StatsUnavailableError, TimeoutError, EngineDeadError: as ``reset`` does.
        """
        try:
            return await self._reset()
        finally:
            self._flights.clear()  # they may have read the window that ended

    async def _take_turn(self, minutes: float | None) -> Engines:
        async with self._turn:
            await asyncio.sleep(max(0.0, self._rested_at - time.monotonic()))
            try:
                return await self._collect(minutes)
            finally:
                self._rested_at = time.monotonic() + self._pace_s

    async def _share(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.ensure_future(work())
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        # A client that goes away, or waits too long, does not end the others' reading.
        return await asyncio.wait_for(asyncio.shield(flight), WAIT_S)

    def _land(self, key: Hashable, flight: "asyncio.Task[Any]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # or asyncio logs it as never retrieved when all clients left
