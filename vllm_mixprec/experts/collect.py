# SPDX-License-Identifier: Apache-2.0
"""Asks the workers for their counts and puts the answers of stages and ranks together.

One way for notebooks, HTTP and Prometheus, over any executor and any number of nodes: vLLM's
``collective_rpc``. The workers hold all state, so several front ends tell the same.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vllm_mixprec.errors import StatsUnavailableError
from vllm_mixprec.experts.setting import VARIABLE
from vllm_mixprec.experts.snapshot import ExpertSnapshot

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient

ENABLED_KEY = "mixprec_expert_counters"
"""In ``VllmConfig.additional_config``: the front end's word to the workers. It is part of the key
of vLLM's compile cache, so that a graph without counters is never taken for one with them."""

T = TypeVar("T", np.int64, np.float64)

_STATS = "mixprec_expert_stats"
_RESET = "mixprec_reset_expert_stats"


def counters_enabled(vllm_config: "VllmConfig") -> bool:
    """Whether the engine was started with counters."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and bool(additional.get(ENABLED_KEY))


def expert_stats(llm: "LLM", *, minutes: float | None = None) -> ExpertSnapshot:
    """Read which experts an offline engine activated.

    Args:
        llm: a ``vllm.LLM``, of a mixed model or any other MoE model.
        minutes: only the last that many, at most 60; None for everything since the start.

    Raises:
        StatsUnavailableError: the engine counts nothing.
    """
    config = llm.llm_engine.vllm_config
    _require_counters(config)
    answers = llm.collective_rpc(_STATS, args=(time.time(), minutes))
    return merge(answers, str(config.model_config.served_model_name))


async def collect(
    client: "EngineClient",
    *,
    minutes: float | None = None,
    total: bool = False,
    timeout_s: float = 20.0,
) -> dict[int, ExpertSnapshot]:
    """Read the counts of every engine behind a server's client.

    Args:
        client: the front end's ``AsyncLLM``.
        minutes: only the last that many, at most 60; None for the window since the last reset.
        total: since the engine's start instead, whatever was reset, without last activations.
        timeout_s: how long the engines have to answer.

    Returns:
        Data-parallel engine -> its counts.

    Raises:
        StatsUnavailableError: the engines count nothing.
        TimeoutError: an engine did not answer in time.
        vllm.v1.engine.exceptions.EngineDeadError: an engine died.
    """
    return await _ask(client, _STATS, (time.time(), minutes, total), timeout_s)


async def reset(client: "EngineClient", *, timeout_s: float = 20.0) -> dict[int, ExpertSnapshot]:
    """Begin a new window for :func:`collect`, and return the one that ends; totals go on.

    Raises:
        StatsUnavailableError, TimeoutError, EngineDeadError: as for :func:`collect`.
    """
    return await _ask(client, _RESET, (time.time(),), timeout_s)


def _require_counters(config: "VllmConfig") -> None:
    if counters_enabled(config):
        return
    if not config.model_config.is_moe:
        raise StatsUnavailableError(
            f"{config.model_config.model} has no experts; expected an MoE model"
        )
    raise StatsUnavailableError(
        f"this engine does not count experts; expected counters. Start it without {VARIABLE}=off "
        "and with the plug-in mixprec (VLLM_PLUGINS unset, or naming it)"
    )


async def _ask(
    client: "EngineClient", method: str, arguments: tuple[Any, ...], timeout_s: float
) -> dict[int, ExpertSnapshot]:
    """Call a method of every worker; engine -> what its workers answer, put together."""
    config = client.vllm_config
    _require_counters(config)
    core: Any = client.engine_core
    try:
        # collective_rpc of a client of several engines returns the first engine's answer alone.
        answers = await asyncio.wait_for(
            # No time limit for the executor: when one expires, vLLM's MultiprocExecutor leaves the
            # late answer in its queue and takes it for that of the next step.
            core.call_utility_all_async("collective_rpc", method, None, arguments, None),
            timeout_s,
        )
    except (asyncio.TimeoutError, TimeoutError):  # noqa: UP041  two classes in Python 3.10
        if client.errored:  # vLLM leaves a call that was under way unanswered
            raise client.dead_error from None
        raise TimeoutError(
            f"the engine did not answer within {timeout_s:g} s; it may be busy, paused or dead. "
            "Try again, and look at the server's log"
        ) from None
    name = str(config.model_config.served_model_name)
    return {
        engine: merge(workers, name)
        for engine, workers in zip(core.engine_ranks_managed, answers, strict=True)
    }


def merge(answers: Sequence[dict[str, Any] | None], model: str) -> ExpertSnapshot:
    """Put one engine's workers together.

    Pipeline stages have different layers. Sequence-parallel ranks of a stage have different tokens
    of the same layers; of other tensor-parallel ranks only one answers, the others are None.

    Raises:
        StatsUnavailableError: no worker has a layer that counts.
    """
    stages: dict[int, list[dict[str, Any]]] = {}
    for answer in answers:
        if answer is None:
            continue
        layers = _parse_layers(answer["layers"])
        if layers:
            stages.setdefault(answer["pp_rank"], []).append({**answer, "layers": layers})
    if not stages:
        raise StatsUnavailableError(
            "no layer of the model reports which experts it chose; the server's log says why"
        )
    parts = [_add_ranks(stages[rank]) for rank in sorted(stages)]
    draft = _snapshot(parts, model, draft=True)
    target = _snapshot(parts, model, draft=False, of_draft=draft)
    if target is None:
        raise StatsUnavailableError(
            "no layer of the target model reports which experts it chose; the server's log says why"
        )
    return target


@lru_cache(maxsize=64)
def _parse_layers(told: bytes) -> list[dict[str, Any]]:
    """Read what a worker says of its layers, which is the same every time; not to be changed."""
    layers: list[dict[str, Any]] = json.loads(told)
    return layers


def _add_ranks(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the ranks that share a stage's tokens."""
    shape = (len(ranks[0]["layers"]), ranks[0]["experts"])
    counts = [np.frombuffer(rank["counts"], np.int64).reshape(shape) for rank in ranks]
    times = [
        np.frombuffer(rank["last_activation_s"], np.float64).reshape(shape)
        for rank in ranks
        if rank["last_activation_s"] is not None
    ]
    return {
        **ranks[0],
        "counts": counts[0] if len(counts) == 1 else np.sum(counts, axis=0),
        "tokens": np.sum([rank["tokens"] for rank in ranks], axis=0).tolist(),
        "last_activation_s": np.fmax.reduce(times) if times else None,
    }


def _snapshot(
    stages: list[dict[str, Any]], model: str, *, draft: bool, of_draft: ExpertSnapshot | None = None
) -> ExpertSnapshot | None:
    """Stack the stages' layers of the target model, or of its draft."""
    labels, counts, times, top_k = [], [], [], 0
    layers = [layer for stage in stages for layer in stage["layers"] if layer["draft"] == draft]
    experts = max((layer["experts"] for layer in layers), default=0)
    tokens = 0
    for stage in stages:
        rows = [i for i, layer in enumerate(stage["layers"]) if layer["draft"] == draft]
        if not rows:
            continue
        labels += [stage["layers"][row]["layer"] for row in rows]
        counts.append(_widen(stage["counts"][rows], experts, 0))
        if stage["last_activation_s"] is not None:
            times.append(_widen(stage["last_activation_s"][rows], experts, np.nan))
        top_k = stage["layers"][rows[0]]["experts_per_token"]
        # Every stage sees every token.
        tokens = max(tokens, stage["tokens"][int(draft)])
    if not labels:
        return None
    return ExpertSnapshot(
        model=model,
        layers=tuple(labels),
        experts_per_token=top_k,
        counts=np.concatenate(counts),
        tokens=tokens,
        requests=stages[0]["requests"],
        started_s=stages[0]["started_s"],
        seconds=stages[0]["seconds"],
        last_activation_s=np.concatenate(times) if times else None,
        draft=of_draft,
    )


def _widen(rows: NDArray[T], experts: int, fill: float) -> NDArray[T]:
    """Cut or pad ``[layers, experts of the stage]`` to the experts of the model."""
    rows = rows[:, :experts]
    missing = experts - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=fill) if missing else rows
