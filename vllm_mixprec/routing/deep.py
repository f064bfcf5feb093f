# SPDX-License-Identifier: Apache-2.0
"""What only the tensors themselves say: broken scales, and weights that are not the base's.

Every routed module is read from its source, in the order of its files, and its counterpart from
the base, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import lcm, prod

import torch

from vllm_mixprec.checkpoint.formats import PLAIN_DTYPES, Module, Scheme
from vllm_mixprec.checkpoint.formats.base import ACTIVATION_SCALES
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.hub import is_available
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.disagreement import Comparison, FoldedFit
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.norms import is_feeding_norm
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
from vllm_mixprec.routing.verdicts import Verdicts

_CHUNK_WEIGHTS = 1 << 19  # 2 MiB in float32, of which some fifteen live at a time
_FOLD_PASSES = 4  # over a weight, to find factors of rows and of columns that both vary

_FORMATS = {dtype: name for name, dtype in PLAIN_DTYPES.items()}


@dataclass(frozen=True)
class _Pair:
    """One tensor, or one weight with what belongs to it, and the base's where that is another."""

    name: str
    route: Route
    source: StoredWeight
    base: StoredWeight | None

    @property
    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows to read at a time."""
        n = self.source.shape[0] if self.source.shape else 1
        step = lcm(self.source.row_step, self.base.row_step if self.base else 1)
        row_weights = max(1, prod(self.source.shape) // max(1, n))
        rows = step * max(1, _CHUNK_WEIGHTS // (step * row_weights))
        for low in range(0, n, rows):
            yield low, min(low + rows, n)


def examine(
    table: RouteTable,
    checkpoints: Mapping[str, Checkpoint],
    log: FindingLog,
    advance: Callable[[int], object],
) -> None:
    """Read every tensor that is served and report what is wrong with it.

    Some 50 MiB of tensors live at a time, besides the stored words of one GPTQ or AWQ module and
    of its counterpart, and a kilobyte for each weight that was read.

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
                sides = _find_folded(pair, comparison)
                if sides:
                    verdicts.add_folded(route, sides)
                else:
                    source = pair.source
                    verdicts.add(pair.name, route, source.shape, source.scheme.label, comparison)
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
    source, route = pair.source, pair.route
    found = False
    for suffix, tensor in source.whole.items():
        problem = None
        if suffix in ORDERS:
            problem = _order_problem(route, tensor)
        elif suffix == "qzeros":
            problem = _zeros_problem(route, tensor)
        elif suffix == "weight_shape" and tuple(tensor.tolist()) != route.shape:
            problem = f"says {tensor.tolist()}, expected {list(route.shape)}"
        if problem is not None:
            found = True
            code = "order-invalid" if suffix in ORDERS else "packing-invalid"
            log.add(
                "error",
                code,
                f"{route.module}.{suffix}",
                f"source {route.source!r}: {problem}. Re-export the module, or choose another "
                "source.",
                noun="tensors",
            )
    return found


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


def _scan(pair: _Pair, table: RouteTable, log: FindingLog) -> Comparison | None:
    """Read both weights; report values that cannot be, and return the comparison without any."""
    source, base = pair.source, pair.base
    columns = prod(source.shape) // max(1, source.shape[0])
    rows = source.shape[0] if source.shape else 1
    comparison = Comparison(rows, columns) if base is not None else None
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
        _compare_rows(comparison, source, stored, weight, base, base_stored, base_weight)
    for (suffix, code), problem in broken.items():
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
    source: StoredWeight,
    stored: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    base: StoredWeight,
    base_stored: Mapping[str, torch.Tensor],
    base_weight: torch.Tensor,
) -> None:
    own = expected_error2(source.scheme, stored, weight)
    others = expected_error2(base.scheme, base_stored, base_weight).mean()
    rounding2 = float(own.mean() + others) * weight.numel()
    tile_errors = None
    if source.scheme.is_quantized:
        tile = tile_of(source.scheme, (weight.shape[0], weight.shape[1]))
        squares, difference2 = base_weight.square(), (weight - base_weight).square()
        if source.order is not None:
            columns = source.order.argsort(stable=True)
            squares, difference2 = squares[:, columns], difference2[:, columns]
        share = others / squares.mean().clamp(min=1e-30)
        rounding = own + share * tile_mean(squares, tile)
        tile_errors = tile_mean(difference2, tile) / rounding.clamp(min=1e-30)
    comparison.add(weight, base_weight, rounding2, tile_errors)


def _find_folded(pair: _Pair, comparison: Comparison) -> frozenset[str]:
    """Return which factors, of rows and of columns, alone tell a weight from the base's."""
    if not comparison.may_be_folded or pair.base is None:
        return frozenset()
    columns = comparison.column_factors()
    for _ in range(_FOLD_PASSES):
        fit = FoldedFit(columns, torch.zeros(comparison.rows, dtype=torch.float64))
        for low, high in pair.chunks:
            fit.add(*(one.dequantize(one.read_rows(low, high)) for one in _both(pair)))
        if fit.explains(comparison):
            return fit.varying(comparison)
        columns = fit.better_columns()
    return frozenset()


def _both(pair: _Pair) -> tuple[StoredWeight, StoredWeight]:
    assert pair.base is not None
    return pair.source, pair.base
