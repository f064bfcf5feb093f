# SPDX-License-Identifier: Apache-2.0
"""What a worker remembers of its counts: since its start, since a reset, and over the last hour."""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HORIZON_S = 3600.0
"""How far back :meth:`History.since` reaches."""
STEP_S = 10.0
"""Least time between two readings that are remembered."""


@dataclass(frozen=True, slots=True, eq=False)
class Totals:
    """What was counted since the engine's start.

    Attributes:
        time_s: unix time at which the counts were read.
        counts: int64 ``[layers, experts]``.
        tokens: routed, by the target model and by its draft.
        requests: that began to run.
    """

    time_s: float
    counts: NDArray[np.int64]
    tokens: tuple[int, int]
    requests: int


class History:
    """The worker's totals over time.

    Attributes:
        start: when counting began; all zero.
        window: where the window of the REST views began: the start, or the last reset.
        last_activation_s: float64 ``[layers, experts]``, unix time of the reading that first saw
            an expert's last activation; NaN for one that was never activated.
    """

    def __init__(self, start_s: float, layers: int, experts: int) -> None:
        nothing = Totals(start_s, np.zeros((layers, experts), np.int64), (0, 0), 0)
        self.start = self.window = nothing
        self.last_activation_s = np.full((layers, experts), np.nan)
        self._newest = nothing
        self._past: deque[Totals] = deque([nothing], maxlen=int(HORIZON_S / STEP_S) + 2)

    def add(self, totals: Totals) -> None:
        """Take note of a reading."""
        self.last_activation_s[totals.counts != self._newest.counts] = totals.time_s
        self._newest = totals
        if totals.time_s - self._past[-1].time_s >= STEP_S:
            self._past.append(totals)

    def reset(self, totals: Totals) -> None:
        """Begin the window anew."""
        self.add(totals)
        self.window = totals

    def since(self, time_s: float) -> Totals:
        """Return the latest remembered totals that are no younger than ``time_s``, else the first.

        While a server exports metrics, counts are read every ten seconds or more often: what is
        returned is then less than two steps older than what was asked for.
        """
        older = [totals for totals in self._past if totals.time_s <= time_s]
        return older[-1] if older else self._past[0]
