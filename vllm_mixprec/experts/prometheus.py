# SPDX-License-Identifier: Apache-2.0
"""Expert statistics on vLLM's own ``/metrics``: the entry point of ``vllm.stat_logger_plugins``.

The truth lives in the workers. One process, the first of the API servers, asks them every second
while they work and publishes what they say, so that with several API servers nothing is exported
twice. Nothing here runs in the path of a token.
"""

import asyncio
import hashlib
import logging
import weakref
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_mixprec.errors import MixPrecError, StatsUnavailableError
from vllm_mixprec.experts.collect import collect, counters_enabled
from vllm_mixprec.experts.exposition import (
    metrics_route_missing,
    share_text,
    unregister_metrics,
)
from vllm_mixprec.experts.series import ExpertSeries, make_gauge
from vllm_mixprec.experts.setting import metrics_setting
from vllm_mixprec.experts.snapshot import ExpertSnapshot
from vllm_mixprec.patches import stat_logger_client
from vllm_mixprec.quant.config import METHOD, load_table, plan_path

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = init_logger("vllm.mixprec")

POLL_S = 1.0
IDLE_POLLS = 10  # of POLL_S: the longest time between two polls, which feed the workers' history
MAX_BACKOFF_S = 60.0

Read = Callable[[], Awaitable[Mapping[int, ExpertSnapshot]]]


def export_plan(vllm_config: VllmConfig, registry: CollectorRegistry = REGISTRY) -> None:
    """Export which plan is served and what its weights take; nothing for a model without one.

    Bytes are those of the tensors that are loaded, as their source stores them. Reads the sources'
    headers.

    Raises:
        MixPrecError, OSError: the plan or a source cannot be read any more, or is another by now.
    """
    model = vllm_config.model_config
    if model.quantization != METHOD:
        return
    path = Path(plan_path(model.model, model.hf_config))
    table = load_table(vllm_config, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    make_gauge(
        "mixprec_plan_info",
        "The plan that is served: SHA-256 of its file.",
        ("model_name", "plan_sha256"),
        registry,
    ).labels(model.served_model_name, digest).set(1)
    weight_bytes = make_gauge(
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
        first = self._series is None
        if self._series is None:  # a model without experts has no metric, not an empty one
            self._series = ExpertSeries(self._model_name, self._full, self._registry)
        # Aborted requests are computed a little longer than they are answered: the engines are at
        # rest when a poll finds nothing new.
        grew = self._series.update(snapshots)
        self.worked |= grew
        if grew or first:
            await share_text(self._registry)
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
        if setting != "off":  # what one of several API servers exports, each of them answers
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
            return
        problem = "vLLM answers /metrics in a way that is not known"
    except Exception as error:  # metrics must not end a server
        problem = f"{type(error).__name__}: {error}"
    logger.warning(metrics_route_missing(), problem)


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
