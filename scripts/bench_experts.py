# SPDX-License-Identifier: Apache-2.0
"""Measure the routed experts of one layer on a GPU: one launch, group by group, stock kernels.

    python scripts/bench_experts.py            # two models' layers, five mixes, batch 1 to 512
    python scripts/bench_experts.py --quick    # one model's layer, batch 1 and 64
    python scripts/bench_experts.py --tune     # search tiles for the one-launch kernel

A measurement is a CUDA graph of several calls, each routed to other experts, so that weights come
from memory: between two readings of an expert at small batches the whole layer passes, several
times the L2. Paths take turns within a round; a number is the median of the rounds.

"groups" is what a mixed layer runs without the one-launch kernel; for a single format it is the
stock kernel alone: vLLM's Triton kernel for BF16 and FP8 blocks, Marlin for int4. "expected" for a
mix is the time its experts would take at the speed of those, each format weighted by its share.
Without vLLM "groups" is the one-launch kernel called once a format, and the stock kernel of BF16 a
dense torch.bmm over all experts.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_results import ROOT, Results, say
from gpu_steps import copy_bandwidth, describe_key
from gpu_timing import (
    BATCHES,
    CALLS,
    DEVICE,
    MIXES,
    SHAPES,
    Path_,
    batches,
    bytes_touched,
    capture,
    case_name,
    replay_us,
)
from tune_experts import tune

sys.path.insert(0, str(ROOT))  # for what the tests share

from tests.gpu.weights import Experts, relative_error  # noqa: E402
from vllm_mixprec.quant.grouped_tiles import choose_config  # noqa: E402

_FORMAT_NAMES = {"bf16": "bf16", "fp8": "fp8_block", "int4": "gptq"}


def has_vllm() -> bool:
    if find_spec("vllm") is None:
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def one_launch(experts: Experts, vllm: bool) -> dict[str, Path_]:
    """The one-launch kernel; with vLLM also on tokens that vLLM's operator has aligned."""
    from vllm_mixprec.quant.grouped_kernel import grouped_experts

    table, shape = experts.table(), experts.shape

    def own(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return grouped_experts(x, weights, ids, table)

    paths: dict[str, Path_] = {"one launch": own}
    if vllm:
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        def aligned(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            config = choose_config(len(x), shape.top_k, shape.experts, shape.inner)
            # As quant/one_launch.py, which must stand -1 in padding.
            inside = ids.masked_fill(ids < 0, shape.experts)
            by_vllm = moe_align_block_size(inside, config.block_m, shape.experts + 1)
            return grouped_experts(x, weights, ids, table, config=config, aligned=by_vllm)

        paths["one launch, vLLM aligns"] = aligned
    return paths


def groups_without_vllm(experts: Experts) -> dict[str, Path_]:
    from vllm_mixprec.quant.grouped_kernel import grouped_experts

    tables = [experts.table(present=ids) for ids in experts.groups().values()]

    def by_groups(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        total = grouped_experts(x, weights, ids, tables[0])
        for table in tables[1:]:
            total += grouped_experts(x, weights, ids, table)
        return total

    paths: dict[str, Path_] = {"groups": by_groups} if len(tables) > 1 else {}
    if experts.formats == ("bf16",) * experts.shape.experts:
        w13 = torch.stack([weight.weight for weight in tables[0].weights[0] if weight])
        w2 = torch.stack([weight.weight for weight in tables[0].weights[1] if weight])

        def dense(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            each = -(-ids.numel() // len(w13))  # as if every expert got as many tokens
            tokens = x[:1].expand(each, -1).expand(len(w13), each, -1)
            gate, up = torch.bmm(tokens, w13.transpose(1, 2)).chunk(2, -1)
            return torch.bmm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2))

        paths["dense bmm, all experts"] = dense
    return paths


@contextmanager
def layers() -> Iterator[Callable[[Experts], dict[str, Path_]]]:
    """Yield what makes the paths of a layer that are not the one-launch kernel's."""
    if not has_vllm():
        say("no vLLM for CUDA here: the stock kernels are not measured")
        yield groups_without_vllm
        return
    from tests.gpu.stock import build, one_rank, run
    from vllm_mixprec.routing.platform import Platform

    device = torch.device("cuda", 0)
    major, minor = torch.cuda.get_device_capability()
    made = 0

    with tempfile.TemporaryDirectory() as folder, one_rank(Path(folder), device) as config:

        def by_groups(experts: Experts) -> dict[str, Path_]:
            nonlocal made
            made += 1
            # Or every layer would stay in memory.
            config.compilation_config.static_forward_context.clear()
            layer = build(experts, Platform(f"cuda-{10 * major + minor}"), device, f"bench.{made}")
            return {"groups": lambda x, weights, ids: run(layer, x, weights, ids)}

        yield by_groups


def measure(
    paths: dict[str, Path_], experts: Experts, rows: int, rounds: int, peak_gb_s: float
) -> dict[str, Any]:
    """Time all paths on one batch size; the keys of the result are in the report's table."""
    calls = batches(experts.shape, rows, CALLS.get(rows, 4))
    touched = statistics.fmean(bytes_touched(experts, call) for call in calls)
    expected = experts.reference(*calls[0])
    found: dict[str, Any] = {"bytes": touched, "paths": {}}
    graphs = {}
    for name, path in paths.items():
        try:
            with torch.inference_mode():
                error = relative_error(path(*calls[0]), expected) if "dense" not in name else 0.0
            graphs[name] = capture(path, calls)
        except Exception as problem:  # one path that fails must not hide the others
            found["paths"][name] = {"problem": f"{type(problem).__name__}: {problem}"[:500]}
            say(f"{name}: {found['paths'][name]['problem']}")
            continue
        found["paths"][name] = {"relative_error": error, "us": []}
    for number in range(-1, rounds):
        for name, graph in graphs.items():
            us = replay_us(graph, len(calls), least_ms=2.0 if number < 0 else 10.0)
            if number >= 0:
                found["paths"][name]["us"].append(us)
    for name in graphs:
        values = found["paths"][name]
        values["median_us"] = statistics.median(values["us"])
        values["of_copy"] = touched / values["median_us"] / 1e3 / peak_gb_s
    return found


def compare(cases: dict[str, Any]) -> dict[str, Any]:
    """Ratios to the mean of the single formats' stock kernels, and which path is the better.

    Returns:
        "ratios": case -> path -> expected over measured; "better": shape -> mix -> batch -> path;
        "one_launch": the mixes, as vllm_mixprec.quant.one_launch.MEASURED names formats, that one
        launch serves faster at batch 1, 8 and 64 on all shapes.
    """

    def time_of(shape: str, mix: str, rows: int, path: str) -> float | None:
        case = cases.get(case_name(shape, mix, rows), {})
        us: float | None = case.get("paths", {}).get(path, {}).get("median_us")
        return us

    ratios: dict[str, dict[str, float]] = {}
    better: dict[str, dict[str, dict[str, str]]] = {}
    slower: set[str] = set()
    for name, case in cases.items():
        shape, mix, rows = name.split(" | ")
        formats = MIXES[mix]
        alone = [time_of(shape, format, int(rows), "groups") for format in formats]
        times = {
            path: values["median_us"]
            for path, values in case["paths"].items()
            if "median_us" in values and "dense" not in path
        }
        stock = [us for us in alone if us is not None]
        if len(stock) == len(formats):
            ratios[name] = {path: statistics.fmean(stock) / us for path, us in times.items()}
        if "groups" in times and "one launch" in times:
            best = min(times, key=lambda path: times[path]).partition(",")[0]
            better.setdefault(shape, {}).setdefault(mix, {})[rows] = best
            ours = times.get("one launch, vLLM aligns", times["one launch"])  # as a server does
            if int(rows) <= 64 and ours > times["groups"]:
                slower.add(mix)
    seen = {mix for mixes in better.values() for mix in mixes if len(MIXES[mix]) > 1}
    chosen = [[_FORMAT_NAMES[format] for format in MIXES[mix]] for mix in sorted(seen - slower)]
    return {"ratios": ratios, "better": better, "one_launch": chosen}


def bench(results: Results, options: argparse.Namespace) -> bool:
    if "copy_gb_s" not in results.data:
        results.save(copy_gb_s=statistics.median(copy_bandwidth()))
    peak = results.data["copy_gb_s"]
    say(f"copy bandwidth {peak:.0f} GB/s")
    shapes = dict(list(SHAPES.items())[: 1 if options.quick else None])
    sizes = (1, 64) if options.quick else BATCHES
    with layers() as make_groups:
        for shape_name, shape in shapes.items():
            for mix, formats in MIXES.items():
                names = {rows: case_name(shape_name, mix, rows) for rows in sizes}
                if all(name in results.cases for name in names.values()):
                    continue
                experts = Experts(shape, formats, DEVICE)
                paths = one_launch(experts, has_vllm()) | make_groups(experts)
                for rows, name in names.items():
                    if name in results.cases:
                        continue
                    found = measure(paths, experts, rows, options.rounds, peak)
                    results.cases[name] = found
                    results.save()
                    times = {p: round(v.get("median_us", -1), 1) for p, v in found["paths"].items()}
                    say(f"{name}: {times} us")
                del paths, experts
                gc.collect()
                torch.cuda.empty_cache()
    results.save(**compare(results.cases))
    failed = [
        n for n, c in results.cases.items() if any("problem" in p for p in c["paths"].values())
    ]
    say(f"one launch is the faster at batch 1 to 64 for {results.data['one_launch']}")
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tune", action="store_true", help="search tiles for the one-launch kernel"
    )
    parser.add_argument("--quick", action="store_true", help="one layer, batch 1 and 64")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "gpu", help="folder")
    options = parser.parse_args()
    step = "tune" if options.tune else "kernels"
    results = Results(options.results, step, describe_key(options.quick), options.again)
    ok = (tune if options.tune else bench)(results, options)
    results.save(complete=ok)
    say(f"Written to {results.file}")
    print(
        json.dumps(
            {key: results.data[key] for key in ("better", "one_launch") if key in results.data}
        )
    )
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
