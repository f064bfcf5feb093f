# SPDX-License-Identifier: Apache-2.0
"""Expert statistics on vLLM's own ``/metrics``: the entry point of ``vllm.stat_logger_plugins``.

The truth lives in the workers. One process, the first of the API servers, asks them every second
while they work and writes what changed into ``prometheus_client`` counters, so that with several
API servers nothing is exported twice. Nothing here runs in the path of a token.
"""

import asyncio
import hashlib
import logging
import os
import weakref
from collections import Counter as CountOf
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_mixprec.errors import MixPrecError, StatsUnavailableError
from vllm_mixprec.experts.collect import collect, counters_enabled
from vllm_mixprec.experts.exposition import CounterFamily, register, unregister_metrics
from vllm_mixprec.experts.setting import metrics_setting
from vllm_mixprec.experts.snapshot import ExpertSnapshot
from vllm_mixprec.patches import stat_logger_client
from vllm_mixprec.plan import Plan
from vllm_mixprec.quant.config import METHOD, dtype_of, layout_of, plan_path
from vllm_mixprec.quant.methods import usable_platform
from vllm_mixprec.routing import load_route_table

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = init_logger("vllm.mixprec")

POLL_S = 1.0
IDLE_POLLS = 10  # of POLL_S: the longest time between two polls, which feed the workers' history
MAX_BACKOFF_S = 60.0
MAX_EXPERT_SERIES = 10_000
BUSIEST = 16  # experts a layer, where all would be more series than that
SLICE_SERIES = 256  # written before the event loop gets its turn; about half a millisecond

Read = Callable[[], Awaitable[Mapping[int, ExpertSnapshot]]]


def _make_gauge(name: str, about: str, labels: tuple[str, ...], registry: Any) -> Gauge:
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
        self._imbalance = _make_gauge(
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


def export_plan(vllm_config: VllmConfig, registry: CollectorRegistry = REGISTRY) -> None:
    """Export which plan is served and what its weights take; nothing for a model without one.

    Bytes are those of the tensors that are loaded, as their source stores them. Reads the sources'
    headers.

    Raises:
        MixPrecError, OSError: the plan or a source cannot be read any more.
    """
    model = vllm_config.model_config
    if model.quantization != METHOD:
        return
    path = Path(plan_path(model.model, model.hf_config))
    table = load_route_table(
        Plan.from_yaml(path),
        layout=layout_of(vllm_config),
        platform=usable_platform(),
        dtype=dtype_of(vllm_config),
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _make_gauge(
        "mixprec_plan_info",
        "The plan that is served: SHA-256 of its file.",
        ("model_name", "plan_sha256"),
        registry,
    ).labels(model.served_model_name, digest).set(1)
    weight_bytes = _make_gauge(
        "mixprec_weight_bytes",
        "Bytes of the weights in use, as their source stores them.",
        ("model_name", "source", "format"),
        registry,
    )
    for (source, stored), size_bytes in table.bytes_by_source().items():
        weight_bytes.labels(model.served_model_name, source, stored).set(size_bytes)


class ExpertPoller:
    """Keeps the series up to date until the engines are gone.

    Attributes:
        worked: set by whoever sees an engine work.
    """

    def __init__(
        self,
        model_name: str,
        full: bool,
        sees_all_work: bool = True,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self.worked = False
        self._model_name = model_name
        self._full = full
        self._sees_all_work = sees_all_work
        self._registry = registry
        self._series: ExpertSeries | None = None
        self._backoff_s = 0.0

    async def run(self, read: Read) -> None:
        """Poll ``read``: totals of every engine since its start.

        Ends when it raises StatsUnavailableError or EngineDeadError. At anything else it goes on,
        ever more rarely: metrics must not end a server.
        """
        while True:
            self.worked = False
            try:
                await self._update(await read())
            except StatsUnavailableError as error:
                logger.info("No expert metrics: %s", error)
                return
            except EngineDeadError:
                return
            except Exception as error:
                self._back_off(error)
            await self._rest()

    async def _update(self, snapshots: Mapping[int, ExpertSnapshot]) -> None:
        if self._series is None:  # a model without experts has no metric, not an empty one
            self._series = ExpertSeries(self._model_name, self._full, self._registry)
        # Aborted requests are computed a little longer than they are answered: the engines are at
        # rest when a poll finds nothing new.
        self.worked |= await self._series.update(snapshots)
        if self._backoff_s:
            self._backoff_s = 0.0
            logger.info("Expert metrics are up to date again")

    def _back_off(self, error: Exception) -> None:
        if not self._backoff_s:
            logger.warning(
                "Expert metrics stand still: %s: %s. Asking again, ever more rarely",
                type(error).__name__,
                error,
                exc_info=logger.isEnabledFor(logging.DEBUG),
            )
        self._backoff_s = min(2 * self._backoff_s or 2 * POLL_S, MAX_BACKOFF_S)

    async def _rest(self) -> None:
        """Wait for the next poll: a second while the engines work, up to ten when they do not."""
        if self._backoff_s:
            await asyncio.sleep(self._backoff_s)
            return
        for _ in range(IDLE_POLLS):
            await asyncio.sleep(POLL_S)
            if self.worked or not self._sees_all_work:
                return


class ExpertStatLogger(AggregateStatLoggerBase):
    """Exports expert statistics of every engine of a front end.

    ``take_client`` and ``follows_log_stats`` are what ``patches/stat_logger_client.py`` asks for.
    """

    follows_log_stats = True

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._vllm_config = vllm_config
        self._task: asyncio.Task[None] | None = None
        try:
            setting = metrics_setting()
        except MixPrecError as error:
            logger.error("No expert metrics are exported: %s", error)
            setting = "off"
        parallel = vllm_config.parallel_config
        self._exports = setting != "off" and parallel._api_process_rank == 0
        self._poller = ExpertPoller(
            str(vllm_config.model_config.served_model_name),
            full=setting == "full",
            # The steps whose outputs go to another API server are not recorded here.
            sees_all_work=parallel._api_process_count == 1,
        )
        if self._exports:
            unregister_metrics()
            _speed_up_scrapes()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Note that an engine works; called for each of its steps."""
        self._poller.worked = True

    def log_engine_initialized(self) -> None:
        """Say nothing: vLLM's own loggers do."""

    def take_client(self, client: "AsyncLLM") -> None:
        """Start to export; called in the event loop of the front end, with its engine client."""
        if self._exports and self._task is None:
            self._task = asyncio.create_task(self._export(_make_reader(client)))

    async def _export(self, read: Read) -> None:
        try:
            await asyncio.to_thread(export_plan, self._vllm_config)
        except Exception as error:  # metrics must not end a server
            logger.warning("mixprec_weight_bytes and mixprec_plan_info are not exported: %s", error)
        if counters_enabled(self._vllm_config) or self._vllm_config.model_config.is_moe:
            await self._poller.run(read)


def _speed_up_scrapes() -> None:
    """Have the app that this API server is about to build append the series' text."""
    try:
        from vllm_mixprec.patches import metrics_route

        if metrics_route.needed():
            metrics_route.apply()
    except Exception as error:  # the series are in vLLM's own answer then
        logger.warning("Scrapes of expert metrics cost more: %s: %s", type(error).__name__, error)


def _make_reader(client: "AsyncLLM") -> Read:
    """Return what reads the totals through a client, without keeping the client alive.

    As vLLM's own output handler: a client ends its engines when it is collected.
    """
    reference = weakref.ref(client)

    async def read() -> Mapping[int, ExpertSnapshot]:
        engine = reference()
        if engine is None or engine.errored:
            raise EngineDeadError
        try:
            return await collect(engine, total=True)
        except Exception as error:
            if engine.errored:  # while it was asked
                raise EngineDeadError from error
            raise

    return read


# For a start with VLLM_PLUGINS=mixprec_metrics, which leaves out plugin.py: only front ends load
# this module, inside AsyncLLM.__init__.
if stat_logger_client.needed():
    stat_logger_client.apply()
