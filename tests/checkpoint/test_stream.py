# SPDX-License-Identifier: Apache-2.0
import errno
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from vllm_mixprec.checkpoint import buffers, stream
from vllm_mixprec.checkpoint.buffers import READ_BYTES
from vllm_mixprec.checkpoint.header import read_header
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import CheckpointError


@pytest.fixture
def shards(tmp_path):
    """Two files of tensors of all sizes and dtypes; returns (their tensors, their specs)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "fp8": torch.randn(7, 5, generator=generator).to(torch.float8_e4m3fn),
        "half": torch.randn(33, generator=generator).half(),
        "words": torch.randint(-(2**31), 2**31, (9, 4), generator=generator).int(),
        "wide": torch.randn(300, 70, generator=generator),
        "bf16": torch.randn(128, 128, generator=generator).bfloat16(),
    }
    names = list(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "b.safetensors")
    specs = [*read_header(tmp_path / "a.safetensors").values()]
    return tensors, specs + [*read_header(tmp_path / "b.safetensors").values()]


@pytest.mark.parametrize("read_bytes, ahead_bytes", [(1, 1), (600, 1000), (4 << 20, 32 << 20)])
def test_every_tensor_comes_once_and_whole(shards, monkeypatch, read_bytes, ahead_bytes):
    tensors, specs = shards
    monkeypatch.setattr(stream, "READ_BYTES", read_bytes)
    monkeypatch.setattr(stream, "_AHEAD_BYTES", ahead_bytes)
    random.Random(0).shuffle(specs)
    found = [(spec.name, tensor) for spec, tensor in read_tensors(specs)]
    assert sorted(name for name, _ in found) == sorted(tensors)
    for name, tensor in found:
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        assert torch.equal(tensor.double(), tensors[name].double())


def test_small_tensors_far_apart_hold_no_more_memory_than_large_ones(tmp_path, monkeypatch):
    tensors = {f"{number:03}": torch.full((20_000,), float(number)) for number in range(200)}
    save_file(tensors, tmp_path / "many.safetensors")
    specs = [*read_header(tmp_path / "many.safetensors").values()][::2]
    made = []
    real = buffers._map
    monkeypatch.setattr(buffers, "_map", lambda nbytes: made.append(nbytes) or real(nbytes))
    found = {spec.name: tensor[0].item() for spec, tensor in read_tensors(specs)}
    assert found == {f"{number:03}": number for number in range(0, 200, 2)}
    assert 0 < sum(made) <= stream._AHEAD_BYTES + 3 * READ_BYTES  # those being given out


def test_tensors_come_in_file_order(shards):
    _, specs = shards
    order = [(str(spec.file), spec.start) for spec, _ in read_tensors(reversed(specs))]
    assert order == sorted(order)


def test_only_the_chosen_bytes_are_read(shards, monkeypatch):
    """Counts what reaches the system call, for one tensor amid others."""
    _, specs = shards
    chosen = [spec for spec in specs if spec.name in ("half", "bf16")]
    asked = []
    real = os.preadv

    def counting(descriptor, buffers, offset):
        asked.append(sum(len(buffer) for buffer in buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    assert len(list(read_tensors(chosen))) == 2
    assert sum(asked) == sum(spec.nbytes for spec in chosen)


def test_a_file_cut_short_after_its_header_was_read_is_an_error(shards):
    _, specs = shards
    last = max((spec for spec in specs if spec.file.name == "b.safetensors"), key=lambda s: s.end)
    with open(last.file, "r+b") as file:
        file.truncate(last.end - 3)
    with pytest.raises(CheckpointError, match=rf"{last.file.name}: was cut short to"):
        list(read_tensors(specs))


def replace(file, raw):
    fresh = file.with_name("fresh")
    fresh.write_bytes(raw)
    fresh.replace(file)


def test_a_file_replaced_after_its_header_was_read_is_an_error(shards):
    """By one with the very same header, such as a fine-tune's."""
    _, specs = shards
    file = specs[0].file
    raw = file.read_bytes()
    replace(file, raw[:-1] + bytes([raw[-1] ^ 1]))
    same = {spec._replace(stamp=None) for spec in read_header(file).values()}
    assert same <= {spec._replace(stamp=None) for spec in specs}
    with pytest.raises(CheckpointError, match=rf"{file.name}: was replaced by another file after"):
        list(read_tensors(specs))


def test_a_file_written_to_after_its_header_was_read_is_an_error(shards):
    _, specs = shards
    file = specs[0].file
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    os.utime(file, (0, 0))  # the clock of the file system ticks every few milliseconds
    with pytest.raises(CheckpointError, match=rf"{file.name}: was written to after"):
        list(read_tensors(specs))


def test_a_file_written_to_while_it_is_read_is_an_error(shards):
    _, specs = shards
    reader = read_tensors(specs)
    next(reader)
    os.utime(specs[0].file, (0, 0))
    with pytest.raises(CheckpointError, match=rf"{specs[0].file.name}: was written to after"):
        list(reader)


def test_a_file_replaced_while_it_is_read_gives_what_was_there(shards):
    tensors, specs = shards
    reader = read_tensors(specs)
    found = [next(reader)]
    replace(found[0][0].file, b"another file")
    found += reader
    assert len(found) == len(tensors)
    for spec, tensor in found:
        assert torch.equal(tensor.double(), tensors[spec.name].double())


def test_a_file_gone_is_an_error(shards):
    _, specs = shards
    specs[0].file.unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be opened any more"):
        list(read_tensors(specs))


def test_misaligned_tensors_are_read(tmp_path):
    """safetensors allows a float32 tensor at an odd offset; torch's view does not."""
    file = tmp_path / "odd.safetensors"
    values = torch.tensor([1.5, -2.0])
    header = (
        b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"e":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},'
        b'"f":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    body = b"\x07" + values.numpy().tobytes()
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)
    found = {spec.name: tensor for spec, tensor in read_tensors(read_header(file).values())}
    assert torch.equal(found["f"], values) and found["b"].item() == 7
    assert found["e"].shape == (0,) and found["e"].dtype == torch.float32


def test_a_file_is_closed_when_what_is_wanted_of_it_was_read(tmp_path):
    """Models have hundreds of shards, a process may open a thousand files."""
    for number in range(40):
        save_file({f"{number:02}": torch.full((9,), number)}, tmp_path / f"{number:02}.safetensors")
    specs = [spec for file in tmp_path.iterdir() for spec in read_header(file).values()]
    before = len(os.listdir("/proc/self/fd"))
    open_files = [len(os.listdir("/proc/self/fd")) - before for _ in read_tensors(specs)]
    assert len(open_files) == 40
    assert max(open_files[20:]) <= 21 and open_files[-1] <= 2


def test_stopping_early_closes_files_and_threads(shards):
    _, specs = shards
    reader = read_tensors(specs)
    next(reader)
    reader.close()


def test_tensors_that_share_bytes_have_rows_of_their_own(tmp_path):
    """As ``.bin`` files may: of the one that begins first less is read, and from further on."""
    save_file({"whole": torch.arange(400.0).view(40, 10)}, tmp_path / "one.safetensors")
    [whole] = read_header(tmp_path / "one.safetensors").values()
    below = whole.rows(range(10, 40))._replace(name="below")
    rows = {whole: range(20, 40), below: range(5)}
    found = dict(read_tensors([whole, below], rows))
    assert torch.equal(found[whole][20:40].clone(), torch.arange(200.0, 400.0).view(20, 10))
    assert torch.equal(found[below][:5].clone(), torch.arange(100.0, 150.0).view(5, 10))


def test_file_that_cannot_be_read_is_named(shards, monkeypatch):
    _, specs = shards

    def fail(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    match = r"a\.safetensors: cannot be read at byte \d+ \(Input/output error\); expected \d+ bytes"
    with pytest.raises(CheckpointError, match=match):
        list(read_tensors(specs))
