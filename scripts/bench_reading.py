# SPDX-License-Identifier: Apache-2.0
"""Measure by which way a disk's bytes get into a model's memory: why loading reads as it does.

    python scripts/bench_reading.py                   # the BF16 model of bench_load.py, five rounds
    python scripts/bench_reading.py DIR --rounds 3    # another checkpoint, on the disk it lies on

Every way reads the same files, cold, with a load's reading threads, into fresh memory of their size
whose pages a thread makes ahead, as a load does. ``dd`` reads them beside it.

past the cache, by buffers: O_DIRECT into the package's buffers in huge pages, copied from there:
what a load does with weights that the page cache does not hold.
past the cache, in place: O_DIRECT straight into the memory. Here it is laid out to suit the file;
a parameter's is not (below), so a load could only do this and then move every byte.
past the cache, in place and moved: the same into memory eight bytes off, where each piece is moved
to after it was read.
through the cache, in place: what a load does with weights that go through the page cache.

A device takes whole sectors of a file, and memory at multiples of a size (statx ``STATX_DIOALIGN``)
which safetensors heeds for no tensor. Straight into a parameter, tensors can be read only where its
memory and all of them begin at the same place of a sector: the last lines count where they do.
"""

import argparse
import ctypes
import json
import mmap
import os
import re
import resource
import statistics
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import describe_machine, machine_line, spread
from bench_load import time_dd
from load_child import set_cache, weight_files
from synthetic import LARGE, LARGE_FOLDER, ROOT, write_models

from vllm_mixprec.checkpoint import TensorSpec, read_header
from vllm_mixprec.checkpoint.buffers import READ_BYTES
from vllm_mixprec.checkpoint.ranges import OpenFile, RangeReader, read_into
from vllm_mixprec.checkpoint.threads import start_readers
from vllm_mixprec.loading.fresh_pages import made_ahead

_MOVED_BYTES = 8
_EXPERT = re.compile(r"\.experts\.\d+\.")
_STATX_DIOALIGN, _DIO_PLACE = 0x2000, 152  # include/uapi/linux/stat.h
_AT_FDCWD = -100
_LIBC = ctypes.CDLL(None)


def past_by_buffers(reader: RangeReader, file: OpenFile, start: int, place: np.ndarray) -> None:
    lent, is_past = reader.lend(file, start, start + len(place), _spec(file), is_past=True)
    assert is_past, f"{file.file}: not read past the page cache"
    place[:] = lent.numpy()


def past_in_place(reader: RangeReader, file: OpenFile, start: int, place: np.ndarray) -> None:
    assert file.direct is not None, f"{file.file}: cannot be read past the page cache"
    read_into(torch.from_numpy(place), file.direct, start, _spec(file))


def past_and_moved(reader: RangeReader, file: OpenFile, start: int, place: np.ndarray) -> None:
    past_in_place(reader, file, start, place)
    address = place.ctypes.data
    size = ctypes.c_size_t(len(place))
    _LIBC.memmove(ctypes.c_void_p(address + _MOVED_BYTES), ctypes.c_void_p(address), size)


def through_in_place(reader: RangeReader, file: OpenFile, start: int, place: np.ndarray) -> None:
    read_into(torch.from_numpy(place), file.descriptor, start, _spec(file))


WAYS = {
    "past the cache, by buffers": past_by_buffers,
    "past the cache, in place": past_in_place,
    "past the cache, in place and moved": past_and_moved,
    "through the cache, in place": through_in_place,
}


def _spec(file: OpenFile) -> TensorSpec:
    return _first(file.file)


@cache
def _first(file: Path) -> TensorSpec:
    """A tensor of a file, for errors to name."""
    return next(iter(read_header(file).values()))


def measure(files: list[Path], way: str) -> dict[str, float]:
    """Read all whole pages of files into fresh memory; MB/s, and CPU seconds a gigabyte."""
    set_cache(files, cold=True)
    opened = [OpenFile(file, None, may_pass=True) for file in files]
    for file in opened:
        _spec(file)
    reader = RangeReader(may_pass=True)
    jobs, total = [], 0
    for file in opened:
        size = file.file.stat().st_size // mmap.PAGESIZE * mmap.PAGESIZE
        for start in range(0, size, READ_BYTES):
            nbytes = min(READ_BYTES, size - start)
            jobs.append((file, start, total, nbytes))
            total += nbytes
    memory = np.frombuffer(mmap.mmap(-1, total + mmap.PAGESIZE), np.uint8)

    def read(job: tuple[OpenFile, int, int, int]) -> None:
        file, start, first, nbytes = job
        WAYS[way](reader, file, start, memory[first : first + nbytes])

    begun, cpu_begun = time.perf_counter(), _cpu_s()
    with made_ahead([torch.from_numpy(memory)]), start_readers() as pool:
        list(pool.map(read, jobs))
    took, cpu = time.perf_counter() - begun, _cpu_s() - cpu_begun
    for file in opened:
        file.close()
    return {"mb_s": total / took / 1e6, "cpu_s_a_gb": cpu / total * 1e9}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def alignments(file: Path) -> tuple[int, int]:
    """What direct reads of a file have to be multiples of: addresses, and offsets in the file."""
    found = (ctypes.c_uint32 * 64)()
    failed = _LIBC.statx(
        _AT_FDCWD, os.fsencode(file), 0, ctypes.c_uint(_STATX_DIOALIGN), ctypes.byref(found)
    )
    memory, offset = found[_DIO_PLACE // 4], found[_DIO_PLACE // 4 + 1]
    return (0, 0) if failed else (memory, offset)


def count_places(files: list[Path], sector: int) -> tuple[int, int, int]:
    """Count the parameters that a layer's experts make up, those all of whose tensors begin at one
    place of a sector, and the places at which tensors of experts begin."""
    places = defaultdict(set)
    for file in files:
        for name, spec in read_header(file).items():
            if _EXPERT.search(name) and spec.nbytes >= READ_BYTES >> 3:
                stem = _EXPERT.sub(".experts.", name).replace("gate_proj", "up_proj")
                places[stem].add(spec.start % sector)
    alike = sum(len(found) == 1 for found in places.values())
    return len(places), alike, len(set().union(*places.values()))


def report(rounds: list[dict[str, Any]]) -> str:
    lines = [
        "| way | MB/s | CPU seconds a GB | over the faster dd | over buffers |",
        "|---|---|---|---|---|",
    ]
    first = next(iter(WAYS))
    for way in WAYS:
        speeds = [times[way]["mb_s"] for times in rounds]
        over_dd = [times[way]["mb_s"] / max(times["dd"].values()) for times in rounds]
        over_buffers = [times[way]["mb_s"] / times[first]["mb_s"] for times in rounds]
        cells = [
            f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})",
            spread([times[way]["cpu_s_a_gb"] for times in rounds]),
            spread(over_dd),
            spread(over_buffers),
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    for kind in rounds[0]["dd"]:
        speeds = [times["dd"][kind] for times in rounds]
        middle = statistics.median(speeds)
        lines.append(f"| {kind} | {middle:.0f} ({min(speeds):.0f} to {max(speeds):.0f}) | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: written under runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench_reading.json")
    options = parser.parse_args()
    folder = options.checkpoint or write_models(LARGE_FOLDER, LARGE, ("bf16",))["bf16"]
    files = weight_files(folder)
    memory, sector = alignments(files[0])
    machine = describe_machine()
    rounds: list[dict[str, Any]] = []
    options.json.parent.mkdir(parents=True, exist_ok=True)
    nbytes = sum(file.stat().st_size for file in files)
    for number in range(options.rounds):
        ways = list(WAYS)
        turn = number % len(ways)
        times: dict[str, Any] = {way: measure(files, way) for way in ways[turn:] + ways[:turn]}
        times["dd"] = {
            "dd": nbytes / time_dd(files, direct=False) / 1e6,
            "dd, direct": nbytes / time_dd(files, direct=True) / 1e6,
        }
        rounds.append(times)
        result = {"machine": machine, "alignments": [memory, sector], "rounds": rounds}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"round {number + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"\n{machine_line(machine)}\n\n{report(rounds)}\n")
    if sector:
        parameters, alike, begun = count_places(files, sector)
        print(
            f"Direct reads here take addresses that are multiples of {memory} bytes and offsets "
            f"that are multiples of {sector}. Tensors of experts begin at {begun} places of such a "
            f"sector; all of a parameter's at the same in {alike} of {parameters} parameters."
        )
    print(f"\nWritten to {options.json}")


if __name__ == "__main__":
    main()
