# SPDX-License-Identifier: Apache-2.0
"""Measure what expert statistics cost a real engine, side by side with one that keeps none.

    python scripts/bench_counters.py              # decode at batch 1, 8 and 64, 15 pairs
    python scripts/bench_counters.py --small      # the same for layers that take a tenth as long
    python scripts/bench_counters.py --latency    # 99th percentile between tokens, while scraped
    python scripts/bench_counters.py --scrapers   # decode under 200 scrapers and a client that
                                                  # never reads

Decode: two engines of one synthetic model, compiled as in production, in one process; they differ
in VLLM_MIXPREC_EXPERT_METRICS alone and read the same weights. They take turns step by step,
A B B A, and a ratio is formed within each pair of a few seconds a side, so that what
else the machine does hits both alike. Both get the same prompts and draw the same tokens. Every
pair is measured in two processes, which start the engines in either order, and summed.

Counting costs the same for every layer, so its proportion is a matter of the layers' size. The
model has 4 layers of the size of Qwen3-30B-A3B's in BF16, and a small vocabulary, lest its head
hide anything; with ``--small`` it has 12 layers that take a tenth of the time, as no served
model's do.
``--control`` measures two engines without counters instead, which shows how far from 1 a ratio
gets by chance.

Progress goes to stderr, the table to stdout.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_decode import _IDLE_S, describe_machine, machine_line
from synthetic import DEFAULT, ROOT, Shape, write_models

BATCHES = (1, 8, 64)
AIM = 0.995
MAX_MODEL_LEN = 1024
_PROMPT = 16
_MIN_STEPS = 8
_KV_BYTES = 1 << 30
_LARGE = Shape(
    layers=4, experts=128, top_k=8, hidden=2048, inner=768, heads=32, kv_heads=4, head_dim=128
)
_VARIABLE = "VLLM_MIXPREC_EXPERT_METRICS"
_PLUGINS = "mixprec,mixprec_metrics,mixprec_endpoints"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Decode, in this process.


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


def share_weights(engines: list[Any]) -> None:
    """Have the second engine read the first one's weights.

    Decoding is bound by memory, and where the weights lie in it makes 2 % of difference between
    two engines that are otherwise the same: for as long as they live, so no number of pairs would
    even it out.
    """
    first, second = (dict(llm.collective_rpc("get_model")[0].named_parameters()) for llm in engines)
    for name, parameter in second.items():
        parameter.data = first[name].data


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
        TokensPrompt(prompt_token_ids=[generator.randrange(vocabulary) for _ in range(_PROMPT)])
        for _ in range(batch)
    ]


def choose_steps(engines: list[Any], seconds: float) -> dict[int, int]:
    """How many steps take about ``seconds``, by batch; warms the engines up."""
    found = {}
    for batch in BATCHES:
        decode(engines, draw_prompts(-2, batch), _MIN_STEPS)
        step = statistics.median(decode(engines, draw_prompts(-1, batch), _MIN_STEPS)[0])
        found[batch] = min(MAX_MODEL_LEN - _PROMPT - 3, max(_MIN_STEPS, round(seconds / step)))
    return found


def measure_pairs(
    model: Path, counters: tuple[bool, bool], pairs: int, seconds: float
) -> list[dict[str, Any]]:
    """Start two engines and measure pairs of decode runs: ms of each step by batch, of each."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    keep_workspaces()
    engines = []
    for counting in counters:
        begun = time.perf_counter()
        engines.append(start_engine(model, counting))
        say(f"counters {'on' if counting else 'off'}: {time.perf_counter() - begun:.0f} s")
    share_weights(engines)
    steps = choose_steps(engines, seconds)
    say(f"steps by batch: {steps}")
    measured = []
    for number in range(pairs):
        ms: tuple[dict[int, list[float]], ...] = ({}, {})
        for batch, count in steps.items():
            for which, times in enumerate(decode(engines, draw_prompts(number, batch), count)):
                ms[which][batch] = [1e3 * each for each in times]
        load = os.getloadavg()[0]
        measured.append({"load_average": load, "first_ms": ms[0], "second_ms": ms[1]})
        found = ", ".join(f"batch {b}: {sum(ms[0][b]) / sum(ms[1][b]):.4f}" for b in steps)
        say(f"pair {number + 1} of {pairs}, load {load:.1f}, second over first: {found}")
    return measured


def bench_decode(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure pairs of decode runs; returns the ratios and what they were made of.

    A pair is measured in a process that starts the engine with counters last and in one that starts
    it first, and summed: where its memory lies makes one of two equal engines 1 % faster, for as
    long as both live.
    """
    orders: list[list[dict[str, Any]]] = []
    for counters_first in (False, True):
        on = not options.control
        order = (counters_first and on, not counters_first and on)
        names = ("with_ms", "without_ms") if counters_first else ("without_ms", "with_ms")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            work = process.submit(measure_pairs, model, order, options.pairs, options.seconds)
            measured = work.result()
        orders.append(
            [
                dict(zip(names, (pair["first_ms"], pair["second_ms"]), strict=True))
                | {"load_average": pair["load_average"]}
                for pair in measured
            ]
        )
    pairs = list(zip(*orders, strict=True))
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


# A server and its clients.


@dataclass(frozen=True)
class Server:
    """One ``vllm serve``."""

    port: int
    counters: bool
    process: subprocess.Popen

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def serve(model: Path, counters: bool, folder: Path) -> Iterator[Server]:
    """Start a server, wait until it answers, and stop it in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "VLLM_PLUGINS": _PLUGINS if counters else "mixprec",
        _VARIABLE: "auto" if counters else "off",
    }
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"bench_counters_{'on' if counters else 'off'}.log"
    arguments = {
        "model": str(model),
        "served-model-name": "bench",
        "port": str(port),
        "host": "127.0.0.1",
        "max-model-len": str(MAX_MODEL_LEN),
        "max-num-seqs": "64",
        "kv-cache-memory-bytes": str(_KV_BYTES),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--skip-tokenizer-init"]
    for name, value in arguments.items():
        command += [f"--{name}", value]
    begun = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    server = Server(port, counters, process)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}; see {log}")
            try:
                urllib.request.urlopen(server.url("/health"), timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        say(f"server, counters {'on' if counters else 'off'}: {time.perf_counter() - begun:.0f} s")
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Stream:
    """What the streaming clients of a phase saw: seconds between tokens, and how many came."""

    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


async def stream(server: Server, clients: int, seconds: float, seed: int) -> Stream:
    """Have clients stream completions, one after the other, for some seconds."""
    import aiohttp

    seen = Stream()
    begun = time.perf_counter()
    until = begun + seconds

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        generator = random.Random(f"client {seed} {number}")
        while time.perf_counter() < until:
            body = {
                "model": "bench",
                "prompt": [generator.randrange(Shape().vocab) for _ in range(_PROMPT)],
                "max_tokens": MAX_MODEL_LEN - _PROMPT - 1,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": True,
                "detokenize": False,
                "return_token_ids": True,
            }
            last = None
            async with session.post(server.url("/v1/completions"), json=body) as answer:
                if answer.status != 200:
                    raise SystemExit(f"/v1/completions: {answer.status}: {await answer.text()}")
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    if now > until:  # leaving closes the connection, which aborts the request
                        return
                    if last is not None:
                        seen.gaps.append(now - last)
                        seen.tokens += 1
                    last = now

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(*(client(session, number) for number in range(clients)))
    seen.seconds = time.perf_counter() - begun
    return seen


def scrape(urls: list[str], every_s: float, scraped: Any, problems: Any) -> None:
    """Ask for each URL every so often, all at the same moment; a process of its own."""

    async def run() -> None:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one(url: str) -> None:
                while True:
                    begun = time.monotonic()
                    try:
                        async with session.get(url) as answer:
                            await answer.read()
                            failed = answer.status != 200
                    except aiohttp.ClientError:
                        failed = True
                    with (problems if failed else scraped).get_lock():
                        (problems if failed else scraped).value += 1
                    await asyncio.sleep(max(0.0, every_s - (time.monotonic() - begun)))

            await asyncio.gather(*map(one, urls))

    asyncio.run(run())


@contextmanager
def scraping(urls: list[str], every_s: float) -> Iterator[dict[str, int]]:
    """Scrape while the body runs; in the end says how often and how often in vain."""
    counted: dict[str, int] = {"scrapes": 0, "problems": 0}
    if not urls:
        yield counted
        return
    context = multiprocessing.get_context("spawn")
    scraped, problems = context.Value("q", 0), context.Value("q", 0)
    process = context.Process(target=scrape, args=(urls, every_s, scraped, problems), daemon=True)
    process.start()
    while not scraped.value + problems.value and process.is_alive():
        time.sleep(0.05)
    try:
        yield counted
    finally:
        process.terminate()
        process.join()
        counted.update(scrapes=scraped.value, problems=problems.value)


@contextmanager
def never_reading(server: Server, paths: list[str]) -> Iterator[None]:
    """Hold a connection a path that asks again and again and takes no answer."""
    with ExitStack() as stack:
        for path in paths:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            stack.callback(connection.close)
            request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
            connection.setblocking(False)
            for _ in range(100):
                try:
                    connection.send(request)
                except BlockingIOError:
                    break
        yield


@dataclass(frozen=True)
class Phase:
    """A kind of measurement at a server: who else asks it, and how often."""

    name: str
    server: Server
    urls: tuple[str, ...] = ()
    every_s: float = 1.0
    unread: tuple[str, ...] = ()

    def run(
        self, clients: int, seconds: float, seed: int, least_tokens: int = 100
    ) -> dict[str, float]:
        with (
            scraping([self.server.url(path) for path in self.urls], self.every_s) as scrapes,
            never_reading(self.server, list(self.unread)),
        ):
            seen = asyncio.run(stream(self.server, clients, seconds, seed))
        if scrapes["problems"]:
            say(f"{self.name}: {scrapes['problems']} scrapes failed, {scrapes['scrapes']} did not")
        time.sleep(_IDLE_S)
        if len(seen.gaps) < least_tokens:
            raise SystemExit(
                f"{self.name}: {len(seen.gaps)} tokens came; expected at least {least_tokens}. "
                "Raise --phase-seconds"
            )
        return {
            "tokens_per_s": seen.tokens / seen.seconds,
            "p50_ms": 1e3 * statistics.median(seen.gaps),
            "p99_ms": 1e3 * statistics.quantiles(seen.gaps, n=100)[98],
            "max_ms": 1e3 * max(seen.gaps),
            **scrapes,
        }


def run_phases(
    phases: list[Phase], options: argparse.Namespace
) -> list[dict[str, dict[str, float]]]:
    """Run all phases a round, forwards and backwards by turns; the first round warms up."""
    rounds = []
    for number in range(-1, options.pairs):
        found = {}
        for phase in phases if number % 2 == 0 else phases[::-1]:
            if number < 0:
                phase.run(options.clients, 3.0, number, least_tokens=2)
                continue
            found[phase.name] = phase.run(options.clients, options.phase_seconds, number)
        if number < 0:
            continue
        rounds.append({phase.name: found[phase.name] for phase in phases})
        say(
            f"round {number + 1} of {options.pairs}, load {os.getloadavg()[0]:.1f}: "
            + "; ".join(
                f"{name} {values['tokens_per_s']:.0f}/s p99 {values['p99_ms']:.1f} ms"
                for name, values in found.items()
            )
        )
    return rounds


def compare(
    rounds: list[dict[str, dict[str, float]]], key: str, over: list[tuple[str, str]]
) -> dict[str, list[float]]:
    """Ratios within each round, above 1 where the first of the two is better."""
    better = 1 if key == "tokens_per_s" else -1
    label = {"tokens_per_s": "throughput", "p99_ms": "1 / p99", "p50_ms": "1 / p50"}[key]
    return {
        f"{label}: {one} over {other}": [
            (values[one][key] / values[other][key]) ** better for values in rounds
        ]
        for one, other in over
    }


def bench_latency(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the time between tokens with a scrape every second and without."""
    with serve(model, False, options.logs) as off, serve(model, True, options.logs) as on:
        rounds = run_phases(
            [
                Phase("off", off),
                Phase("off, scraped", off, ("/metrics",)),
                Phase("on", on),
                Phase("on, scraped", on, ("/metrics",)),
            ],
            options,
        )
    over = [("on, scraped", "on"), ("on", "off"), ("on, scraped", "off"), ("off, scraped", "off")]
    ratios: dict[str, list[float]] = {}
    for key in ("p99_ms", "p50_ms", "tokens_per_s"):
        ratios |= compare(rounds, key, over)
    return {"rounds": rounds, "ratios": ratios}


def bench_scrapers(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare decoding under many scrapers and a client that never reads."""
    many = options.scrapers
    stock = ("/metrics",) * many
    ours = ("/metrics", "/v1/mixprec/expert_stats") * (many // 2)
    with serve(model, False, options.logs) as off, serve(model, True, options.logs) as on:
        rounds = run_phases(
            [
                Phase("off", off),
                Phase("on", on),
                Phase("off, scrapers", off, stock, options.every, ("/metrics",)),
                Phase("on, stock scrapers", on, stock, options.every, ("/metrics",)),
                Phase("on, scrapers", on, ours, options.every, ours[:2]),
            ],
            options,
        )
    over = [
        ("on", "off"),
        ("on, stock scrapers", "off, scrapers"),
        ("on, scrapers", "off, scrapers"),
        ("on, scrapers", "on"),
        ("off, scrapers", "off"),
    ]
    ratios = compare(rounds, "tokens_per_s", over) | compare(rounds, "p99_ms", over)
    return {"rounds": rounds, "ratios": ratios}


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
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--latency", action="store_true", help="time between tokens, while scraped")
    part.add_argument(
        "--scrapers",
        type=int,
        nargs="?",
        const=200,
        help="decode under that many scrapers (default 200) and a client that never reads",
    )
    parser.add_argument("--control", action="store_true", help="no counters in either engine")
    parser.add_argument("--pairs", type=int, default=15, help="or rounds (default 15)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of decode a measurement (default 2)"
    )
    parser.add_argument(
        "--phase-seconds", type=float, default=15.0, help="of a server's phase (default 15)"
    )
    parser.add_argument(
        "--clients", type=int, default=4, help="that stream from a server (default 4)"
    )
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between a scraper's scrapes (default 5)"
    )
    parser.add_argument("--small", action="store_true", help="decode with small layers")
    parser.add_argument("--quick", action="store_true", help="a model of two small layers")
    parser.add_argument("--models", type=Path, help="folder of the model (default in runs)")
    parser.add_argument("--json", type=Path, help="default runs/bench_counters[_PART].json")
    options = parser.parse_args()
    options.logs = ROOT / "runs"
    folder, shape = DEFAULT, Shape()
    if options.quick:
        folder, shape = ROOT / "runs" / "synthetic-quick", Shape(layers=2)
    elif not (options.small or options.latency or options.scrapers):
        folder, shape = ROOT / "runs" / "synthetic-large", _LARGE
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # As a user has it, whatever the caller's shell says.
    os.environ.pop("VLLM_PLUGINS", None)

    model = write_models(options.models or folder, shape, ("bf16",))["bf16"]
    if options.latency:
        name, result = "_latency", bench_latency(model, options)
    elif options.scrapers:
        name, result = "_scrapers", bench_scrapers(model, options)
    else:
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
    if not (options.latency or options.scrapers):
        print(f"\nAim: throughput, median at least {AIM}.")
    say(f"Written to {file}")


if __name__ == "__main__":
    main()
