# SPDX-License-Identifier: Apache-2.0
"""Read chosen tensors out of a checkpoint's files: no other byte, in file order, reading ahead."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch

from vllm_mixprec.checkpoint.buffers import READ_BYTES, Buffers
from vllm_mixprec.checkpoint.files import FileStamp, reopen, require_unchanged
from vllm_mixprec.checkpoint.header import TensorSpec, View
from vllm_mixprec.checkpoint.stored import DTYPES, StoredTensor, read_into, start_readers

# Small neighbours share one read. Larger reads gain nothing on NVMe or page cache and cost memory.
_AHEAD_BYTES = 64 << 20
_LARGE_BYTES = 32 << 20  # a tensor of more is read straight to where it goes

Tensors = list[tuple[TensorSpec, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Part:
    """What is to be read of one tensor: its rows, indices along the first dimension, or all."""

    spec: TensorSpec
    rows: range | None = None

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
    specs: Iterable[TensorSpec], rows: Mapping[TensorSpec, range] | None = None
) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Yield each tensor once, in the order of files and offsets.

    Tensors are CPU views of buffers that are used again when no view of them lives; at most 64 MiB
    are read ahead. ``pread`` rather than ``mmap``, so that a file cut short under our hands is an
    error and not a SIGBUS.

    Args:
        rows: of some tensors the rows that will be asked for, which are read ahead. They come as a
            :class:`StoredTensor` of the whole shape, which reads any others when they are wanted,
            as tensors larger than 32 MiB do.

    Raises:
        CheckpointError: a file vanished or was changed since its header was read, or while its
            tensors are.
    """
    rows = rows or {}
    ordered = sorted(specs, key=lambda spec: (str(spec.file), spec.start))
    chunks = _chunk([Part(spec, rows.get(spec)) for spec in ordered])
    waiting: deque[tuple[int, Future[Tensors]]] = deque()
    ahead_bytes = 0
    files: dict[Path, tuple[int, FileStamp | None]] = {}
    buffers = Buffers()
    pool = start_readers()
    try:
        for chunk in chunks:
            file = chunk[0].spec.file
            if file not in files:
                files[file] = _open(chunk[0].spec)
            # A chunk of a few bytes holds a whole buffer.
            nbytes = min(max(_end(chunk) - chunk[0].start, READ_BYTES), _AHEAD_BYTES)
            while waiting and ahead_bytes + nbytes > _AHEAD_BYTES:
                taken, future = waiting.popleft()
                ahead_bytes -= taken
                yield from future.result()
            waiting.append((nbytes, pool.submit(_read_chunk, files[file][0], chunk, buffers)))
            ahead_bytes += nbytes
        while waiting:
            yield from waiting.popleft()[1].result()
        for file, (descriptor, stamp) in files.items():
            require_unchanged(file, descriptor, stamp)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for descriptor, _ in files.values():
            os.close(descriptor)


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


def _open(spec: TensorSpec) -> tuple[int, FileStamp | None]:
    descriptor = reopen(spec.file, spec.stamp)
    # The kernel's own read-ahead would fetch the neighbours that no rule routes here.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, spec.stamp


def _end(chunk: list[Part]) -> int:
    return max(part.end for part in chunk)


def _read_chunk(descriptor: int, chunk: list[Part], buffers: Buffers) -> Tensors:
    begin, last = chunk[0].start, max(chunk, key=attrgetter("end"))
    if last.end - begin > _LARGE_BYTES and last.spec.shape and last.spec.view is None:
        [part] = chunk
        return [(part.spec, StoredTensor(part.spec))]
    buffer = buffers.take(last.end - begin)
    read_into(buffer, descriptor, begin, last.spec)
    return [
        (part.spec, _typed(part, buffer[part.start - begin : part.end - begin])) for part in chunk
    ]


def _typed(part: Part, raw: torch.Tensor) -> torch.Tensor:
    spec = part.spec
    dtype = DTYPES[spec.dtype]
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()  # safetensors does not promise alignment, torch's view needs it
    if spec.view is not None:
        return _taken(raw.view(dtype).view(spec.view.stored), spec.view)
    if part.rows is None:
        return raw.view(dtype).view(spec.shape)
    read = raw.view(dtype).view(len(part.rows), *spec.shape[1:])
    return StoredTensor(spec, ahead=(part.rows, read))


def _taken(stored: torch.Tensor, view: View) -> torch.Tensor:
    """Return a part of a stored tensor, as a contiguous tensor of its own."""
    if view.values is not None:
        return torch.tensor(view.values, dtype=stored.dtype)
    if view.columns is not None:
        stored = stored[:, slice(*view.columns)]
    part = stored.t() if view.transposed else stored
    return part.clone(memory_format=torch.contiguous_format)
