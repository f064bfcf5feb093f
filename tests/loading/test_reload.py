# SPDX-License-Identifier: Apache-2.0
"""Specs of files that were written to since their headers were read."""

import os

import pytest
import torch
from safetensors.torch import save_file

from vllm_mixprec.checkpoint import read_header
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import CheckpointError
from vllm_mixprec.loading.reload import as_files_are


def write(file, **tensors):
    """Write a file anew, with a time of its own: the clock of a file system ticks slowly."""
    written = os.stat(file).st_mtime_ns if file.exists() else 0
    save_file(tensors, file)
    os.utime(file, ns=(written + 10**9, written + 10**9))


@pytest.fixture
def specs(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, a=torch.ones(4, 4), b=torch.zeros(2, dtype=torch.int32))
    return list(read_header(file).values())


def test_files_that_did_not_change_keep_their_specs(specs):
    assert as_files_are(specs) == {spec: spec for spec in specs}


def test_new_values_in_the_same_layout_are_read(specs):
    write(specs[0].file, a=torch.full((4, 4), 7.0), b=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="after its header was read"):
        list(read_tensors(specs))
    now = as_files_are(specs)
    assert [spec._replace(stamp=None) for spec in now.values()] == [
        spec._replace(stamp=None) for spec in specs
    ]
    found = {spec.name: tensor for spec, tensor in read_tensors(now.values())}
    assert found["a"].eq(7).all()


def test_parts_of_a_fused_tensor_follow_it(specs):
    fused = next(spec for spec in specs if spec.name == "a")
    half = fused._replace(name="a.1", shape=(2, 4), start=fused.start + 32)
    write(fused.file, a=torch.full((4, 4), 7.0), b=torch.zeros(2, dtype=torch.int32))
    [now] = as_files_are([half]).values()
    [(_, tensor)] = read_tensors([now])
    assert tensor.tolist() == [[7.0] * 4] * 2


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(4, 4), "b": torch.zeros(2)},
        {"a": torch.ones(2, 8), "b": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.ones(4, 4), "b": torch.zeros(3, dtype=torch.int32)},
        {"a": torch.ones(4, 4, dtype=torch.float16), "b": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.ones(4, 4)},
    ],
    ids=["dtype", "shape", "size", "moved", "missing"],
)
def test_another_layout_is_an_error(specs, tensors):
    write(specs[0].file, **tensors)
    with pytest.raises(CheckpointError, match="expected the header that the server started with"):
        as_files_are(specs)


def test_a_file_gone_is_an_error(specs):
    specs[0].file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        as_files_are(specs)
