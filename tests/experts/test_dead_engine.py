# SPDX-License-Identifier: Apache-2.0
"""A front end whose engine hangs or dies while its counts are read answers with an error."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.harness import EAGER, ENGINE, ENVIRONMENT
from tests.engine.mixes import ROOT, SOURCES

pytestmark = pytest.mark.engine

TIMEOUT_S = 2.0


async def read_while_it_dies() -> dict[str, list]:
    """Runs in a process of its own: what four readings end with, and after how many seconds."""
    import asyncio

    import psutil
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_mixprec.experts.collect import collect

    options = ENGINE | EAGER | {"distributed_executor_backend": "uni"}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(SOURCES["random"]["bf16"]), **options))
    (engine,) = (p for p in psutil.Process().children() if "EngineCore" in " ".join(p.cmdline()))
    ends = {}

    async def read(name: str) -> None:
        begun = time.monotonic()
        try:
            await collect(llm, timeout_s=TIMEOUT_S)
            end = "answered"
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
        ends[name] = [end, time.monotonic() - begun]

    await read("alive")
    engine.send_signal(signal.SIGSTOP)
    await read("hanging")
    engine.send_signal(signal.SIGCONT)
    await read("going on")
    engine.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(read("dying"))
    await asyncio.sleep(0.2)
    engine.kill()
    await waiting
    await read("dead")
    return ends


async def read_while_it_works() -> dict[str, list]:
    """Likewise, while requests run: decoding, paused in the midst of it, and as a worker dies."""
    import asyncio

    import psutil
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_mixprec.experts.collect import collect

    options = ENGINE | EAGER | {"distributed_executor_backend": "mp"}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(SOURCES["random"]["bf16"]), **options))
    (engine,) = (p for p in psutil.Process().children() if "EngineCore" in " ".join(p.cmdline()))
    (worker,) = (p for p in engine.children() if "Worker" in " ".join(p.cmdline()))
    parameters = SamplingParams(max_tokens=200, ignore_eos=True, detokenize=False)
    arrived: list[int] = []

    async def generate(name: str) -> None:
        async for _ in llm.generate({"prompt_token_ids": [1, 2, 3]}, parameters, name):
            arrived.append(1)

    async def arrive(count: int) -> None:
        while len(arrived) < count:
            if running.done():  # its engine died of something else
                await running
                raise AssertionError(f"{len(arrived)} of {count} outputs came")
            await asyncio.sleep(0.01)

    ends = {}

    async def read(name: str) -> None:
        begun = time.monotonic()
        try:
            found = await collect(llm, timeout_s=TIMEOUT_S, total=name != "routes")
            end = f"answered {found[0].tokens}"
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
        ends[name] = [end, time.monotonic() - begun]

    running = asyncio.create_task(generate("first"))
    await arrive(20)
    await asyncio.gather(read("working"), read("routes"))
    await llm.pause_generation(mode="keep", clear_cache=False)  # or it is computed again
    before = len(arrived)
    await read("paused")
    ends["paused in the midst"] = [before < 200 and len(arrived) - before < 3, 0.0]
    await llm.resume_generation()
    await running
    await read("at rest")
    running = asyncio.create_task(generate("second"))
    await arrive(220)
    worker.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(read("worker dies"))
    await asyncio.sleep(0.2)
    worker.kill()
    await waiting
    await asyncio.gather(running, return_exceptions=True)
    return ends


def run_scenario(name: str, folder: Path) -> dict[str, list]:
    """Run one of the two in a process of its own."""
    out = folder / "ends.json"
    code = (
        "import asyncio, json, sys\n"
        f"from tests.experts.test_dead_engine import {name}\n"
        "if __name__ == '__main__':\n"
        f"    ends = asyncio.run({name}())\n"
        "    open(sys.argv[1], 'w').write(json.dumps(ends))\n"
    )
    script = out.parent / "read.py"
    script.write_text(code)
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    done = subprocess.run(
        [sys.executable, script, out],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.exists(), done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list]:
    return run_scenario("read_while_it_dies", tmp_path_factory.mktemp("dead"))


@pytest.fixture(scope="module")
def ends_at_work(tmp_path_factory) -> dict[str, list]:
    return run_scenario("read_while_it_works", tmp_path_factory.mktemp("works"))


def test_a_hanging_engine_is_a_timeout(ends):
    end, seconds = ends["hanging"]
    assert "TimeoutError: the engine did not answer within 2 s" in end
    assert seconds < TIMEOUT_S + 2


def test_an_engine_that_goes_on_is_read_again(ends):
    assert ends["alive"][0] == ends["going on"][0] == "answered"


@pytest.mark.parametrize("when", ["dying", "dead"])
def test_a_dead_engine_is_an_error(ends, when):
    end, seconds = ends[when]
    assert end.startswith("EngineDeadError"), end
    assert seconds < TIMEOUT_S + 2


@pytest.mark.parametrize("when", ["working", "routes", "paused", "at rest"])
def test_an_engine_is_read_whatever_it_does(ends_at_work, when):
    """Its loop does not wait for the answer, which must be heard all the same."""
    end, seconds = ends_at_work[when]
    assert end.startswith("answered"), end
    assert seconds < TIMEOUT_S
    assert ends_at_work["paused in the midst"][0]


def test_what_is_read_at_rest_is_exact(ends_at_work):
    assert ends_at_work["at rest"][0] == "answered 202"  # 3 + 200 - 1


def test_a_worker_that_dies_while_it_is_read_is_an_error(ends_at_work):
    end, seconds = ends_at_work["worker dies"]
    # The engine gives up what it waited for, and ends: the front end may hear of either first.
    given_up = "Exception: Call to collective_rpc method failed: cancelled"
    assert end.startswith(("EngineDeadError", given_up)), end
    assert seconds < TIMEOUT_S + 2
