# SPDX-License-Identifier: Apache-2.0
"""Measure what reading the expert statistics costs: piece by piece, and at a server's clients.

    python scripts/bench_polling.py --cost       # microseconds of each piece, for three sizes
    python scripts/bench_polling.py              # time between tokens, scraped and not
    python scripts/bench_polling.py --scrapers   # the same under 200 scrapers and clients that
                                                 # never read

Cost: a real engine whose steps are taken here and whose worker is a process, as in production; the
worker's share is timed in the worker. "Hold" is how long the step loop stands still for a reading,
as vLLM does it (it waits for the worker) and as ``patches/engine_core_wait.py`` does (it does not).

Clients: one server at a time has four clients that stream without a pause, while the scrapers are
switched on and off in slices of a few seconds, A B B A. How much decoding is slowed is told as
bench_counters.py tells it: the seconds a token of a scraped slice over its quiet neighbour's, the
median of all such pairs. The gaps between tokens are also pooled a side, thousands of them. Each
ratio has a confidence interval from drawing pairs again (bootstrap), because gaps of one moment are
alike. Three servers take turns: ours with ``/metrics`` scraped; ours without its poll each second,
its counters read through ``/v1/mixprec/expert_stats`` (a reading or none at all); and stock, whose
own ``/metrics`` is scraped: the control, for vLLM's own metrics cost something, too. Of many
scrapers there is another control: they ask a process that only answers, with as many bytes; what
slows the server then is what the scrapers themselves take of the machine.

Ratios are times: above 1 is slower. Progress goes to stderr, tables to stdout.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_decode import describe_machine, machine_line
from polling_cost import measure_cost
from serving_load import (
    Gaps,
    Scrapers,
    Server,
    never_reading,
    say,
    serve,
    serve_bytes,
    stream,
)
from synthetic import DEFAULT, ROOT, Shape, write_models

SIZES = ((12, 32), (48, 128), (58, 256))
_DRAWS = 2000
_EDGE_S = 0.2  # of a slice, in which what was switched may still be under way


@dataclass(frozen=True)
class Kind:
    """A server, and what is asked of it while its scrapers are on."""

    name: str
    counters: bool
    paths: tuple[str, ...]
    unread: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    elsewhere: bool = False  # a process that only answers is asked instead


READING = "/v1/mixprec/expert_stats?detail=none"
LATENCY = (
    Kind("ours, /metrics", True, ("/metrics",)),
    Kind("ours, a reading", True, (READING,), arguments=("--disable-log-stats",)),
    Kind("stock, /metrics", False, ("/metrics",)),
)


def many(scrapers: int) -> tuple[Kind, ...]:
    """Ours and stock under many scrapers, and clients that never read."""
    both = ("/metrics", "/v1/mixprec/expert_stats")
    metrics = {"paths": ("/metrics",) * scrapers, "unread": ("/metrics",)}
    return (
        Kind(f"ours, {scrapers} of /metrics", True, **metrics),
        Kind(f"ours, {scrapers} elsewhere", True, **metrics, elsewhere=True),
        Kind(f"ours, {scrapers} of both", True, both * (scrapers // 2), both),
        Kind(f"stock, {scrapers} of /metrics", False, **metrics),
    )


def run_block(
    server: Server,
    kind: Kind,
    scrapers: Scrapers,
    asked_port: int,
    options: argparse.Namespace,
    seed: int,
) -> list[tuple[bool, list[float]]]:
    """Stream through slices A B B A; returns for each whether it was scraped, and its gaps."""
    plan = (False, True, True, False) * (options.slices // 4)
    if seed % 2:
        plan = tuple(not scraped for scraped in plan)
    seen = Gaps()
    begun = time.monotonic() + 2.0  # the first tokens

    async def switch() -> None:
        for number, scraped in enumerate(plan):
            await asyncio.sleep(begun + number * options.slice - time.monotonic())
            scrapers.on = scraped
            if scraped:
                unread.enter_context(never_reading(asked_port, kind.unread))
            else:
                unread.close()

    async def run() -> None:
        until = begun + len(plan) * options.slice
        await asyncio.gather(stream(server, options.clients, seen, until, seed), switch())

    with ExitStack() as unread:
        asyncio.run(run())
    scrapers.on = False
    times, gaps = np.array(seen.times) - begun, np.array(seen.seconds)
    slices = []
    for number, scraped in enumerate(plan):
        since = times - number * options.slice
        inside = (since - gaps > _EDGE_S) & (since < options.slice)
        slices.append((scraped, gaps[inside].tolist()))
    return slices


Pairs = list[tuple[np.ndarray, np.ndarray]]  # gaps of a scraped slice and its quiet neighbour's


def pairs_of(slices: Sequence[tuple[bool, list[float]]]) -> Pairs:
    found = []
    for first, second in zip(slices[::2], slices[1::2], strict=True):
        quiet, scraped = (first, second) if second[0] else (second, first)
        found.append((np.array(scraped[1]), np.array(quiet[1])))
    return found


def compare(pairs: Pairs, ratio: Callable[[Pairs], float]) -> list[float]:
    """Ratio, scraped over not, with its 95 % interval: pairs are drawn again."""
    generator = np.random.default_rng(0)
    drawn = [
        ratio([pairs[place] for place in generator.integers(0, len(pairs), len(pairs))])
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return [ratio(pairs), float(low), float(high)]


def pooled(of: Callable[[Any], float]) -> Callable[[Pairs], float]:
    """Return a ratio of all gaps of one side over all of the other."""

    def ratio(pairs: Pairs) -> float:
        scraped, quiet = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        return of(scraped) / of(quiet)

    return ratio


def median_of_pairs(pairs: Pairs) -> float:
    """Seconds a token, scraped over not: the median of neighbouring slices."""
    return statistics.median(float(scraped.mean() / quiet.mean()) for scraped, quiet in pairs)


STATISTICS: dict[str, Callable[[Any], float]] = {
    "p50": lambda gaps: float(np.quantile(gaps, 0.50)),
    "p99": lambda gaps: float(np.quantile(gaps, 0.99)),
    "mean": lambda gaps: float(np.mean(gaps)),
}
RATIOS = {"pairs": median_of_pairs} | {name: pooled(of) for name, of in STATISTICS.items()}


def bench_clients(
    model: Path, kinds: Sequence[Kind], options: argparse.Namespace
) -> dict[str, Any]:
    """Measure each kind of server in blocks, by turns."""
    found: dict[str, list[tuple[bool, list[float]]]] = {kind.name: [] for kind in kinds}
    with ExitStack() as stack:
        servers: dict[tuple[bool, tuple[str, ...]], Server] = {}
        scrapers: dict[str, Scrapers] = {}
        ports: dict[str, int] = {}
        for number, kind in enumerate(kinds):
            key = (kind.counters, kind.arguments)
            if key not in servers:
                log = ROOT / "runs" / f"bench_polling_{number}.log"
                started = serve(model, log, counters=kind.counters, arguments=kind.arguments)
                servers[key] = stack.enter_context(started)
            ports[kind.name] = servers[key].port
            if kind.elsewhere:
                with urllib.request.urlopen(servers[key].url(kind.paths[0])) as answer:
                    size = len(answer.read())
                ports[kind.name] = stack.enter_context(serve_bytes(size))
            urls = [f"http://127.0.0.1:{ports[kind.name]}{path}" for path in kind.paths]
            scrapers[kind.name] = Scrapers(urls, options.every)
            stack.callback(scrapers[kind.name].stop)
        for block in range(-1, options.blocks):
            for kind in kinds if block % 2 == 0 else kinds[::-1]:
                server = servers[kind.counters, kind.arguments]
                slices = run_block(
                    server, kind, scrapers[kind.name], ports[kind.name], options, block
                )
                if block < 0:  # warms up
                    continue
                found[kind.name] += slices
                say(
                    f"block {block + 1} of {options.blocks}, load {os.getloadavg()[0]:.1f}, "
                    f"{kind.name}: p50 and p99 in ms, scraped * "
                    + "; ".join(
                        f"{'*' * scraped}{1e3 * statistics.median(gaps):.2f} "
                        f"{1e3 * STATISTICS['p99'](gaps):.2f}"
                        for scraped, gaps in slices
                    )
                )
        scraped = {name: each.stop() for name, each in scrapers.items()}
    ratios = {
        name: {key: compare(pairs_of(slices), ratio) for key, ratio in RATIOS.items()}
        for name, slices in found.items()
    }
    sides = {
        name: {
            label: {
                key: 1e3 * of(np.concatenate([gaps for scraped, gaps in slices if scraped == side]))
                for key, of in STATISTICS.items()
            }
            | {"gaps": sum(len(gaps) for scraped, gaps in slices if scraped == side)}
            for label, side in (("quiet", False), ("scraped", True))
        }
        for name, slices in found.items()
    }
    return {"ratios": ratios, "sides_ms": sides, "scrapes": scraped}


def report_clients(result: dict[str, Any]) -> Iterator[str]:
    """Tables in markdown."""
    for name, counts in result["scrapes"].items():
        yield f"{name}: {counts['scrapes']} scrapes answered, {counts['failed']} not"
    yield ""
    yield "| time between tokens, ms | gaps | p50 | p99 | mean |"
    yield "|---|---:|---:|---:|---:|"
    for name, sides in result["sides_ms"].items():
        for side, values in sides.items():
            cells = " | ".join(f"{values[key]:.2f}" for key in STATISTICS)
            yield f"| {name}: {side} | {values['gaps']} | {cells} |"
    yield ""
    yield "| scraped over quiet (95 % interval) | a token, median of pairs | p50 | p99 | mean |"
    yield "|---|---|---|---|---|"
    for name, ratios in result["ratios"].items():
        cells = " | ".join(f"{v:.3f} ({low:.3f} to {high:.3f})" for v, low, high in ratios.values())
        yield f"| {name} | {cells} |"


def report_cost(result: dict[str, Any]) -> Iterator[str]:
    """A table in markdown."""
    sizes = list(result["cost"])
    yield f"| median microseconds | {' | '.join(sizes)} |"
    yield "|---|" + "---:|" * len(sizes)
    for part in result["cost"][sizes[0]]:
        cells = " | ".join(f"{result['cost'][size][part]:.0f}" for size in sizes)
        yield f"| {part} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--cost", action="store_true", help="of one reading, piece by piece")
    part.add_argument(
        "--scrapers",
        type=int,
        nargs="?",
        const=200,
        help="that many scrapers (default 200), and clients that never read",
    )
    parser.add_argument("--blocks", type=int, default=8, help="a kind of server (default 8)")
    parser.add_argument("--slice", type=float, help="seconds (default 4; of many scrapers 1.5)")
    parser.add_argument(
        "--slices", type=int, help="a block, a multiple of 4 (default 4; of many scrapers 16)"
    )
    parser.add_argument("--clients", type=int, default=4, help="that stream (default 4)")
    parser.add_argument(
        "--every", type=float, help="seconds between a scraper's scrapes (default 1; of many 5)"
    )
    parser.add_argument("--only", help="a regular expression of the kinds of server")
    parser.add_argument("--quick", action="store_true", help="a model of two small layers")
    parser.add_argument("--models", type=Path, help="folder of the model (default in runs)")
    parser.add_argument("--json", type=Path, help="default runs/bench_polling[_PART].json")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # As a user has it, whatever the caller's shell says.
    os.environ.pop("VLLM_PLUGINS", None)

    if options.cost:
        name = "_cost"
        sizes = SIZES[:1] if options.quick else SIZES
        folder = options.models or ROOT / "runs"
        found = {f"{size[0]} x {size[1]}": measure_cost(folder, *size) for size in sizes}
        result: dict[str, Any] = {"cost": found}
        lines = report_cost(result)
    else:
        name = "_scrapers" if options.scrapers else ""
        if options.every is None:
            options.every = 5.0 if options.scrapers else 1.0
        if options.slice is None:
            options.slice = 1.5 if options.scrapers else 4.0
        if options.slices is None:
            options.slices = 16 if options.scrapers else 4
        if options.slices % 4 or options.slices < 4:
            parser.error(f"--slices {options.slices}; expected a multiple of 4")
        shape = Shape(layers=2) if options.quick else Shape()
        folder = ROOT / "runs" / "synthetic-quick" if options.quick else DEFAULT
        model = write_models(options.models or folder, shape, ("bf16",))["bf16"]
        kinds = many(options.scrapers) if options.scrapers else LATENCY
        kinds = tuple(kind for kind in kinds if re.search(options.only or "", kind.name))
        result = bench_clients(model, kinds, options)
        lines = report_clients(result)
    machine = describe_machine()
    file = options.json or ROOT / "runs" / f"bench_polling{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    file.write_text(json.dumps(result | {"machine": machine, "options": chosen}, indent=1) + "\n")
    print(f"{machine_line(machine)}\n")
    for line in lines:
        print(line)
    say(f"Written to {file}")


if __name__ == "__main__":
    main()
