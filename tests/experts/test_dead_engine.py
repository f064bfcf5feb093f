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


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list]:
    out = tmp_path_factory.mktemp("dead") / "ends.json"
    code = (
        "import asyncio, json, sys\n"
        "from tests.experts.test_dead_engine import read_while_it_dies\n"
        "if __name__ == '__main__':\n"
        "    ends = asyncio.run(read_while_it_dies())\n"
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
    return json.loads(Path(out).read_text())


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
