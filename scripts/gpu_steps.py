# SPDX-License-Identifier: Apache-2.0
"""The steps of scripts/gpu_suite.sh, each of which writes RESULTS/STEP.json.

    python scripts/gpu_steps.py STEP [--results DIR] [--again] [--quick] [--decode-gb N]

A file holds the key that it was made for: device, versions, the code's hash. A step whose file is
complete for the same key is not run again; one that was cut goes on after what it had written.
"""

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gpu_engines
from gpu_results import ROOT, Results, say

PACKAGES = ("torch", "triton", "vllm", "transformers", "vllm-mixprec")
CODE = ("vllm_mixprec/**/*.py", "patches/*.py", "scripts/*.py", "tests/gpu/*.py")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def code_sha256() -> str:
    """Hash the code that is measured: a commit says nothing of a dirty tree, or without git."""
    total = hashlib.sha256()
    for file in sorted(file for pattern in CODE for file in ROOT.glob(pattern)):
        total.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def describe_key(quick: bool) -> dict[str, Any]:
    """What a result holds for.

    Raises:
        SystemExit: no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device, or a torch that was not built for CUDA")
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": 10 * major + minor,
        "versions": versions(),
        "code": code_sha256(),
        "quick": quick,
    }


def copy_bandwidth(rounds: int = 9) -> list[float]:
    """GB/s of large device-to-device copies, bytes read and written over time, one a round."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    size = min(4 << 30, free // 4)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    found = []
    for number in range(-2, rounds):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        target.copy_(source)
        ended.record()
        ended.synchronize()
        if number >= 0:
            found.append(2 * size / begun.elapsed_time(ended) / 1e6)
    return found


def answer_of(command: list[str]) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""


def device(results: Results, options: argparse.Namespace) -> bool:
    import torch

    fields = "name,driver_version,memory.total,compute_cap,clocks.max.sm,clocks.max.memory"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    smi = answer_of(command)
    properties = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    commit = answer_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    results.cases["device"] = {
        "nvidia_smi": dict(zip(fields.split(","), smi.split("\n")[0].split(", "), strict=False)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy_gb_s": statistics.median(bandwidth),
        "copy_gb_s_range": [min(bandwidth), max(bandwidth)],
        "commit": commit.strip() or None,
    }
    say(json.dumps(results.cases["device"], indent=1))
    return True


def tests(results: Results, options: argparse.Namespace) -> bool:
    """Run tests/gpu file by file, so that a run that was cut goes on with the next."""
    for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        if results.cases.get(file.stem, {}).get("ok"):
            continue
        report = results.file.with_name(f"tests-{file.stem}.xml")
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", f"tests/gpu/{file.name}", "-q"]
        code = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT).returncode
        names = ("tests", "failures", "errors", "skipped")
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
        if suite is None:  # pytest itself died
            counts, bad = dict.fromkeys(names, 0), [f"pytest exited {code} and wrote no report"]
        else:
            counts = {name: int(suite.attrib[name]) for name in names}
            bad = [
                f"{case.get('name')}: {problem.get('message', '')[:400]}"
                for case in suite.iter("testcase")
                for problem in [*case.iter("failure"), *case.iter("error")]
            ]
        results.cases[file.stem] = {"ok": code == 0, "failed": bad, **counts}
        results.save()
    return all(case["ok"] for case in results.cases.values())


def kernels(results: Results, options: argparse.Namespace) -> bool:
    command = [sys.executable, str(ROOT / "scripts" / "bench_experts.py")]
    command += ["--results", str(results.file.parent)]
    command += ["--quick"] * options.quick + ["--again"] * options.again
    code = subprocess.run(command, cwd=ROOT).returncode
    if results.file.exists():
        results.data = json.loads(results.file.read_text())
    return code == 0


STEPS: dict[str, Callable[[Results, argparse.Namespace], bool]] = {
    "device": device,
    "tests": tests,
    "kernels": kernels,
    "decode": gpu_engines.decode,
    "counters": gpu_engines.counters,
    "memory": gpu_engines.memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--again", action="store_true", help="run it though its file is there")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer")
    parser.add_argument(
        "--decode-gb", type=float, default=8, help="of the synthetic model in BF16 (default 8)"
    )
    options = parser.parse_args()
    options.results = options.results.absolute()
    key = describe_key(options.quick)
    if options.step in ("decode", "memory"):
        key["decode_gb"] = options.decode_gb
    results = Results(options.results, options.step, key, options.again)
    if results.data["complete"]:
        say(f"{options.step}: {results.file} is of this device, code and versions; --again repeats")
        return
    begun = time.monotonic()
    ok = STEPS[options.step](results, options)
    spent = results.data.get("seconds", 0) + time.monotonic() - begun
    results.save(complete=ok, seconds=spent)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
