# SPDX-License-Identifier: Apache-2.0
"""A ``collective_rpc`` from a front end stops the engine core's loop until every worker answered.

``EngineCore.collective_rpc`` (v1/engine/core.py, vLLM 0.32 and 0.33) waits between two steps: the
next one is not scheduled until workers in processes of their own have been woken, have answered and
have been heard, and with asynchronous scheduling the queue of batches runs dry. Yet the executor
can be asked without waiting, and the loop knows what to do with an answer that is still to come.
"""

import functools
import inspect
from concurrent.futures import Future
from typing import Any

from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_mixprec.patches import Patch

_STOCK = EngineCoreProc.collective_rpc
_OURS = "mixprec_"


@functools.wraps(_STOCK)
def _collective_rpc(
    self: EngineCoreProc,
    method: Any,
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Ask for our statistics without waiting; do anything else as vLLM does.

    The executor hears the answers in the order of its questions, so whoever waits for the next
    step's output gets ours on the way.
    """
    asks_ours = isinstance(method, str) and method.startswith(_OURS)
    if not asks_ours or not isinstance(self.model_executor, MultiprocExecutor):
        return _STOCK(self, method, timeout, args, kwargs)
    answer = self.model_executor.collective_rpc(method, timeout, args, kwargs, non_block=True)
    _hear_when_idle(self, answer)
    return answer


def _hear_when_idle(core: EngineCoreProc, answer: "Future[Any]") -> None:
    """Have a loop that comes to rest, or is at rest, wait for the answer: no step will."""
    asked: list[Future[Any]] | None = core.__dict__.get("_mixprec_asked")
    if asked is None:
        asked = core.__dict__["_mixprec_asked"] = []
    asked[:] = [earlier for earlier in asked if not earlier.done()] + [answer]
    if _hear_all not in core._idle_state_callbacks:
        core._idle_state_callbacks.append(_hear_all)


def _hear_all(core: EngineCoreProc) -> None:
    for answer in core.__dict__.pop("_mixprec_asked", []):
        try:
            answer.result()
        except Exception:  # noqa: S110  whoever asked is told
            pass


def needed() -> bool:
    """Whether vLLM waits, and has what it takes not to."""
    if "non_block" in inspect.getsource(_STOCK):
        return False
    able = "add_done_callback" in inspect.getsource(EngineCoreProc._invoke_utility_method)
    idle = "_idle_state_callbacks" in inspect.getsource(EngineCoreProc._notify_idle_state_callbacks)
    return able and idle


def apply() -> None:
    """Put ours where the engine core's dispatcher looks it up."""
    EngineCoreProc.collective_rpc = _collective_rpc  # type: ignore[method-assign]


PATCH = Patch(
    name="engine_core_wait",
    issues=(),
    broken="the engine core's loop stands still while workers answer a collective_rpc",
    mended="expert statistics are asked for without waiting, and heard with the next step's output",
    needed=needed,
    apply=apply,
    remove_when="collective_rpc of the engine core can be asked not to wait",
)
