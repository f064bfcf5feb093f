# SPDX-License-Identifier: Apache-2.0
"""Tells a weight with factors that another module takes back from one that is not the base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.disagreement import Comparison, FoldedFit, Inverse, Side
from vllm_mixprec.routing.norms import feeding_norm, is_feeding_norm
from vllm_mixprec.routing.pairs import Pair, both, open_pair, scan
from vllm_mixprec.routing.route import Route
from vllm_mixprec.routing.stored import expected_error2, tile_of
from vllm_mixprec.routing.structure import ModelDims
from vllm_mixprec.routing.table import RouteTable
from vllm_mixprec.routing.verdicts import Verdicts, other_halves

_FOLD_PASSES = 4  # over a weight, to find factors of rows and of columns that both vary

_SIDES: tuple[Side, ...] = ("columns", "rows")


def judge(
    pair: Pair,
    comparison: Comparison,
    table: RouteTable,
    checkpoints: Mapping[str, Checkpoint],
    verdicts: Verdicts,
) -> None:
    """Note what a comparison came to; factors only where the source itself takes them back."""
    route, sides = pair.route, _find_folded(pair, comparison)
    is_linear = pair.name == route.module and len(route.shape) == 2
    if is_linear and (sides or comparison.verdict == "scaled"):
        inverse, halves = _find_inverse(route, table, checkpoints)
        if any(other_halves(route.module, side, table.routes) for side in sides - halves.keys()):
            verdicts.add_folded(route, sides)  # the source lacks what would tell
            return
        if inverse.sides:
            taken_back = replace(pair, inverse=inverse)
            again = scan(taken_back, table, None)
            if again is not None and again.verdict == "same":
                if not _find_folded(taken_back, again):
                    verdicts.add_folded(route, inverse.sides)
                    return
        if sides:
            names = [halves[side] for side in sorted(sides & halves.keys())]
            verdicts.add_damaged(route, sides, names, comparison.error)
            return
    source = pair.source
    verdicts.add(pair.name, route, source.shape, source.scheme.label, comparison)


def _find_folded(pair: Pair, comparison: Comparison) -> frozenset[Side]:
    """Return which factors, of rows and of columns, alone tell a weight from the base's."""
    if not comparison.may_be_folded or pair.base is None:
        return frozenset()
    n, k = comparison.rows, comparison.columns
    tile = tile_of(pair.source.scheme, (n, k)) if pair.source.scheme.is_quantized else (1, 1)
    one_side = comparison.fit_side()
    if one_side is not None:
        return one_side.varying(comparison, tile)
    columns = comparison.factors("columns").float()
    for _ in range(_FOLD_PASSES):
        fit = FoldedFit(columns, torch.zeros(n, dtype=torch.float64))
        for low, high in pair.chunks:
            weight, base = (one.dequantize(one.read_rows(low, high)) for one in both(pair))
            fit.add(pair.take_back(weight, low), base)
        if fit.explains(comparison):
            return fit.varying(comparison, tile)
        columns = fit.better_columns()
    return frozenset()


def _find_inverse(
    route: Route, table: RouteTable, checkpoints: Mapping[str, Checkpoint]
) -> tuple[Inverse, dict[Side, str]]:
    """Read what takes a weight's factors back in its own source, whatever the plan takes of it.

    Returns:
        The factors, and by side the module that was read for them; none where it is not there.
    """
    n, k = route.shape
    inverse, halves = Inverse(torch.ones(n), torch.ones(k)), dict[Side, str]()
    for side in _SIDES:
        for name in other_halves(route.module, side, table.routes):
            if is_feeding_norm(name):
                found = _norm_factors(name, route.source, table, checkpoints)
            else:
                found = _other_factors(route, side, name, table, checkpoints)
            if found is not None and len(found[0]) == (n if side == "rows" else k):
                inverse = inverse.times(side, *found)
                halves[side] = name
    return inverse, halves


def _norm_factors(
    name: str, source: str, table: RouteTable, checkpoints: Mapping[str, Checkpoint]
) -> tuple[torch.Tensor, float] | None:
    """Return a source's norm over the base's, and the mean square of its relative error."""
    pair = open_pair(name, source, table, checkpoints)
    if pair is None or pair.base is None or pair.source.scheme.is_quantized:
        return None
    values, noise2 = [], 0.0
    for one in both(pair):
        stored = one.read_rows(0, one.shape[0])
        value = one.dequantize(stored).reshape(1, -1)
        rounding2 = float(expected_error2(one.scheme, stored, value).mean())
        noise2 += rounding2 / max(float(value.square().mean()), 1e-30)
        values.append(value[0])
    ratio = values[0] / values[1]
    return torch.where(ratio.isfinite() & (ratio != 0), ratio, 1.0), noise2


def _other_factors(
    route: Route,
    side: Side,
    name: str,
    table: RouteTable,
    checkpoints: Mapping[str, Checkpoint],
) -> tuple[torch.Tensor, float] | None:
    """Return factors that take back a weight's columns: those of another's rows.

    For its rows, those of the other's columns. They are 1 where the other is not the base's weight
    but for them: that is reported of it. As in :func:`_norm_factors`.
    """
    pair = open_pair(name, route.source, table, checkpoints)
    if pair is None or len(pair.source.shape) != 2:
        return None
    n, k = pair.source.shape
    rows = (route.module, route.shape[0], k) if side == "rows" else (name, n, route.shape[1])
    index = _rows_of_columns(*rows, ModelDims.from_config(table.base_config))
    count = route.shape[0] if side == "rows" else route.shape[1]
    none = torch.ones(count), 0.0
    if index is None:
        return none
    norm = feeding_norm(name)
    found = None if norm is None else _norm_factors(norm, route.source, table, checkpoints)
    if found is not None and len(found[0]) == k:
        ones = Inverse(torch.ones(n), torch.ones(k))
        pair = replace(pair, inverse=ones.times("columns", *found))
    comparison = scan(pair, table, None)
    theirs: Side = "columns" if side == "rows" else "rows"
    if comparison is None or not comparison.explained_by(theirs):
        return none
    noise2 = max(comparison.left2(theirs), 0.0) / max(comparison.source2, 1e-300)
    noise2 = noise2 / (n if theirs == "columns" else k) + comparison.noise2
    factors = comparison.factors(theirs).float()
    if side == "columns":
        return factors[index], noise2
    # Several columns of one row, of grouped-query attention, all have its factor.
    sums = torch.zeros(count).index_add_(0, index, factors)
    counts = torch.zeros(count).index_add_(0, index, torch.ones(len(index)))
    return torch.where(counts > 0, sums / counts, 1.0), noise2


def _rows_of_columns(module: str, n: int, k: int, dims: ModelDims) -> torch.Tensor | None:
    """Return the row of a module (n, ...) that each of the K columns of what it feeds takes.

    An attention head's columns take those of its group's values; ``kv_b_proj`` has the head's keys
    before them (modeling_deepseek_v3.py).
    """
    leaf = module.rpartition(".")[2]
    if leaf not in ("v_proj", "kv_b_proj"):
        return torch.arange(k) if n == k else None
    heads = dims.num_heads or 0
    groups = heads if leaf == "kv_b_proj" else dims.num_kv_heads or 0
    if not heads or not groups or k % heads or n % groups or heads % groups:
        return None
    size, step = k // heads, n // groups
    if step < size or (leaf == "v_proj" and step != size):
        return None
    column = torch.arange(k)
    return column // size // (heads // groups) * step + (step - size) + column % size
