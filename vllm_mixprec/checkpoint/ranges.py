# SPDX-License-Identifier: Apache-2.0
"""Reads ranges of files: through the system's page cache, or past it where few would miss it.

What is read through the page cache is there for the next start and for other ranks. But making the
cache's pages and copying out of them takes processor time, at the next start too, which a load may
need for itself: four layers of Qwen3-30B-A3B on two cores load from a cold disk in six tenths of
the processor time, and 1.7 times as fast, when read past it (O_DIRECT); as fast as from the cache.

So ranges that are cached are read from the cache, and others past it as long as the device delivers
what makes the cache hardly worth its while: a start from the cache takes about a core's second for
a gigabyte, filling it two more, so the first start loses by it what the next one gains at some 0.5
GB/s a core. Half of that counts as enough, since the disk's own speed varies as much from second to
second. From a slower one the rest is read through the cache, and the first 256 MiB or so, which
told that, are brought there afterwards.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vllm_mixprec.checkpoint.buffers import Buffers
from vllm_mixprec.checkpoint.direct import (
    Alignment,
    DirectRead,
    aligned_memory,
    alignment_of,
)
from vllm_mixprec.checkpoint.files import FileStamp, reopen, require_unchanged
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.threads import reading_cores
from vllm_mixprec.errors import CheckpointError

_TRIAL_BYTES = 256 << 20
_WORTH_A_CORE = 0.25e9  # bytes a second of a device, a core, from which on the cache is passed
_SAMPLE_BYTES = 64 << 10
_SMALL_BYTES = 64 << 10
_ALIGNED_BYTES = 4096  # of offsets, sizes and memory; a device that asks for more says so
_ADVISED_BYTES = 128 << 10  # of one advice; the kernel cuts longer ones short
_LIBC = ctypes.PyDLL(None)  # keeps Python's lock, which takes longer to get than mincore takes


class OpenFile:
    """A checkpoint's file, open for its data.

    Args:
        may_pass: whether to open it for reading past the page cache as well.

    Raises:
        CheckpointError: it is gone, or not as it was when ``stamp`` was taken.
    """

    def __init__(self, file: Path, stamp: FileStamp | None, may_pass: bool = False) -> None:
        self.file = file
        self.stamp = stamp
        self.is_open = True
        self.direct: int | None = None
        self.alignment: Alignment | None = None  # None: only to memory kept from forks
        self._mapped: np.ndarray | None = None
        self.descriptor = reopen(file, stamp)
        _read_no_neighbours(self.descriptor)
        if may_pass:
            # A file system may have no such reading, and none that tells what is cached.
            with contextlib.suppress(OSError, ValueError):
                # Only to ask what is cached: reading by it ends in a SIGBUS where a file is cut.
                # Once a file, for each mapping stops those who are making pages meanwhile.
                mapped = mmap.mmap(self.descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
                if _is_told(self.descriptor):
                    self._mapped = np.frombuffer(mapped, np.uint8)
                # The very file that is open, whatever its path leads to by now.
                path = f"/proc/self/fd/{self.descriptor}"
                self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                _read_no_neighbours(self.direct)
                self.alignment = alignment_of(self.direct)

    def require_unchanged(self) -> None:
        """Make sure that it is as it was when its header was read; raises CheckpointError."""
        require_unchanged(self.file, self.descriptor, self.stamp)

    def is_cached(self, start: int, end: int) -> bool | None:
        """Whether the middle of a range is in the page cache, as a sample of all of it.

        None where nobody tells.
        """
        if self._mapped is None:
            return None
        first = max((start + end - _SAMPLE_BYTES) // 2, start)
        begin = first // mmap.PAGESIZE * mmap.PAGESIZE
        size = min(_SAMPLE_BYTES, end - begin)
        states = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        failed = _LIBC.mincore(
            ctypes.c_void_p(self._mapped.ctypes.data + begin),
            ctypes.c_size_t(size),
            ctypes.c_void_p(states.ctypes.data),
        )
        return bool(failed) or 2 * int(np.count_nonzero(states & 1)) >= len(states)

    def close_unchanged(self) -> None:
        """Close it, and make sure that it was not changed while it was read."""
        try:
            self.require_unchanged()
        finally:
            self.close()

    def close(self) -> None:
        self.is_open = False
        self._mapped = None
        os.close(self.descriptor)
        if self.direct is not None:
            os.close(self.direct)


def _is_told(descriptor: int) -> bool:
    """Whether the kernel tells what of a file is cached: to its owner, and who may write to it.

    To others it says that all of it is (mm/mincore.c ``can_do_mincore``).
    """
    may_write = os.access(f"/proc/self/fd/{descriptor}", os.W_OK)
    return may_write or os.fstat(descriptor).st_uid == os.geteuid()


def _read_no_neighbours(descriptor: int) -> None:
    # The kernel's own read-ahead would fetch what no rule routes here.
    with contextlib.suppress(OSError):  # it is a hint
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


class RangeReader:
    """Reads ranges of open files, and decides by which way.

    Args:
        may_pass: whether any may be read past the page cache.
    """

    def __init__(self, may_pass: bool = False) -> None:
        self.may_pass = may_pass
        self._unplaced: OSError | None = None  # why none is read straight into place any more
        self._is_slow = False  # whether the device is one whose bytes are worth caching
        self._worth = _WORTH_A_CORE * reading_cores()
        self._buffers = Buffers()
        self._lock = threading.Lock()
        self._reading = 0  # threads that the device reads for, and since when there were any
        self._since = self._reading_s = 0.0
        self._past_bytes = self._placed_bytes = 0
        self._tried: list[tuple[OpenFile, int, int]] = []
        self._refused: OSError | None = None

    def is_past(self, file: OpenFile, start: int, end: int) -> bool:
        """Whether a range is to be read past the page cache."""
        return self.may_pass and file.direct is not None and file.is_cached(start, end) is False

    def lend(
        self, file: OpenFile, start: int, end: int, spec: TensorSpec, is_past: bool
    ) -> tuple[torch.Tensor, bool]:
        """Return the bytes of a range, and whether they were read past the page cache.

        They are uint8 on the CPU, in memory that is used again when no view of it lives; the last
        of them belong to ``spec``.

        Args:
            is_past: as :meth:`is_past` has it.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        if is_past and self.may_pass:
            found = self._lend_past(file, start, end, spec)
            if found is not None:
                return found, True
        if end - start < _SMALL_BYTES:  # which would hold a whole buffer
            lent = torch.empty(end - start, dtype=torch.uint8, device="cpu")
        else:
            lent = self._buffers.take(end - start)
        read_into(lent, file.descriptor, start, spec)
        return lent, False

    def fill(self, raw: torch.Tensor, file: OpenFile, start: int, spec: TensorSpec) -> None:
        """Fill uint8 memory of the CPU with the range from ``start`` on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        end = start + len(raw)
        if self.is_past(file, start, end):
            found = self._lend_past(file, start, end, spec)
            if found is not None:
                raw.numpy()[:] = found.numpy()
                return
        read_into(raw, file.descriptor, start, spec)

    def read_into_place(self, file: OpenFile, segments: np.ndarray, start: int) -> bool:
        """Fill pieces of memory with a range of a file, past the page cache, without a buffer.

        Args:
            segments: address and length of each: uint64 (pieces, 2).

        Returns:
            Whether it did; it does not where memory does not lie as the device needs it, and where
            reading so is refused.
        """
        if self._unplaced is not None or file.direct is None or file.alignment is None:
            return False
        read = DirectRead(segments, start, file.alignment)
        if not read.fits:
            return False
        end = start + int(segments[:, 1].sum())
        is_read = self._pass(file, start, end, partial(self._place, read, file.direct))
        if is_read:
            with self._lock:
                self._placed_bytes += end - start
        return is_read

    def _place(self, read: DirectRead, descriptor: int) -> bool:
        try:
            return read.run(descriptor)
        except OSError as error:
            if error.errno != errno.EINTR:
                self._unplaced = error  # a layered device may ask for more than it tells
            return False

    def finish(self) -> None:
        """Have what was tried brought into the page cache, if the next start could use it there."""
        if self._is_slow or self._is_slower_than_worth():
            tried = [(file.file, file.stamp, start, end) for file, start, end in self._tried]
            # The device is slow, and nobody waits for this.
            threading.Thread(
                target=_bring_all, args=(tried,), name="mixprec-cache", daemon=True
            ).start()
        self._tried = []

    def report(self) -> str | None:
        """Say in a line what was read past the page cache and why; None where nothing was."""
        size, placed = self._past_bytes / 2**30, self._placed_bytes / max(self._past_bytes, 1)
        speed = self._past_bytes / max(self._reading_s, 1e-9) / 1e9
        what = f"{size:.2f} GiB were read past the page cache"
        how = f"at {speed:.2f} GB/s, {placed:.0%} of it straight into place"
        if self._unplaced is not None:
            how += f" until that was refused ({self._unplaced})"
        if self._refused is not None:
            return f"{what}, the rest through it: reading past it was refused ({self._refused})"
        if not self._past_bytes:
            return None
        worth = f"{self._worth / 1e9:.1f} GB/s"
        if self._is_slow:
            return f"{what} {how}; below {worth} the cache is worth filling: the rest through it"
        return f"{what} {how}"

    def _is_slower_than_worth(self) -> bool:
        return self._past_bytes < self._worth * self._reading_s

    def _pass(self, file: OpenFile, start: int, end: int, read: Callable[[], bool]) -> bool:
        """Have a range read past the page cache, and judge the device by it.

        Returns:
            Whether it was read; not so where ``read`` says so, or is refused.
        """
        with self._lock:
            if not self._reading:
                self._since = time.perf_counter()
            self._reading += 1
        is_read = False
        try:
            is_read = read()
        except OSError as error:
            # A file system that takes the flag and not the reads, or a file that was cut short
            # amid a page: reading through the cache does it, or says what is wrong.
            self._refused, self.may_pass = error, False
        finally:
            with self._lock:
                now = time.perf_counter()
                self._reading_s += now - self._since
                self._since = now
                self._reading -= 1
                if is_read:
                    self._note(file, start, end)
        return is_read

    def _note(self, file: OpenFile, start: int, end: int) -> None:
        if self._past_bytes < _TRIAL_BYTES:
            self._tried.append((file, start, end))
        self._past_bytes += end - start
        if self._past_bytes >= _TRIAL_BYTES and self._is_slower_than_worth():
            self._is_slow, self.may_pass = True, False

    def _lend_past(
        self, file: OpenFile, start: int, end: int, spec: TensorSpec
    ) -> torch.Tensor | None:
        direct = file.direct
        assert direct is not None
        first, last = aligned(start, end)
        if last - first < _SMALL_BYTES and file.alignment is not None:
            lent = torch.from_numpy(aligned_memory(last - first, _ALIGNED_BYTES))
        else:
            lent = self._buffers.take(last - first)

        def read() -> bool:
            _read(lent, direct, first, spec, end - first)
            return True

        return lent[start - first : end - first] if self._pass(file, start, end, read) else None


def aligned(start: int, end: int) -> tuple[int, int]:
    """Return the range that a device can read, around one that a file has."""
    return start // _ALIGNED_BYTES * _ALIGNED_BYTES, -(-end // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _bring_all(ranges: Iterable[tuple[Path, FileStamp | None, int, int]]) -> None:
    """Have the kernel read ranges into the page cache; a file that is gone by now is none."""
    for file, stamp, start, end in ranges:
        with contextlib.suppress(CheckpointError, OSError):
            descriptor = reopen(file, stamp)
            try:
                bring(descriptor, start, end)
            finally:
                os.close(descriptor)


def bring(descriptor: int, start: int, end: int) -> None:
    """Have the kernel read a range into the page cache, as far as it is not there; do not wait."""
    with contextlib.suppress(OSError):  # it is a hint
        for begin in range(start, end, _ADVISED_BYTES):
            size = min(_ADVISED_BYTES, end - begin)
            os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_WILLNEED)


def read_into(buffer: torch.Tensor, descriptor: int, offset: int, spec: TensorSpec) -> None:
    """Fill a uint8 buffer with the bytes of a file from ``offset`` on, those of ``spec`` last.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    try:
        _read(buffer, descriptor, offset, spec, len(buffer))
    except OSError as error:
        raise CheckpointError(
            f"{spec.file}: cannot be read at byte {offset} ({error.strerror or error}); expected "
            f"{len(buffer)} bytes for {spec.name}. Check the disk, or copy the file again"
        ) from error


def _read(
    buffer: torch.Tensor, descriptor: int, offset: int, spec: TensorSpec, needed: int
) -> None:
    """The same, of which so many bytes are enough; an error of the system stays one."""
    view = memoryview(buffer.numpy())
    done = 0
    while done < needed:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{spec.file}: ends at byte {offset + done}, expected {offset + needed} for "
                f"{spec.name}; it was cut short after its header was read. Copy it again"
            )
        done += count
