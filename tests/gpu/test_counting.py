# SPDX-License-Identifier: Apache-2.0
"""The counting kernel on a GPU, by itself: the interpreter's cases, and CUDA graphs."""

import numpy as np
import pytest
import torch

from tests.experts.test_kernel import CASES, Case
from tests.gpu.weights import on

EXPERTS, ROWS, TOP_K = 8, 32, 3


@pytest.fixture(scope="module")
def count_experts():
    from vllm_mixprec.experts.kernel import count_experts

    return count_experts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_counts_as_numpy_does(case: Case, count_experts, device):
    inputs = case.inputs()
    counts = inputs["counts"].to(device)
    count_experts(
        on(device, inputs["topk_ids"]),
        inputs["real"].to(device),
        counts,
        inputs["experts"],
    )
    np.testing.assert_array_equal(counts.cpu().numpy(), case.expected())


def test_capture_counts_nothing_and_each_replay_its_own_rows(count_experts, device):
    ids = torch.zeros(ROWS, TOP_K, dtype=torch.int32, device=device)
    real = torch.zeros(ROWS, dtype=torch.bool, device=device)
    everything = torch.zeros(3 * EXPERTS, dtype=torch.int64, device=device)
    counts = everything[EXPERTS : 2 * EXPERTS]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles outside the graph; no row is real
        count_experts(ids, real, counts, EXPERTS)
    torch.cuda.current_stream().wait_stream(stream)
    real.fill_(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count_experts(ids, real, counts, EXPERTS)
    torch.cuda.synchronize()
    assert not counts.any(), "capturing counted"

    expected = np.zeros(EXPERTS, dtype=np.int64)
    for seed, tokens in enumerate((ROWS, 1, 17, 0, 31)):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(EXPERTS, (ROWS, TOP_K), generator=generator, dtype=torch.int32)
        ids.copy_(drawn)
        real.copy_(torch.arange(ROWS) < tokens)  # the rest is padding
        graph.replay()
        expected += np.bincount(drawn[:tokens].numpy().ravel(), minlength=EXPERTS)
    found = everything.cpu().numpy()
    assert not found[:EXPERTS].any() and not found[2 * EXPERTS :].any(), "counted elsewhere"
    np.testing.assert_array_equal(counts.cpu().numpy(), expected)
    assert found.sum() == TOP_K * (ROWS + 1 + 17 + 0 + 31)


def test_many_programs_add_to_one_expert(count_experts, device):
    rows = 100_000
    ids = torch.full((rows, 1), 5, dtype=torch.int64, device=device)
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device=device)
    count_experts(ids, torch.ones(rows, dtype=torch.bool, device=device), counts, EXPERTS)
    assert counts.tolist() == [0, 0, 0, 0, 0, rows, 0, 0]
