# SPDX-License-Identifier: Apache-2.0
"""The measuring side of bench_load.py: a process that is set up as vLLM sets up its CPU worker.

It imports vLLM once and forks for each measurement, so that every one begins in the same state and
none pays for imports. Requests come as lines of JSON on stdin, answers go as such to stdout.
"""

import ctypes
import json
import mmap
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve() -> None:
    """Answer requests until stdin ends."""
    import torch  # noqa: F401
    import vllm.model_executor.models.qwen3_moe  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401  what it does to torch.accelerator
    import vllm.v1.worker.gpu_worker  # noqa: F401
    from vllm.engine.arg_utils import EngineArgs  # noqa: F401

    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # as a worker's parent is: not bound
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints
    for line in sys.stdin:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.sched_setaffinity(0, bound)
            try:
                request = json.loads(line)
                answer = {"drain": drain, "load": load}[request.pop("what")](**request)
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with os.fdopen(theirs, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)  # no orderly end of torch.distributed: nothing depends on it
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            told = pipe.read() or json.dumps({"error": "the process died without a word"})
        os.waitpid(child, 0)
        print(told, file=answers, flush=True)


def load(model: str, cold: bool, plain: bool, load_format: str = "auto") -> dict[str, Any]:
    """Load ``model`` and return what that took; ``plain``: by vLLM without any plug-in."""
    import torch
    from vllm.plugins import load_general_plugins

    if plain:
        os.environ["VLLM_PLUGINS"] = ""
    load_general_plugins()
    torch.ops._C.init_cpu_memory_env([0])  # as CPUWorker does
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import base_loader, get_model_cls, get_model_loader
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    config = EngineArgs(
        model=model,
        load_format=load_format,
        skip_tokenizer_init=True,
        max_model_len=512,
        kv_cache_memory_bytes=192 << 20,
    ).create_engine_config()
    with set_current_vllm_config(config):
        address = get_distributed_init_method("127.0.0.1", get_open_port())
        init_worker_distributed_environment(config, 0, address, 0, "gloo")
        get_model_cls(config.model_config)  # importing modules is not loading
        loader = get_model_loader(config.load_config)
        phases: dict[str, float] = {}
        cpu_phases: dict[str, float] = {}
        for owner, name in (
            (loader, "create_model"),
            (loader, "load_weights"),
            (base_loader, "process_weights_after_loading"),
        ):
            _time(owner, name, time.perf_counter, phases)
            _time(owner, name, time.process_time, cpu_phases)
        files = weight_files(Path(model))
        found: dict[str, Any] = {"cached_share_before": set_cache(files, cold)}
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        watch = _AnonymousPeak()
        before, io_before = _memory(), _io()
        loaded = loader.load_model(vllm_config=config, model_config=config.model_config)
        io_after, after = _io(), _memory()
        anonymous = watch.stop()
        routed = None
        if config.load_config.load_format == "mixprec":
            from vllm_mixprec.loading.loader import rank_routes

            routed = sum(route.stored_bytes for route in rank_routes(loaded, config.quant_config))
    return found | {
        "phases_s": phases,
        "load_s": sum(phases.values()),
        "load_cpu_s": sum(cpu_phases.values()),
        "file_bytes": sum(file.stat().st_size for file in files),
        "routed_bytes": routed,
        "rchar": io_after["rchar"] - io_before["rchar"],
        "read_bytes": io_after["read_bytes"] - io_before["read_bytes"],
        "weight_bytes": weight_bytes(loaded),
        "peak_bytes": after["VmHWM"] - before["VmRSS"],
        "anonymous_peak_bytes": anonymous - before["RssAnon"],
        "final_bytes": after["VmRSS"] - before["VmRSS"],
        "anonymous_final_bytes": after["RssAnon"] - before["RssAnon"],
    }


def drain(model: str, cold: bool) -> dict[str, Any]:
    """Read every tensor of a checkpoint through the package's reader and drop it."""
    from vllm_mixprec.checkpoint import read_header
    from vllm_mixprec.checkpoint.stream import read_tensors

    files = weight_files(Path(model))
    specs = [spec for file in files for spec in read_header(file).values()]
    found: dict[str, Any] = {"cached_share_before": set_cache(files, cold)}
    begun = time.perf_counter()
    found["bytes"] = sum(tensor.nbytes for _, tensor in read_tensors(specs))
    found["load_s"] = time.perf_counter() - begun
    return found


def weight_bytes(model: Any) -> int:
    """Bytes of a finished model's weights: parameters, buffers, and what kernels took over.

    vLLM packs an unquantised linear for oneDNN and drops its parameter
    (model_executor/layers/utils.py ``dispatch_cpu_unquantized_gemm``); the handler does not say its
    bytes, which are those of (k, n) in the model's dtype.
    """
    import torch
    from vllm._custom_ops import CPUDNNLGEMMHandler

    tensors = [*model.parameters(), *model.buffers()]
    packed = 0
    for module in model.modules():
        closure = getattr(getattr(module, "cpu_linear", None), "__closure__", None) or ()
        for cell in closure:
            if isinstance(cell.cell_contents, torch.Tensor):
                tensors.append(cell.cell_contents)
            elif isinstance(cell.cell_contents, CPUDNNLGEMMHandler):
                packed += cell.cell_contents.n * cell.cell_contents.k * module.weight.itemsize
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return packed + sum(storages.values())


def _time(owner: Any, name: str, clock: Callable[[], float], phases: dict[str, float]) -> None:
    """Have ``owner.name`` add its seconds by ``clock`` to ``phases``."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = clock()
        try:
            return function(*args, **kwargs)
        finally:
            phases[name] = phases.get(name, 0.0) + clock() - begun

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


def set_cache(files: list[Path], cold: bool) -> float:
    """Bring files into the page cache or out of it; return the share of their pages in it."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            if cold:
                os.fdatasync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = bytearray(4 << 20)
                while stream.readinto(buffer):
                    pass
    return _cached_share(files)


def _cached_share(files: list[Path]) -> float:
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


if __name__ == "__main__":
    serve()
