# SPDX-License-Identifier: Apache-2.0
"""Ranges of files come the same by either way, and by the way that is the better one."""

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_mixprec.checkpoint import ranges, stored, stream
from vllm_mixprec.checkpoint.header import TensorSpec, read_header
from vllm_mixprec.checkpoint.ranges import OpenFile, RangeReader
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.checkpoint.threads import start_readers
from vllm_mixprec.errors import CheckpointError

COUNT, VALUES = 24, 50_001  # tensors, which begin and end amid pages


def make_cold(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.fixture
def cold(tmp_path: Path) -> tuple[dict[str, torch.Tensor], list[TensorSpec]]:
    """A checkpoint that is on the disk alone: its tensors, and their specs in the file's order."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{number:02}": torch.randn(VALUES, generator=generator).bfloat16()
        for number in range(COUNT)
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    specs = sorted(read_header(file).values(), key=lambda spec: spec.start)
    make_cold(file)
    with closing(OpenFile(file, specs[0].stamp, may_pass=True)) as opened:
        if opened.direct is None:
            pytest.skip("this file system has no direct reading")
        if opened.is_cached(specs[0].start, specs[-1].end):
            pytest.skip("this system does not tell what is in its page cache")
    return tensors, specs


def cached(specs: list[TensorSpec]) -> list[bool]:
    """Whether each tensor is in the page cache."""
    with closing(OpenFile(specs[0].file, specs[0].stamp, may_pass=True)) as opened:
        return [opened.is_cached(spec.start, spec.end) for spec in specs]


def read_all(
    specs: list[TensorSpec], reader: RangeReader, pause_s: float = 0.0, **rest
) -> Iterator[tuple[str, torch.Tensor]]:
    for spec, tensor in read_tensors(specs, reader=reader, **rest):
        yield spec.name, tensor.clone()
        del tensor
        time.sleep(pause_s)


def test_a_cold_range_is_read_past_the_page_cache_whatever_its_place(cold):
    _, specs = cold
    raw = specs[0].file.read_bytes()
    make_cold(specs[0].file)
    size = len(raw)
    places = [(0, 1), (1, 4095), (4095, 4097), (8192, 12288), (5000, 5_000_000), (size - 1, size)]
    reader = RangeReader(may_pass=True)
    with closing(OpenFile(specs[0].file, specs[0].stamp, may_pass=True)) as opened:
        for start, end in places:
            end = min(end, size)
            found, is_past = reader.lend(
                opened, start, end, specs[-1], reader.is_past(opened, start, end)
            )
            assert is_past
            assert bytes(found.numpy()) == raw[start:end]
        assert not opened.is_cached(0, size)


def test_a_cached_range_is_read_from_the_cache(cold):
    tensors, specs = cold
    specs[0].file.read_bytes()
    reader = RangeReader(may_pass=True)
    found = dict(read_all(specs, reader))
    assert found.keys() == tensors.keys()
    assert reader.report() is None


def test_nothing_passes_the_cache_unless_it_may(cold):
    tensors, specs = cold
    reader = RangeReader()
    found = dict(read_all(specs, reader))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert reader.report() is None and all(cached(specs))


def test_what_others_read_as_well_goes_through_the_cache(cold, monkeypatch):
    tensors, specs = cold
    monkeypatch.setattr(stream, "READ_BYTES", 1)  # each tensor by itself
    monkeypatch.setattr(ranges, "_WORTH_A_CORE", 0)  # reads of 0.1 MB are slow ones
    found = dict(read_all(specs, RangeReader(may_pass=True), shared={specs[7]}))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [place for place, is_cached in enumerate(cached(specs)) if is_cached] == [7]


@pytest.fixture
def one_by_one(cold, monkeypatch):
    """Each tensor is a read by itself, none is read ahead, and four are the trial.

    A device is worth passing the cache for from six megabytes a second on.
    """
    monkeypatch.setattr(stream, "READ_BYTES", 1)
    monkeypatch.setattr(stream, "_AHEAD_BYTES", 1)
    monkeypatch.setattr(ranges, "_TRIAL_BYTES", 4 * cold[1][0].nbytes)
    monkeypatch.setattr(ranges, "_WORTH_A_CORE", 6e6)
    monkeypatch.setattr(ranges, "reading_cores", lambda: 1)
    return cold


@pytest.fixture
def slow(monkeypatch) -> list[float]:
    """Seconds that a read of 0.1 MB takes longer by now."""
    pause_s = [0.03]
    real = os.preadv

    def reading(*given):
        time.sleep(pause_s[-1])
        return real(*given)

    monkeypatch.setattr(os, "preadv", reading)
    return pause_s


def wait_until_cached(specs: list[TensorSpec]) -> None:
    until = time.monotonic() + 20
    while not all(cached(specs)):
        assert time.monotonic() < until, cached(specs)
        time.sleep(0.01)


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_a_fast_device_is_read_past_the_cache_however_long_the_load_takes(one_by_one, pause_s):
    tensors, specs = one_by_one
    reader = RangeReader(may_pass=True)
    found = dict(read_all(specs, reader, pause_s))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not any(cached(specs))
    told = reader.report()
    assert re.search(r"past the page cache at \d+\.\d\d GB/s, 0% of it straight into place$", told)


def test_what_a_slow_device_delivers_is_left_in_the_cache(one_by_one, slow):
    tensors, specs = one_by_one
    reader = RangeReader(may_pass=True)
    rest = iter(read_all(specs, reader))
    found = dict(next(rest) for _ in range(7))
    assert cached(specs[:6]) == [False] * 4 + [True] * 2
    found |= dict(rest)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert reader.report().endswith("the cache is worth filling: the rest through it")
    slow.append(0.0)
    wait_until_cached(specs)  # those of the trial as well: they are brought there when all is read


def test_a_load_of_less_than_a_trial_is_in_the_cache_as_well_if_the_device_is_slow(
    one_by_one, slow
):
    _, specs = one_by_one
    list(read_all(specs[:3], RangeReader(may_pass=True)))
    wait_until_cached(specs[:3])


def test_a_device_that_becomes_slow_is_noticed(one_by_one, slow):
    _, specs = one_by_one
    slow.append(0.0)
    reader = RangeReader(may_pass=True)
    rest = iter(read_all(specs, reader))
    for _ in range(6):
        next(rest)
    assert reader.may_pass
    slow.append(0.2)
    list(rest)
    assert not reader.may_pass and cached(specs)[-1] and not any(cached(specs[4:6]))


def test_only_the_time_in_which_the_device_reads_counts(one_by_one, slow):
    """Eight reads at a time of 0.03 s each are a device that is eight times as fast."""
    _, specs = one_by_one
    reader = RangeReader(may_pass=True)
    with (
        closing(OpenFile(specs[0].file, specs[0].stamp, may_pass=True)) as opened,
        start_readers() as pool,
    ):
        lent = [
            pool.submit(reader.lend, opened, spec.start, spec.end, spec, is_past=True)
            for spec in specs
        ]
        assert all(each.result()[1] for each in lent)
    assert reader.may_pass and not any(cached(specs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("may_pass", [True, False])
def test_large_tensors_pass_the_cache_as_others_do(cold, monkeypatch, dtype, may_pass):
    tensors, specs = cold
    monkeypatch.setattr(stream, "READ_BYTES", 1)
    monkeypatch.setattr(stream, "_LARGE_BYTES", 1)
    monkeypatch.setattr(stored, "READ_BYTES", 30_000)
    monkeypatch.setattr(ranges, "_WORTH_A_CORE", 0)  # reads of 0.1 MB are slow ones
    target = torch.zeros(VALUES, dtype=dtype)
    for spec, tensor in read_tensors(specs[:8], reader=RangeReader(may_pass)):
        target.copy_(tensor)
        assert torch.equal(target, tensors[spec.name].to(dtype))
    assert cached(specs[:8]) == [not may_pass] * 8


@pytest.mark.parametrize("may_pass", [True, False])
def test_a_file_that_was_cut_short_is_an_error_by_either_way(cold, may_pass):
    _, specs = cold
    reader = RangeReader(may_pass)
    last = specs[-1]
    with closing(OpenFile(last.file, last.stamp, may_pass=True)) as opened:
        os.truncate(last.file, last.end - 5000)
        with pytest.raises(CheckpointError, match=f"ends at byte {last.end - 5000}, expected"):
            reader.lend(opened, last.start, last.end, last, is_past=True)


@pytest.mark.parametrize("refuses", ["to open", "to read"])
def test_a_file_system_without_direct_reading_is_read_through_the_cache(cold, monkeypatch, refuses):
    tensors, specs = cold
    real_open, real_read = os.open, os.preadv
    direct = set()

    def opening(path, flags, *rest, **named):
        if flags & os.O_DIRECT and refuses == "to open":
            raise OSError(errno.EINVAL, "no direct reading")
        descriptor = real_open(path, flags, *rest, **named)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def reading(descriptor, *rest):
        if descriptor in direct:
            raise OSError(errno.EOPNOTSUPP, "not by this")
        return real_read(descriptor, *rest)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "preadv", reading)
    reader = RangeReader(may_pass=True)
    found = dict(read_all(specs, reader))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert bool(direct) == (refuses == "to read")
    if direct:
        assert "reading past it was refused ([Errno 95] not by this)" in reader.report()
