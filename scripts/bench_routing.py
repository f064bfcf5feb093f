# SPDX-License-Identifier: Apache-2.0
"""Measure how long a plan over DeepSeek-V3's headers takes to resolve, check and compose.

    python scripts/bench_routing.py              # 5 rounds, about a minute
    python scripts/bench_routing.py --json out.json

The two sources have DeepSeek-V3's names, shapes and dtypes and no data: 61 layers and the MTP
layer, 256 experts, FP8 with block scales in 163 shards as published, and the routed experts in GPTQ
int4 beside BF16 in 160. Every measurement is a fresh process. Seconds and CPU seconds (user and
system) are of the call, for a command of the whole process with the interpreter's start; the peak
is the process's largest resident memory, with the interpreter and all imports.

``worker`` is what each of vLLM's workers does at start: it resolves the composed directory.
``opened`` counts the files under the sources and the composed directory that a process opened.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for what the tests share

from tests.routing.headers import (  # noqa: E402
    DEEPSEEK_V3,
    glm_header,
    gptq_experts,
    write_checkpoint,
)

DEFAULT = ROOT / "runs" / "deepseek-v3-headers"
SHARDS = {"fp8": 163, "int4": 160}
# Seconds and bytes that each is to stay under.
AIMS = {
    "resolve": (3.0, 600e6),
    "check": (3.0, 600e6),
    "check, command": (3.0, 600e6),
    "compose": (5.0, None),
    "worker": (3.0, 600e6),
}
PLAN = """\
version: 1
base: fp8
sources:
  fp8: {path: ./fp8}
  int4: {path: ./int4}
rules:
  - {match: "model.layers.{0-60}.mlp.experts.{0-31}", source: fp8}
  - {match: "model.layers.{0-60}.mlp.experts", source: int4}
"""


def write_sources(folder: Path) -> Path:
    """Write both sources' headers and the plan unless they are there; return the plan."""
    plan = folder / "plan.yaml"
    if not plan.exists() or plan.read_text() != PLAN:
        headers = {
            "fp8": glm_header(DEEPSEEK_V3, fp8=True),
            "int4": gptq_experts(glm_header(DEEPSEEK_V3)),
        }
        for name, header in headers.items():
            write_checkpoint(folder / name, DEEPSEEK_V3, header, SHARDS[name])
        plan.write_text(PLAN)
    return plan


def run_step(step: str, plan: Path) -> dict[str, Any]:
    """Do one step in this process and return what it took. The child's side."""
    from vllm_mixprec import Plan, check, compose
    from vllm_mixprec.routing import Layout, load_route_table

    folder = plan.parent
    opened: set[str] = set()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(str(folder)):
            opened.add(str(arguments[0]))

    steps: dict[str, Callable[[], object]] = {
        "resolve": lambda: load_route_table(Plan.from_yaml(plan)),
        "check": lambda: check(Plan.from_yaml(plan), tensor_parallel_size=8),
        "compose": lambda: compose(Plan.from_yaml(plan), folder / "mixed"),
        "worker": lambda: load_route_table(
            Plan.from_yaml(folder / "mixed" / "mixprec_plan.yaml"), Layout(8, 8)
        ),
    }
    sys.addaudithook(audit)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    result = steps[step]()
    found = {
        "seconds": time.perf_counter() - begun,
        "cpu_s": time.process_time() - cpu_begun,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "opened": len(opened),
    }
    report = getattr(result, "ok", True)
    if not report:
        raise SystemExit(f"{step} found errors: {result}")
    return found


def measure(step: str, plan: Path) -> dict[str, Any]:
    """Run one step in a fresh process."""
    if step == "check, command":
        return measure_command(["check", str(plan), "-tp", "8"])
    command = [sys.executable, __file__, "--child", step, "--folder", str(plan.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_command(arguments: list[str]) -> dict[str, Any]:
    """Run the command as a shell would, and take what the system says of it."""
    command = [str(Path(sys.executable).with_name("vllm-mixprec")), *arguments]
    with tempfile.TemporaryFile() as output:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()[-4000:]}")
    return {
        "seconds": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss << 10,
    }


def report(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """The medians as a markdown table, the aims beside them."""
    lines = [
        "| step | seconds | aim | CPU seconds | peak, MB | aim | files opened |",
        "|---|---|---|---|---|---|---|",
    ]
    for step, (aim_s, aim_bytes) in AIMS.items():
        found = [times[step] for times in rounds]
        seconds = [one["seconds"] for one in found]
        cpu_s = statistics.median(one["cpu_s"] for one in found)
        peak = statistics.median(one["peak_bytes"] for one in found)
        cells = [
            step,
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            f"{aim_s:.0f}",
            f"{cpu_s:.2f}",
            f"{peak / 1e6:.0f}",
            "" if aim_bytes is None else f"{aim_bytes / 1e6:.0f}",
            str(found[0].get("opened", "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(f"Median, and range, of {len(rounds)} rounds, each step in a fresh process.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=DEFAULT, help="of the sources")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    parser.add_argument("--child", metavar="STEP", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.child:
        print(json.dumps(run_step(options.child, folder / "plan.yaml")), flush=True)
        os._exit(0)  # freeing 300,000 objects one by one is no part of it
    folder.mkdir(parents=True, exist_ok=True)
    plan = write_sources(folder)
    rounds, loads = [], []
    for number in range(options.rounds):
        rounds.append({step: measure(step, plan) for step in AIMS})
        loads.append(os.getloadavg()[0])
        print(f"round {number + 1} of {options.rounds}, load {loads[-1]:.1f}", flush=True)
    print(f"\nLoad average {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores.\n")
    print(report(rounds))
    if options.json:
        options.json.write_text(json.dumps({"load_average": loads, "rounds": rounds}, indent=1))
        print(f"\nWritten to {options.json}")


if __name__ == "__main__":
    main()
