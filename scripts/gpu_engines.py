# SPDX-License-Identifier: Apache-2.0
"""The steps of scripts/gpu_suite.sh that start engines: decode, memory, counters.

Each engine runs in a process of its own, which is this file run as a script.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_results import ROOT, Results, say

BATCHES = (1, 8, 64, 512)
_STEPS, _PREFILL = 32, 128  # decode steps, and tokens of a prompt, a measurement

# Name -> (source of each expert in turn, kernel of layers of several formats).
MODELS: dict[str, tuple[tuple[str, ...], str]] = {
    "stock bf16": (("bf16",), ""),
    "fp8": (("fp8",), "groups"),
    "int4": (("int4",), "groups"),
    "fp8+int4, groups": (("fp8", "int4"), "groups"),
    "fp8+int4, one launch": (("fp8", "int4"), "one-launch"),
    "bf16+fp8+int4, groups": (("bf16", "fp8", "int4"), "groups"),
    "bf16+fp8+int4, one launch": (("bf16", "fp8", "int4"), "one-launch"),
}
_ALONE = {"bf16": "stock bf16", "fp8": "fp8", "int4": "int4"}
_KERNEL_VARIABLE = "VLLM_MIXPREC_EXPERT_KERNEL"


def synthetic_models(options: argparse.Namespace) -> tuple[dict[str, Path], Any]:
    """Write the three models of one shape, of about --decode-gb in BF16, unless they are there."""
    from synthetic import Shape, write_models

    layers = 2 if options.quick else max(2, round(1.5 * options.decode_gb))
    wide = {"experts": 64, "top_k": 8, "hidden": 2048, "inner": 768}
    shape = Shape(
        layers=layers, heads=32, kv_heads=4, head_dim=128, vocab=32768, shard_bytes=10**9, **wide
    )
    say(f"models of {layers} layers: {ROOT / 'runs' / 'gpu' / 'models'}")
    return write_models(ROOT / "runs" / "gpu" / "models", shape), shape


def run_engine(name: str, measure: str, results: Results, options: argparse.Namespace) -> None:
    """Measure one of MODELS in a process of its own."""
    if results.cases.get(name, {}).get("ok"):
        return
    from synthetic import compose_mix

    paths, shape = synthetic_models(options)
    experts, kernel = MODELS[name]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the worker is asked by a function
    if kernel:
        folder = ROOT / "runs" / "gpu" / "composed" / "-".join(experts)
        model = compose_mix(folder, paths, experts, "bf16")
        environment[_KERNEL_VARIABLE] = kernel
    else:
        model, environment["VLLM_PLUGINS"] = paths["bf16"], ""
    out = results.file.with_name("engine.json")
    out.unlink(missing_ok=True)
    job = {"model": str(model), "vocab": shape.vocab, "measure": measure, "quick": options.quick}
    begun = time.monotonic()
    code = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job), "--out", str(out)],
        env=environment,
        cwd=ROOT,
    ).returncode
    found = json.loads(out.read_text()) if out.exists() else {}
    results.cases[name] = {"ok": code == 0, "seconds": time.monotonic() - begun, **found}
    say(f"{name}: {results.cases[name]}")
    results.save()


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """Start one engine and measure it; runs in a process of its own."""
    from bench_decode import Requests
    from vllm import LLM

    eager = job["measure"] == "memory"
    begun = time.monotonic()
    llm = LLM(
        job["model"],
        max_model_len=1024,
        max_num_seqs=max(BATCHES),
        seed=0,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        enable_prefix_caching=False,
        enforce_eager=eager,
        gpu_memory_utilization=0.85,
    )
    found: dict[str, Any] = {"start_s": time.monotonic() - begun}
    (found["memory"],) = llm.collective_rpc(weigh)
    if eager:
        return found
    requests, generator = Requests(job["vocab"]), random.Random(0)
    for batch in (1, 64) if job["quick"] else BATCHES:
        rounds: dict[str, list[float]] = {"decode_ms": [], "prefill_ms": []}
        for number in range(-1, 2 if job["quick"] else 5):
            times = requests.run(llm, requests.prompts(generator, batch, 16), _STEPS + 8)
            # The first steps still take in prompts, the last ones may be of fewer sequences.
            steps = [b - a for a, b in zip(times[5:-2], times[6:-1], strict=True)]
            prompts = requests.prompts(generator, batch, _PREFILL)
            prefill = requests.run(llm, prompts, 1)[-1]
            if number >= 0:
                rounds["decode_ms"].append(1e3 * statistics.median(steps))
                rounds["prefill_ms"].append(1e3 * prefill)
        found[str(batch)] = rounds
    return found


def weigh(worker: Any) -> dict[str, int]:
    """Runs in the worker: what loading took, by torch's own count, and the parameters alone."""
    runner = worker.model_runner
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in runner.get_model().parameters()
    }
    return {
        "loaded_bytes": int(runner.model_memory_usage),
        "parameter_bytes": sum(storages.values()),
    }


def decode(results: Results, options: argparse.Namespace) -> bool:
    for name in MODELS:
        run_engine(name, "decode", results, options)
    # As in bench_decode.py: what a mix would take at the speed of its formats alone.
    ratios: dict[str, dict[str, float]] = {}
    for name, (experts, _) in MODELS.items():
        for batch in (1, 64) if options.quick else BATCHES:
            for what in ("decode_ms", "prefill_ms"):
                try:
                    alone = [
                        statistics.median(results.cases[_ALONE[source]][str(batch)][what])
                        for source in experts
                    ]
                    mixed = statistics.median(results.cases[name][str(batch)][what])
                except KeyError:
                    continue
                if len(experts) > 1:
                    ratios.setdefault(name, {})[f"{what[:-3]} {batch}"] = (
                        statistics.fmean(alone) / mixed
                    )
    results.save(ratios=ratios)
    return all(results.cases[name]["ok"] for name in MODELS)


def memory(results: Results, options: argparse.Namespace) -> bool:
    """Compare torch's memory after loading with what check says of the plan, within 2 %."""
    for name, (experts, kernel) in MODELS.items():
        if not kernel:
            continue
        run_engine(name, "memory", results, options)
        case = results.cases[name]
        plan = ROOT / "runs" / "gpu" / "composed" / "-".join(experts) / "mixprec_plan.yaml"
        done = subprocess.run(
            [sys.executable, "-m", "vllm_mixprec", "check", str(plan), "--json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode or "memory" not in case:
            case["ok"] = False
            say(done.stderr)
            continue
        (said,) = json.loads(done.stdout)["bytes_per_rank"]
        case["check_bytes"] = said
        case["over_check"] = case["memory"]["loaded_bytes"] / said
        # --quick's model is so small that buffers weigh more than that.
        case["ok"] = abs(case["over_check"] - 1) <= (0.05 if options.quick else 0.02)
        say(f"{name}: loaded over check {case['over_check']:.4f}")
        results.save()
    return all(case["ok"] for case in results.cases.values())


def counters(results: Results, options: argparse.Namespace) -> bool:
    """Run scripts/bench_counters.py."""
    out = results.file.with_name("bench_counters.json")
    arguments = ["--json", str(out), *(["--quick", "--pairs", "5"] if options.quick else [])]
    code = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench_counters.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    ).returncode
    if code or not out.exists():
        return False
    ratios = json.loads(out.read_text())["ratios"]
    results.cases["counters"] = ratios
    worst = min(statistics.median(v) for name, v in ratios.items() if name.startswith("throughput"))
    results.save(worst_median=worst, aim=0.995)
    return worst >= 0.995


def main() -> None:
    parser = argparse.ArgumentParser(description=engine.__doc__)
    parser.add_argument("--job", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(json.dumps(engine(options.job)))


if __name__ == "__main__":
    main()
