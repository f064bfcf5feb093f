# SPDX-License-Identifier: Apache-2.0
"""Measure what loading a mixed model reads, takes and holds, beside stock vLLM and ``dd``.

    python scripts/bench_load.py              # four layers of Qwen3-30B-A3B's size, five rounds
    python scripts/bench_load.py --small      # twelve layers of small experts: many tensors a byte
    python scripts/bench_load.py --quick      # a two-layer model of such, two rounds

Every number comes from a process of its own, forked of one that is set up as vLLM sets up its CPU
worker (its OpenMP binding, its LD_PRELOAD, one rank; see load_child.py), which runs vLLM's
``load_model`` and nothing after it. Its time is that of building the layers, reading, and
reordering weights for the kernels; the collection of garbage amid them, a second whatever the
model, is left out of all. A round measures every model with a warm page cache and, but for the
smaller stock ones, with a cold one (posix_fadvise DONTNEED on its files, checked with mincore), in
an order that changes from round to round. Ratios are formed within a round.

bytes read: /proc/self/io over ``load_model``. ``rchar`` counts read system calls, ``read_bytes``
what the block device delivered, memory maps included.
time: every format is compared with stock loading a BF16 model of about as many bytes (fewer
layers), scaled by the rest between them. Where stock loads the FP8 or int4 checkpoint itself, which
takes a CPU with AMX (the script tries and says what happened), with that too. CPU time, of all
threads, is told besides: it says more than the clock where the machine does other work.
peak memory: VmHWM over ``load_model``, less the resident memory just before, less the bytes of the
finished model's weights, those that vLLM packs for oneDNN among them. It includes file pages of
memory maps, which the kernel could take back, and what the process itself takes on the way (code,
thread stacks), which is measured with a model of a megabyte and told apart.
dd: the BF16 model's files, cold, read by ``dd`` in the same round, through the page cache and with
``iflag=direct``, thrown away or, if /dev/shm has room, kept in memory. It is compared with the
package's reader alone, which drops what it read and so goes through the page cache, and with a
load's reading, which goes past it if the device keeps up, has the parameters' memory made, copies
every tensor into its place and packs all but the last layer; a whole load builds the layers before
and packs the rest after.
fastsafetensors: stock vLLM with ``--load-format fastsafetensors``, if it runs here.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench_decode import STOCK, describe_machine, machine_line, spread
from load_child import set_cache, weight_files
from synthetic import (
    DEFAULT,
    LARGE,
    LARGE_FOLDER,
    ROOT,
    Shape,
    compose_mix,
    write_models,
)

# Layers of the BF16 models whose bytes come nearest to the others'.
_SMALLER_STOCK = {LARGE.layers: (1, 2), Shape().layers: (3, 6)}
_TINY = "tiny: "
_ITSELF = "stock, itself: "  # stock loading a quantised checkpoint
_TINY_SHAPE = Shape(layers=1, experts=4, top_k=2, hidden=256, inner=128, heads=4, vocab=512)
_PEAK_BYTES = 256 << 20
_MEMORY = Path("/dev/shm")
_DD = {
    "dd": "buffered_s",
    "dd, direct": "direct_s",
    "dd into memory": "kept_s",
    "dd into memory, direct": "direct_kept_s",
}
MODELS: dict[str, tuple[tuple[str, ...], str]] = {
    "BF16": (("bf16",), "bf16"),
    "FP8": (("fp8",), "fp8"),
    "int4": (("int4",), "int4"),
    "three formats": (("int4", "fp8", "bf16"), "bf16"),
}
Round = dict[str, dict[str, Any]]


class Child:
    """The process that measures."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("load_child.py"))],
            env=_worker_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, what: str, model: Path, cold: bool = False, **rest: Any) -> dict[str, Any]:
        """Have a fork ``load`` or ``drain`` a model; raises RuntimeError with its traceback."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"what": what, "model": str(model), "cold": cold, **rest}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def end(self) -> None:
        """Have the process end, which it does when nothing more can come."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _worker_environment() -> dict[str, str]:
    """The environment that vLLM gives its CPU worker on this machine."""
    import torch
    import vllm

    gomp = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    gomp += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    malloc = sorted((Path(vllm.__file__).parent / "libs").glob("libtcmalloc*.so*"))
    cores = sorted(os.sched_getaffinity(0))
    # vLLM's "auto" leaves one core to the scheduler's process.
    bound = os.environ.get("BENCH_CORES") or " ".join(map(str, cores[1:] or cores))
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(str(library) for library in malloc[:1] + gomp[:1]),
        "OMP_NUM_THREADS": str(len(bound.split())),
        "GOMP_CPU_AFFINITY": bound,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def try_stock(child: Child, model: Path, load_format: str = "auto") -> tuple[bool, str]:
    """Say whether stock vLLM loads a model here, and its seconds or its error's line."""
    try:
        found = child.ask("load", model, plain=True, load_format=load_format)
    except RuntimeError as error:
        return False, str(error).strip().splitlines()[-1]
    return True, f"{found['load_s']:.2f} s warm for {found['file_bytes'] / 1e6:.0f} MB"


def time_dd(files: list[Path], direct: bool, kept: bool = False) -> float:
    """Read files with ``dd``, none of them in the page cache; return the seconds."""
    set_cache(files, cold=True)
    flags = ["iflag=direct"] if direct else []
    with tempfile.TemporaryDirectory(dir=_MEMORY if kept else None) as folder:
        begun = time.perf_counter()
        for number, file in enumerate(files):
            to = Path(folder, str(number)) if kept else "/dev/null"
            command = ["dd", f"if={file}", f"of={to}", "bs=4M", *flags]
            subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - begun


def run_dd(files: list[Path]) -> dict[str, float]:
    """Seconds of ``dd`` by how it reads and what it does with that, and the bytes it reads."""
    nbytes = sum(file.stat().st_size for file in files)
    found = {
        "bytes": nbytes,
        "buffered_s": time_dd(files, direct=False),
        "direct_s": time_dd(files, direct=True),
    }
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 1.2 * nbytes:
        found["kept_s"] = time_dd(files, direct=False, kept=True)
        found["direct_kept_s"] = time_dd(files, direct=True, kept=True)
    return found


def measure_round(child: Child, served: dict[str, Path], number: int) -> Round:
    """Measure everything once; keys are "NAME, warm", "NAME, cold", "reader" and "dd".

    In any order: what reads a file after others may find it in the memory of the disk's host.
    """
    plain = served[STOCK]
    cases = [(name, False) for name in served]
    cases += [(name, True) for name in (*MODELS, STOCK)]
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        f"{name}, {'cold' if cold else 'warm'}": partial(
            child.ask, "load", served[name], cold, plain=name.startswith((STOCK, _ITSELF))
        )
        for name, cold in cases
    }
    runs["reader"] = partial(child.ask, "drain", plain, cold=True)
    runs["dd"] = partial(run_dd, weight_files(plain))
    names = list(runs)
    random.Random(number).shuffle(names)
    return {name: runs[name]() for name in names}


def _nearest_stock(times: Round, nbytes: int) -> str:
    """The warm stock run whose bytes are nearest in proportion."""
    runs = [name for name in times if name.startswith(STOCK) and name.endswith(", warm")]
    return min(runs, key=lambda name: abs(math.log(times[name]["file_bytes"] / nbytes)))


def _over_stock(times: Round, name: str, value: str) -> float:
    """``value`` a byte of a warm load over that of stock's load of about as many bytes."""
    ours = times[f"{name}, warm"]
    stock = times[_nearest_stock(times, ours["routed_bytes"])]
    return (ours[value] / ours["routed_bytes"]) / (stock[value] / stock["file_bytes"])


def _above(times: Round, run: str) -> float:
    """Megabytes that a run's peak was above its weights."""
    return (times[run]["peak_bytes"] - times[run]["weight_bytes"]) / 1e6


def _cold_speeds(times: Round) -> dict[str, float]:
    """MB/s from a cold cache, of the BF16 model."""
    dd, reader, load = times["dd"], times["reader"], times["BF16, cold"]
    stock = times[f"{STOCK}, cold"]
    speeds = {label: dd["bytes"] / dd[key] / 1e6 for label, key in _DD.items() if key in dd}
    return speeds | {
        "reader alone": reader["bytes"] / reader["load_s"] / 1e6,
        "load's reading": load["routed_bytes"] / load["phases_s"]["load_weights"] / 1e6,
        "whole load": load["routed_bytes"] / load["load_s"] / 1e6,
        "stock's reading": stock["file_bytes"] / stock["phases_s"]["load_weights"] / 1e6,
        "stock's whole load": stock["file_bytes"] / stock["load_s"] / 1e6,
    }


def report(rounds: list[Round]) -> str:
    """A table of loads, a line on cold reading, and for each aim whether it is met."""

    def each(measure: Callable[[Round], float]) -> list[float]:
        return [measure(times) for times in rounds]

    def median(measure: Callable[[Round], float]) -> float:
        return statistics.median(each(measure))

    lines = [
        "| loaded | weights, MB | read calls over routed bytes, warm | device over routed, cold "
        "| time over stock, warm | CPU time over stock, warm | reading + reordering, s "
        "| peak less weights, MB: ours | stock's of such bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        warm, cold = f"{name}, warm", f"{name}, cold"
        stock = _nearest_stock(rounds[0], rounds[0][warm]["routed_bytes"])
        phases = [
            median(lambda times: times[warm]["phases_s"][phase])  # noqa: B023  called at once
            for phase in ("load_weights", "process_weights_after_loading")
        ]
        cells = [
            f"{rounds[0][warm]['weight_bytes'] / 1e6:.0f}",
            f"{median(lambda t: t[warm]['rchar'] / t[warm]['routed_bytes']):.3f}",  # noqa: B023
            f"{median(lambda t: t[cold]['read_bytes'] / t[cold]['routed_bytes']):.3f}",  # noqa: B023
            spread(each(lambda t: _over_stock(t, name, "load_s"))),  # noqa: B023
            spread(each(lambda t: _over_stock(t, name, "load_cpu_s"))),  # noqa: B023
            f"{phases[0]:.2f} + {phases[1]:.2f}",
            f"{max(each(lambda t: _above(t, warm))):.0f}",  # noqa: B023
            f"{max(each(lambda t: _above(t, stock))):.0f}",  # noqa: B023
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    process = max(each(lambda times: _above(times, f"{_TINY}BF16, warm")))
    lines += [
        "",
        f"Median, and range, of {len(rounds)} rounds; memory is the largest of them, {process:.0f} "
        "MB of it the process's own.",
        "",
        "Cold reading of the BF16 model, MB/s: "
        + "; ".join(
            f"{name} {statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
            for name in _cold_speeds(rounds[0])
            if (speeds := each(lambda times: _cold_speeds(times)[name]))  # noqa: B023
        ),
        "",
    ]
    return "\n".join(lines + _verdicts(rounds))


def _verdicts(rounds: list[Round]) -> list[str]:
    """Each aim, what was measured, and whether that meets it."""
    speeds = [_cold_speeds(times) for times in rounds]
    found: list[tuple[str, list[float], bool]] = []
    kinds = [("dd", ("dd", "dd, direct"))]
    kept = ("dd into memory", "dd into memory, direct")
    if all(label in each for each in speeds for label in kept):
        kinds.append(("dd into memory", kept))
    for kind, labels in kinds:
        for name in ("reader alone", "load's reading", "whole load"):
            ratios = [each[name] / max(each[label] for label in labels) for each in speeds]
            aim = f"cold, {name} over the faster {kind}, at least 1"
            found.append((aim, ratios, statistics.median(ratios) >= 1))
    for name in MODELS:
        for value, label in (("load_s", "time"), ("load_cpu_s", "CPU time")):
            ratios = [_over_stock(times, name, value) for times in rounds]
            aim = f"warm, {name}, {label} over stock of equal bytes, at most 1"
            found.append((aim, ratios, statistics.median(ratios) <= 1))
            stock = f"{_ITSELF}{name}, warm"
            if stock in rounds[0]:
                ratios = [times[f"{name}, warm"][value] / times[stock][value] for times in rounds]
                aim = f"warm, {name}, {label} over stock's of the same checkpoint, at most 1"
                found.append((aim, ratios, statistics.median(ratios) <= 1))
        above = [
            max(_above(times, f"{name}, {cache}") for cache in ("warm", "cold")) for times in rounds
        ]
        aim = f"{name}, peak less weights, at most {_PEAK_BYTES / 1e6:.0f} MB"
        found.append((aim, above, max(above) <= _PEAK_BYTES / 1e6))
    return [f"{aim}: {spread(values)}, {'met' if ok else 'MISSED'}" for aim, values, ok in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--small", action="store_true", help="a model of small experts")
    parser.add_argument("--models", type=Path, help="folder of the models (default in runs)")
    parser.add_argument("--json", type=Path, help="default runs/bench_load[_small|_quick].json")
    options = parser.parse_args()
    n_rounds = options.rounds or (2 if options.quick else 5)
    folder, shape, name = LARGE_FOLDER, LARGE, "bench_load"
    if options.quick:
        folder, shape, name = ROOT / "runs" / "synthetic-quick", Shape(layers=2), f"{name}_quick"
    elif options.small:
        folder, shape, name = DEFAULT, Shape(), f"{name}_small"
    folder = options.models or folder
    paths = write_models(folder, shape)
    served = {STOCK: paths["bf16"]}
    for layers in _SMALLER_STOCK.get(shape.layers, ()):
        smaller = write_models(folder / f"layers{layers}", replace(shape, layers=layers), ("bf16",))
        served[f"{STOCK}, {layers} layers"] = smaller["bf16"]
    for formats, (experts, dense) in MODELS.items():
        served[formats] = compose_mix(folder / "mixed" / "+".join(experts), paths, experts, dense)
    tiny = write_models(folder / "tiny", _TINY_SHAPE, ("bf16",))
    served[f"{_TINY}BF16"] = compose_mix(folder / "mixed" / "tiny", tiny, ("bf16",))
    machine = describe_machine()
    child = Child()
    tried = {
        "--load-format fastsafetensors": try_stock(child, paths["bf16"], "fastsafetensors"),
        "the FP8 checkpoint": try_stock(child, paths["fp8"]),
        "the int4 checkpoint": try_stock(child, paths["int4"]),
    }
    for what, (_, outcome) in tried.items():
        print(f"Stock vLLM, {what}: {outcome}", flush=True)
    for quantised in ("FP8", "int4"):
        if tried[f"the {quantised} checkpoint"][0]:
            served[f"{_ITSELF}{quantised}"] = paths[quantised.lower()]
    file = options.json or ROOT / "runs" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rounds, loads = [], []
    for number in range(n_rounds):
        begun = time.perf_counter()
        rounds.append(measure_round(child, served, number))
        loads.append(os.getloadavg())
        result = {"machine": machine, "load_average": loads, "tried": tried, "rounds": rounds}
        file.write_text(json.dumps(result, indent=1) + "\n")  # a run cut short is not lost
        took = time.perf_counter() - begun
        print(
            f"round {number + 1} of {n_rounds}, {took:.0f} s, load {loads[-1][0]:.1f}", flush=True
        )
    load = [minute for minute, _, _ in loads]
    print(f"\n{machine_line(machine)}\nLoad average {min(load):.1f} to {max(load):.1f}.\n")
    print(report(rounds))
    print(f"\nWritten to {file}")


if __name__ == "__main__":
    main()
