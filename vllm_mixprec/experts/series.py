# SPDX-License-Identifier: Apache-2.0
"""The counters of experts, layers and tokens in a Prometheus registry, brought up to each poll.

A poll is arithmetic on whole arrays: whatever takes time a series is left to the scrapes.
"""

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
        shape: (layers, experts).
        seen: int64 [layers, experts], the engine's counts at the last poll.
        total: int64 [layers, experts], counted since the first poll; an engine that starts again
            goes on from where it was, so that no counter goes down. Each poll makes it anew.
        imbalance: the gauge of each layer that worked.
        every: ids of all experts of a layer.
        capped: whether only the busiest have series; None before the first poll.
    """

    layers: tuple[str, ...]
    shape: tuple[int, ...]
    seen: NDArray[np.int64] = field(init=False)
    total: NDArray[np.int64] = field(init=False)
    imbalance: dict[int, Gauge] = field(init=False, default_factory=dict)
    every: range = field(init=False)
    capped: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.seen = np.zeros(self.shape, np.int64)
        self.total = np.zeros(self.shape, np.int64)
        self.every = range(self.shape[1])

    def advance(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take the counts of a poll; return what came since the one before."""
        if (counts < self.seen).any():  # the engine started again, from zero
            self.seen = np.zeros(self.shape, np.int64)
        grown = counts - self.seen
        self.seen = counts
        self.total = self.total + grown
        return grown

    def busiest(self) -> list[NDArray[np.intp]]:
        """Return the busiest experts of each layer that were ever busy; ties to the lower id."""
        experts = self.shape[1]
        rank = self.total * experts + np.arange(experts - 1, -1, -1)  # no two alike
        least = max(experts - BUSIEST, 0)
        busiest = np.sort(np.argpartition(rank, least, axis=1)[:, least:], axis=1)
        worked = np.take_along_axis(self.total, busiest, axis=1) > 0
        return [row[mask] for row, mask in zip(busiest, worked, strict=True)]


class ExpertSeries:
    """The counters of experts, layers and tokens in a registry.

    Above ``MAX_EXPERT_SERIES``, and unless ``full``, a layer has series for its ``BUSIEST`` experts
    so far only: one that is overtaken loses its series, one that comes (back) starts at its true
    count.
    """

    def __init__(self, model_name: str, full: bool, registry: CollectorRegistry = REGISTRY) -> None:
        self._model_name = model_name
        self._full = full
        self._said_capped = False
        self._exported: dict[tuple[int, bool], _Exported] = {}
        self._tokens_seen: CountOf[int] = CountOf()
        self._tokens_total: CountOf[int] = CountOf()
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

    def update(self, snapshots: Mapping[int, ExpertSnapshot]) -> bool:
        """Bring the series up to the engines' counts since their start; say whether any grew."""
        parts = {
            (engine, part is not snapshot): part
            for engine, snapshot in snapshots.items()
            for part in (snapshot, snapshot.draft)
            if part is not None
        }
        capped = self._is_capped(sum(part.counts.size for part in parts.values()))
        grew = False
        for (engine, is_draft), part in parts.items():
            exported = self._exported_of(engine, is_draft, part)
            grown = exported.advance(part.counts)
            grew |= bool(grown.any())
            if not is_draft:
                self._count_tokens(engine, part.tokens)
            self._set_imbalance(engine, exported, grown)
            self._set_activations(engine, exported, grown, capped)
        self._set_tokens()
        for family in (self._tokens, self._activations):
            family.publish()
        return grew

    def _exported_of(self, engine: int, is_draft: bool, part: ExpertSnapshot) -> _Exported:
        exported = self._exported.get((engine, is_draft))
        if exported is None or (exported.layers, exported.shape) != (
            part.layers,
            part.counts.shape,
        ):
            for layer in exported.layers if exported is not None else ():
                self._activations.end((self._model_name, str(engine), layer))
            exported = _Exported(part.layers, part.counts.shape)
            self._exported[engine, is_draft] = exported
        return exported

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
        self._tokens_total[engine] += tokens - seen if tokens >= seen else tokens
        self._tokens_seen[engine] = tokens

    def _set_tokens(self) -> None:
        engines = sorted(self._tokens_total)
        totals = np.array([self._tokens_total[engine] for engine in engines], np.int64)
        self._tokens.set((self._model_name,), engines, totals)

    def _set_imbalance(self, engine: int, exported: _Exported, grown: NDArray[np.int64]) -> None:
        sums, busiest = grown.sum(axis=1), grown.max(axis=1, initial=0)
        worked = np.flatnonzero(sums)
        ratios = busiest[worked] * grown.shape[1] / sums[worked]
        for row, ratio in zip(worked.tolist(), ratios.tolist(), strict=True):
            gauge = exported.imbalance.get(row)
            if gauge is None:
                gauge = self._imbalance.labels(self._model_name, engine, exported.layers[row])
                exported.imbalance[row] = gauge
            gauge.set(ratio)

    def _set_activations(
        self, engine: int, exported: _Exported, grown: NDArray[np.int64], capped: bool
    ) -> None:
        rows = np.flatnonzero(grown.any(axis=1)).tolist()
        if exported.capped is not capped:  # at the first poll, and when another engine comes
            exported.capped = capped
            rows = range(len(exported.layers))
        chosen = exported.busiest() if capped else None
        for row in rows:
            shared = (self._model_name, str(engine), exported.layers[row])
            total = exported.total[row]
            if chosen is None:
                self._activations.set(shared, exported.every, total)
            elif len(chosen[row]):
                self._activations.set(shared, chosen[row], total[chosen[row]])
            else:
                self._activations.end(shared)
