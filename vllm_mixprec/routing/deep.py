# SPDX-License-Identifier: Apache-2.0
"""What only the tensors themselves say: broken scales, and weights that are not the base's.

Every routed module is read from its source, in the order of its files, and its counterpart from
the base, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, lcm, prod

import torch

from vllm_mixprec.checkpoint.formats import PLAIN_DTYPES, Module, Scheme
from vllm_mixprec.checkpoint.formats.base import ACTIVATION_SCALES
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.hub import is_available
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.disagreement import Comparison, FoldedFit, similarity
from vllm_mixprec.routing.findings import FindingLog, generalise
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
from vllm_mixprec.routing.structure import ModelDims, layer_name
from vllm_mixprec.routing.table import RouteTable

_CHUNK_WEIGHTS = 1 << 20  # 4 MiB in float32, of which some fifteen live at a time
_FOLD_PASSES = 4  # over a weight, to find factors of rows and of columns that both vary
_ALIKE = 0.8  # similarity from which a weight is taken for another one of the base

_FORMATS = {dtype: name for name, dtype in PLAIN_DTYPES.items()}

# Module -> what divides its input by the factors that were folded into its columns, and what takes
# the factors of its rows back; siblings, where no norm does. A source is consistent in itself.
_COLUMNS_FROM = {"down_proj": ("up_proj",), "w2": ("w3",), "o_proj": ("v_proj", "kv_b_proj")}
_ROWS_TO = {
    "up_proj": ("down_proj",),
    "w3": ("w2",),
    "v_proj": ("o_proj",),
    "kv_b_proj": ("o_proj",),
}


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


@dataclass
class _Samples:
    """Of one layer, samples of the base's weights, and what sources hold that is not theirs."""

    base: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = field(default_factory=dict)
    strange: list[tuple[_Pair, Comparison]] = field(default_factory=list)


class _Gathered:
    """Findings with a measured number, put together to one for names that differ in numbers."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str, str], dict[str, tuple[float, float]]] = {}

    def add(self, code: str, source: str, text: str, name: str, value: float, bound: float) -> None:
        """Add one; ``text`` has ``{value}`` and ``{bound}`` in it."""
        key = (code, source, text, generalise(name))
        self._found.setdefault(key, {})[name] = (value, bound)

    def report(self, log: FindingLog) -> None:
        """Log them."""
        for (code, _, text, _), found in self._found.items():
            values, bounds = zip(*found.values(), strict=True)
            low, high = min(values), max(values)
            value = _spell(low) if low == high else f"{_spell(low)} to {_spell(high)}"
            for name in found:
                log.add("error", code, name, text.format(value=value, bound=_spell(max(bounds))))


def examine(
    table: RouteTable,
    checkpoints: Mapping[str, Checkpoint],
    log: FindingLog,
    advance: Callable[[int], object],
) -> None:
    """Read every tensor that is served and report what is wrong with it.

    Some 50 MiB of tensors live at a time, besides the stored words of one GPTQ or AWQ module.

    Args:
        advance: told the bytes of each module that is done; :func:`count_bytes` in all.

    Raises:
        CheckpointError: a file changed since its header was read.
    """
    gathered = _Gathered()
    layers: dict[str, _Samples] = {}
    folded: dict[str, frozenset[str]] = {}
    for route, module, base in _modules(table, checkpoints):
        if not module.problems and module.shape == route.shape:
            for pair in _pairs(route, base):
                comparison = None if _report_packing(pair, log) else _scan(pair, table, log)
                if comparison is None:
                    continue
                sides = _find_folded(pair, comparison)
                if sides:
                    folded[route.module] = sides
                else:
                    samples = layers.setdefault(layer_name(route.module) or "", _Samples())
                    _judge(pair, comparison, samples, table, gathered)
        advance(route.stored_bytes + (base.nbytes if base is not None else 0))
    for samples in layers.values():
        _report_strange(samples, table, gathered, log)
    _report_folded(table, folded, log)
    gathered.report(log)


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
    comparison = Comparison(columns) if base is not None else None
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
        fit = FoldedFit(columns)
        for low, high in pair.chunks:
            fit.add(*(one.dequantize(one.read_rows(low, high)) for one in _both(pair)))
        if fit.explains(comparison):
            return fit.varying(comparison)
        columns = fit.better_columns()
    return frozenset()


def _both(pair: _Pair) -> tuple[StoredWeight, StoredWeight]:
    assert pair.base is not None
    return pair.source, pair.base


def _judge(
    pair: _Pair,
    comparison: Comparison,
    samples: _Samples,
    table: RouteTable,
    gathered: _Gathered,
) -> None:
    if comparison.base_sample is not None:
        samples.base[pair.name] = comparison.base_sample, pair.source.shape
    if comparison.verdict == "differs":
        samples.strange.append((pair, comparison))
    elif comparison.verdict == "tiles":
        gathered.add(
            "weights-differ",
            pair.route.source,
            f"source {pair.route.source!r}: {{value}} of its {pair.route.stored.label} groups are "
            f"nothing that rounding base {table.plan.base!r} explains, expected {{bound}}. Their "
            "scales or codes are damaged: re-export the module, or choose another source.",
            pair.name,
            comparison.wrong_tiles / comparison.tiles,
            0.0,
        )


def _report_strange(
    samples: _Samples, table: RouteTable, gathered: _Gathered, log: FindingLog
) -> None:
    """Report weights that are not the base's, and which others of the layer they are."""
    base = table.plan.base
    swapped: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for pair, comparison in samples.strange:
        name, source = pair.name, pair.route.source
        other = _find_twin(pair, comparison, samples)
        if other is not None:
            swapped.setdefault((source, generalise(name)), []).append((name, other))
        elif comparison.source2 == 0.0:
            log.add(
                "error",
                "weights-differ",
                name,
                f"source {source!r}: all weights are zero, those of base {base!r} are not. GPTQ "
                "leaves experts so that no text of its calibration reached: choose another source.",
            )
        else:
            gathered.add(
                "weights-differ",
                source,
                f"source {source!r}: differs from base {base!r} by {{value}} of its size, expected "
                f"at most {{bound}} of {pair.source.scheme.label}. It was made from other weights: "
                "choose a source made from the base.",
                name,
                comparison.error,
                comparison.bound,
            )
    for (source, _), pairs in swapped.items():
        for name, _ in pairs:
            log.add(
                "error",
                "weights-differ",
                name,
                f"source {source!r} holds another weight of base {base!r} here: "
                f"{pairs[0][0]} holds {pairs[0][1]}. Its experts or projections are in another "
                "order: choose another source.",
            )


def _find_twin(pair: _Pair, comparison: Comparison, samples: _Samples) -> str | None:
    """Return the name of the layer's other weight that a source holds in a weight's place."""
    if comparison.source_sample is None:
        return None
    alike = {
        name: similarity(comparison.source_sample, sample)
        for name, (sample, shape) in samples.base.items()
        if shape == pair.source.shape
    }
    twin = max(alike, key=lambda name: alike[name], default=None)
    return twin if twin is not None and twin != pair.name and alike[twin] > _ALIKE else None


def _report_folded(
    table: RouteTable, folded: Mapping[str, frozenset[str]], log: FindingLog
) -> None:
    """Report factors in columns or rows whose other half the plan takes from elsewhere."""
    for module, sides in folded.items():
        route = table.routes[module]
        for side in sorted(sides):
            partners = _partners(module, side, table)
            if partners and all(table.routes[name].source == route.source for name in partners):
                continue
            where = generalise(partners[0]) if partners else "what the package does not know"
            log.add(
                "error",
                "weights-rescaled",
                module,
                f"source {route.source!r}: base {table.plan.base!r}'s weights but for a factor for "
                f"each of its {side}, as AWQ and SmoothQuant fold them; the other half is in "
                f"{where}, which the plan takes from elsewhere. Take both from this source, or "
                "choose one that was quantised without folding.",
            )


def _partners(module: str, side: str, table: RouteTable) -> list[str]:
    """Return the modules that hold the inverse of a module's factors."""
    parent, _, leaf = module.rpartition(".")
    leaves = (_COLUMNS_FROM if side == "columns" else _ROWS_TO).get(leaf, ())
    names = [name for other in leaves if (name := f"{parent}.{other}") in table.routes]
    norm = feeding_norm(module) if side == "columns" else None
    return names + ([norm] if norm is not None and norm in table.routes else [])


def _spell(value: float) -> str:
    return "infinity" if value == inf else f"{100 * value:.3g} %"
