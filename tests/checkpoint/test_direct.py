# SPDX-License-Identifier: Apache-2.0
"""Whole sectors go where they belong, and of those at the edges what belongs there."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mixprec.checkpoint import direct
from vllm_mixprec.checkpoint.direct import Alignment, DirectRead, aligned_memory, alignment_of

SIZE = 40_000
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "file"
    CONTENT.tofile(path)
    return path


def read(
    file: Path, start: int, pieces: list[tuple[int, int]], alignment: Alignment, flags: int = 0
) -> tuple[bool, bool]:
    """Read to pieces of an arena, given by gaps before them and sizes; check all of the arena.

    Returns whether the pieces fit, and whether all was read.
    """
    arena = aligned_memory(4096 + sum(map(sum, pieces)), 4096)
    expected = arena.copy()
    segments, place, offset = [], 0, start
    for gap, size in pieces:
        place += gap
        segments.append((arena.ctypes.data + place, size))
        expected[place : place + size] = CONTENT[offset : offset + size][:size]
        place, offset = place + size, offset + size
    direct_read = DirectRead(np.array(segments, np.uint64), start, alignment)
    if not direct_read.fits:
        return False, False
    descriptor = os.open(file, os.O_RDONLY | flags)
    try:
        is_read = direct_read.run(descriptor)
    finally:
        os.close(descriptor)
    assert np.array_equal(arena, expected)
    return True, is_read


PIECES = st.lists(
    st.tuples(st.integers(0, 1500), st.one_of(st.integers(1, 40), st.integers(1, 3000))),
    min_size=1,
    max_size=8,
)


@given(
    start=st.integers(0, 9000),
    pieces=PIECES,
    sector=st.sampled_from([512, 1024, 4096]),
)
def test_every_byte_goes_where_it_belongs_and_no_other_is_touched(file, start, pieces, sector):
    assert read(file, start, pieces, Alignment(1, sector)) == (True, True)


@given(start=st.integers(0, 9000), pieces=PIECES)
def test_pieces_that_the_device_cannot_write_to_do_not_fit(file, start, pieces):
    """Each that takes whole sectors has to begin at the place of one where its file has it."""
    place, offset, is_suited = 0, start, True
    for gap, size in pieces:
        place += gap
        takes_whole = -(-offset // 512) * 512 < (offset + size) // 512 * 512
        is_suited &= not takes_whole or (place - offset) % 512 == 0
        place, offset = place + size, offset + size
    assert read(file, start, pieces, Alignment(512, 512))[0] == is_suited


@pytest.mark.parametrize("start", [0, 8, 512, 1000])
@pytest.mark.parametrize("is_suited", [True, False])
def test_the_device_of_this_machine(file: Path, start: int, is_suited: bool):
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no direct reading")
    alignment = alignment_of(descriptor)
    os.close(descriptor)
    if alignment is None:
        pytest.skip("this system does not tell what direct reads need")
    gap = start % 4096 + (0 if is_suited else alignment.memory // 2)
    pieces = [(gap, 9000), (0, 5000), (4096, 9000), (0, 30)]
    found = read(file, start, pieces, alignment, os.O_DIRECT)
    is_any = is_suited or alignment.memory == 1
    # The last piece is within a sector, and the third goes on after a page that is left out.
    assert found == (is_any, is_any)


def test_rows_that_begin_amid_sectors_are_left_to_others(file: Path):
    rows = [(512, 512)] * 60
    assert read(file, 0, rows, Alignment(512, 512)) == (True, True)
    assert read(file, 8, [(520, 512), *rows[1:]], Alignment(4, 512)) == (True, True)
    assert read(file, 8, [(520, 512), *rows[1:], *rows[:9]], Alignment(4, 512))[0] is False


def test_a_file_that_ends_before_is_told(file: Path):
    rest = SIZE - 30_000
    assert read(file, 30_000, [(0, rest)], Alignment(4, 512)) == (True, True)
    segments = np.array([(aligned_memory(9999, 512).ctypes.data, rest + 1)], np.uint64)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        assert not DirectRead(segments, 30_000, Alignment(4, 512)).run(descriptor)
    finally:
        os.close(descriptor)


def test_what_the_system_refuses_is_its_error(file: Path):
    memory = aligned_memory(512, 512)
    read = DirectRead(np.array([(memory.ctypes.data, 512)], np.uint64), 0, Alignment(4, 512))
    with pytest.raises(OSError, match="Bad file descriptor"):
        read.run(-1)


@pytest.mark.parametrize("release", ["6.4.9-x", "5.14.0-503.el9", "unknown"])
def test_before_reads_pinned_pages_nothing_goes_to_memory_of_others(
    file: Path, monkeypatch, release: str
):
    monkeypatch.setattr(
        direct.os, "uname", lambda: os.uname_result(("Linux", "", release, "", "x86_64"))
    )
    descriptor = os.open(file, os.O_RDONLY)
    try:
        assert alignment_of(descriptor) is None
    finally:
        os.close(descriptor)
