# SPDX-License-Identifier: Apache-2.0
"""What scripts/bench_experts.py measures, and how: layers, batches, CUDA graphs and their time."""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_results import ROOT

sys.path.insert(0, str(ROOT))  # for what the tests share

from tests.gpu.weights import Experts, Shape, expert_bytes, route  # noqa: E402

DEVICE = "cuda"
SHAPES = {
    "Qwen3-30B-A3B": Shape(experts=128, hidden=2048, inner=768, top_k=8),
    "DeepSeek-V3, TP 8": Shape(experts=256, hidden=7168, inner=256, top_k=8),
}
MIXES: dict[str, tuple[str, ...]] = {
    "bf16": ("bf16",),
    "fp8": ("fp8",),
    "int4": ("int4",),
    "fp8+int4": ("fp8", "int4"),
    "bf16+fp8+int4": ("bf16", "fp8", "int4"),
}
BATCHES = (1, 8, 64, 512)
CALLS = {1: 32, 8: 16, 64: 8, 512: 4}  # a graph

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Path_ = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def batches(shape: Shape, rows: int, calls: int) -> list[Batch]:
    """Batches whose experts follow each other as cards that are dealt and shuffled anew."""
    made, deck = [], []
    dealer = random.Random(rows)
    for number in range(calls):
        x, weights, ids = route(rows, shape, DEVICE, seed=number)
        if rows * shape.top_k <= shape.experts:  # no expert twice in a batch
            dealt: list[int] = []
            while len(dealt) < rows * shape.top_k:
                deck = deck or dealer.sample(range(shape.experts), shape.experts)
                card = deck.pop()
                if card not in dealt:
                    dealt.append(card)
            ids = torch.tensor(dealt, dtype=torch.int32, device=DEVICE).view(rows, -1)
        made.append((x, weights, ids))
    return made


def bytes_touched(experts: Experts, batch: Batch) -> float:
    """Read and written by one call: the weights of its experts, and the states between them."""
    shape, pairs = experts.shape, batch[2].numel()
    weights = sum(expert_bytes(shape, experts.formats[e]) for e in set(batch[2].flatten().tolist()))
    states = 2 * batch[0].numel() + 2 * pairs * (shape.inner + shape.hidden)
    return weights + 2 * states


def capture(
    path: Callable[..., torch.Tensor], calls: Sequence[tuple[Any, ...]]
) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(2):  # compile, and give vLLM's workspace its size
            path(*calls[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for call in calls:
            path(*call)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, calls: int, least_ms: float) -> float:
    """Microseconds a call, of as many replays as take about ``least_ms``."""
    replays, ms = 1, 0.0
    while True:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(replays):
            graph.replay()
        ended.record()
        ended.synchronize()
        ms = begun.elapsed_time(ended)
        if ms >= least_ms or replays >= 4096:
            return 1e3 * ms / replays / calls
        replays = min(4096, max(2 * replays, int(1.2 * replays * least_ms / max(ms, 1e-3))))


def case_name(shape: str, mix: str, rows: int) -> str:
    return f"{shape} | {mix} | {rows}"
