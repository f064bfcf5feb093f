# SPDX-License-Identifier: Apache-2.0
"""Tells weights of another model, or of another place, by a few rows of one in each file.

A fine-tuned weight points where the base's does, a quantised one even more so; one of another
model, another layer or another expert points anywhere. A source that holds both is no choice of
its maker: a file was exchanged, or modules stand in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from math import lcm, prod
from pathlib import Path

import torch

from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.findings import FindingLog, generalise
from vllm_mixprec.routing.pairs import open_pair
from vllm_mixprec.routing.route import Route
from vllm_mixprec.routing.stored import StoredWeight
from vllm_mixprec.routing.structure import ModelDims, layer_name
from vllm_mixprec.routing.table import RouteTable

MISPLACED = "weights-misplaced"

# Cosines. Two bits a weight came to 0.9; of unrelated ones this many weights have at most 0.02.
_UNRELATED = 0.25
_RELATED = 0.5
_ROWS, _COLUMNS = 32, 2048
_PASSES = 3  # factors of e to a normal deviate then leave a cosine of 0.9999

_MOST_OTHERS = 256  # of its kind that an unrelated weight is held against


def report_strangers(
    table: RouteTable, checkpoints: Mapping[str, Checkpoint], log: FindingLog
) -> None:
    """Report weights that are another model's, or another module's of the base.

    Looked at is one weight of each kind and source, and one in each file. That all weights of a
    kind are unrelated is not reported: its maker may mean it, as one who rotates values and takes
    that back behind them.

    Raises:
        CheckpointError: a file changed since its header was read.
    """
    seen: set[tuple[str, str]] = set()
    for route in _chosen(table, checkpoints[table.plan.base]):
        kind = route.source, generalise(route.module)
        own = None if kind in seen else _Rows.of(route.module, route.source, table, checkpoints)
        if own is None or abs(own.cosine(own.base)) > _UNRELATED:
            continue
        seen.add(kind)
        _report(own, route, table, checkpoints, log)


class _Rows:
    """A corner of a source's weight and of the base's of that name, float32 (rows, columns).

    Balanced: what AWQ and SmoothQuant fold into rows and columns is no other direction.
    """

    def __init__(self, source: StoredWeight, base: StoredWeight) -> None:
        n, k = source.shape[0], prod(source.shape[1:])
        rows = min(n, lcm(source.row_step, base.row_step))
        self.source, self.base = (
            _balanced(each.dequantize(each.read_rows(0, rows)).reshape(rows, k)[:_ROWS, :_COLUMNS])
            for each in (source, base)
        )

    @classmethod
    def of(
        cls, module: str, source: str, table: RouteTable, checkpoints: Mapping[str, Checkpoint]
    ) -> _Rows | None:
        """Read a module's; None where it is no matrix, not here, not finite or zero."""
        pair = open_pair(module, source, table, checkpoints)
        if pair is None or pair.base is None or len(pair.source.shape) != 2:
            return None
        rows = cls(pair.source, pair.base)
        norms = float(rows.source.norm()), float(rows.base.norm())
        return rows if all(0.0 < norm < math.inf for norm in norms) else None

    def cosine(self, other: torch.Tensor) -> float:
        """Return the cosine of the angle between the source's rows and others of that shape."""
        products = torch.dot(self.source.flatten(), other.flatten())
        return float(products / (self.source.norm() * other.norm()))


def _balanced(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix with rows and columns of about one norm, which no factors of either change.

    Sinkhorn and Knopp's iteration.
    """
    for _ in range(_PASSES):
        for dim in (0, 1):
            weight = weight / weight.square().sum(dim, keepdim=True).sqrt().clamp(min=1e-30)
    return weight


def _report(
    own: _Rows,
    route: Route,
    table: RouteTable,
    checkpoints: Mapping[str, Checkpoint],
    log: FindingLog,
) -> None:
    """Report an unrelated weight if others of its kind say what it is."""
    module, source, base = route.module, route.source, table.plan.base
    related = None
    for other in _others(route, checkpoints[base]):
        rows = _Rows.of(other, source, table, checkpoints)
        if rows is None:
            continue
        if rows.base.shape == own.source.shape and own.cosine(rows.base) > _RELATED:
            log.add(
                "error",
                MISPLACED,
                module,
                f"source {source!r} holds weights of {other} of base {base!r} here. Its layers, "
                "experts or projections are in another order: choose another source.",
            )
            return
        if generalise(other) == generalise(module) and rows.cosine(rows.base) > _RELATED:
            related = related or other
    if related is not None:
        files = [str(file) for file in _files(route, checkpoints[base])]
        log.add(
            "error",
            MISPLACED,
            module,
            f"source {source!r} and base {base!r} hold unrelated weights here, and the same ones "
            f"in {related}: {' or '.join(files)} is another model's. Download both again, or "
            "choose another source.",
        )


def _chosen(table: RouteTable, base: Checkpoint) -> Iterable[Route]:
    """Return the first weight of each kind, and small ones until every file is looked into."""
    dims = ModelDims.from_config(table.base_config)
    kinds: dict[tuple[str, str], Route] = {}
    smallest: dict[tuple[Path, ...], Route] = {}
    for route in table.routes.values():
        if route.source == table.plan.base or len(route.shape) != 2 or not route.tensors:
            continue
        if not dims.is_loaded(route.module, table.layout.draft):
            continue
        kinds.setdefault((route.source, generalise(route.module)), route)
        files = _files(route, base)
        found = smallest.setdefault(files, route)
        if prod(route.shape) < prod(found.shape):
            smallest[files] = route
    chosen = {route.module: route for route in kinds.values()}
    seen = {file for route in kinds.values() for file in _files(route, base)}
    for is_wanted in (seen.isdisjoint, lambda files: not seen.issuperset(files)):
        for files, route in smallest.items():  # those first that tell of two new files at once
            if is_wanted(files):
                seen.update(files)
                chosen[route.module] = route
    return chosen.values()


def _files(route: Route, base: Checkpoint) -> tuple[Path, ...]:
    """Return the files that hold a source's weight, and those that hold the base's."""
    own = [spec.file for spec in route.tensors.values()]
    others = [spec.file for spec in base.modules[route.module].tensors.values()]
    return tuple(dict.fromkeys((*own, *others)))


def _others(route: Route, base: Checkpoint) -> list[str]:
    """Return what an unrelated weight may belong to, or tell by what its source holds there.

    Of its layer all of its shape, as gate and up may have changed places; of its kind some of
    everywhere.
    """
    kind, layer = generalise(route.module), layer_name(route.module)
    near, far = [], []
    for name, module in base.modules.items():
        if name == route.module or module.shape != route.shape:
            continue
        if layer is not None and layer_name(name) == layer:
            near.append(name)
        elif generalise(name) == kind:
            far.append(name)
    step = max(1, len(far) // _MOST_OTHERS)
    return near[: 3 * _MOST_OTHERS] + far[::step][:_MOST_OTHERS]
