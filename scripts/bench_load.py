# SPDX-License-Identifier: Apache-2.0
"""Measure what loading a mixed model reads, takes and holds, beside stock vLLM.

    python scripts/bench_load.py              # the 1.3 GB synthetic model, five rounds, 10 minutes
    python scripts/bench_load.py --quick      # a two-layer model, two rounds

Every number comes from a fresh process set up as vLLM sets up its CPU worker (its OpenMP binding,
its LD_PRELOAD, one rank) that runs vLLM's ``get_model`` and nothing after it: building the layers,
reading, and reordering weights for the kernels. A round measures every model once with a cold page
cache (posix_fadvise DONTNEED on its files, checked with mincore) and once with a warm one, in an
order that changes from round to round.

bytes read: /proc/self/io of the process over ``get_model``. ``rchar`` counts read system calls,
``read_bytes`` what the block device delivered, memory maps included. Bytes of Python modules that
were imported meanwhile are in both.
time: stock cannot load FP8 or int4 experts on this kind of CPU, so every format is compared with
stock loading a BF16 model of about as many bytes (fewer layers), scaled by the rest between them.
peak memory: VmHWM over ``get_model``, less the resident memory just before, over the bytes of the
finished model's parameters and buffers. VmHWM includes file pages of memory maps, which the kernel
could take back; ``anonymous`` (in the JSON) is the peak without them, sampled every 5 ms. What the
process itself takes on the way (modules that are imported, kernels' code, thread stacks) is
measured with a model of a megabyte and told apart.
dd: the BF16 model's files, cold, read by ``dd`` in the same round: through the page cache with
POSIX_FADV_DONTNEED before it, and with ``iflag=direct``. It is compared with the loader's own
reading, which also copies every tensor into its place.
fastsafetensors: stock vLLM with ``--load-format fastsafetensors``, if it runs here.
"""

import argparse
import ctypes
import json
import math
import mmap
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench_decode import STOCK, describe_machine, machine_line, spread
from synthetic import DEFAULT, ROOT, Shape, compose_mix, write_models

# Layers of the BF16 models whose bytes come nearest to the others'.
_SMALLER_STOCK = (3, 6)
TINY = "tiny: "
_TINY = Shape(layers=1, experts=4, top_k=2, hidden=256, inner=128, heads=4, vocab=512)
MODELS: dict[str, tuple[tuple[str, ...], str]] = {
    "bf16": (("bf16",), "bf16"),
    "fp8": (("fp8",), "fp8"),
    "int4": (("int4",), "int4"),
    "int4 + fp8 + bf16": (("int4", "fp8", "bf16"), "bf16"),
}


def load_once(model: str, cold: bool, load_format: str) -> dict[str, Any]:
    """Load ``model`` in this process and return what that took. The child's side."""
    import torch
    import vllm.v1.worker.cpu_worker  # noqa: F401  what it does to torch.accelerator
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    torch.ops._C.init_cpu_memory_env([0])  # as CPUWorker does
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader, get_model_cls, get_model_loader
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    begun = time.perf_counter()
    config = EngineArgs(
        model=model,
        load_format=load_format,
        skip_tokenizer_init=True,
        max_model_len=512,
        kv_cache_memory_bytes=192 << 20,
    ).create_engine_config()
    found: dict[str, Any] = {"config_s": time.perf_counter() - begun}
    with set_current_vllm_config(config):
        address = get_distributed_init_method("127.0.0.1", get_open_port())
        init_worker_distributed_environment(config, 0, address, 0, "gloo")
        get_model_cls(config.model_config)  # importing modules is not loading
        loader = get_model_loader(config.load_config)
        phases: dict[str, float] = {}
        _time(loader, "create_model", phases)
        _time(loader, "load_weights", phases)
        _time(base_loader, "process_weights_after_loading", phases)
        files = weight_files(Path(model))
        if cold:
            drop_pages(files)
        else:
            read_all(files)
        found["cached_share_before"] = cached_share(files)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        watch = _AnonymousPeak()
        before, io_before = _memory(), _io()
        begun, cpu_begun = time.perf_counter(), time.process_time()
        loaded = loader.load_model(vllm_config=config, model_config=config.model_config)
        found["load_s"] = time.perf_counter() - begun
        found["load_cpu_s"] = time.process_time() - cpu_begun
        io_after, after = _io(), _memory()
        anonymous = watch.stop()
        routed = None
        if config.load_config.load_format == "mixprec":
            from vllm_mixprec.loading.loader import rank_routes

            routed = sum(route.stored_bytes for route in rank_routes(loaded, config.quant_config))
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*loaded.parameters(), *loaded.buffers()]
    }
    found |= {
        "phases_s": phases,
        "file_bytes": sum(file.stat().st_size for file in files),
        "routed_bytes": routed,
        "rchar": io_after["rchar"] - io_before["rchar"],
        "read_bytes": io_after["read_bytes"] - io_before["read_bytes"],
        "weight_bytes": sum(storages.values()),
        "peak_bytes": after["VmHWM"] - before["VmRSS"],
        "anonymous_peak_bytes": anonymous - before["RssAnon"],
        "final_bytes": after["VmRSS"] - before["VmRSS"],
        "anonymous_final_bytes": after["RssAnon"] - before["RssAnon"],
    }
    return found


def _time(owner: Any, name: str, phases: dict[str, float]) -> None:
    """Have ``owner.name`` add its seconds to ``phases``."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            phases[name] = phases.get(name, 0.0) + time.perf_counter() - begun

    setattr(owner, name, timed)


def _memory() -> dict[str, int]:
    """Bytes of this process, from /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in lines if words[-1:] == ["kB"]}


def _io() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/io").read_text().splitlines())
    return {name[:-1]: int(number) for name, number in lines}


class _AnonymousPeak:
    """Samples RssAnon, which has no high-water mark of its own."""

    def __init__(self) -> None:
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        page = mmap.PAGESIZE
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
        while not self._ended.wait(0.005):
            _, resident, shared, *_ = os.pread(descriptor, 200, 0).split()
            self._peak = max(self._peak, (int(resident) - int(shared)) * page)
        os.close(descriptor)

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._peak


def weight_files(model: Path) -> list[Path]:
    """The shards under a directory, of a composed one those of its sources."""
    return sorted({file.resolve() for file in model.rglob("*.safetensors")})


def drop_pages(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(files: list[Path]) -> None:
    """Bring files into the page cache."""
    buffer = bytearray(4 << 20)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def cached_share(files: list[Path]) -> float:
    """Share of the files' pages that are in the page cache, asked of mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = total = 0
    for file in files:
        with file.open("rb") as stream:
            mapped = mmap.mmap(
                stream.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            )
        pages = -(-len(mapped) // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        if libc.mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), states
        ):
            raise OSError(ctypes.get_errno(), f"mincore of {file}")
        resident += sum(state & 1 for state in states)
        total += pages
        del start
        mapped.close()
    return resident / total


def worker_environment(plain: bool) -> dict[str, str]:
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
        **({"VLLM_PLUGINS": ""} if plain else {}),
    }


def run_child(model: Path, cold: bool, plain: bool, load_format: str = "auto") -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(model), "--load-format", load_format]
    command += ["--cold"] if cold else []
    result = subprocess.run(command, env=worker_environment(plain), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def try_fastsafetensors(model: Path) -> str:
    """Say what stock vLLM's fastsafetensors loader does here: its seconds, or its error's line."""
    try:
        found = run_child(model, cold=False, plain=True, load_format="fastsafetensors")
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]
    return f"{found['load_s']:.2f} s warm for {found['file_bytes'] / 1e6:.0f} MB"


def time_dd(files: list[Path], direct: bool) -> float:
    """Read files with ``dd``, none of them in the page cache; return the seconds."""
    drop_pages(files)
    begun = time.perf_counter()
    for file in files:
        flags = ["iflag=direct"] if direct else []
        command = ["dd", f"if={file}", "of=/dev/null", "bs=4M", *flags]
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def _nearest_stock(times: dict[str, dict[str, Any]], nbytes: int, cache: str) -> str:
    """The stock run whose bytes are nearest in proportion."""
    runs = [name for name in times if name.startswith(STOCK) and name.endswith(f", {cache}")]
    return min(runs, key=lambda name: abs(math.log(times[name]["file_bytes"] / nbytes)))


def report(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """One table for each state of the page cache, as markdown."""

    def over(value: str, base: str, name: str) -> list[float]:
        return [times[name][value] / times[name][base] for times in rounds]

    def above(name: str) -> list[float]:
        return [times[name]["peak_bytes"] - times[name]["weight_bytes"] for times in rounds]

    lines = []
    for cache in ("cold", "warm"):
        lines += [
            f"Page cache {cache}:",
            "",
            "| model | weights, MB | system calls over routed bytes | device over routed bytes "
            "| MB/s | s reading + reordering | time over stock, equal bytes "
            "| peak memory over weights | peak less weights, MB | of it the process |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in rounds[0]:
            label, _, state = name.rpartition(", ")
            if state != cache or label.startswith(TINY):
                continue
            tiny = f"{TINY}{STOCK if label.startswith(STOCK) else 'bf16'}, {cache}"
            base = "file_bytes" if label.startswith(STOCK) else "routed_bytes"
            stock = _nearest_stock(rounds[0], rounds[0][name][base], cache)
            speed = [1e-6 * times[name][base] / times[name]["load_s"] for times in rounds]
            time_ratio = [
                (times[name]["load_s"] / times[name][base])
                / (times[stock]["load_s"] / times[stock]["file_bytes"])
                for times in rounds
            ]
            weights_s = [times[name]["phases_s"]["load_weights"] for times in rounds]
            process_s = [
                times[name]["phases_s"]["process_weights_after_loading"] for times in rounds
            ]
            cells = [
                f"{1e-6 * rounds[0][name]['weight_bytes']:.0f}",
                f"{statistics.median(over('rchar', base, name)):.3f}",
                f"{statistics.median(over('read_bytes', base, name)):.3f}",
                f"{statistics.median(speed):.0f}",
                f"{statistics.median(weights_s):.2f} + {statistics.median(process_s):.2f}",
                spread(time_ratio),
                spread(over("peak_bytes", "weight_bytes", name)),
                *(f"{statistics.median(above(one)) / 1e6:.0f}" for one in (name, tiny)),
            ]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        f"Median, and range, of {len(rounds)} rounds. Time over stock is seconds a byte over those "
        "of the stock run of the same round that is nearest in bytes. Aims: bytes read 1.00, time "
        "over stock 1.1, peak less weights and the process 256 MiB."
    )
    return "\n".join(lines)


def report_dd(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """How the loader's cold reading compares with ``dd`` of the same round, as a line."""
    speeds: dict[str, list[float]] = {"loader": [], "dd": [], "dd, direct": []}
    for times in rounds:
        nbytes, found = times["dd"]["bytes"], times["bf16, cold"]
        speeds["loader"].append(found["routed_bytes"] / found["phases_s"]["load_weights"] / 1e6)
        speeds["dd"].append(nbytes / times["dd"]["buffered_s"] / 1e6)
        speeds["dd, direct"].append(nbytes / times["dd"]["direct_s"] / 1e6)
    told = "; ".join(f"{name} {spread(values)}" for name, values in speeds.items())
    return f"Cold reading of the BF16 model, MB/s: {told}. Aim: the loader is as fast as dd."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--models", type=Path, help="folder of the models (default runs/synthetic)")
    parser.add_argument("--json", type=Path, help="default runs/bench_load[_quick].json")
    parser.add_argument("--child", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load-format", default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = load_once(options.child, options.cold, options.load_format)
        print(json.dumps(found), flush=True)
        os._exit(0)  # no orderly end of torch.distributed: nothing depends on it
    n_rounds = options.rounds or (2 if options.quick else 5)
    folder = options.models or (ROOT / "runs" / "synthetic-quick" if options.quick else DEFAULT)
    paths = write_models(folder, Shape(layers=2) if options.quick else Shape())
    served = {STOCK: paths["bf16"]}
    for layers in () if options.quick else _SMALLER_STOCK:
        smaller = write_models(folder / f"layers{layers}", Shape(layers=layers), ("bf16",))
        served[f"{STOCK}, {layers} layers"] = smaller["bf16"]
    for name, (experts, dense) in MODELS.items():
        served[name] = compose_mix(folder / "mixed" / name.replace(" ", ""), paths, experts, dense)
    tiny = write_models(folder / "tiny", _TINY, ("bf16",))
    served[f"{TINY}{STOCK}"] = tiny["bf16"]
    served[f"{TINY}bf16"] = compose_mix(folder / "mixed" / "tiny", tiny, ("bf16",))
    machine = describe_machine()
    fast = try_fastsafetensors(paths["bf16"])
    print(f"Stock vLLM with --load-format fastsafetensors: {fast}", flush=True)
    file = options.json or ROOT / "runs" / f"bench_load{'_quick' * options.quick}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    cases = [(name, cache) for name in served for cache in ("cold", "warm")]
    rounds, loads = [], []
    for number in range(n_rounds):
        order = list(cases)
        random.Random(number).shuffle(order)
        found = {}
        for name, cache in order:
            found[name, cache] = run_child(served[name], cache == "cold", plain=STOCK in name)
        files = weight_files(paths["bf16"])
        dd = {
            "bytes": sum(file.stat().st_size for file in files),
            "buffered_s": time_dd(files, direct=False),
            "direct_s": time_dd(files, direct=True),
        }
        rounds.append(
            {f"{name}, {cache}": found[name, cache] for name, cache in cases} | {"dd": dd}
        )
        loads.append(os.getloadavg())
        result = {"machine": machine, "load_average": loads, "fastsafetensors": fast}
        result["rounds"] = rounds
        file.write_text(json.dumps(result, indent=1) + "\n")  # a run cut short is not lost
        print(f"round {number + 1} of {n_rounds}, load {loads[-1][0]:.1f}", flush=True)
    print(f"\n{machine_line(machine)}\nLoad average {loads[0][0]:.1f} to {loads[-1][0]:.1f}.\n")
    print(report(rounds))
    print(report_dd(rounds))
    print(f"\nWritten to {file}")


if __name__ == "__main__":
    main()
