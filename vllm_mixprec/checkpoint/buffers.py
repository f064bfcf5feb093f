# SPDX-License-Identifier: Apache-2.0
"""Buffers of one size for reading, used again as soon as nothing views them."""

import mmap
import weakref
from collections import deque

import numpy as np
import torch

READ_BYTES = 4 << 20


class Buffers:
    """Lends memory; what is lent comes back by itself when the last view of it dies.

    Fresh memory costs a page fault for each 4 KiB, as much as reading from the page cache does.
    All of it goes back to the system when this object and the views are gone: malloc would keep
    blocks of this size in its heap, between the parameters that stay.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque()

    def take(self, nbytes: int) -> torch.Tensor:
        """Return ``nbytes`` of uint8, at least one; of more than READ_BYTES they are fresh."""
        if nbytes > READ_BYTES:
            return torch.from_numpy(_map(nbytes))
        try:
            block = self._free.pop()
        except IndexError:
            block = _map(READ_BYTES)
        lent = block[:nbytes]  # an object of its own, which the tensor's storage keeps alive
        weakref.finalize(lent, self._free.append, block)
        return torch.from_numpy(lent)


def _map(nbytes: int) -> np.ndarray:
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=private), dtype=np.uint8)
