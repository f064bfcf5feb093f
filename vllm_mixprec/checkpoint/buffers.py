# SPDX-License-Identifier: Apache-2.0
"""Memory for reading, used again as soon as nothing views it."""

import contextlib
import mmap
import threading
import weakref
from collections import deque

import numpy as np
import torch

# Small neighbours share one read. Larger reads gain nothing on NVMe or page cache and cost memory.
READ_BYTES = 4 << 20

_HUGE_BYTES = 2 << 20
_SLACK_BYTES = 64 << 10  # of small pages behind the huge ones: what is read may begin amid a page
_KEPT_BYTES = 72 << 20  # of free blocks: sixteen of 4 MiB and their slack; and of a single one


class Buffers:
    """Lends memory; what is lent comes back by itself when the last view of it dies.

    Fresh memory costs a page fault for each 4 KiB, as much as reading from the page cache does.
    Blocks lie in huge pages where the system has some: a device that reads into scattered small
    pages takes an entry of its queue for each (a virtio disk of 254 entries a request read 1.2 GB/s
    into small pages and 2.8 into huge ones). All goes back to the system when this object and the
    views are gone: malloc would keep blocks of this size in its heap, between the parameters that
    stay.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """Return ``nbytes`` of uint8, at least one, that begin with a page."""
        block = self._block(block_bytes(nbytes))
        lent = block[:nbytes]  # an object of its own, which the tensor's storage keeps alive
        if len(block) <= _KEPT_BYTES:
            # Takes no lock: the collector may run it in a thread that holds one.
            weakref.finalize(lent, self._free.append, block)
        return torch.from_numpy(lent)

    def _block(self, size: int) -> np.ndarray:
        with self._lock:
            # A list's: the collector, which may run in here, brings blocks back.
            while sum(map(len, list(self._free))) > _KEPT_BYTES:
                self._free.popleft()  # of sizes that nobody asks for any more
            for place in range(len(self._free) - 1, -1, -1):
                block = self._free[place]
                if len(block) == size:
                    del self._free[place]
                    return block
        return _map(size)


def block_bytes(nbytes: int) -> int:
    """Return what a loan of so many bytes holds in memory, at most."""
    huge = -(-(nbytes - _SLACK_BYTES) // _HUGE_BYTES) * _HUGE_BYTES
    return max(huge, READ_BYTES) + _SLACK_BYTES


def _map(nbytes: int) -> np.ndarray:
    """Map memory that begins with a huge page's boundary; what lies before and behind is unused."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapped = mmap.mmap(-1, nbytes + _HUGE_BYTES, flags=flags)
    whole = np.frombuffer(mapped, dtype=np.uint8)
    skipped = -whole.ctypes.data % _HUGE_BYTES
    with contextlib.suppress(OSError):  # a system without them: small pages do, only slower
        mapped.madvise(mmap.MADV_HUGEPAGE, skipped, nbytes // _HUGE_BYTES * _HUGE_BYTES)
    with contextlib.suppress(OSError):
        # Until Linux 5.19 a device could write past a page that a fork meanwhile had copied.
        mapped.madvise(mmap.MADV_DONTFORK)
    return whole[skipped : skipped + nbytes]
