# SPDX-License-Identifier: Apache-2.0
"""Times each piece of one reading of the expert statistics, in a real engine."""

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from serving_load import PROMPT, say
from synthetic import Shape, write_models

_TIMES = 200
_TURNS = 800
_STATS = "mixprec_expert_stats"


def measure_cost(folder: Path, layers: int, experts: int) -> dict[str, float]:
    """Start an engine of so many layers and experts, in a process of its own, and time a reading.

    Returns:
        Piece -> microseconds, the median of many.
    """
    shape = Shape(
        layers=layers, experts=experts, hidden=128, inner=128, heads=2, kv_heads=1, vocab=2048
    )
    model = write_models(folder / f"polling-{layers}x{experts}", shape, ("bf16",))["bf16"]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure, model).result()


def _measure(model: Path) -> dict[str, float]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the step loop is ours
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function goes to the worker
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    begun = time.perf_counter()
    llm = LLM(
        str(model),
        max_model_len=1024,
        max_num_seqs=2,
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=True,
        distributed_executor_backend="mp",
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
    )
    say(f"{model.parent.name}: started in {time.perf_counter() - begun:.0f} s")
    parameters = SamplingParams(temperature=1.0, seed=0, max_tokens=900, ignore_eos=True)
    for number in range(2):
        prompt = TokensPrompt(prompt_token_ids=list(range(number, number + PROMPT)))
        llm.llm_engine.add_request(str(number), prompt, parameters)
    for _ in range(10):
        llm.llm_engine.step()
    found: dict[str, float] = {}
    (in_worker,) = llm.collective_rpc(_time_in_worker, args=(_TIMES,))
    found["worker: one reading for the metrics"] = in_worker["total"]
    found["worker: one reading for the routes"] = in_worker["window"]
    cold = []
    for _ in range(_TIMES // 2):
        llm.llm_engine.step()
        cold.append(llm.collective_rpc(_time_in_worker, args=(1,))[0]["total"])
    found["worker: one reading for the metrics, after a step"] = statistics.median(cold)
    found |= _time_loop(llm)
    found |= _time_front_end(llm.collective_rpc(_STATS, args=(time.time(), None, True)))
    llm.llm_engine.engine_core.shutdown()
    return found


def _median_us(seconds: list[float]) -> float:
    return 1e6 * statistics.median(seconds)


def _time(call: Callable[[], Any], times: int = _TIMES) -> float:
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return _median_us(taken)


def _time_in_worker(worker: Any, times: int) -> dict[str, float]:
    """Runs in the worker."""
    import statistics
    import time

    found = {}
    for name, total in (("total", True), ("window", False)):
        taken = []
        for _ in range(times):
            begun = time.perf_counter()
            worker.mixprec_expert_stats(time.time(), None, total)
            taken.append(time.perf_counter() - begun)
        found[name] = 1e6 * statistics.median(taken)
    return found


def _time_loop(llm: Any) -> dict[str, float]:
    """Time how long the step loop stands still for a reading, and for a call that does nothing.

    Between two steps, in turn: nothing, vLLM's wait, nothing, and no wait. How much longer a turn
    takes is told from the one with nothing before it.
    """
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    names = ("nothing", "waits", "nothing", "does not wait", "nothing", "empty")
    held: dict[str, list[float]] = {name: [] for name in names}
    longer: dict[str, list[float]] = {name: [] for name in names}
    steps = []
    before = 0.0
    for turn in range(_TURNS):
        name = names[turn % len(names)]
        method, arguments = _STATS, (time.time(), None, True)
        if name == "empty":
            method, arguments = "check_health", ()
        begun = time.perf_counter()
        if name != "nothing":
            executor.collective_rpc(
                method, None, arguments, None, non_block=name == "does not wait"
            )
        held[name].append(time.perf_counter() - begun)
        llm.llm_engine.step()
        taken = time.perf_counter() - begun
        longer[name].append(taken - before)
        before = taken
        if name == "nothing":
            steps.append(taken)
    return {
        "engine core: hold by a call that does nothing": _median_us(held["empty"]),
        "engine core: hold by a reading, as vLLM does it": _median_us(held["waits"]),
        "engine core: hold by a reading, not waiting": _median_us(held["does not wait"]),
        "engine core: a step, alone": _median_us(steps),
        "engine core: longer with a reading, as vLLM does it": _median_us(longer["waits"]),
        "engine core: longer with a reading, not waiting": _median_us(longer["does not wait"]),
    }


def _time_front_end(answers: list[Any]) -> dict[str, float]:
    """Time what the front end does with a reading; every count grows from poll to poll."""
    import numpy as np
    from prometheus_client import CollectorRegistry
    from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

    from vllm_mixprec.experts.collect import merge
    from vllm_mixprec.experts.series import ExpertSeries

    outputs = EngineCoreOutputs(utility_output=UtilityOutput(1, None, UtilityResult(answers)))
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    frames = encoder.encode(outputs)
    series = ExpertSeries("bench", True, CollectorRegistry())
    updates, texts, again = [], [], []
    for poll in range(_TIMES // 4):
        counts = np.frombuffer(answers[0]["counts"], np.int64) + 8 * poll
        snapshot = merge([{**answers[0], "counts": counts.tobytes()}], "bench")
        for taken, call in (
            (updates, lambda snapshot=snapshot: series.update({0: snapshot})),
            (texts, lambda: asyncio.run(series._activations.text())),
            (again, lambda: asyncio.run(series._activations.text())),
        ):
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
    # An event loop of its own for each is no part of it.
    return {
        "both: encode for the socket": _time(lambda: encoder.encode(outputs)),
        "front end: decode": _time(lambda: decoder.decode(frames)),
        "front end: put workers together": _time(lambda: merge(answers, "bench")),
        "front end: a poll's series, first": 1e6 * updates[0],
        "front end: a poll's series": _median_us(updates[1:]),
        "front end: text, first scrape": 1e6 * (texts[0] - statistics.median(again)),
        "front end: text, first scrape after a poll": _median_us(texts[1:]) - _median_us(again),
    }
