# SPDX-License-Identifier: Apache-2.0
"""The counters of a layer as a worker makes them, in a CUDA graph: padding is never counted."""

import numpy as np
import pytest
import torch

ROWS = 32


@pytest.fixture
def layers():
    return pytest.importorskip("tests.experts.layers")


def test_replays_mark_and_count_the_rows_of_their_own_batch(layers, tmp_path, device):
    with layers.one_rank(tmp_path) as config:
        counters = layers.Counters(device=str(device))
        slots = torch.full((ROWS,), -1, dtype=torch.int64, device=device)
        ids = [torch.zeros(ROWS, layers.TOP_K, dtype=torch.int32, device=device) for _ in range(2)]
        with layers.forward(config, slot_mapping={"layer": slots}):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles outside the graph, a dummy batch
                counters.count(*ids)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                counters.count(*ids)
        torch.cuda.synchronize()
        assert not counters.counts.any() and not counters.tokens.any()

        expected = np.zeros((2, layers.EXPERTS), dtype=np.int64)
        for seed, tokens in enumerate((ROWS, 3, 0, 20)):
            drawn = layers.routed(ROWS, seed)
            for held, new in zip(ids, drawn, strict=True):
                held.copy_(new)
            slots.copy_(torch.where(torch.arange(ROWS) < tokens, 7, -1))
            graph.replay()
            for layer, new in enumerate(drawn):
                expected[layer] += layers.bincount(new[:tokens])
        counts = counters.counts
        np.testing.assert_array_equal(counts, expected)
        assert counters.tokens.item() == ROWS + 3 + 20
