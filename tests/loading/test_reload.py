# SPDX-License-Identifier: Apache-2.0
"""Specs of files that were written to since their headers were read."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.loading.serving import make_plan
from tests.spellings import RANDOM, respell, stack
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import CheckpointError, MixPrecError
from vllm_mixprec.loading.reload import as_sources_are, hash_fixed
from vllm_mixprec.routing import Layout, Route, load_route_table
from vllm_mixprec.routing.platform import Platform

GATE_UP = "model.layers.{}.mlp.experts.gate_up_proj"


@dataclass(frozen=True)
class Started:
    """What a server knows of one file of fused experts since it started."""

    file: Path
    routes: list[Route]
    resolve: Callable[[], Any]

    def rewrite(self, change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(self.file).items()}
        change(tensors)
        self.touch(lambda: save_file(tensors, self.file, metadata or None))

    def touch(self, write: Callable[[], Any]) -> None:
        """Write, and give the file a time of its own: the clock of a file system ticks slowly."""
        written = self.file.stat().st_mtime_ns
        write()
        os.utime(self.file, ns=(written + 10**9, written + 10**9))

    def now(self, routes: list[Route] | None = None) -> dict[Any, Any]:
        return as_sources_are(routes or self.routes, self.resolve)


@pytest.fixture
def started(tmp_path: Path) -> Started:
    base = respell(tmp_path / "base", RANDOM / "bf16", stack())
    plan = make_plan(base, {}, {})
    platform = Platform("cpu-avx512")

    def resolve():
        return load_route_table(plan, Layout(), platform)

    return Started(base / "model.safetensors", list(resolve().routes.values()), resolve)


def double(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.mul_(2)


def test_files_that_did_not_change_keep_their_specs(started):
    assert all(spec is now for spec, now in started.now().items())


def test_new_values_in_the_same_layout_are_read(started):
    specs = [spec for route in started.routes for spec in route.tensors.values()]
    before = {spec: tensor.clone() for spec, tensor in read_tensors(specs)}
    started.rewrite(double)
    with pytest.raises(CheckpointError, match="after its header was read"):
        list(read_tensors(specs))
    now = started.now()
    assert list(now) == specs
    found = {spec._replace(stamp=None): tensor for spec, tensor in read_tensors(now.values())}
    for spec, tensor in before.items():
        assert torch.equal(found[spec._replace(stamp=None)], tensor * 2), spec.name


def swap(file: Path, *names: str) -> None:
    """Exchange the names of two tensors, and leave the data as it is."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    first, second = names
    header[first], header[second] = header[second], header[first]
    written = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    assert len(written) == end - 8
    file.write_bytes(raw[:8] + written + raw[end:])


def test_fused_tensors_that_changed_places_are_an_error(started):
    """Each part lies where a part of another tensor, of the same shape, lay."""
    names = [GATE_UP.format(layer) for layer in (0, 1)]
    started.touch(lambda: swap(started.file, *names))
    with pytest.raises(CheckpointError, match="expected the header and the config"):
        started.now()


@pytest.mark.parametrize("expert", [0, 1])
def test_fused_tensors_that_moved_are_an_error(started, expert):
    """An expert-parallel rank may hold any of the parts."""
    held = [route for route in started.routes if f".experts.{expert}." in route.module]
    started.rewrite(lambda tensors: None, more="x" * 64)
    with pytest.raises(CheckpointError, match="expected the header and the config"):
        started.now(held)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({name: each.half() for name, each in tensors.items()}),
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(2).bfloat16()}),
    ],
    ids=["dtype", "missing", "shape"],
)
def test_another_layout_is_an_error(started, change):
    started.rewrite(change)
    with pytest.raises(MixPrecError):
        started.now()


def test_a_file_gone_is_an_error(started):
    started.file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        started.now()


def test_front_ends_and_workers_mean_the_same_by_as_it_was(started):
    """By a hash of it all a front end refuses, before anything is changed, what a worker would."""
    before = hash_fixed(started.resolve().routes)
    started.rewrite(double)
    assert hash_fixed(started.resolve().routes) == before
    started.now()
    started.touch(lambda: swap(started.file, *(GATE_UP.format(layer) for layer in (0, 1))))
    assert hash_fixed(started.resolve().routes) != before
