# SPDX-License-Identifier: Apache-2.0
"""Read chosen tensors out of a checkpoint's files: no other byte, in file order, reading ahead."""

import time
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_mixprec.checkpoint.buffers import READ_BYTES, block_bytes
from vllm_mixprec.checkpoint.header import TensorSpec, View
from vllm_mixprec.checkpoint.ranges import OpenFile, RangeReader, aligned
from vllm_mixprec.checkpoint.stored import DTYPES, StoredTensor, as_dtype, start_readers

_AHEAD_BYTES = 64 << 20
_LARGE_BYTES = 32 << 20  # a tensor of more is read straight to where it goes


class _Read(NamedTuple):
    """What one read gave, where it lies, and whether it was read past the page cache."""

    tensors: list[tuple[TensorSpec, torch.Tensor]]
    file: OpenFile
    start: int
    end: int
    is_past: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """What is to be read of one tensor: its rows, indices along the first dimension, or all."""

    spec: TensorSpec
    rows: range | None = None
    is_shared: bool = False

    @property
    def start(self) -> int:
        """Offset in the file of the first byte to be read."""
        return self.spec.start + self._offset(0 if self.rows is None else self.rows.start)

    @property
    def end(self) -> int:
        """Offset in the file behind the last."""
        rows = self.rows
        return self.spec.end if rows is None else self.spec.start + self._offset(rows.stop)

    def _offset(self, row: int) -> int:
        return row * (self.spec.nbytes // self.spec.shape[0]) if row else 0


def read_tensors(
    specs: Iterable[TensorSpec],
    rows: Mapping[TensorSpec, range] | None = None,
    reader: RangeReader | None = None,
    shared: Container[TensorSpec] = (),
) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Yield each tensor once, in the order of files and offsets.

    Tensors are CPU views of buffers that are used again when no view of them lives; at most 64 MiB
    are read ahead. ``pread`` rather than ``mmap``, so that a file cut short under our hands is an
    error and not a SIGBUS.

    Args:
        rows: of some tensors the rows that will be asked for, which are read ahead. They come as a
            :class:`StoredTensor` of the whole shape, which reads any others when they are wanted,
            as tensors larger than 32 MiB do.
        reader: of this load; None for one that goes through the page cache.
        shared: tensors that another process of this machine reads, too, so that they are read
            through the page cache.

    Raises:
        CheckpointError: a file vanished or was changed since its header was read, or while its
            tensors are.
    """
    rows = rows or {}
    reader = reader or RangeReader()
    ordered = sorted(specs, key=lambda spec: (str(spec.file), spec.start))
    chunks = _chunk([Part(spec, rows.get(spec), spec in shared) for spec in ordered])
    waiting: deque[tuple[int, Future[_Read]]] = deque()
    ahead_bytes = 0
    files: dict[Path, OpenFile] = {}  # those that chunks wait of
    pool = start_readers()

    def give() -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """Yield what was read first, and tell ``reader`` how long that was waited for, and used."""
        nonlocal ahead_bytes
        taken, future = waiting.popleft()
        ahead_bytes -= taken
        begun = time.perf_counter()
        read = future.result()
        came = time.perf_counter()
        for file in [file for file in files.values() if str(file.file) < str(read.file.file)]:
            files.pop(file.file).close_unchanged()
        yield from read.tensors
        if read.is_past:
            busy_s = time.perf_counter() - came
            reader.note(read.file, read.start, read.end, came - begun, busy_s)

    try:
        for chunk in chunks:
            spec = chunk[0].spec
            if spec.file not in files:
                files[spec.file] = OpenFile(spec.file, spec.stamp, reader.may_pass)
            # A chunk of a few bytes holds a whole buffer.
            first, last = aligned(chunk[0].start, _end(chunk))
            nbytes = min(block_bytes(last - first), _AHEAD_BYTES)
            while waiting and ahead_bytes + nbytes > _AHEAD_BYTES:
                yield from give()
            waiting.append((nbytes, pool.submit(_read_chunk, files[spec.file], chunk, reader)))
            ahead_bytes += nbytes
        while waiting:
            yield from give()
        for file in files.values():
            file.require_unchanged()
        reader.finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for file in files.values():
            file.close()


def _chunk(parts: list[Part]) -> Iterator[list[Part]]:
    """Join parts that touch or overlap each other, up to one read's size.

    Parts of a fused tensor overlap where they are columns of it: its bytes are read once.
    """
    chunk: list[Part] = []
    end = 0
    for part in parts:
        if chunk and (
            part.spec.file != chunk[0].spec.file
            or part.start > end
            or part.end > max(end, chunk[0].start + READ_BYTES)
        ):
            yield chunk
            chunk = []
        end = max(end, part.end) if chunk else part.end
        chunk.append(part)
    if chunk:
        yield chunk


def _end(chunk: list[Part]) -> int:
    return max(part.end for part in chunk)


def _read_chunk(file: OpenFile, chunk: list[Part], reader: RangeReader) -> _Read:
    begin, last = chunk[0].start, max(chunk, key=attrgetter("end"))
    may_pass = not any(part.is_shared for part in chunk)
    is_large = last.end - begin > _LARGE_BYTES and last.spec.shape and last.spec.view is None
    if is_large and len(chunk) == 1:  # an empty tensor may begin where it ends
        [part] = chunk
        stored = StoredTensor(part.spec, reader=reader if may_pass else None)
        return _Read([(part.spec, stored)], file, begin, last.end)
    raw, is_past = reader.lend(file, begin, last.end, last.spec, may_pass)
    tensors = [
        (part.spec, _typed(part, raw[part.start - begin : part.end - begin])) for part in chunk
    ]
    return _Read(tensors, file, begin, last.end, is_past)


def _typed(part: Part, raw: torch.Tensor) -> torch.Tensor:
    spec = part.spec
    values = as_dtype(raw, DTYPES[spec.dtype])
    if spec.view is not None:
        return _taken(values.view(spec.view.stored), spec.view)
    if part.rows is None:
        return values.view(spec.shape)
    read = values.view(len(part.rows), *spec.shape[1:])
    return StoredTensor(spec, ahead=(part.rows, read))


def _taken(stored: torch.Tensor, view: View) -> torch.Tensor:
    """Return a part of a stored tensor, as a contiguous tensor of its own."""
    if view.values is not None:
        return torch.tensor(view.values, dtype=stored.dtype)
    if view.columns is not None:
        stored = stored[:, slice(*view.columns)]
    part = stored.t() if view.transposed else stored
    return part.clone(memory_format=torch.contiguous_format)
