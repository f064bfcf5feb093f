# SPDX-License-Identifier: Apache-2.0
"""The counters of experts, layers and tokens in a Prometheus registry, brought up to each poll."""

import asyncio
import os
from collections import Counter as CountOf
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from vllm.logger import init_logger

from vllm_mixprec.experts.exposition import CounterFamily, register
from vllm_mixprec.experts.snapshot import ExpertSnapshot

logger = init_logger("vllm.mixprec")

MAX_EXPERT_SERIES = 10_000
BUSIEST = 16  # experts a layer, where all would be more series than that
SLICE_SERIES = 256  # written before the event loop gets its turn; about half a millisecond


def make_gauge(name: str, about: str, labels: tuple[str, ...], registry: Any) -> Gauge:
    """Register a gauge as vLLM's own are."""
    gauge = Gauge(name, about, labels, registry=None, multiprocess_mode="mostrecent")
    register(name, gauge, registry)
    return gauge


@dataclass(eq=False)
class _Exported:
    """What the series of one engine's model, or of its draft, stand at.

    Attributes:
        layers: label of each layer.
        seen: int64 [layers, experts], the engine's counts at the last poll.
        total: int64 [layers, experts], counted since the first poll; an engine that starts again
            goes on from where it was, so that no counter goes down.
        written: int64 [layers, experts], value of each series; 0 where there is none.
        series: [layers, experts] the counter's child, None where there is none.
        has_series: bool [layers, experts], where there is one.
    """

    layers: tuple[str, ...]
    shape: tuple[int, ...]
    seen: NDArray[np.int64] = field(init=False)
    total: NDArray[np.int64] = field(init=False)
    written: NDArray[np.int64] = field(init=False)
    series: NDArray[np.object_] = field(init=False)
    has_series: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = np.zeros(self.shape, np.int64)
        self.total = np.zeros(self.shape, np.int64)
        self.written = np.zeros(self.shape, np.int64)
        self.series = np.full(self.shape, None, object)
        self.has_series = np.zeros(self.shape, bool)

    def advance(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take the counts of a poll; return what came since the one before."""
        if (counts < self.seen).any():  # the engine started again, from zero
            self.seen = np.zeros(self.shape, np.int64)
        grown = counts - self.seen
        self.seen = counts.copy()
        self.total += grown
        return grown

    def busiest(self) -> NDArray[np.bool_]:
        """Mask of the busiest experts of each layer that were ever busy; ties to the lower id."""
        order = np.argsort(-self.total, axis=1, kind="stable")[:, :BUSIEST]
        mask = np.zeros(self.shape, bool)
        np.put_along_axis(mask, order, True, axis=1)
        return mask & (self.total > 0)


class ExpertSeries:
    """The counters of experts, layers and tokens in a registry.

    Above ``MAX_EXPERT_SERIES``, and unless ``full``, a layer has series for its ``BUSIEST`` experts
    so far only: one that is overtaken loses its series, one that comes (back) starts at its true
    count. In multi-process mode ``prometheus_client`` cannot remove a series: there it stays, and
    goes on counting.
    """

    def __init__(self, model_name: str, full: bool, registry: CollectorRegistry = REGISTRY) -> None:
        self._model_name = model_name
        self._full = full
        self._keeps_series = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._said_capped = False
        self._exported: dict[tuple[int, bool], _Exported] = {}
        self._tokens_seen: CountOf[int] = CountOf()
        engine = ("model_name", "engine")
        self._activations = CounterFamily(
            "mixprec_expert_activations",
            "Tokens that the router sent to an expert. For every layer the sum over its experts is "
            "mixprec_routed_tokens_total x experts per token.",
            (*engine, "layer", "expert"),
            registry,
        )
        self._imbalance = make_gauge(
            "mixprec_layer_imbalance_ratio",
            "Busiest over mean expert of a layer, in the last polling interval in which it worked.",
            (*engine, "layer"),
            registry,
        )
        self._tokens = CounterFamily(
            "mixprec_routed_tokens",
            "Tokens that went through the model's layers, without padding and warm-up.",
            engine,
            registry,
        )

    async def update(self, snapshots: Mapping[int, ExpertSnapshot]) -> bool:
        """Bring the series up to the engines' counts since their start; say whether any grew.

        Yields to the event loop between slices of ``SLICE_SERIES`` series.
        """
        parts = {
            (engine, part is not snapshot): part
            for engine, snapshot in snapshots.items()
            for part in (snapshot, snapshot.draft)
            if part is not None
        }
        capped = self._is_capped(sum(part.counts.size for part in parts.values()))
        grew = False
        for family in (self._tokens, self._activations):
            family.begin()
        for (engine, is_draft), part in parts.items():
            exported = self._exported.get((engine, is_draft))
            if exported is None or (exported.layers, exported.shape) != (
                part.layers,
                part.counts.shape,
            ):
                exported = _Exported(part.layers, part.counts.shape)
                self._exported[engine, is_draft] = exported
            grown = exported.advance(part.counts)
            grew |= bool(grown.any())
            if not is_draft:
                self._count_tokens(engine, part.tokens)
            self._set_imbalance(engine, part.layers, grown)
            await self._write(engine, exported, capped)
        for family in (self._tokens, self._activations):
            family.publish()
        return grew

    def _is_capped(self, series: int) -> bool:
        capped = not self._full and series > MAX_EXPERT_SERIES
        if capped and not self._said_capped:
            self._said_capped = True
            logger.info(
                "%d series of mixprec_expert_activations_total are more than %d: only the %d "
                "busiest experts a layer are exported. VLLM_MIXPREC_EXPERT_METRICS=full exports "
                "all",
                series,
                MAX_EXPERT_SERIES,
                BUSIEST,
            )
        return capped

    def _count_tokens(self, engine: int, tokens: int) -> None:
        seen = self._tokens_seen[engine]
        self._tokens.series(self._model_name, engine).inc(
            tokens - seen if tokens >= seen else tokens
        )
        self._tokens_seen[engine] = tokens

    def _set_imbalance(
        self, engine: int, layers: tuple[str, ...], grown: NDArray[np.int64]
    ) -> None:
        sums, busiest = grown.sum(axis=1), grown.max(axis=1, initial=0)
        for row in np.flatnonzero(sums).tolist():
            ratio = float(busiest[row] * grown.shape[1] / sums[row])
            self._imbalance.labels(self._model_name, engine, layers[row]).set(ratio)

    async def _write(self, engine: int, exported: _Exported, capped: bool) -> None:
        wanted = exported.busiest() if capped else np.ones(exported.shape, bool)
        if self._keeps_series:
            wanted |= exported.has_series
        for row, expert in np.argwhere(exported.has_series & ~wanted).tolist():
            self._activations.remove(self._model_name, engine, exported.layers[row], expert)
            exported.series[row, expert] = None
            exported.has_series[row, expert] = False
            exported.written[row, expert] = 0
        changed = wanted & (~exported.has_series | (exported.written != exported.total))
        for done, (row, expert) in enumerate(np.argwhere(changed).tolist(), start=1):
            series = exported.series[row, expert]
            if series is None:
                layer = exported.layers[row]
                series = self._activations.series(self._model_name, engine, layer, expert)
                exported.series[row, expert] = series
                exported.has_series[row, expert] = True
            value = exported.total[row, expert]
            series.inc(int(value - exported.written[row, expert]))
            exported.written[row, expert] = value
            if done % SLICE_SERIES == 0:
                await asyncio.sleep(0)
