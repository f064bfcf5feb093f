# SPDX-License-Identifier: Apache-2.0
"""What only the tensors themselves say: broken scales, and weights that are not the base's.

Every routed module is read from its source, in the order of its files, and its counterpart from
the base, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm, prod

import torch

from vllm_mixprec.checkpoint.formats import PLAIN_DTYPES, Module, Scheme
from vllm_mixprec.checkpoint.formats.base import ACTIVATION_SCALES
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.hub import is_available
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.disagreement import Comparison, FoldedFit, Inverse, Side
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.norms import feeding_norm, is_feeding_norm
from vllm_mixprec.routing.route import Route
from vllm_mixprec.routing.stored import (
    ORDERS,
    SCALES,
    StoredWeight,
    expected_error2,
    scale_values,
    tile_mean,
    tile_of,
)
from vllm_mixprec.routing.structure import ModelDims
from vllm_mixprec.routing.table import RouteTable
from vllm_mixprec.routing.verdicts import Verdicts, other_halves

_CHUNK_WEIGHTS = 1 << 19  # 2 MiB in float32, of which some fifteen live at a time
_FOLD_PASSES = 4  # over a weight, to find factors of rows and of columns that both vary

_FORMATS = {dtype: name for name, dtype in PLAIN_DTYPES.items()}
_SIDES: tuple[Side, ...] = ("columns", "rows")


@dataclass(frozen=True)
class _Pair:
    """One tensor, or one weight with what belongs to it, and the base's where that is another.

    ``inverse``: what the source's weight is multiplied by before it is compared.
    """

    name: str
    route: Route
    source: StoredWeight
    base: StoredWeight | None
    inverse: Inverse | None = None

    @property
    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows to read at a time."""
        n = self.source.shape[0] if self.source.shape else 1
        step = lcm(self.source.row_step, self.base.row_step if self.base else 1)
        row_weights = max(1, prod(self.source.shape) // max(1, n))
        rows = step * max(1, _CHUNK_WEIGHTS // (step * row_weights))
        for low in range(0, n, rows):
            yield low, min(low + rows, n)

    def scale2(self, low: int, high: int) -> torch.Tensor | None:
        """Squares of what the source's rows are multiplied by, (rows, K)."""
        if self.inverse is None:
            return None
        return (self.inverse.rows[low:high, None] * self.inverse.columns).square()

    def take_back(self, weight: torch.Tensor, low: int) -> torch.Tensor:
        """Return the source's rows from ``low`` on without what was folded into them."""
        if self.inverse is None:
            return weight
        return weight * self.inverse.rows[low : low + len(weight), None] * self.inverse.columns


def examine(
    table: RouteTable,
    checkpoints: Mapping[str, Checkpoint],
    log: FindingLog,
    advance: Callable[[int], object],
) -> None:
    """Read every tensor that is served and report what is wrong with it.

    Some 50 MiB of tensors live at a time, besides the stored words of one GPTQ or AWQ module, of
    the one that takes its folded factors back and of their counterparts, and a kilobyte for each
    weight that was read.

    Args:
        advance: told the bytes of each module that is done; :func:`count_bytes` in all.

    Raises:
        CheckpointError: a file changed since its header was read.
    """
    verdicts = Verdicts(table)
    for route, module, base in _modules(table, checkpoints):
        if not module.problems and module.shape == route.shape:
            for pair in _pairs(route, base):
                comparison = None if _report_packing(pair, log) else _scan(pair, table, log)
                if comparison is None:
                    continue
                _judge(pair, comparison, table, checkpoints, verdicts)
        advance(route.stored_bytes + (base.nbytes if base is not None else 0))
    verdicts.report(log)


def count_bytes(table: RouteTable, checkpoints: Mapping[str, Checkpoint]) -> int:
    """Return how many bytes :func:`examine` reads."""
    return sum(
        route.stored_bytes + (base.nbytes if base is not None else 0)
        for route, _, base in _modules(table, checkpoints)
    )


def _modules(
    table: RouteTable, checkpoints: Mapping[str, Checkpoint]
) -> Iterator[tuple[Route, Module, Module | None]]:
    """Yield what is served in file order: route, its module, the base's when that is another."""
    dims = ModelDims.from_config(table.base_config)
    routes = [
        route
        for module, route in table.routes.items()
        if route.tensors and dims.is_loaded(module, table.layout.draft)
    ]
    base = table.plan.base
    for route in sorted(routes, key=_position):
        module = checkpoints[route.source].find(route.module)
        assert module is not None, f"{route.module} is routed to {route.source}"
        other = None if route.source == base else checkpoints[base].modules[route.module]
        if other is not None and not all(is_available(s.file) for s in other.tensors.values()):
            other = None  # in a shard that compose did not need
        yield route, module, other


def _position(route: Route) -> tuple[str, int]:
    first = min(route.tensors.values(), key=lambda spec: spec.start)
    return str(first.file), first.start


def _pairs(route: Route, base: Module | None) -> Iterator[_Pair]:
    """Take a module apart: its weight with scales and zero points, and every bare tensor."""
    own = _weights(route.stored, route.tensors, route.shape)
    others = {} if base is None else _weights(base.scheme, base.tensors, base.shape)
    is_norm = is_feeding_norm(route.module)  # compared with what it feeds, by compare_norms
    for suffix, (scheme, tensors, shape) in own.items():
        other = others.get(suffix)
        is_same = other is not None and other[2] == shape
        yield _Pair(
            route.module if suffix == "weight" else f"{route.module}.{suffix}",
            route,
            StoredWeight(scheme, tensors, shape),
            StoredWeight(*other) if other is not None and is_same and not is_norm else None,
        )


def _weights(
    scheme: Scheme, tensors: Mapping[str, TensorSpec], shape: tuple[int, ...]
) -> dict[str, tuple[Scheme, Mapping[str, TensorSpec], tuple[int, ...]]]:
    """Return suffix -> scheme, tensors and shape of each thing that has values of its own."""
    plain = {
        suffix: (Scheme(_FORMATS[spec.dtype], bits=16), {"weight": spec}, spec.shape)
        for suffix, spec in tensors.items()
        if spec.dtype in _FORMATS and 0 not in spec.shape and spec.shape
    }
    if not scheme.is_quantized:
        return dict(plain)
    packed = {
        suffix: spec
        for suffix, spec in tensors.items()
        if suffix != "bias" and suffix not in ACTIVATION_SCALES
    }
    bias = {suffix: found for suffix, found in plain.items() if suffix == "bias"}
    return {"weight": (scheme, packed, shape), **bias}


def _report_packing(pair: _Pair, log: FindingLog) -> bool:
    """Report orders, zero points and shapes that cannot be; return whether any was found."""
    route, found = pair.route, False
    for suffix, problem in _packing_problems(pair):
        found = True
        code = "order-invalid" if suffix in ORDERS else "packing-invalid"
        log.add(
            "error",
            code,
            f"{route.module}.{suffix}",
            f"source {route.source!r}: {problem}. Re-export the module, or choose another source.",
            noun="tensors",
        )
    return found


def _packing_problems(pair: _Pair) -> Iterator[tuple[str, str]]:
    """Yield the suffix of each tensor whose values contradict config.json or the headers."""
    source, route = pair.source, pair.route
    for suffix, tensor in source.whole.items():
        problem = None
        if suffix in ORDERS:
            problem = _order_problem(route, tensor)
        elif suffix == "qzeros":
            problem = _zeros_problem(route, tensor)
        elif suffix == "weight_shape" and tuple(tensor.tolist()) != route.shape:
            problem = f"says {tensor.tolist()}, expected {list(route.shape)}"
        if problem is not None:
            yield suffix, problem


def _order_problem(route: Route, g_idx: torch.Tensor) -> str | None:
    scheme = route.stored
    if bool((g_idx == -1).all()) and "weight_g_idx" in route.tensors:
        return None  # compressed-tensors' "never set"
    assert scheme.group_size is not None, f"{route.module}: an order without groups"
    groups = -(-route.shape[1] // scheme.group_size)
    low, high = int(g_idx.min()), int(g_idx.max())
    if not 0 <= low <= high < groups:
        return f"puts rows into groups {low} to {high}, expected 0 to {groups - 1}"
    in_order = torch.arange(len(g_idx)) // scheme.group_size
    if not route.widened and not bool((g_idx == in_order).all()):
        return (
            "does not group rows in order though the checkpoint's config.json says desc_act false"
        )
    return None


def _zeros_problem(route: Route, qzeros: torch.Tensor) -> str | None:
    scheme = route.stored
    if not scheme.symmetric or route.widened:
        return None  # what is widened is dequantised with the zero points that are there
    stored = (1 << (scheme.bits - 1)) - scheme.zero_offset
    word = sum(stored << shift for shift in range(0, 32, scheme.bits))
    if not bool((qzeros != word - (word >> 31 << 32)).any()):
        return None
    return f"zero points vary, expected {stored} everywhere since config.json says sym true"


def _scan(pair: _Pair, table: RouteTable, log: FindingLog | None) -> Comparison | None:
    """Read both weights; report values that cannot be, and return the comparison without any.

    Without a log, they are reported elsewhere.
    """
    source, base = pair.source, pair.base
    columns = prod(source.shape) // max(1, source.shape[0])
    rows = source.shape[0] if source.shape else 1
    noise2 = pair.inverse.noise2 if pair.inverse is not None else 0.0
    comparison = Comparison(rows, columns, noise2=noise2) if base is not None else None
    broken: dict[tuple[str, str], str] = {}
    for low, high in pair.chunks:
        stored = source.read_rows(low, high)
        for suffix in SCALES:
            if source.scheme.is_quantized and suffix in stored:
                problem = _scale_problem(source.scheme, suffix, stored[suffix])
                if problem is not None:
                    broken[suffix, "scale-invalid"] = problem
        weight = source.dequantize(stored).reshape(high - low, columns)
        if not broken and not bool(weight.isfinite().all()):
            broken["weight", "weight-not-finite"] = "holds NaN or infinite weights"
        if broken or base is None or comparison is None:
            continue
        base_stored = base.read_rows(low, high)
        base_weight = base.dequantize(base_stored).reshape(high - low, columns)
        if not bool(base_weight.isfinite().all()):
            broken["weight", "weight-not-finite"] = (
                f"cannot be compared: base {table.plan.base!r} holds NaN or infinite weights"
            )
            continue
        _compare_rows(comparison, pair, low, stored, weight, base, base_stored, base_weight)
    for (suffix, code), problem in broken.items():
        if log is not None:
            log.add(
                "error",
                code,
                f"{pair.name}.{suffix}" if source.scheme.is_quantized else pair.name,
                f"source {pair.route.source!r}: {problem}. Re-export the module, or choose another "
                "source.",
                noun="tensors",
            )
    return None if broken else comparison


def _scale_problem(scheme: Scheme, suffix: str, stored: torch.Tensor) -> str | None:
    """Say what is wrong with scales; those of integers may be negative, as auto-round's are."""
    values = scale_values(scheme, suffix, stored)
    if not bool(values.isfinite().all()):
        return "holds NaN or infinite scales"
    if bool((values == 0).any()):
        return "holds scales that are zero"
    if scheme.group_size is None and bool((values < 0).any()):
        return "holds negative scales"
    return None


def _compare_rows(
    comparison: Comparison,
    pair: _Pair,
    low: int,
    stored: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    base: StoredWeight,
    base_stored: Mapping[str, torch.Tensor],
    base_weight: torch.Tensor,
) -> None:
    source, scale2 = pair.source, pair.scale2(low, low + len(weight))
    order = source.order.argsort(stable=True) if source.order is not None else None
    tile = tile_of(source.scheme, (weight.shape[0], weight.shape[1]))
    own = expected_error2(source.scheme, stored, weight)
    if scale2 is not None:
        own = own * tile_mean(scale2 if order is None else scale2[:, order], tile)
    others = expected_error2(base.scheme, base_stored, base_weight).mean()
    rounding2 = float(own.mean() + others) * weight.numel()
    weight = pair.take_back(weight, low)
    tile_errors = None
    if source.scheme.is_quantized:
        squares, difference2 = base_weight.square(), (weight - base_weight).square()
        if order is not None:
            squares, difference2 = squares[:, order], difference2[:, order]
        share = others / squares.mean().clamp(min=1e-30) + comparison.noise2
        rounding = own + share * tile_mean(squares, tile)
        tile_errors = tile_mean(difference2, tile) / rounding.clamp(min=1e-30)
    comparison.add(weight, base_weight, rounding2, tile_errors)


def _find_folded(pair: _Pair, comparison: Comparison) -> frozenset[Side]:
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
            weight, base = (one.dequantize(one.read_rows(low, high)) for one in _both(pair))
            fit.add(pair.take_back(weight, low), base)
        if fit.explains(comparison):
            return fit.varying(comparison, tile)
        columns = fit.better_columns()
    return frozenset()


def _both(pair: _Pair) -> tuple[StoredWeight, StoredWeight]:
    assert pair.base is not None
    return pair.source, pair.base


def _judge(
    pair: _Pair,
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
            again = _scan(taken_back, table, None)
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
    pair = _read_pair(name, source, table, checkpoints)
    if pair is None or pair.base is None or pair.source.scheme.is_quantized:
        return None
    values, noise2 = [], 0.0
    for one in _both(pair):
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
    pair = _read_pair(name, route.source, table, checkpoints)
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
    comparison = _scan(pair, table, None)
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


def _read_pair(
    name: str, source: str, table: RouteTable, checkpoints: Mapping[str, Checkpoint]
) -> _Pair | None:
    """Open a module of a source, routed there or not, with the base's; None where one is missing.

    So it is of a module that cannot be read, which is reported of it where it is routed.
    """
    own, base = checkpoints[source].find(name), checkpoints[table.plan.base].modules.get(name)
    if own is None or base is None or own.shape != base.shape:
        return None
    for module in (own, base):
        if module.problems or not all(is_available(s.file) for s in module.tensors.values()):
            return None
    weights = [_weights(one.scheme, one.tensors, one.shape).get("weight") for one in (own, base)]
    if weights[0] is None or weights[1] is None or weights[0][2] != weights[1][2]:
        return None
    widened = Scheme("bf16", bits=16)  # so that its order and zero points may be any
    route = Route(name, source, own.scheme, widened, None, own.tensors, own.shape)
    pair = _Pair(name, route, StoredWeight(*weights[0]), StoredWeight(*weights[1]))
    return None if any(_packing_problems(pair)) else pair
