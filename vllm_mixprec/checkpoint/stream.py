# SPDX-License-Identifier: Apache-2.0
"""Read chosen tensors out of a checkpoint's files: no other byte, in file order, reading ahead."""

from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_mixprec.checkpoint.buffers import READ_BYTES, block_bytes
from vllm_mixprec.checkpoint.filling import Filling
from vllm_mixprec.checkpoint.header import TensorSpec, View
from vllm_mixprec.checkpoint.ranges import OpenFile, RangeReader, aligned, bring
from vllm_mixprec.checkpoint.stored import DTYPES, StoredTensor, as_dtype
from vllm_mixprec.checkpoint.threads import start_readers

_AHEAD_BYTES = 64 << 20
_LARGE_BYTES = 32 << 20  # a tensor of more is read straight to where it goes
_PLACED_BYTES = 1 << 20  # of less and its neighbours a device reads all at once faster


class _Read(NamedTuple):
    """What one read gave, and where it lies."""

    tensors: list[tuple[TensorSpec, torch.Tensor]]
    filling: Filling
    start: int
    end: int

    @property
    def file(self) -> OpenFile:
        return self.filling.file


class Part(NamedTuple):
    """What is to be read of one tensor.

    Attributes:
        start: offset in the file of the first byte to be read.
        end: offset in the file behind the last.
        rows: indices along the first dimension; None for all.
    """

    spec: TensorSpec
    start: int
    end: int
    rows: range | None = None
    is_shared: bool = False
    is_copied: bool = False

    @classmethod
    def of(cls, spec: TensorSpec, rows: range | None, is_shared: bool, is_copied: bool) -> "Part":
        """Place some rows of a tensor, or all."""
        if rows is None:
            return cls(spec, spec.start, spec.end, None, is_shared, is_copied)
        row_bytes = spec.nbytes // spec.shape[0] if rows.stop else 0
        start, end = (spec.start + row * row_bytes for row in (rows.start, rows.stop))
        return cls(spec, start, end, rows, is_shared, is_copied)


def read_tensors(
    specs: Iterable[TensorSpec],
    rows: Mapping[TensorSpec, range] | None = None,
    reader: RangeReader | None = None,
    shared: Container[TensorSpec] = (),
    copied: Container[TensorSpec] = (),
) -> Generator[tuple[TensorSpec, torch.Tensor]]:
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
        copied: tensors that are copied at once, as they are, into memory of the CPU, so that the
            file can be read straight into it: they come as a :class:`StoredTensor`, and of what
            goes through the page cache only that is filled ahead. Past it this is so of tensors
            of 1 MiB or more that lie by themselves.

    Raises:
        CheckpointError: a file vanished or was changed since its header was read, or while its
            tensors are.
    """
    rows = rows or {}
    parts = [Part.of(spec, rows.get(spec), spec in shared, spec in copied) for spec in specs]
    # Tensors may share bytes, of which each has rows of its own to be read.
    parts.sort(key=lambda part: (str(part.spec.file), part.start))
    with closing(_Stream(reader or RangeReader())) as stream:
        yield from stream.tensors(parts)


class _Stream:
    """Reads chunks ahead, hands their tensors out, and sees to what those leave to be read."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self._pool = start_readers()
        self._files: dict[Path, OpenFile] = {}  # those of which chunks are on their way
        # How to get what comes next, with the memory it holds.
        self._waiting: deque[tuple[int, Callable[[], _Read]]] = deque()
        self._begun: deque[_Read] = deque()  # those whose places are being filled
        self._ahead_bytes = self._begun_bytes = 0

    def tensors(self, parts: list[Part]) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """Yield every part's tensor, in order."""
        for chunk in _chunk(parts):
            spec = chunk[0].spec
            if spec.file not in self._files:
                opened = OpenFile(spec.file, spec.stamp, self._reader.may_pass)
                self._files[spec.file] = opened
            # A chunk of a few bytes holds a whole buffer.
            first, last = aligned(chunk[0].start, _last(chunk).end)
            nbytes = min(block_bytes(last - first), _AHEAD_BYTES)
            while self._waiting and self._ahead_bytes + nbytes > _AHEAD_BYTES:
                yield from self._give()
            self._waiting.append((nbytes, self._begin(chunk)))
            self._ahead_bytes += nbytes
        while self._waiting:
            yield from self._give()
        self._fill(until=lambda: not self._begun)
        for file in self._files.values():
            file.require_unchanged()
        self._reader.finish()

    def _begin(self, chunk: list[Part]) -> Callable[[], _Read]:
        """Have a chunk read, or brought into the page cache; return how to get its tensors."""
        file, start, end = self._files[chunk[0].spec.file], chunk[0].start, _last(chunk).end
        is_shared = any(part.is_shared for part in chunk)
        is_past = not is_shared and self._reader.is_past(file, start, end)
        filling = Filling(file, self._pool, self._reader, is_past)
        copied = [part for part in chunk if part.is_copied]
        is_whole = len(copied) == len(chunk)
        is_piecemeal = not is_whole or min(part.end - part.start for part in chunk) < _PLACED_BYTES
        if not copied or (is_past and (is_piecemeal or file.alignment is None)):
            return self._pool.submit(_read_chunk, filling, chunk, self._reader).result
        is_on_its_way = None
        if not is_past and not file.is_cached(start, end):
            is_on_its_way = self._pool.submit(bring, file.descriptor, start, end)
        return partial(_leave, filling, chunk, self._reader, is_on_its_way)

    def _give(self) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
        """Yield what was read first, and have filled what those who took it left for later."""
        taken, get = self._waiting.popleft()
        self._ahead_bytes -= taken
        read = get()
        self._close_before(read.file)
        try:
            yield from read.tensors
        finally:
            is_begun = read.filling.begin()
        if is_begun:
            self._begun.append(read)
            self._begun_bytes += read.end - read.start
            self._fill(until=lambda: self._begun_bytes <= _AHEAD_BYTES)

    def _close_before(self, file: OpenFile) -> None:
        """Close the files before one, of which all is read, or will be."""
        for done in [each for each in self._files.values() if str(each.file) < str(file.file)]:
            self._fill(until=lambda: not self._begun or self._begun[0].file is not done)  # noqa: B023  called at once
            self._files.pop(done.file).close_unchanged()

    def _fill(self, until: Callable[[], bool]) -> None:
        """Wait for places to be filled, in order."""
        while not until():
            read = self._begun.popleft()
            self._begun_bytes -= read.end - read.start
            read.filling.done.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
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


def _last(chunk: list[Part]) -> Part:
    """The part that ends last, whichever begins last."""
    return max(chunk, key=attrgetter("end"))


def _read_chunk(filling: Filling, chunk: list[Part], reader: RangeReader) -> _Read:
    begin, last = chunk[0].start, _last(chunk)
    is_large = last.end - begin > _LARGE_BYTES and last.spec.shape and last.spec.view is None
    if is_large and len(chunk) == 1:  # an empty tensor may begin where it ends
        [part] = chunk
        stored = StoredTensor(part.spec, reader=None if part.is_shared else reader)
        return _Read([(part.spec, stored)], filling, begin, last.end)
    raw, _ = reader.lend(filling.file, begin, last.end, last.spec, filling.is_past)
    return _Read(_cut(chunk, raw), filling, begin, last.end)


def _leave(
    filling: Filling, chunk: list[Part], reader: RangeReader, is_on_its_way: Future[None] | None
) -> _Read:
    """Leave what is copied to be read when it is; read what else there is, which is small."""
    if is_on_its_way is not None:
        is_on_its_way.result()  # or the file could be closed meanwhile
    read: list[tuple[TensorSpec, torch.Tensor]] = []
    for rest in _chunk([part for part in chunk if not part.is_copied]):
        last = _last(rest)
        raw, _ = reader.lend(filling.file, rest[0].start, last.end, last.spec, is_past=False)
        read += _cut(rest, raw)
    others = iter(read)
    tensors = [
        (part.spec, StoredTensor(part.spec, filling=filling)) if part.is_copied else next(others)
        for part in chunk
    ]
    return _Read(tensors, filling, chunk[0].start, _last(chunk).end)


def _cut(chunk: list[Part], raw: torch.Tensor) -> list[tuple[TensorSpec, torch.Tensor]]:
    """Return the tensors of a chunk whose bytes were read, in order."""
    begin = chunk[0].start
    return [(part.spec, _typed(part, raw[part.start - begin : part.end - begin])) for part in chunk]


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
