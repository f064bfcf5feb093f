# SPDX-License-Identifier: Apache-2.0
"""Measure by which way a disk's bytes get into a model's memory: why loading reads as it does.

    python scripts/bench_reading.py                   # the BF16 model of bench_load.py, five rounds
    python scripts/bench_reading.py DIR --rounds 3    # another checkpoint, on the disk it lies on

Every way reads the same files, cold, with a load's reading threads, into fresh memory of their size
whose pages a thread makes ahead, as a load does. ``dd`` reads them beside it.

past the cache, by buffers: O_DIRECT into the package's buffers in huge pages, copied from there:
what a load does with what the page cache does not hold and is small, or lies otherwise in memory.
past the cache, in place: O_DIRECT straight into the memory, which begins at the place of a sector
where the file does: what a load does with most weights that the page cache does not hold.
through the cache, in place: what a load does with weights that go through the page cache.
in pieces: the same bytes as experts' GPTQ words lie in a file, 768 KiB with 14 KiB of zero points
and orders between them; the words to one place, the rest to another, all by one call. A load does
so by buffers: in place it would take parameters whose gate and up projections lie one behind the
other, not side by side as vLLM lays them.
"""

import argparse
import json
import mmap
import os
import resource
import statistics
import time
from collections.abc import Iterator
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

_WORDS_BYTES, _BETWEEN_BYTES = 768 << 10, 14 << 10


def past_by_buffers(reader: RangeReader, file: OpenFile, start: int, place: np.ndarray) -> None:
    lent, is_past = reader.lend(file, start, start + len(place), _spec(file), is_past=True)
    assert is_past, f"{file.file}: not read past the page cache"
    place[:] = lent.numpy()


def past_in_place(reader: RangeReader, file: OpenFile, start: int, place: np.ndarray) -> None:
    segments = np.array([(place.ctypes.data, len(place))], np.uint64)
    is_past = reader.read_into_place(file, segments, start)
    assert is_past, f"{file.file}: not read past the page cache, {file.alignment}"


def through_in_place(reader: RangeReader, file: OpenFile, start: int, place: np.ndarray) -> None:
    read_into(torch.from_numpy(place), file.descriptor, start, _spec(file))


def past_by_buffers_in_pieces(
    reader: RangeReader, file: OpenFile, start: int, place: np.ndarray
) -> None:
    lent, is_past = reader.lend(file, start, start + len(place), _spec(file), is_past=True)
    assert is_past, f"{file.file}: not read past the page cache"
    read = lent.numpy()
    for first, piece in _pieces(place):
        piece[:] = read[first : first + len(piece)]


def past_in_place_in_pieces(
    reader: RangeReader, file: OpenFile, start: int, place: np.ndarray
) -> None:
    pieces = [(piece.ctypes.data, len(piece)) for _, piece in _pieces(place)]
    is_past = reader.read_into_place(file, np.array(pieces, np.uint64), start)
    assert is_past, f"{file.file}: not read past the page cache, {file.alignment}"


def _pieces(place: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first byte read of each piece, and where it goes: words in front, the rest last."""
    bounds = [0]
    while bounds[-1] < len(place):
        size = (_WORDS_BYTES, _BETWEEN_BYTES)[len(bounds) % 2 - 1]
        bounds.append(min(bounds[-1] + size, len(place)))
    sizes = np.diff(bounds)
    places = np.empty(len(sizes), int)
    for first, done in ((0, 0), (1, int(sizes[::2].sum()))):
        places[first::2] = done + np.cumsum(sizes[first::2]) - sizes[first::2]
    for first, to, size in zip(bounds, places, sizes, strict=False):
        yield first, place[to : to + size]


BUFFERS = "past the cache, by buffers"
BUFFERS_IN_PIECES = f"{BUFFERS}, in pieces"
# Each way, and the one whose speed it is compared with.
WAYS = {
    BUFFERS: (past_by_buffers, BUFFERS),
    "past the cache, in place": (past_in_place, BUFFERS),
    "through the cache, in place": (through_in_place, BUFFERS),
    BUFFERS_IN_PIECES: (past_by_buffers_in_pieces, BUFFERS_IN_PIECES),
    "past the cache, in place, in pieces": (past_in_place_in_pieces, BUFFERS_IN_PIECES),
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
    reader, read_to = RangeReader(may_pass=True), WAYS[way][0]
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
        read_to(reader, file, start, memory[first : first + nbytes])

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


def report(rounds: list[dict[str, Any]]) -> str:
    lines = [
        "| way | MB/s | CPU seconds a GB | over the faster dd | over buffers |",
        "|---|---|---|---|---|",
    ]
    for way, (_, compared) in WAYS.items():
        speeds = [times[way]["mb_s"] for times in rounds]
        over_dd = [times[way]["mb_s"] / max(times["dd"].values()) for times in rounds]
        over_buffers = [times[way]["mb_s"] / times[compared]["mb_s"] for times in rounds]
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
        result = {"machine": machine, "rounds": rounds}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"round {number + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"\n{machine_line(machine)}\n\n{report(rounds)}\n")
    print(f"\nWritten to {options.json}")


if __name__ == "__main__":
    main()
