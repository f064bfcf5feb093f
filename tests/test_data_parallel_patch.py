# SPDX-License-Identifier: Apache-2.0
"""The collectives that vLLM's CPU communicator lacks, over gloo between threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, ProcessGroup, ProcessGroupGloo
from vllm.config import ParallelConfig, VllmConfig
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.version import __version_tuple__

from tests.loading.serving import needs_cpu
from vllm_mixprec.patches import apply_patches, cpu_data_parallel

pytestmark = needs_cpu

COLLECTIVES = ("all_gatherv", "reduce_scatterv")


@pytest.fixture(autouse=True)
def stock_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without the patch, and take it off afterwards."""
    for name in COLLECTIVES:
        monkeypatch.setattr(CpuCommunicator, name, getattr(CpuCommunicator, name))
        monkeypatch.delattr(CpuCommunicator, name)
    monkeypatch.setattr(MoERunner, "_select_forward", cpu_data_parallel._STOCK_FORWARD)


@pytest.fixture(scope="module", params=[2, 3])
def groups(request: pytest.FixtureRequest) -> list[ProcessGroup]:
    """One gloo group, as each of its ranks sees it."""
    store, size = HashStore(), request.param

    def join(rank: int) -> ProcessGroup:
        group = ProcessGroup(store, rank, size)
        gloo = ProcessGroupGloo(store, rank, size, timedelta(seconds=20))
        group._set_default_backend(ProcessGroup.BackendType.GLOO)
        group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
        return group

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(join, range(size)))


def on_each(groups: list[Any], call: Callable[[CpuCommunicator, int], Any]) -> list[Any]:
    """Call on all ranks at once, with communicators made by hand: theirs want an engine."""

    def run(rank: int) -> Any:
        communicator = object.__new__(CpuCommunicator)
        communicator.world_size, communicator.rank_in_group = len(groups), rank
        communicator.device_group, communicator.dist_module = groups[rank], torch.distributed
        return call(communicator, rank)

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(run, range(len(groups))))


def batches(sizes: list[int], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for rank, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(rank)
        yield torch.randint(-8, 8, (size, 5), generator=generator).to(dtype)


SIZES = [[4, 4, 4], [1, 7, 3], [6, 1, 1], [5, 0, 2]]
DTYPES = [torch.bfloat16, torch.float32, torch.int32]


def test_stock_has_no_such_collectives(groups: list[Any]) -> None:
    if __version_tuple__[:2] != (0, 32):
        pytest.skip("the answer was read off vLLM 0.32")
    assert cpu_data_parallel.PATCH.needed()
    for name in COLLECTIVES:
        with pytest.raises(NotImplementedError):
            on_each(groups, lambda ours, rank, name=name: getattr(ours, name)(torch.ones(2, 2)))
    cpu_data_parallel.PATCH.apply()
    assert cpu_data_parallel.PATCH.needed(), "what is asked is stock vLLM, patched or not"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_batches_are_gathered_in_the_ranks_order(
    groups: list[Any], sizes: list[int], dtype: torch.dtype
) -> None:
    cpu_data_parallel.PATCH.apply()
    sizes = sizes[: len(groups)]
    own = list(batches(sizes, dtype))
    wide = [torch.cat((batch, -batch), 1) for batch in own]
    for several in on_each(
        groups, lambda ours, rank: ours.all_gatherv([own[rank], wide[rank][:, ::2]], 0, sizes)
    ):
        assert several[0].equal(torch.cat(own))
        assert several[1].equal(torch.cat(wide)[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_come_back_to_whose_tokens_they_are(
    groups: list[Any], sizes: list[int], dtype: torch.dtype
) -> None:
    cpu_data_parallel.PATCH.apply()
    sizes = sizes[: len(groups)]
    partial = list(batches([sum(sizes)] * len(groups), dtype))
    before = [tensor.clone() for tensor in partial]
    found = on_each(groups, lambda ours, rank: ours.reduce_scatterv(partial[rank], 0, sizes))
    # Small whole numbers: their sums are exact in every dtype, in any order.
    expected = torch.stack(partial).sum(0).to(dtype)
    for part, own in zip(found, expected.split(sizes), strict=True):
        assert part.equal(own)
    assert all(now.equal(then) for now, then in zip(partial, before, strict=True))


def test_without_sizes_all_ranks_have_as_many(groups: list[Any]) -> None:
    cpu_data_parallel.PATCH.apply()
    own = list(batches([3] * len(groups), torch.float32))
    (gathered, *others) = on_each(groups, lambda ours, rank: ours.all_gatherv(own[rank]))
    assert all(other.equal(gathered) for other in others)
    assert gathered.equal(torch.cat(own))
    parts = on_each(groups, lambda ours, rank: ours.reduce_scatterv(gathered, 0))
    assert torch.cat(parts).equal(len(groups) * gathered)


def test_only_data_parallel_engines_get_the_patch() -> None:
    apply_patches(VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=2)), [])
    assert "all_gatherv" not in vars(CpuCommunicator)
    assert MoERunner._select_forward is cpu_data_parallel._STOCK_FORWARD
    config = VllmConfig(parallel_config=ParallelConfig(data_parallel_size=2))
    for _ in range(2):
        apply_patches(config, [])
    assert CpuCommunicator.all_gatherv is cpu_data_parallel._all_gatherv
    assert CpuCommunicator.reduce_scatterv is cpu_data_parallel._reduce_scatterv
    assert MoERunner._select_forward is cpu_data_parallel._select_forward
