# SPDX-License-Identifier: Apache-2.0
"""Measure what expert statistics cost a real engine, side by side with one that keeps none.

    python scripts/bench_counters.py              # decode at batch 1, 8 and 64, 15 pairs
    python scripts/bench_counters.py --small      # the same for layers that take a tenth as long

What reading the counters costs, and a server that is scraped, is scripts/bench_polling.py's.

Two engines of one synthetic model, compiled as in production, in one process; they differ
in VLLM_MIXPREC_EXPERT_METRICS alone, and read the same weights and, on a CPU, the same KV cache.
They take turns step by step, A B B A, and a ratio is formed within each pair of a few seconds a
side, so that what else the machine does hits both alike. Both get the same prompts and draw the
same tokens. Every pair is measured in two processes, which start the engines in either order, and
summed. Where the rest of an engine lies in memory still makes one of two equal engines faster for
as long as both live: so after every few pairs both processes are started anew.

Counting costs the same for every layer, so its proportion is a matter of the layers' size. The
model has 4 layers of the size of Qwen3-30B-A3B's in BF16, and a small vocabulary, lest its head
hide anything; with ``--small`` it has 12 layers that take a tenth of the time, as no served
model's do.
``--control`` measures two engines without counters instead, which shows how far from 1 a ratio
gets by chance.

Progress goes to stderr, the table to stdout.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_decode import describe_machine, machine_line
from serving_load import MAX_MODEL_LEN, PROMPT, say
from synthetic import DEFAULT, LARGE, LARGE_FOLDER, ROOT, Shape, write_models

BATCHES = (1, 8, 64)
AIM = 0.995
_MIN_STEPS = 8
_KV_BYTES = 1 << 30
_VARIABLE = "VLLM_MIXPREC_EXPERT_METRICS"


def start_engine(model: Path, counters: bool) -> Any:
    """Start ``LLM(model)`` with or without counters; its processes read the environment anew."""
    from vllm import LLM
    from vllm.platforms import current_platform

    # Two engines share a GPU; on a CPU this is a share of the machine's memory, and not asked.
    share = {"gpu_memory_utilization": 0.4} if current_platform.is_cuda() else {}
    os.environ[_VARIABLE] = "auto" if counters else "off"
    try:
        return LLM(
            str(model),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max(BATCHES),
            seed=0,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            distributed_executor_backend="uni",
            enable_prefix_caching=False,
            kv_cache_memory_bytes=_KV_BYTES,
            **share,
        )
    finally:
        del os.environ[_VARIABLE]


def keep_workspaces() -> None:
    """Keep each engine's scratch memory on a GPU.

    vLLM frees the first engine's when the second starts, yet the first one's graphs write to it.
    """
    from vllm.v1.worker import workspace

    kept, start = [], workspace.init_workspace_manager

    def keep(*args: Any, **more: Any) -> None:
        kept.append(workspace._manager)
        start(*args, **more)

    workspace.init_workspace_manager = keep


def share_memory(engines: list[Any]) -> None:
    """Have the second engine read the first one's weights and, on a CPU, its KV cache.

    Decoding is bound by memory, and where that lies makes 2 % of difference between two engines
    that are otherwise the same: for as long as they live, so no number of pairs would even it out.
    Both draw the same tokens and number their blocks alike, so each writes what the other did.
    """
    first, second = (llm.collective_rpc("get_model")[0] for llm in engines)
    weights = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        parameter.data = weights[name].data
    for one, other in zip(first.modules(), second.modules(), strict=True):
        cache = getattr(one, "kv_cache", None)
        if isinstance(cache, torch.Tensor) and cache.is_cpu:
            other.kv_cache = cache


def decode(engines: list[Any], prompts: list[Any], steps: int) -> tuple[list[float], ...]:
    """Decode one batch on both engines, by turns; returns the seconds of each engine's steps."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=1.0, seed=0, max_tokens=steps + 2, ignore_eos=True, detokenize=False
    )
    for llm in engines:
        for number, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(number), prompt, parameters)
        llm.llm_engine.step()  # the prompts
    times: tuple[list[float], ...] = ([], [])
    for step in range(steps):
        for which in (0, 1) if step % 2 == 0 else (1, 0):
            begun = time.perf_counter()
            engines[which].llm_engine.step()
            times[which].append(time.perf_counter() - begun)
    for llm in engines:
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    return times


def draw_prompts(seed: int, batch: int) -> list[Any]:
    from vllm.inputs import TokensPrompt

    generator = random.Random(f"prompts {seed} {batch}")
    vocabulary = Shape().vocab
    return [
        TokensPrompt(prompt_token_ids=[generator.randrange(vocabulary) for _ in range(PROMPT)])
        for _ in range(batch)
    ]


def choose_steps(engines: list[Any], seconds: float) -> dict[int, int]:
    """How many steps take about ``seconds``, by batch; warms the engines up."""
    found = {}
    for batch in BATCHES:
        decode(engines, draw_prompts(-2, batch), _MIN_STEPS)
        step = statistics.median(decode(engines, draw_prompts(-1, batch), _MIN_STEPS)[0])
        found[batch] = min(MAX_MODEL_LEN - PROMPT - 3, max(_MIN_STEPS, round(seconds / step)))
    return found


def measure_pairs(
    model: Path, counters: tuple[bool, bool], first: int, pairs: int, seconds: float
) -> list[dict[str, Any]]:
    """Start two engines and measure pairs of decode runs: ms of each step by batch, of each."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    keep_workspaces()
    engines = []
    for counting in counters:
        begun = time.perf_counter()
        engines.append(start_engine(model, counting))
        say(f"counters {'on' if counting else 'off'}: {time.perf_counter() - begun:.0f} s")
    share_memory(engines)
    steps = choose_steps(engines, seconds)
    say(f"steps by batch: {steps}")
    measured = []
    for number in range(first, first + pairs):
        ms: tuple[dict[int, list[float]], ...] = ({}, {})
        for batch, count in steps.items():
            for which, times in enumerate(decode(engines, draw_prompts(number, batch), count)):
                ms[which][batch] = [1e3 * each for each in times]
        load = os.getloadavg()[0]
        measured.append({"load_average": load, "first_ms": ms[0], "second_ms": ms[1]})
        found = ", ".join(f"batch {b}: {sum(ms[0][b]) / sum(ms[1][b]):.4f}" for b in steps)
        say(f"pair {number + 1}, load {load:.1f}, second over first: {found}")
    return measured


def bench_decode(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure pairs of decode runs; returns the ratios and what they were made of."""
    on = not options.control
    context = multiprocessing.get_context("spawn")
    pairs: list[list[dict[str, Any]]] = []
    while len(pairs) < options.pairs:
        some = min(options.per_start, options.pairs - len(pairs))
        orders: list[list[dict[str, Any]]] = []
        for counters_first in (False, True):
            order = (counters_first and on, not counters_first and on)
            names = ("with_ms", "without_ms") if counters_first else ("without_ms", "with_ms")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                seed = len(pairs)
                work = process.submit(measure_pairs, model, order, seed, some, options.seconds)
                measured = work.result()
            orders.append(
                [
                    dict(zip(names, (pair["first_ms"], pair["second_ms"]), strict=True))
                    | {"load_average": pair["load_average"]}
                    for pair in measured
                ]
            )
        pairs += map(list, zip(*orders, strict=True))
    ratios = {
        f"{name}, batch {batch}": [
            sum(of(one["without_ms"][batch]) for one in pair)
            / sum(of(one["with_ms"][batch]) for one in pair)
            for pair in pairs
        ]
        for name, of in (("throughput", sum), ("median step", statistics.median))
        for batch in BATCHES
    }
    return {"pairs": pairs, "ratios": ratios}


def report(ratios: dict[str, list[float]]) -> str:
    """A table in markdown: median, quartiles and range of each ratio."""
    lines = ["| ratio, with over without | median | quartiles | range |", "|---|---|---|---|"]
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        lines.append(
            f"| {name} | {middle:.4f} | {low:.4f} to {high:.4f} "
            f"| {min(values):.4f} to {max(values):.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--control", action="store_true", help="no counters in either engine")
    parser.add_argument("--pairs", type=int, default=15, help="of decode runs (default 15)")
    parser.add_argument(
        "--per-start", type=int, default=3, help="pairs before engines start anew (default 3)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of decode a measurement (default 2)"
    )
    parser.add_argument("--small", action="store_true", help="decode with small layers")
    parser.add_argument("--quick", action="store_true", help="a model of two small layers")
    parser.add_argument("--models", type=Path, help="folder of the model (default in runs)")
    parser.add_argument("--json", type=Path, help="default runs/bench_counters[_PART].json")
    options = parser.parse_args()
    folder, shape = DEFAULT, Shape()
    if options.quick:
        folder, shape = ROOT / "runs" / "synthetic-quick", Shape(layers=2)
    elif not options.small:
        folder, shape = LARGE_FOLDER, LARGE
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # As a user has it, whatever the caller's shell says.
    os.environ.pop("VLLM_PLUGINS", None)

    model = write_models(options.models or folder, shape, ("bf16",))["bf16"]
    name = "_small" * options.small + "_control" * options.control
    result = bench_decode(model, options)
    machine = describe_machine()
    file = options.json or ROOT / "runs" / f"bench_counters{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    result |= {"machine": machine, "shape": vars(shape), "options": chosen}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{machine_line(machine)}\n")
    print(report(result["ratios"]))
    print(f"\nAim: throughput, median at least {AIM}.")
    say(f"Written to {file}")


if __name__ == "__main__":
    main()
