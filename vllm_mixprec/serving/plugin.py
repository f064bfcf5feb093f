# SPDX-License-Identifier: Apache-2.0
"""``MixPrecEndpoints``: what vLLM's API server loads under ``vllm.endpoint_plugins``."""

import time
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.middleware import Middleware
from vllm.logger import init_logger

from vllm_mixprec.experts.collect import collect, reset
from vllm_mixprec.serving.page import KeyPrompt
from vllm_mixprec.serving.routes import PREFIX, Service, router
from vllm_mixprec.serving.statistics import Engines, Statistics
from vllm_mixprec.serving.updates import Reloader

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = init_logger("vllm.mixprec")


class MixPrecEndpoints:
    """Adds ``/v1/mixprec``; loaded only when ``VLLM_PLUGINS`` names ``mixprec_endpoints``."""

    name = "mixprec_endpoints"
    required_tasks = None

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        self._app = app

    async def init_state(
        self, engine_client: "EngineClient | None", state: State, args: Namespace
    ) -> None:
        if engine_client is None:  # vLLM's render server, which has no engine
            state.mixprec = None
        else:
            state.mixprec = Service(
                client=engine_client,
                statistics=make_statistics(engine_client),
                reloader=await Reloader.create(engine_client),
                started_at=time.monotonic(),
            )
            logger.info("expert statistics under %s/, as a page %s/dashboard", PREFIX, PREFIX)
        self._prompt_for_keys()

    def _prompt_for_keys(self) -> None:
        """Stand outside vLLM's check of API keys, which was added after our routes."""
        assert self._app is not None, "vLLM attaches the routes before it starts the engine"
        path = f"{PREFIX}/dashboard"
        if self._app.middleware_stack is None:
            self._app.user_middleware.insert(0, Middleware(KeyPrompt, path=path))
        else:  # vLLM's SageMaker support builds it early
            self._app.middleware_stack = KeyPrompt(self._app.middleware_stack, path=path)


def make_statistics(client: "EngineClient") -> Statistics:
    """Read and reset the counters of the engines behind a client."""

    async def read(minutes: float | None) -> Engines:
        return await collect(client, minutes=minutes)

    return Statistics(read, partial(reset, client))
