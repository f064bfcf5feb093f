# SPDX-License-Identifier: Apache-2.0
"""Reads ranges of files: through the system's page cache, or past it where nobody would miss it.

What is read through the page cache is there for the next start and for other ranks. But making the
cache's pages and copying out of them takes processor time, which a load may need for itself: four
layers of Qwen3-30B-A3B on two cores load from a cold disk in half the processor time, and nearly
twice as fast, when read past it (O_DIRECT). So ranges that are cached are read from the cache, and
of the others the first 256 MiB past it. If the load waited for those longer than it then was busy
with them, cached bytes would make the next start faster, and the rest is read through the cache. If
not, the device keeps up with loading, at the next start as at this one, and the rest is read past
the cache as well.
"""

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from vllm_mixprec.checkpoint.buffers import Buffers
from vllm_mixprec.checkpoint.files import FileStamp, reopen, require_unchanged
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import CheckpointError

_TRIAL_BYTES = 256 << 20
_SAMPLE_BYTES = 64 << 10
_LIBC = ctypes.PyDLL(None)  # keeps Python's lock, which takes longer to get than mincore takes
_ALIGNED_BYTES = 4096  # of offsets, sizes and memory; no device asks for more


class OpenFile:
    """A checkpoint's file, open for its data.

    Raises:
        CheckpointError: it is gone, or not as it was when ``stamp`` was taken.
    """

    def __init__(self, file: Path, stamp: FileStamp | None) -> None:
        self.file = file
        self._stamp = stamp
        self.descriptor = reopen(file, stamp)
        # The kernel's own read-ahead would fetch the neighbours that no rule routes here.
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            # The very file that is open, whatever its path leads to by now.
            path = f"/proc/self/fd/{self.descriptor}"
            self.direct: int | None = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # the file system has no such reading
            self.direct = None
        # Only to ask what is cached: reading by it would end in a SIGBUS where the file was cut.
        # Once a file, since each mapping stops those who are making pages meanwhile.
        self._mapped: np.ndarray | None = None
        try:
            mapped = mmap.mmap(self.descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
            self._mapped = np.frombuffer(mapped, np.uint8)
        except (OSError, ValueError):  # not to be mapped, or empty
            pass

    def require_unchanged(self) -> None:
        """Make sure that it is as it was when its header was read; raises CheckpointError."""
        require_unchanged(self.file, self.descriptor, self._stamp)

    def is_cached(self, start: int, end: int) -> bool:
        """Whether the middle of a range is in the page cache, as a sample of all of it.

        The kernel tells only those who could write to the file; to others all of it seems cached.
        """
        if self._mapped is None:
            return True
        middle = (start + end) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
        begin = max(middle - _SAMPLE_BYTES // 2, start // mmap.PAGESIZE * mmap.PAGESIZE)
        size = min(_SAMPLE_BYTES, end - begin)
        states = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        failed = _LIBC.mincore(
            ctypes.c_void_p(self._mapped.ctypes.data + begin),
            ctypes.c_size_t(size),
            ctypes.c_void_p(states.ctypes.data),
        )
        return bool(failed) or 2 * int(np.count_nonzero(states & 1)) >= len(states)

    def close(self) -> None:
        self._mapped = None
        os.close(self.descriptor)
        if self.direct is not None:
            os.close(self.direct)

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Ranges:
    """Reads ranges of open files, and decides by which way.

    Args:
        may_pass: whether any may be read past the page cache.
    """

    def __init__(self, may_pass: bool = False) -> None:
        self._buffers = Buffers()
        self._passes = may_pass
        self.is_tried = False  # whether it is decided
        self._busy_s = self._waited_s = 0.0
        self._noted_bytes = self._past_bytes = 0
        self._lock = threading.Lock()

    def lend(
        self, file: OpenFile, start: int, end: int, spec: TensorSpec, may_pass: bool = True
    ) -> tuple[torch.Tensor, bool]:
        """Return the bytes of a range, and whether they were read past the page cache.

        They are uint8 on the CPU, in memory that is used again when no view of it lives; the last
        of them belong to ``spec``.

        Raises:
            CheckpointError: the file ends before.
        """
        if may_pass and self._is_past(file, start, end):
            found = self._read_past(file, start, end, spec)
            if found is not None:
                return found, True
        lent = self._buffers.take(end - start)
        read_into(lent, file.descriptor, start, spec)
        return lent, False

    def fill(
        self, raw: torch.Tensor, file: OpenFile, start: int, spec: TensorSpec, may_pass: bool
    ) -> None:
        """Fill uint8 memory of the CPU with the range from ``start`` on.

        Raises:
            CheckpointError: the file ends before.
        """
        end = start + len(raw)
        if may_pass and self._is_past(file, start, end):
            found = self._read_past(file, start, end, spec)
            if found is not None:
                raw.numpy()[:] = found.numpy()
                return
        read_into(raw, file.descriptor, start, spec)

    def note(self, nbytes: int, waited_s: float, busy_s: float) -> None:
        """Take note of a range that was read past the cache, when it is done with.

        Args:
            waited_s: how long the load waited for it.
            busy_s: how long it then was busy with it.
        """
        self._noted_bytes += nbytes
        self._waited_s += waited_s
        self._busy_s += busy_s
        if not self.is_tried and self._noted_bytes >= _TRIAL_BYTES:
            self.is_tried = True
            self._passes = self._waited_s <= self._busy_s

    def report(self) -> str | None:
        """Say in a line what was read past the page cache and why; None where nothing was."""
        if not self._past_bytes:
            return None
        waited = self._waited_s / max(self._waited_s + self._busy_s, 1e-9)
        why = "to see how fast the device is"
        if self.is_tried and self._passes:
            why = "the device gives them as fast as they are loaded"
        elif self.is_tried:
            why += ", the rest through it for the next start"
        return (
            f"{self._past_bytes / 2**30:.2f} GiB were read past the page cache ({why}; loading "
            f"waited for it {waited:.0%} of the time)"
        )

    def _is_past(self, file: OpenFile, start: int, end: int) -> bool:
        return self._passes and file.direct is not None and not file.is_cached(start, end)

    def _read_past(
        self, file: OpenFile, start: int, end: int, spec: TensorSpec
    ) -> torch.Tensor | None:
        assert file.direct is not None
        first = start // _ALIGNED_BYTES * _ALIGNED_BYTES
        last = -(-end // _ALIGNED_BYTES) * _ALIGNED_BYTES
        lent = self._buffers.take(last - first)
        try:
            read_into(lent, file.direct, first, spec, end - first)
        except OSError as error:
            # A file system that takes the flag and not the reads, or a file that was cut short
            # amid a page: reading through the cache does it, or says what is wrong.
            if error.errno != errno.EINVAL:
                raise
            return None
        with self._lock:
            self._past_bytes += end - start
        return lent[start - first : end - first]


def read_into(
    buffer: torch.Tensor,
    descriptor: int,
    offset: int,
    spec: TensorSpec,
    needed: int | None = None,
) -> None:
    """Fill a uint8 buffer with the bytes of a file from ``offset`` on, those of ``spec`` last.

    Args:
        needed: that many of them are enough; None for all.

    Raises:
        CheckpointError: the file ends before.
    """
    view = memoryview(buffer.numpy())
    needed = len(view) if needed is None else needed
    done = 0
    while done < needed:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{spec.file}: ends at byte {offset + done}, expected {offset + needed} for "
                f"{spec.name}; it was cut short after its header was read. Copy it again"
            )
        done += count
