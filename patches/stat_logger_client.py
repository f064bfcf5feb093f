# SPDX-License-Identifier: Apache-2.0
"""A stat logger plug-in never meets the engine's client, and undoes ``--disable-log-stats``.

``AsyncLLM.__init__`` (v1/engine/async_llm.py, vLLM 0.32 and 0.33) builds the loggers of
``vllm.stat_logger_plugins`` from the config alone, and turns all statistics on where it finds one,
whatever the user asked for.

Importing this module imports ``AsyncLLM``, so only front ends should. It mends the instance whose
``__init__`` is running, too: what starts the output handler is looked up on the class.
"""

import functools
import inspect
from contextvars import ContextVar
from typing import Any

from vllm.v1.engine import async_llm
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_mixprec.patches import Patch

_STOCK_INIT = AsyncLLM.__init__
_STOCK_RUN = AsyncLLM._run_output_handler
_STOCK_LOAD = async_llm.load_stat_logger_plugin_factories

_log_stats: ContextVar[bool] = ContextVar("log_stats", default=True)


@functools.wraps(_STOCK_INIT)
def _init(self: AsyncLLM, *args: Any, **kwargs: Any) -> None:
    asked = inspect.signature(_STOCK_INIT).bind(self, *args, **kwargs).arguments["log_stats"]
    before = _log_stats.set(asked)
    try:
        _STOCK_INIT(self, *args, **kwargs)
    finally:
        _log_stats.reset(before)


@functools.wraps(_STOCK_LOAD)
def _load_stat_logger_plugin_factories() -> list[Any]:
    """Leave out, where statistics are off, the loggers that say they follow that flag."""
    factories = _STOCK_LOAD()
    if _log_stats.get():
        return list(factories)
    return [factory for factory in factories if not getattr(factory, "follows_log_stats", False)]


@functools.wraps(_STOCK_RUN)
def _run_output_handler(self: AsyncLLM) -> None:
    """Hand the client, once it can be asked, to every logger that has a ``take_client``.

    vLLM calls this for each request, so all but the first call must cost nothing.
    """
    if self.output_handler is not None:
        return
    _STOCK_RUN(self)
    if self.logger_manager is not None:
        for stat_logger in self.logger_manager.stat_loggers:
            take_client = getattr(stat_logger, "take_client", None)
            if take_client is not None:
                take_client(self)


def needed() -> bool:
    """Whether ``AsyncLLM`` builds plug-ins without itself, and without asking for ``log_stats``."""
    source = inspect.getsource(_STOCK_INIT)
    return "has_custom_loggers" in source and "engine_client=" not in source


def apply() -> None:
    """Put ours where ``AsyncLLM`` looks them up."""
    AsyncLLM.__init__ = _init
    AsyncLLM._run_output_handler = _run_output_handler
    async_llm.load_stat_logger_plugin_factories = _load_stat_logger_plugin_factories


PATCH = Patch(
    name="stat_logger_client",
    issues=(),
    broken="a stat logger plug-in gets no engine client, and --disable-log-stats is undone by its "
    "mere presence",
    mended="loggers with a take_client get the client; ours stays away under --disable-log-stats",
    needed=needed,
    apply=apply,
    remove_when="plug-ins are built with the client, and only where statistics are on",
)
