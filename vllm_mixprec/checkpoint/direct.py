# SPDX-License-Identifier: Apache-2.0
"""Reads a file past the page cache straight into memory that others laid out.

A device delivers whole sectors, to addresses that are multiples of a size of its own (Linux 6.1
tells both: statx ``STATX_DIOALIGN``). Memory whose pieces begin and end amid sectors gets whole
ones, and the few bytes at its edges from sectors that are read beside it, by the same call.
"""

import ctypes
import os
import re
from typing import NamedTuple

import numpy as np

_STATX_DIOALIGN, _DIO_PLACE = 0x2000, 152  # include/uapi/linux/stat.h
_AT_EMPTY_PATH = 0x1000
_PINNING_LINUX = (6, 5)
_BESIDE = 64
_SEGMENTS = 1024  # of one preadv, Linux's IOV_MAX
_LIBC = ctypes.CDLL(None, use_errno=True)


class Alignment(NamedTuple):
    """Bytes that direct reads of a file have to be multiples of.

    Attributes:
        memory: addresses.
        sector: offsets in the file, and lengths; no less than ``memory``.
    """

    memory: int
    sector: int


def alignment_of(descriptor: int) -> Alignment | None:
    """Return what direct reads of a file need; None where they must not go to others' memory.

    That is where nobody tells, and before Linux 6.5: a fork amid a read copied the page, and the
    device wrote to the copy that nobody sees, unless the memory is kept from forks.
    """
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is None or tuple(map(int, release.groups())) < _PINNING_LINUX:
        return None
    if not hasattr(_LIBC, "statx"):
        return None
    found = (ctypes.c_uint32 * 64)()
    failed = _LIBC.statx(
        descriptor, b"", _AT_EMPTY_PATH, ctypes.c_uint(_STATX_DIOALIGN), ctypes.byref(found)
    )
    memory, sector = found[_DIO_PLACE // 4], found[_DIO_PLACE // 4 + 1]
    is_told = not failed and found[0] & _STATX_DIOALIGN and memory and sector
    return Alignment(memory, max(memory, sector)) if is_told else None


class DirectRead:
    """One call that reads a range of a file to pieces of memory.

    Args:
        segments: address and length of each piece: uint64 (pieces, 2).
        start: offset in the file of what goes to the first of them; the others follow on it.
    """

    def __init__(self, segments: np.ndarray, start: int, alignment: Alignment) -> None:
        self._sector = sector = alignment.sector
        ends = start + np.cumsum(segments[:, 1].astype(np.int64))
        begins = ends - segments[:, 1].astype(np.int64)
        inner, outer = -(-begins // sector) * sector, ends // sector * sector
        addresses = segments[:, 0].astype(np.int64) + inner - begins
        unsuited = np.count_nonzero((addresses % alignment.memory != 0) & (inner < outer))
        # Rows of a piece each that begin amid a sector would be as many sectors beside.
        beside = int(np.count_nonzero(begins % sector)) + 1
        self.fits = not unsuited and beside <= _BESIDE and len(segments) + beside <= _SEGMENTS
        if not self.fits:
            return
        self._first = self._position = start // sector * sector
        self._end = int(ends[-1])
        self._vectors: list[tuple[int, int]] = []  # address and length, as preadv takes them
        self._edges: list[tuple[int, int, int]] = []  # address, offset in the file, length
        # Of the sectors that have an edge in them, one an edge at most.
        self._memory = aligned_memory(sector * (beside + 1), sector)
        self._beside = self._memory.ctypes.data
        self._places: dict[int, int] = {}  # offset in the file -> address in that
        pieces = zip(
            segments[:, 0].tolist(), *(each.tolist() for each in (begins, ends)), strict=True
        )
        for address, begin, end in pieces:
            first, last = self._up(begin), end // sector * sector
            if first < last:
                self._read_beside(first)
                self._vectors.append((address + first - begin, last - first))
                self._position = last
                self._edges.append((address, begin, first - begin))
                self._edges.append((address + last - begin, last, end - last))
            else:
                self._edges.append((address, begin, end - begin))
        self._read_beside(self._up(self._end))

    def _up(self, offset: int) -> int:
        return -(-offset // self._sector) * self._sector

    def _read_beside(self, end: int) -> None:
        """Have the sectors from the last position on read to memory of our own."""
        for offset in range(self._position, end, self._sector):
            address = self._beside + len(self._places) * self._sector
            self._places[offset] = address
            self._vectors.append((address, self._sector))
        self._position = max(self._position, end)

    def run(self, descriptor: int) -> bool:
        """Read, if it ``fits``; returns whether all is there, for the file may end before.

        Raises:
            OSError: the file system does not read so.
        """
        vectors = np.array(self._vectors, np.uint64)
        count = _LIBC.preadv(
            ctypes.c_int(descriptor),
            ctypes.c_void_p(vectors.ctypes.data),
            ctypes.c_int(len(vectors)),
            ctypes.c_int64(self._first),
        )
        if count < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        if count < self._end - self._first:
            return False
        for address, offset, nbytes in self._edges:
            while nbytes:  # an edge without a whole sector may lie in two
                sector = offset // self._sector * self._sector
                size = min(nbytes, sector + self._sector - offset)
                ctypes.memmove(address, self._places[sector] + offset - sector, size)
                address, offset, nbytes = address + size, offset + size, nbytes - size
        return True


def aligned_memory(nbytes: int, multiple: int) -> np.ndarray:
    """Return uint8 memory whose address is a multiple."""
    memory = np.empty(nbytes + multiple, np.uint8)
    return memory[-memory.ctypes.data % multiple :][:nbytes]
