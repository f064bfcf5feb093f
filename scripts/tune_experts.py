# SPDX-License-Identifier: Apache-2.0
"""The search of ``scripts/bench_experts.py --tune`` for tiles of the one-launch kernel."""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace

import torch
from gpu_results import ROOT, Results, say
from gpu_timing import (
    BATCHES,
    CALLS,
    DEVICE,
    MIXES,
    SHAPES,
    batches,
    capture,
    case_name,
    replay_us,
)

sys.path.insert(0, str(ROOT))  # for what the tests share

from tests.gpu.weights import Experts, Shape  # noqa: E402
from vllm_mixprec.quant.grouped_tiles import (  # noqa: E402
    Aligned,
    TileConfig,
    align_tokens,
    choose_config,
)
from vllm_mixprec.quant.grouped_weights import ExpertTable  # noqa: E402


def neighbours(config: TileConfig) -> Iterator[TileConfig]:
    """Tiles that differ in one value."""
    for field in ("block_m", "block_n", "block_k", "warps"):
        for value in (getattr(config, field) // 2, getattr(config, field) * 2):
            changed = vars(config) | {field: value}
            within = changed["block_m"] <= 128 and changed["block_n"] <= 256
            if not within or changed["block_k"] > 256 or changed["warps"] > 8:
                continue
            try:
                yield TileConfig(**changed)
            except ValueError:
                continue
    for stages in (config.stages - 1, config.stages + 1):
        if 1 <= stages <= 6:
            yield replace(config, stages=stages)


class TileTimer:
    """Times the kernel on one layer and batch size; each tile once, alignment not included."""

    def __init__(self, table: ExpertTable, shape: Shape, rows: int) -> None:
        self.table = table
        self.calls = batches(shape, rows, CALLS[rows])
        self.us: dict[TileConfig, float] = {}

    def __call__(self, config: TileConfig) -> float:
        """Microseconds a call; infinite for a tile that does not fit the device."""
        if config not in self.us:
            try:
                self.us[config] = self._measure(config)
            except Exception as problem:  # too much shared memory, mostly
                say(f"{astuple(config)}: {type(problem).__name__}")
                self.us[config] = float("inf")
        return self.us[config]

    def _measure(self, config: TileConfig) -> float:
        from vllm_mixprec.quant.grouped_kernel import grouped_experts

        def path(
            x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, aligned: Aligned
        ) -> torch.Tensor:
            return grouped_experts(x, weights, ids, self.table, config=config, aligned=aligned)

        experts = self.table.experts
        calls = [(*call, align_tokens(call[2], config.block_m, experts)) for call in self.calls]
        graph = capture(path, calls)
        return statistics.median(replay_us(graph, len(calls), 5.0) for _ in range(3))


def tune(results: Results, options: argparse.Namespace) -> bool:
    """Walk from the default tile to better neighbours; prints the best of each batch size."""
    shapes = dict(list(SHAPES.items())[: 1 if options.quick else None])
    for shape_name, shape in shapes.items():
        for mix, formats in MIXES.items():
            names = {rows: case_name(shape_name, mix, rows) for rows in BATCHES}
            if all(name in results.cases for name in names.values()):
                continue
            table = Experts(shape, formats, DEVICE).table()
            for rows, name in names.items():
                if name in results.cases:
                    continue
                time_of = TileTimer(table, shape, rows)
                best = default = choose_config(rows, shape.top_k, shape.experts, shape.inner)
                time_of(best)
                for _ in range(6):
                    step = min(neighbours(best), key=time_of)
                    if time_of(step) >= 0.99 * time_of(best):
                        break
                    best = step
                results.cases[name] = {
                    "default": [*astuple(default), time_of(default)],
                    "best": [*astuple(best), time_of(best)],
                    "tried": len(time_of.us),
                }
                results.save()
                say(f"{name}: {results.cases[name]}")
    print("| layer, mix, batch | default tile | us | best tile | us |\n|---|---|---|---|---|")
    for name, case in results.cases.items():
        cells = [f"{case[k][:-1]} | {case[k][-1]:.1f}" for k in ("default", "best")]
        print(f"| {name.replace(' | ', ', ')} | {' | '.join(cells)} |")
    return True
