# SPDX-License-Identifier: Apache-2.0
"""The routes under ``/v1/mixprec``; vLLM's API key guards all that is below ``/v1``."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from vllm_mixprec.experts.describe import summarize
from vllm_mixprec.serving.errors import ApiError, MixPrecRoute
from vllm_mixprec.serving.generation import generate
from vllm_mixprec.serving.model_info import describe_model
from vllm_mixprec.serving.page import dashboard
from vllm_mixprec.serving.report import describe_stats, encode, merge_engines, name_export
from vllm_mixprec.serving.requests import (
    BatchGenerateBody,
    ExportBody,
    ExportQuery,
    GenerateBody,
    StatsBody,
    StatsQuery,
    WeightMappingBody,
)
from vllm_mixprec.serving.statistics import Engines, Statistics
from vllm_mixprec.serving.updates import Reloader, UpdateRoute, updates_allowed

PREFIX = "/v1/mixprec"

_HEALTH_S = 10.0


@dataclass(slots=True)
class Service:
    """What the routes of one API server need; in ``app.state.mixprec``, None without an engine."""

    client: EngineClient
    statistics: Statistics
    reloader: Reloader
    started_at: float  # of the monotonic clock
    model_info: bytes | None = None
    model_info_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def uptime_s(self, engines: Engines) -> float:
        """Return for how long this server has run, or has counted if that began before.

        The engines count from their own start, which is before the API server's.
        """
        snapshots = engines.values()
        window_s = max(s.ended_s for s in snapshots) - min(s.started_s for s in snapshots)
        now = time.monotonic()
        self.started_at = min(self.started_at, now - window_s)
        return now - self.started_at


def _service(request: Request) -> Service:
    service: Service | None = getattr(request.app.state, "mixprec", None)
    if service is None:
        raise ApiError(
            503, "unavailable", "this server has no engine; ask one that was started by vllm serve"
        )
    return service


Served = Annotated[Service, Depends(_service)]


def _refuse_query(request: Request) -> None:
    """Refuse parameters in the address where they are expected in the body, or nowhere.

    Raises:
        ApiError: there are some.
    """
    if request.query_params:
        name = next(iter(request.query_params))
        message = f"{name}: in the address; expected in the body alone, as JSON"
        raise ApiError(422, "invalid_request", message, name)


_NO_QUERY = [Depends(_refuse_query)]

router = APIRouter(prefix=PREFIX, tags=["mixprec"], route_class=MixPrecRoute)
updates = APIRouter(route_class=UpdateRoute)


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})


@router.get("/model_info")
async def model_info(service: Served) -> Response:
    """The model, its plan, and the source and format of each expert."""
    async with service.model_info_lock:
        if service.model_info is None:
            service.model_info = await asyncio.to_thread(
                lambda: encode(describe_model(service.client.vllm_config))
            )
    return _json(service.model_info)


@router.get("/expert_stats")
async def get_expert_stats(query: Annotated[StatsQuery, Query()], service: Served) -> Response:
    """Which experts worked since the last reset, or in the last minutes."""
    return await _expert_stats(query, service)


@router.post("/expert_stats")
async def post_expert_stats(
    service: Served,
    query: Annotated[StatsQuery, Query()],
    request: Request,
    body: Annotated[StatsBody | None, Body()] = None,
) -> Response:
    """The same, asked in JSON or in the address."""
    if body is not None:
        _refuse_query(request)
    return await _expert_stats(body or query, service)


async def _expert_stats(query: StatsQuery, service: Service) -> Response:
    def describe(engines: Engines) -> bytes:
        return encode(
            describe_stats(
                engines, top_k=query.top_k, detail=query.detail, uptime_s=service.uptime_s(engines)
            )
        )

    kind = ("stats", query.top_k, query.detail)
    return _json(await service.statistics.render(query.minutes, kind, describe))


@router.post("/reset_expert_stats", dependencies=_NO_QUERY)
async def reset_expert_stats(service: Served) -> Response:
    """Begin a new window, and say what the one that ended had counted; totals go on."""
    engines = await service.statistics.reset()
    ended = summarize(merge_engines(engines))
    return _json(encode({"status": "reset", "ended": ended}))


@router.post("/export_expert_stats")
async def export_expert_stats(
    service: Served,
    query: Annotated[ExportQuery, Query()],
    request: Request,
    body: Annotated[ExportBody | None, Body()] = None,
) -> Response:
    """The counts as a file: a snapshot that ``vllm-mixprec stats`` reads, or CSV."""
    if body is not None:
        _refuse_query(request)
    wanted = body or query
    if wanted.reset and wanted.minutes is not None:
        raise ApiError(
            422,
            "invalid_request",
            "minutes: cannot go with reset, which ends the window",
            "minutes",
        )

    def write(engines: Engines) -> tuple[bytes, str]:
        snapshot = merge_engines(engines)
        if wanted.format == "csv":
            return snapshot.to_csv().encode(), name_export(snapshot, "csv")
        return encode(snapshot.to_dict()), name_export(snapshot, "json")

    if wanted.reset:
        content, name = await asyncio.to_thread(write, await service.statistics.reset())
    else:
        kind = ("export", wanted.format)
        content, name = await service.statistics.render(wanted.minutes, kind, write)
    return Response(
        content,
        media_type="text/csv" if wanted.format == "csv" else "application/json",
        headers={
            "Content-Disposition": f'attachment; filename="{name}"',
            "Cache-Control": "no-store",
        },
    )


@router.post("/generate", dependencies=_NO_QUERY)
@with_cancellation
async def generate_one(body: GenerateBody, raw_request: Request) -> Response:
    """Continue one prompt."""
    (answer,) = await generate(_service(raw_request).client, [body.prompt], body)
    return _json(encode(answer))


@router.post("/batch_generate", dependencies=_NO_QUERY)
@with_cancellation
async def generate_batch(body: BatchGenerateBody, raw_request: Request) -> Response:
    """Continue several prompts, in their order."""
    answers = await generate(_service(raw_request).client, body.prompts, body)
    totals: dict[str, int] = {}
    for answer in answers:
        for name, tokens in answer["usage"].items():
            totals[name] = totals.get(name, 0) + tokens
    return _json(encode({"results": answers, "usage": totals}))


@router.get("/health")
async def health(service: Served) -> dict[str, str]:
    """Whether the engine can serve."""
    await asyncio.wait_for(service.client.check_health(), _HEALTH_S)
    # Only a reload of ours leaves it paused; others need not wait for the step that runs.
    if updates_allowed() and await asyncio.wait_for(service.client.is_paused(), _HEALTH_S):
        raise ApiError(
            503,
            "unavailable",
            "generation is paused: the weights are being reloaded, or a reload failed",
        )
    return {"status": "ok"}


@router.get("/dashboard", response_class=HTMLResponse)
async def get_dashboard() -> HTMLResponse:
    """The page that shows all of this."""
    return dashboard()


@updates.post("/reload_weights")
async def reload_weights(service: Served) -> dict[str, Any]:
    """Read the weights again from the plan's sources."""
    return await service.reloader.reload()


@updates.post("/update_weight_mapping")
async def update_weight_mapping(body: WeightMappingBody, service: Served) -> None:
    """Not in this release: a running model keeps its plan."""
    raise ApiError(
        501,
        "not_implemented",
        f"this release does not change the plan of a running model ({len(body.weight_mapping)} "
        "entries were not applied). Write a new plan, run `vllm-mixprec compose`, and restart",
    )


router.include_router(updates)
