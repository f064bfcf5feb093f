# SPDX-License-Identifier: Apache-2.0
"""Has Linux give a model's parameters their memory while the first of them are being read.

A page that nobody has written to yet is made, and zeroed, when it first is: of all that a loader
does from a warm page cache this takes the most time, and the thread that copies would wait for each
page by itself. One call for many pages on another thread takes half as long, and its time is not
the loader's.
"""

import ctypes
import mmap
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from vllm_mixprec.checkpoint.threads import unpin

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python does not name
_STEP_BYTES = 4 << 20  # of one call, so that the end of loading is not waited for
_SMALLEST_BYTES = 1 << 20


@contextmanager
def made_ahead(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While the body runs, make the memory of CPU tensors, in their order; values stay as they are.

    Where the system does not know how, nothing happens: whoever writes makes the pages.
    """
    places = [
        (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        for tensor in tensors
        if tensor.is_cpu and (storage := tensor.untyped_storage()).nbytes() >= _SMALLEST_BYTES
    ]
    ended = threading.Event()
    thread = threading.Thread(target=_make, args=(places, ended), name="mixprec-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _make(places: list[tuple[int, int]], ended: threading.Event) -> None:
    unpin()
    madvise = ctypes.CDLL(None).madvise
    page = mmap.PAGESIZE
    for start, end in places:
        first, last = -(-start // page) * page, end // page * page
        for begin in range(first, last, _STEP_BYTES):
            size = min(_STEP_BYTES, last - begin)
            if ended.is_set():
                return
            if madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _POPULATE_WRITE):
                break  # packed by now, and its memory given back
