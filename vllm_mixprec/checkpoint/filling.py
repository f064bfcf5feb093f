# SPDX-License-Identifier: Apache-2.0
"""Reads a file straight into the memory where it goes, from the page cache or past it."""

import ctypes
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from vllm_mixprec.checkpoint.buffers import READ_BYTES
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.ranges import OpenFile, RangeReader, read_into

_SEGMENTS = 1024  # of one preadv, Linux's IOV_MAX
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class _Place:
    """Memory, and where what goes there begins in the file.

    Attributes:
        target: contiguous, or a matrix whose rows are.
    """

    target: torch.Tensor
    start: int
    spec: TensorSpec

    @property
    def end(self) -> int:
        nbytes: int = self.target.nbytes
        return self.start + nbytes

    @property
    def segments(self) -> np.ndarray:
        """Address and length of each contiguous piece: uint64 (pieces, 2), C's struct iovec."""
        target = self.target
        pieces = 1 if target.is_contiguous() else len(target)
        stride = target.stride(0) * target.itemsize if pieces > 1 else 0
        found = np.empty((pieces, 2), np.uint64)
        found[:, 0] = target.data_ptr() + stride * np.arange(pieces, dtype=np.uint64)
        found[:, 1] = target.nbytes // pieces
        return found

    def pieces(self) -> torch.Tensor:
        """The same as a uint8 matrix of a piece a row."""
        whole = self.target.view(1, -1) if self.target.is_contiguous() else self.target
        return whole.view(torch.uint8)

    def split(self) -> "Iterator[_Place]":
        """Cut it into parts of one read's size."""
        target, start = self.target, self.start
        if target.is_contiguous():
            target = target.view(-1)
        for part in target.split(max(READ_BYTES // target[0].nbytes, 1)):
            yield _Place(part, start, self.spec)
            start += part.nbytes


class Filling:
    """Fills the places of a few neighbouring tensors of one file, by reading threads.

    Attributes:
        file: which they are read from; whoever opened it closes it when all is done.
        is_past: whether they are read past the page cache, as long as ``reader`` does so: into
            place where the memory lies as the device needs it, elsewhere through a buffer.
        done: finished when all that was left for later is read, or failed; cancelled if it will
            never be.
    """

    def __init__(
        self, file: OpenFile, pool: ThreadPoolExecutor, reader: RangeReader, is_past: bool
    ) -> None:
        self.file = file
        self.is_past = is_past
        self._reader = reader
        self.done: Future[None] = Future()
        self._pool = pool
        self._left: list[_Place] = []
        self._is_begun = False
        self._lock = threading.Lock()
        self._to_end = 0  # jobs
        self._failure: BaseException | None = None

    def fill(self, target: torch.Tensor, start: int, spec: TensorSpec) -> None:
        """Fill memory with the range of the file from ``start`` on, a part of it each thread.

        Args:
            target: on the CPU, of ``spec``'s dtype; contiguous, or a matrix whose rows are.

        Raises:
            CheckpointError: the file ends before.
        """
        parts = [[part] for part in _Place(target.detach(), start, spec).split()]
        if len(parts) == 1:
            self._read(parts[0])
        else:
            list(self._pool.map(self._read, parts))

    def fill_later(self, target: torch.Tensor, start: int, spec: TensorSpec) -> None:
        """Fill it by the time that :attr:`done` is; nobody may look at it before."""
        if self._is_begun:
            self.fill(target, start, spec)
        else:
            self._left.append(_Place(target.detach(), start, spec))

    def begin(self) -> bool:
        """Begin with what was left for later; returns whether there is any."""
        self._is_begun = True
        if not self._left:
            self.done.set_result(None)
            return False
        jobs = [self._left]
        if len(self._left) == 1:  # which may be large; neighbours never are
            jobs = [[part] for part in self._left[0].split()]
        self._to_end = len(jobs)
        for job in jobs:
            self._pool.submit(self._read, job).add_done_callback(self._end)
        return True

    def _read(self, places: list[_Place]) -> None:
        """Read to several places, those that are neighbours in the file by one call."""
        run: list[_Place] = []
        for place in places:
            if run and place.start != run[-1].end:
                self._read_run(run)
                run = []
            run.append(place)
        self._read_run(run)

    def _read_run(self, run: list[_Place]) -> None:
        """Read a range to the places of its parts."""
        segments = np.concatenate([place.segments for place in run])
        start = run[0].start
        if self.is_past and self._reader.may_pass:
            if not self._reader.read_into_place(self.file, segments, start):
                self._read_by_buffer(run)
            return
        for first in range(0, len(segments), _SEGMENTS):
            some = segments[first : first + _SEGMENTS]
            expected = int(some[:, 1].sum())
            count = _LIBC.preadv(
                ctypes.c_int(self.file.descriptor),
                ctypes.c_void_p(some.ctypes.data),
                ctypes.c_int(len(some)),
                ctypes.c_int64(start),
            )
            if count != expected:
                break
            start += count
        else:
            return
        for place in run:  # interrupted, or at the end of the file: this goes on, or says so
            for number, piece in enumerate(place.pieces()):
                offset = place.start + number * len(piece)
                read_into(piece, self.file.descriptor, offset, place.spec)

    def _read_by_buffer(self, run: list[_Place]) -> None:
        start, last = run[0].start, run[-1]
        raw, _ = self._reader.lend(self.file, start, last.end, last.spec, self.is_past)
        for place in run:
            pieces = place.pieces()
            pieces.copy_(raw[place.start - start : place.end - start].view(pieces.shape))

    def _end(self, job: Future[None]) -> None:
        """Pass on how the jobs ended, when the last has."""
        with self._lock:
            self._to_end -= 1
            if job.cancelled():
                self._failure = CancelledError()
            else:
                self._failure = job.exception() or self._failure
            if self._to_end:
                return
        if self._failure is None:
            self.done.set_result(None)
        elif isinstance(self._failure, CancelledError):
            self.done.cancel()
        else:
            self.done.set_exception(self._failure)
