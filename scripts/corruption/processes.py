# SPDX-License-Identifier: Apache-2.0
"""A case in a process of its own: what it returned, or what befell it."""

import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HANG_S = 20
ADDRESS_SPACE_BYTES = 8 << 30  # what a case may map on top, so that the machine survives it


def run_forked(work: Callable[[], dict[str, Any]], limit_s: float = HANG_S) -> dict[str, Any]:
    """Run ``work`` in a fork; returns its result, seconds and growth_bytes, or what befell it."""
    receiver, sender = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _run_child(work, sender, limit_s)
    os.close(sender)
    received = b""
    while True:
        left = 3 * limit_s - (time.monotonic() - begun)
        if left <= 0 or not select.select([receiver], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(receiver)
            return {"befell": "HANG", "detail": "by the clock", "seconds": 3 * limit_s}
        more = os.read(receiver, 1 << 16)
        if not more:
            break
        received += more
    os.close(receiver)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - begun
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return {"befell": "HANG", "detail": f"over {limit_s} s", "seconds": seconds}
    if os.WIFSIGNALED(status) or not received:
        return {"befell": "CRASH", "detail": f"ended with status {status}", "seconds": seconds}
    return json.loads(received) | {"seconds": seconds}


def _run_child(work: Callable[[], dict[str, Any]], sender: int, limit_s: float) -> None:
    try:
        limit = max(1, int(limit_s))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        limit = _status_bytes("VmSize") + ADDRESS_SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now
        before = _status_bytes("VmRSS")
        with open(os.devnull, "w", encoding="utf-8") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        try:
            result = work()
        except BaseException as error:
            result = _describe(error)
        result["growth_bytes"] = _status_bytes("VmHWM") - before
        os.write(sender, json.dumps(result).encode())
    finally:
        os._exit(0)


def _status_bytes(key: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def _describe(error: BaseException) -> dict[str, Any]:
    """Tell an error of ours, and one that our code raised without meaning to, from vLLM's."""
    from pydantic import ValidationError

    from vllm_mixprec.errors import MixPrecError

    if isinstance(error, ValidationError):  # of a config of vLLM's, which calls us as it is made
        for problem in error.errors():
            if isinstance(within := problem.get("ctx", {}).get("error"), Exception):
                return _describe(within)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MixPrecError):
            return {"refused": f"{type(cause).__name__}: {cause}"[:500]}
        cause = cause.__cause__ or cause.__context__
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    detail = f"{''.join(traceback.format_exception(error))[-1500:]}"
    package = str(ROOT / "vllm_mixprec")
    patches = str(ROOT / "patches")
    # What a library raises in a call of ours is ours too; vLLM calls us, and calls transformers.
    ours = [i for i, name in enumerate(frames) if name.startswith((package, patches))]
    theirs = [i for i, name in enumerate(frames) if "/vllm/" in name or "/transformers/" in name]
    if isinstance(error, MemoryError):
        return {"befell": "ALLOC", "detail": detail}
    if ours and (not theirs or ours[-1] > theirs[-1]) or not theirs:
        return {"befell": "CRASH", "detail": detail}
    return {"refused_by_vllm": detail}
