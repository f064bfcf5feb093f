# SPDX-License-Identifier: Apache-2.0
"""``/metrics`` formats every sample of every collector anew for every scrape.

``attach_router`` (entrypoints/serve/instrumentator/metrics.py, vLLM 0.32 and 0.33) answers with
``generate_latest`` alone, which knows no text that is ready. Ten thousand series of experts take it
a tenth of a second, in the process that streams the tokens; vLLM's own take it four milliseconds.
"""

import functools
import inspect

from fastapi import FastAPI
from starlette.routing import Mount, Route
from vllm.entrypoints.serve.instrumentator import metrics
from vllm.logger import init_logger

from vllm_mixprec.experts.exposition import metrics_route_missing
from vllm_mixprec.experts.scrapes import Scrapes
from vllm_mixprec.patches import Patch

logger = init_logger("vllm.mixprec")

_STOCK = metrics.attach_router
_PATH = "/metrics"


@functools.wraps(_STOCK)
def _attach_router(app: FastAPI) -> None:
    """Attach vLLM's two routes, and stand around both."""
    _STOCK(app)
    routes = [
        route for route in app.routes if isinstance(route, Route | Mount) and route.path == _PATH
    ]
    if not routes:
        logger.warning(metrics_route_missing(), f"vLLM answers {_PATH} by no route that is known")
    for route in routes:
        route.app = Scrapes(route.app)


def needed() -> bool:
    """Whether vLLM's route knows nothing but a registry."""
    return ".expose(" in inspect.getsource(_STOCK)


def apply() -> None:
    """Put ours where vLLM's API server looks it up when it builds its app."""
    metrics.attach_router = _attach_router


PATCH = Patch(
    name="metrics_route",
    issues=(),
    broken="/metrics formats every series anew for every scrape",
    mended="experts' series are formatted when they changed; scrapes of one moment share an answer",
    needed=needed,
    apply=apply,
    remove_when="vLLM exports the experts' counts itself",
)
