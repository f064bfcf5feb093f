# SPDX-License-Identifier: Apache-2.0
"""Reads what is in the page cache straight into the memory where it goes."""

import ctypes
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from vllm_mixprec.checkpoint.buffers import READ_BYTES
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.ranges import OpenFile, read_into

_SEGMENTS = 1024  # of one preadv, Linux's IOV_MAX
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class _Place:
    """Memory in pieces, and where what goes there begins in the file.

    Attributes:
        pieces: uint8 (pieces, bytes); each is contiguous.
    """

    pieces: torch.Tensor
    start: int
    spec: TensorSpec

    @property
    def end(self) -> int:
        nbytes: int = self.pieces.nbytes
        return self.start + nbytes

    @property
    def segments(self) -> np.ndarray:
        """Address and length of each piece: uint64 (pieces, 2), C's struct iovec."""
        found = np.empty((len(self.pieces), 2), np.uint64)
        strides = self.pieces.stride(0) * np.arange(len(self.pieces), dtype=np.uint64)
        found[:, 0] = self.pieces.data_ptr() + strides
        found[:, 1] = self.pieces.shape[1]
        return found


class Filling:
    """Fills the places of a few neighbouring tensors of one file, by reading threads.

    Attributes:
        file: which they are read from; whoever opened it closes it when all is done.
        done: finished when all that was left for later is read, or failed; cancelled if it will
            never be.
    """

    def __init__(self, file: OpenFile, pool: ThreadPoolExecutor) -> None:
        self.file = file
        self.done: Future[None] = Future()
        self._pool = pool
        self._left: list[_Place] = []
        self._is_begun = False

    def fill(self, target: torch.Tensor, start: int, spec: TensorSpec) -> None:
        """Fill memory with the range of the file from ``start`` on, a part of it each thread.

        Args:
            target: on the CPU, of ``spec``'s dtype; contiguous, or a matrix whose rows are.

        Raises:
            CheckpointError: the file ends before.
        """
        jobs = [[place] for place in _places(target, start, spec)]
        if len(jobs) == 1:
            self._read(jobs[0])
        else:
            list(self._pool.map(self._read, jobs))

    def fill_later(self, target: torch.Tensor, start: int, spec: TensorSpec) -> None:
        """Fill it by the time that :attr:`done` is; nobody may look at it before."""
        if self._is_begun:
            self.fill(target, start, spec)
        else:
            self._left += _places(target, start, spec)

    def begin(self) -> bool:
        """Begin with what was left for later; returns whether there is any."""
        self._is_begun = True
        if not self._left:
            self.done.set_result(None)
            return False
        self._pool.submit(self._read, self._left).add_done_callback(self._end)
        return True

    def _read(self, places: list[_Place]) -> None:
        """Read to several places with as few calls as can be.

        After each this thread waits for Python's lock, which the one that loads gives up only every
        few milliseconds.
        """
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
            for number, piece in enumerate(place.pieces):
                offset = place.start + number * len(piece)
                read_into(piece, self.file.descriptor, offset, place.spec)

    def _end(self, job: Future[None]) -> None:
        """Pass on how the job ended."""
        if job.cancelled():
            self.done.cancel()
        elif (error := job.exception()) is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


def _places(target: torch.Tensor, start: int, spec: TensorSpec) -> list[_Place]:
    """Cut memory into parts of one read's size."""
    target = target.detach()
    pieces = (target.view(1, -1) if target.is_contiguous() else target).view(torch.uint8)
    parts = (
        pieces.split(READ_BYTES, 1)
        if len(pieces) == 1
        else pieces.split(max(READ_BYTES // pieces.shape[1], 1))
    )
    places = []
    for part in parts:
        places.append(_Place(part, start, spec))
        start += part.numel()
    return places
