# SPDX-License-Identifier: Apache-2.0
"""Tensors that are copied at once are read straight into their place, at once or a little later."""

import errno
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_mixprec.checkpoint import buffers, filling, ranges, stream
from vllm_mixprec.checkpoint.header import TensorSpec, read_header
from vllm_mixprec.checkpoint.ranges import OpenFile, RangeReader
from vllm_mixprec.checkpoint.stored import StoredTensor
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import CheckpointError

Written = tuple[dict[str, torch.Tensor], list[TensorSpec]]
Make = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Weights with scales between them, in two files; and what is stored of each."""
    generator = torch.Generator().manual_seed(0)
    tensors, specs = {}, []
    for file in "ab":
        some = {}
        for number in range(9):
            weight = torch.randn(40 + number, 30, generator=generator).bfloat16()
            some[f"{file}{number}.weight"] = weight
            some[f"{file}{number}.weight_scale"] = weight[:, :1].clone()
        save_file(some, tmp_path / f"{file}.safetensors")
        specs += read_header(tmp_path / f"{file}.safetensors").values()
        tensors |= some
    return tensors, specs


def weights_of(specs: list[TensorSpec]) -> set[TensorSpec]:
    return {spec for spec in specs if spec.name.endswith("weight")}


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, 7.0)


def rows_apart(tensor: torch.Tensor) -> torch.Tensor:
    """As a projection in a parameter that it shares with another, side by side."""
    return torch.full((tensor.shape[0], 2 * tensor.shape[1]), 7.0, dtype=tensor.dtype)[
        :, tensor.shape[1] :
    ]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor.t().contiguous(), 7.0).t()


def wider(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, 7.0, dtype=torch.float32)


def read_to(
    specs: Iterable[TensorSpec], copied: set[TensorSpec], make: Make, is_late: bool, **rest
) -> dict[str, torch.Tensor]:
    """Copy every tensor as a weight loader does."""
    places = {}
    for spec, tensor in read_tensors(specs, copied=copied, **rest):
        assert isinstance(tensor, StoredTensor) == (spec in copied), spec.name
        places[spec.name] = make(torch.empty(tensor.shape, dtype=tensor.dtype))
        if is_late and spec in copied:
            tensor = tensor.late()
        places[spec.name].data.copy_(tensor.narrow(1, 0, tensor.shape[1]))
    return places


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("make", [contiguous, rows_apart, transposed, wider])
@pytest.mark.parametrize("read_bytes, ahead_bytes", [(1, 1), (3000, 6000), (4 << 20, 64 << 20)])
def test_every_place_is_filled(
    written: Written, monkeypatch, make: Make, is_late: bool, read_bytes: int, ahead_bytes: int
):
    for module in (stream, filling):
        monkeypatch.setattr(module, "READ_BYTES", read_bytes)
    monkeypatch.setattr(stream, "_AHEAD_BYTES", ahead_bytes)
    tensors, specs = written
    places = read_to(specs, weights_of(specs), make, is_late)
    assert places.keys() == tensors.keys()
    for name, place in places.items():
        assert torch.equal(place, tensors[name].to(place.dtype)), name


@pytest.mark.parametrize("is_late", [False, True])
def test_no_buffer_is_taken_and_no_byte_read_twice(written: Written, monkeypatch, is_late: bool):
    _, specs = written
    monkeypatch.setattr(ranges, "_SMALL_BYTES", 0)
    monkeypatch.setattr(buffers, "_map", lambda nbytes: pytest.fail("took a buffer"))
    read_to(specs, set(specs), rows_apart, is_late)  # torch imports much at its first use
    before = read_so_far()
    read_to(specs, set(specs), rows_apart, is_late)
    told = read_so_far() - before
    assert 0 <= told - sum(spec.nbytes for spec in specs) < 250  # what reading /proc reads


def read_so_far() -> int:
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


def test_a_matrix_of_more_rows_than_a_call_takes_is_filled(tmp_path: Path):
    rows = torch.arange(3 * filling._SEGMENTS * 8).view(-1, 8)
    save_file({"weight": rows}, tmp_path / "a.safetensors")
    specs = [*read_header(tmp_path / "a.safetensors").values()]
    assert torch.equal(read_to(specs, set(specs), rows_apart, True)["weight"], rows)


def test_only_rows_that_are_asked_for_are_read(written: Written):
    tensors, specs = written
    [spec] = [spec for spec in specs if spec.name == "b3.weight"]
    for _ in range(2):  # torch imports much at its first use
        place, before = torch.zeros(5, 30, dtype=torch.bfloat16), read_so_far()
        for _, tensor in read_tensors([spec], {spec: range(10, 20)}, copied={spec}):
            place.copy_(tensor.late().narrow(0, 12, 5))
        told = read_so_far() - before
    assert torch.equal(place, tensors["b3.weight"][12:17])
    assert 0 <= told - place.nbytes < 250 < place.nbytes


@pytest.mark.parametrize(
    "use",
    [
        lambda tensor: tensor.float(),
        lambda tensor: tensor.t().contiguous(),
        lambda tensor: tensor.narrow(1, 3, 9),
        lambda tensor: tensor[4:20] * 2,
        lambda tensor: torch.zeros(2, *tensor.shape, dtype=tensor.dtype).copy_(tensor),
    ],
)
def test_whatever_else_is_done_with_a_late_tensor_is_done_at_once(written: Written, use):
    tensors, specs = written
    for spec, tensor in read_tensors(specs, copied=weights_of(specs)):
        if spec in weights_of(specs):
            assert torch.equal(use(tensor.late()), use(tensors[spec.name])), spec.name


def test_copying_to_memory_that_is_none_reads_nothing(written: Written):
    """As vLLM's reload does, to learn how much a loader copies."""
    tensors, specs = written
    [spec] = [spec for spec in specs if spec.name == "a2.weight"]
    for _ in range(2):  # torch imports much at its first use
        before = read_so_far()
        for _, tensor in read_tensors([spec], copied={spec}):
            torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").copy_(tensor)
        told = read_so_far() - before
    assert told < 250 < spec.nbytes  # what reading /proc reads


def test_what_is_not_copied_by_then_is_read_from_a_file_of_its_own(written: Written):
    """A consumer may keep a tensor longer than its file is open."""
    tensors, specs = written
    kept = {spec.name: tensor for spec, tensor in read_tensors(specs, copied=weights_of(specs))}
    for name, tensor in kept.items():
        assert torch.equal(contiguous(tensors[name]).copy_(tensor), tensors[name])


def test_what_is_copied_late_when_that_was_begun_is_there_at_once(written: Written):
    tensors, specs = written
    stored = read_tensors(specs, copied=weights_of(specs))
    kept = next(tensor for spec, tensor in stored if spec in weights_of(specs))
    for _ in range(2 * len(specs) - 3):  # its file is open still
        next(stored, None)
    name = kept.spec.name
    assert torch.equal(contiguous(tensors[name]).copy_(kept.late()), tensors[name])


def test_who_waits_for_a_place_is_told_when_it_is_filled(written: Written, monkeypatch):
    tensors, specs = written
    [spec] = [spec for spec in specs if spec.name == "a2.weight"]
    may_read = threading.Event()
    read = filling.Filling._read
    monkeypatch.setattr(
        filling.Filling, "_read", lambda self, places: may_read.wait(9) and read(self, places)
    )
    place, told = contiguous(tensors[spec.name]), []
    stored = read_tensors([spec], copied={spec})
    _, tensor = next(stored)
    place.copy_(tensor.late())
    done: Future[None] = tensor.filling.done
    done.add_done_callback(lambda _: told.append(place.clone()))
    assert not done.done() and bool((place == 7).all())
    threading.Timer(0.2, may_read.set).start()
    assert next(stored, None) is None
    assert torch.equal(told[0], tensors[spec.name]) and done.result() is None


def test_a_large_tensor_is_filled_late_by_several_threads(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(filling, "READ_BYTES", 3000)
    tensors = {"weight": torch.randn(400, 30), "x": torch.randn(3, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    specs = [*read_header(tmp_path / "model.safetensors").values()]
    threads, read = set(), filling.Filling._read_run

    def noted(self, run):
        threads.add((threading.get_ident(), run[0].start))
        read(self, run)

    monkeypatch.setattr(filling.Filling, "_read_run", noted)
    monkeypatch.setattr(stream, "READ_BYTES", 1)
    places = read_to(specs, set(specs), contiguous, True)
    assert all(torch.equal(place, tensors[name]) for name, place in places.items())
    assert len(threads) == 17 and threading.get_ident() not in {ident for ident, _ in threads}


@pytest.mark.parametrize("is_late", [False, True])
def test_a_file_that_was_cut_short_is_an_error(written: Written, is_late: bool):
    _, specs = written
    file, last = specs[0].file, max(specs[:18], key=lambda spec: spec.end)
    weights = weights_of(specs)
    stored = read_tensors(specs, copied=weights)
    waited: list[Future[None]] = []
    with pytest.raises(CheckpointError, match=r"a\.safetensors: ends at byte .* Copy it again"):
        for spec, tensor in stored:
            os.truncate(file, last.end - 4000)
            if spec in weights:
                tensor = tensor.late() if is_late else tensor
                waited += [tensor.filling.done]
                torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    if is_late:
        with pytest.raises(CheckpointError, match=r"ends at byte"):
            waited[-1].result(9)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_file_written_to_while_it_is_read_is_an_error(written: Written, is_late: bool):
    _, specs = written
    stored = read_tensors(specs, copied=weights_of(specs))
    next(stored)
    os.utime(specs[0].file, (0, 0))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: was written to after"):
        for spec, tensor in stored:
            if spec in weights_of(specs):
                torch.empty(tensor.shape, dtype=tensor.dtype).copy_(
                    tensor.late() if is_late else tensor
                )


def test_who_waits_is_let_go_when_reading_stops_early(written: Written):
    _, specs = written
    weights = weights_of(specs)
    stored = read_tensors(specs, copied=weights)
    spec, tensor = next((spec, tensor) for spec, tensor in stored if spec in weights)
    torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.late())
    stored.close()
    assert tensor.filling.done.done()


def make_cold(specs: list[TensorSpec]) -> None:
    for file in {spec.file for spec in specs}:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def suited(tensor: torch.Tensor, start: int) -> torch.Tensor:
    """Memory for a tensor that begins at the place of a page where its file has it."""
    room = torch.full((tensor.nbytes + 8192,), 7, dtype=torch.uint8)
    begin = (start - room.data_ptr()) % 4096
    return room[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("is_suited", [False, True])
@pytest.mark.parametrize("least_bytes", [1, 1 << 20])
@pytest.mark.parametrize("may_pass", [False, True])
def test_cold_tensors_come_the_same(
    tmp_path: Path,
    monkeypatch,
    may_pass: bool,
    least_bytes: int,
    is_suited: bool,
    is_late: bool,
):
    monkeypatch.setattr(stream, "_PLACED_BYTES", least_bytes)
    tensors = {f"{number}.weight": torch.randn(400, 30 + number) for number in range(9)}
    save_file(tensors, tmp_path / "model.safetensors")
    specs = list(read_header(tmp_path / "model.safetensors").values())
    make_cold(specs)
    reader, places = RangeReader(may_pass), {}
    for spec, tensor in read_tensors(specs, reader=reader, copied=set(specs)):
        is_large = spec.nbytes >= least_bytes
        assert isinstance(tensor, StoredTensor) == (not reader.may_pass or is_large)
        start = spec.start if is_suited else spec.start + 8
        places[spec.name] = suited(tensors[spec.name], start)
        late = isinstance(tensor, StoredTensor) and is_late
        places[spec.name].copy_(tensor.late() if late else tensor)
    assert all(torch.equal(place, tensors[name]) for name, place in places.items())
    told = reader.report()
    if may_pass and (told is None or "refused" in told):
        pytest.skip("this file system has no direct reading, or does not tell what is cached")
    with closing(OpenFile(specs[0].file, None, may_pass=True)) as file:
        needs_suited = file.alignment is None or file.alignment.memory > 8
    if may_pass:
        is_placed = least_bytes == 1 and (is_suited or not needs_suited)
        assert ("100% of it straight into place" in told) == is_placed, told


def test_where_the_device_refuses_memory_it_reads_by_buffers_and_says_so(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(stream, "_PLACED_BYTES", 1)

    def refuse(self: object, descriptor: int) -> bool:
        raise OSError(errno.EINVAL, "not there")

    monkeypatch.setattr(ranges.DirectRead, "run", refuse)
    tensors = {f"{number}.weight": torch.randn(400, 30 + number) for number in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    specs = list(read_header(tmp_path / "model.safetensors").values())
    make_cold(specs)
    reader, places = RangeReader(may_pass=True), {}
    for spec, tensor in read_tensors(specs, reader=reader, copied=set(specs)):
        places[spec.name] = suited(tensors[spec.name], spec.start).copy_(tensor)
    assert all(torch.equal(place, tensors[name]) for name, place in places.items())
    told = reader.report()
    with closing(OpenFile(specs[0].file, None, may_pass=True)) as file:
        if told is None or file.alignment is None:
            pytest.skip("this system has no direct reading into place")
    assert "0% of it straight into place until that was refused ([Errno 22] not there)" in told


def test_what_nobody_tells_of_is_brought_into_the_cache(written: Written, monkeypatch):
    """To one who may not write to a file the kernel says that all of it is cached."""
    _, specs = written
    brought: list[tuple[int, int]] = []
    monkeypatch.setattr(
        stream, "bring", lambda descriptor, start, end: brought.append((start, end))
    )
    read_to(specs, weights_of(specs), contiguous, True, reader=RangeReader(may_pass=True))
    known = len(brought)
    monkeypatch.setattr(ranges.os, "access", lambda path, mode: False)
    monkeypatch.setattr(ranges.os, "geteuid", lambda: os.getuid() + 1)
    with closing(OpenFile(specs[0].file, None, may_pass=True)) as file:
        assert file.is_cached(0, 10) is None
    read_to(specs, weights_of(specs), contiguous, True, reader=RangeReader(may_pass=True))
    assert known == 0 and sum(end - start for start, end in brought) >= sum(
        spec.nbytes for spec in weights_of(specs)
    )
