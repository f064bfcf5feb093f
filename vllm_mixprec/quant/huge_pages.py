# SPDX-License-Identifier: Apache-2.0
"""Asks Linux to back large CPU tensors with huge pages, before they are first written to.

A fresh page of 4 KiB costs a page fault, and a loader touches every page of a model once: on the
machine that README names, faults took longer than reading from the page cache. Pages of 2 MiB are
five hundred times fewer. Most distributions give them only to those who ask (``madvise`` in
/sys/kernel/mm/transparent_hugepage/enabled); where there are none, nothing changes.
"""

import ctypes
import mmap
from collections.abc import Iterable

from torch import Tensor

_HUGE_BYTES = 2 << 20


def ask_for_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Advise that the memory of CPU tensors be of huge pages, as far as these fit inside them.

    Tensors that lie side by side are one range. Costs a system call a range and touches nothing.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    places = sorted(
        (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        for tensor in tensors
        if tensor.is_cpu and (storage := tensor.untyped_storage()).nbytes() >= _HUGE_BYTES
    )
    ranges: list[tuple[int, int]] = []
    for start, end in places:
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], end)
        else:
            ranges.append((start, end))
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for start, end in ranges:
        first, last = -(-start // _HUGE_BYTES) * _HUGE_BYTES, end // _HUGE_BYTES * _HUGE_BYTES
        if first < last:
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
