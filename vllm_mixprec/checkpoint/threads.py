# SPDX-License-Identifier: Apache-2.0
"""Threads to read with, and the cores that they may run on."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's own, with cgroup v2
READERS = 8  # four read a fast disk a tenth slower, sixteen no faster


def start_readers() -> ThreadPoolExecutor:
    """Start threads to read with."""
    return ThreadPoolExecutor(READERS, thread_name_prefix="mixprec-read", initializer=unpin)


def unpin() -> None:
    """Let this thread run where the process's parent may, if it is bound to one core.

    vLLM's CPU workers bind OpenMP's threads to a core each, the main thread among them, and a new
    thread inherits its core: readers would take turns with the thread that they read for.
    """
    with suppress(OSError):  # a sandbox's, and of cores taken away meanwhile: it is only slower
        os.sched_setaffinity(0, _cores())


def reading_cores() -> int:
    """Return how many cores readers can keep busy."""
    with suppress(OSError):
        return min(len(_cores()), _quota(), READERS)
    return 1


def _quota() -> int:
    """Return how many cores' time the container may take, at least one; all where none is set."""
    with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
        limit, period = _QUOTA.read_text().split()
        return max(math.ceil(int(limit) / int(period)), 1)
    return READERS


def _cores() -> set[int]:
    own = os.sched_getaffinity(0)
    return own if len(own) > 1 else os.sched_getaffinity(os.getppid())
