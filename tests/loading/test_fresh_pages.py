# SPDX-License-Identifier: Apache-2.0
"""Memory that is made ahead is there, holds what it held, and is not waited for."""

import ctypes
import mmap
import threading
import time

import numpy as np
import pytest
import torch

from vllm_mixprec.loading.fresh_pages import made_ahead

BYTES = 64 << 20


def fresh() -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, BYTES), dtype=np.uint8))


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that a tensor lies in, from /proc/self/smaps."""
    within = False
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(part, 16) for part in words[0].split("-"))
            within = start <= tensor.data_ptr() < end
        elif within and words[0] == "Rss:":
            return int(words[1]) << 10
    raise AssertionError("no mapping holds the tensor")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_pages_are_made_while_the_body_runs():
    written, empty = fresh(), fresh()
    written[::4096] = 7
    assert resident_bytes(empty) < BYTES
    with made_ahead([written, empty]):
        until = time.monotonic() + 20
        while "mixprec-pages" in threads() and time.monotonic() < until:
            time.sleep(0.01)
    assert resident_bytes(empty) >= BYTES
    assert bool((written[::4096] == 7).all()) and not bool(empty.any())


def test_memory_that_was_given_back_is_passed_over():
    """Of a layer that was packed meanwhile."""
    tensors = [fresh(), fresh(), fresh()]
    protect = ctypes.CDLL(None).mprotect
    gone = ctypes.c_void_p(tensors[1].data_ptr()), ctypes.c_size_t(BYTES)
    assert not protect(*gone, 0)  # PROT_NONE
    with made_ahead(tensors):
        until = time.monotonic() + 20
        while "mixprec-pages" in threads() and time.monotonic() < until:
            time.sleep(0.01)
    assert not protect(*gone, mmap.PROT_READ | mmap.PROT_WRITE)
    assert [resident_bytes(tensor) >= BYTES for tensor in tensors] == [True, False, True]


def test_an_error_ends_it():
    tensors = [fresh() for _ in range(16)]
    with pytest.raises(ValueError, match="loading failed"):
        with made_ahead(tensors):
            raise ValueError("loading failed")
    assert "mixprec-pages" not in threads()
    assert sum(map(resident_bytes, tensors)) < 16 * BYTES


def test_small_tensors_and_none_at_all_are_left_alone():
    with made_ahead([torch.zeros(3), torch.empty(0)]):
        pass
    with made_ahead([]):
        pass
