# SPDX-License-Identifier: Apache-2.0
"""Reads one weight and the base's, some rows at a time, and compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm, prod

import torch

from vllm_mixprec.checkpoint.formats import PLAIN_DTYPES, Module, Scheme
from vllm_mixprec.checkpoint.formats.base import ACTIVATION_SCALES
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.disagreement import Comparison, Inverse
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
from vllm_mixprec.routing.table import RouteTable

_CHUNK_WEIGHTS = 1 << 19  # 2 MiB in float32, of which some fifteen live at a time

_FORMATS = {dtype: name for name, dtype in PLAIN_DTYPES.items()}


@dataclass(frozen=True)
class Pair:
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


def pairs_of(route: Route, base: Module | None) -> Iterator[Pair]:
    """Take a module apart: its weight with scales and zero points, and every bare tensor."""
    own = weights_of(route.stored, route.tensors, route.shape)
    others = {} if base is None else weights_of(base.scheme, base.tensors, base.shape)
    is_norm = is_feeding_norm(route.module)  # compared with what it feeds, by compare_norms
    for suffix, (scheme, tensors, shape) in own.items():
        other = others.get(suffix)
        is_same = other is not None and other[2] == shape
        yield Pair(
            route.module if suffix == "weight" else f"{route.module}.{suffix}",
            route,
            StoredWeight(scheme, tensors, shape),
            StoredWeight(*other) if other is not None and is_same and not is_norm else None,
        )


def weights_of(
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


def report_packing(pair: Pair, log: FindingLog) -> bool:
    """Report orders, zero points and shapes that cannot be; return whether any was found."""
    route, found = pair.route, False
    for suffix, problem in packing_problems(pair):
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


def packing_problems(pair: Pair) -> Iterator[tuple[str, str]]:
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


def scan(pair: Pair, table: RouteTable, log: FindingLog | None) -> Comparison | None:
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
                values = scale_values(source.scheme, suffix, stored[suffix])
                found = _scale_problem(source.scheme, values)
                if found is not None:
                    code, problem = found
                    broken[suffix, code] = problem
        weight = source.dequantize(stored).reshape(high - low, columns)
        if not broken and not bool(weight.isfinite().all()):
            broken["weight", "weight-not-finite"] = "holds NaN or infinite weights"
        if broken or base is None or comparison is None:
            continue
        base_stored = base.read_rows(low, high)
        base_weight = base.dequantize(base_stored).reshape(high - low, columns)
        if not bool(base_weight.isfinite().all()):
            broken["weight", "base-not-finite"] = (
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


def _scale_problem(scheme: Scheme, values: torch.Tensor) -> tuple[str, str] | None:
    """Return a code and what is wrong with scales.

    Those of integers may be negative, as auto-round's are. A zero is right where all that it scales
    is about zero: some exporters let the scale of such a group underflow.
    """
    if not bool(values.isfinite().all()):
        return "scale-invalid", "holds NaN or infinite scales"
    if scheme.group_size is None and bool((values < 0).any()):
        return "scale-invalid", "holds negative scales"
    if bool((values == 0).any()):
        return "scale-zero", "holds scales that are zero"
    return None


def _compare_rows(
    comparison: Comparison,
    pair: Pair,
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


def both(pair: Pair) -> tuple[StoredWeight, StoredWeight]:
    assert pair.base is not None
    return pair.source, pair.base


def open_pair(
    name: str, source: str, table: RouteTable, checkpoints: Mapping[str, Checkpoint]
) -> Pair | None:
    """Open a weight of a source, routed there or not, with the base's; None where one is missing.

    So it is of a module that cannot be read, which is reported of it where it is routed.
    """
    own, base = checkpoints[source].find(name), checkpoints[table.plan.base].modules.get(name)
    if own is None or base is None or own.shape != base.shape:
        return None
    for module in (own, base):
        if module.problems or not all(s.file.exists() for s in module.tensors.values()):
            return None
    weights = [weights_of(one.scheme, one.tensors, one.shape).get("weight") for one in (own, base)]
    if weights[0] is None or weights[1] is None or weights[0][2] != weights[1][2]:
        return None
    widened = Scheme("bf16", bits=16)  # so that its order and zero points may be any
    route = Route(name, source, own.scheme, widened, None, own.tensors, own.shape)
    pair = Pair(name, route, StoredWeight(*weights[0]), StoredWeight(*weights[1]))
    return None if any(packing_problems(pair)) else pair
