# SPDX-License-Identifier: Apache-2.0
"""Tensors of which only some rows are read: right whatever is done with them, and no byte more."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vllm_mixprec.checkpoint import stored, stream
from vllm_mixprec.checkpoint.buffers import READ_BYTES, Buffers
from vllm_mixprec.checkpoint.header import TensorSpec, read_header
from vllm_mixprec.checkpoint.stored import StoredTensor
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import CheckpointError

ROWS, COLUMNS = 96, 40


@pytest.fixture
def written(tmp_path: Path) -> tuple[torch.Tensor, TensorSpec]:
    """A tensor between two others, and its place in the file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in "abc"}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors["b"], read_header(tmp_path / "model.safetensors")["b"]


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts what reaches the system call."""
    asked: list[int] = []
    real = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(len(buffer) for buffer in buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    yield asked


def with_rows(spec: TensorSpec, rows: range) -> torch.Tensor:
    [(_, tensor)] = read_tensors([spec], {spec: rows})
    return tensor


def test_rows_that_were_foreseen_are_all_that_is_read(written, read_bytes):
    expected, spec = written
    tensor = with_rows(spec, range(24, 48))
    target = torch.zeros(24, COLUMNS)
    target.copy_(tensor.narrow(0, 24, 24))  # as vLLM's weight loaders do
    assert torch.equal(target, expected[24:48])
    assert sum(read_bytes) == 24 * COLUMNS * 4


def test_rows_that_were_not_foreseen_are_read_when_wanted(written, read_bytes):
    expected, spec = written
    tensor = with_rows(spec, range(24, 48))
    target = torch.zeros(30, COLUMNS)
    target.copy_(tensor[20:50])
    assert torch.equal(target, expected[20:50])
    assert sum(read_bytes) == (24 + 30) * COLUMNS * 4


def test_it_looks_like_the_whole_tensor(written):
    expected, spec = written
    tensor = with_rows(spec, range(0, 8))
    assert (tensor.shape, tensor.dtype, tensor.dim()) == (expected.shape, expected.dtype, 2)
    assert tensor.is_contiguous() and tensor.numel() == expected.numel()


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t.narrow(1, 8, 16),
        lambda t: t[5:30].narrow(1, 8, 16),
        lambda t: t[5:30][3:9],
        lambda t: t[-10:],
        lambda t: t[::2],
        lambda t: t[7],
        lambda t: t[1, 2].item(),
        lambda t: t.t().contiguous(),
        lambda t: t.chunk(3, dim=0)[1],
        lambda t: t.to(torch.bfloat16),
        lambda t: t.view(-1)[100:200],
        lambda t: torch.cat([t, t]),
        lambda t: t.data.clone(),
        lambda t: torch.empty(96, 40, dtype=torch.bfloat16).copy_(t),
        lambda t: torch.empty(2, 96, 40).copy_(t),
        lambda t: t.float().sum(),
        lambda t: (t[0:10] == t[10:20]).any(),
    ],
)
def test_any_operation_gives_what_the_tensor_gives(written, use):
    expected, spec = written
    found = use(with_rows(spec, range(8, 16)))
    assert not isinstance(found, StoredTensor) or found.read() is not None
    found = found.read() if isinstance(found, StoredTensor) else found
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(use(expected)))


def test_large_tensors_go_to_their_place_in_pieces(written, read_bytes, monkeypatch):
    expected, spec = written
    monkeypatch.setattr(stream, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(stored, "READ_BYTES", 7 * COLUMNS * 4)
    [(_, tensor)] = read_tensors([spec])
    assert isinstance(tensor, StoredTensor) and read_bytes == []
    target = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    target.copy_(tensor)
    assert torch.equal(target, expected.bfloat16())
    assert sum(read_bytes) == spec.nbytes and max(read_bytes) == 7 * COLUMNS * 4


@pytest.mark.parametrize(
    "make, is_straight",
    [
        (lambda: torch.zeros(50, COLUMNS), True),
        (lambda: torch.nn.Parameter(torch.zeros(2, 50, COLUMNS), requires_grad=False)[1], True),
        (lambda: torch.zeros(50, COLUMNS, dtype=torch.float64), False),
        (lambda: torch.zeros(50, 2 * COLUMNS)[:, ::2], False),
    ],
)
def test_it_is_read_straight_into_a_parameter_of_its_dtype(written, monkeypatch, make, is_straight):
    expected, spec = written
    places: list[int] = []
    real = os.preadv

    def noting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        places.extend(np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", noting)
    monkeypatch.setattr(stored, "READ_BYTES", 7 * COLUMNS * 4)
    target = make()
    target.copy_(StoredTensor(spec)[20:70])
    assert torch.equal(target, expected[20:70].to(target.dtype))
    begin = target.data_ptr()
    assert len(places) == 8
    assert all((begin <= place < begin + target.nbytes) == is_straight for place in places)


def test_read_once_it_is_kept(written, read_bytes):
    _, spec = written
    tensor = StoredTensor(spec)
    for row in range(3):
        tensor[row].sum()
    assert sum(read_bytes) == spec.nbytes


def test_file_cut_short_is_an_error(written):
    _, spec = written
    tensor = StoredTensor(spec)
    os.truncate(spec.file, spec.end - 5)
    with pytest.raises(CheckpointError, match=r"was cut short to .* after its header was read"):
        tensor.sum()


def test_file_written_to_while_it_is_read_is_an_error(written, monkeypatch):
    _, spec = written
    real = os.preadv

    def reading(*given):
        os.utime(spec.file, (0, 0))
        return real(*given)

    monkeypatch.setattr(os, "preadv", reading)
    with pytest.raises(CheckpointError, match=r"was written to after its header was read"):
        torch.zeros(ROWS, COLUMNS).copy_(StoredTensor(spec))


def test_buffers_are_used_again_but_never_while_they_are_seen():
    buffers = Buffers()
    first = buffers.take(1000)
    first.fill_(1)
    view, place = first[10:20], first.data_ptr()
    del first
    second = buffers.take(READ_BYTES)
    assert second.data_ptr() != place  # a view lives
    second.fill_(2)
    assert view.tolist() == [1] * 10
    del view
    assert buffers.take(5).data_ptr() == place


def test_buffers_go_back_to_the_system_at_the_end():
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    before = resident()
    buffers = Buffers()
    lent = [buffers.take(nbytes).fill_(1) for nbytes in (READ_BYTES,) * 15 + (60 << 20,)]
    assert resident() - before > 110 << 20
    del lent
    assert resident() - before > 50 << 20  # kept to be used again
    del buffers
    assert resident() - before < 10 << 20


_READERS_CORES = """
import os
from vllm_mixprec.checkpoint.threads import start_readers

os.sched_setaffinity(0, {cores})
with start_readers() as pool:
    print(pool.submit(os.sched_getaffinity, 0).result() == {expected})
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("is_pinned", [True, False])
def test_readers_leave_the_one_core_of_a_pinned_worker_but_no_wider_binding(is_pinned):
    mine = os.sched_getaffinity(0)
    cores = {max(mine)} if is_pinned else mine
    script = _READERS_CORES.format(cores=cores, expected=mine)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "True\n", found.stderr


def test_readers_stay_where_they_are_if_they_may_not_leave(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})

    def refuse(*given):
        raise PermissionError("not in this sandbox")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with stored.start_readers() as pool:
        assert pool.submit(int, "7").result() == 7


def test_buffers_may_come_back_while_one_is_taken():
    """The collector brings them, whenever it runs; a turn of it for each moment within."""
    thresholds = gc.get_threshold()
    try:
        for allocations in range(1, 40):
            for before in range(12):
                buffers = Buffers()
                held = [buffers.take(READ_BYTES) for _ in range(3)]
                loops = [[each] for each in held]
                for loop in loops:
                    loop.append(loop)
                del held, loops, loop
                gc.set_threshold(allocations)
                junk = [[] for _ in range(before)]
                buffers.take(READ_BYTES)
                gc.set_threshold(*thresholds)
                del junk
    finally:
        gc.set_threshold(*thresholds)
