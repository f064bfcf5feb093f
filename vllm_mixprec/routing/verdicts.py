# SPDX-License-Identifier: Apache-2.0
"""What is reported of weights that were compared with the base's, once all of them were read.

Of each weight a few hundred bytes are kept: all may be another model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from vllm_mixprec.routing.disagreement import Comparison, Side, directions
from vllm_mixprec.routing.findings import FindingLog, generalise
from vllm_mixprec.routing.norms import feeding_norm
from vllm_mixprec.routing.route import Route
from vllm_mixprec.routing.structure import layer_name
from vllm_mixprec.routing.table import RouteTable

_ALIKE = 0.8  # similarity from which a weight is taken for another one of the base

# Module -> what divides its input by the factors that were folded into its columns, and what takes
# the factors of its rows back; siblings, where no norm does.
_COLUMNS_FROM = {"down_proj": ("up_proj",), "w2": ("w3",), "o_proj": ("v_proj", "kv_b_proj")}
_ROWS_TO = {
    "up_proj": ("down_proj",),
    "w3": ("w2",),
    "v_proj": ("o_proj",),
    "kv_b_proj": ("o_proj",),
}


@dataclass(frozen=True, slots=True)
class _Strange:
    """A weight that is not the base's; ``error`` and ``bound`` as in :class:`Comparison`.

    ``gain`` is the factor of one that is scaled as a whole.
    """

    name: str
    route: Route
    shape: tuple[int, ...]
    label: str
    error: float
    bound: float
    gain: float | None
    is_zero: bool
    sample: bytes


@dataclass
class _Layer:
    """Of one layer, samples of the base's weights, and what sources hold that is not theirs."""

    base: dict[str, tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    strange: list[_Strange] = field(default_factory=list)


class Verdicts:
    """Collects what comparisons came to, and reports it when each weight's layer is complete."""

    def __init__(self, table: RouteTable) -> None:
        self._table = table
        self._layers: dict[str, _Layer] = {}
        self._folded: dict[str, frozenset[Side]] = {}
        self._measured: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = {}

    def add_folded(self, route: Route, sides: frozenset[Side]) -> None:
        """Note a weight that is the base's but for factors that its source takes back elsewhere.

        Or whose other half is not there to be read.
        """
        self._folded[route.module] = sides

    def add_damaged(
        self, route: Route, sides: frozenset[Side], halves: Sequence[str], error: float
    ) -> None:
        """Note one whose factors the ``halves``, modules of its source, do not take back.

        There are none where the package knows of none.
        """
        folded = " and ".join(sorted(sides, reverse=True))
        where = " and ".join(map(generalise, halves)) or "nothing that the package knows"
        self._measure(
            route.source,
            f"source {route.source!r}: differs from base {self._table.plan.base!r} by {{value}} of "
            f"its size, by a factor for each of its {folded} that is not taken back in {where} of "
            "that source. Its scales are damaged: re-export the module, or choose another source.",
            route.module,
            error,
            0.0,
        )

    def add(
        self,
        name: str,
        route: Route,
        shape: tuple[int, ...],
        label: str,
        comparison: Comparison,
    ) -> None:
        """Note any other weight.

        Args:
            name: the weight's, its module's or one of a module's bare tensors'.
            label: of how the source stores it.
        """
        layer = self._layers.setdefault(layer_name(route.module) or "", _Layer())
        if comparison.base_sample is not None:
            layer.base[name] = comparison.base_sample, shape
        verdict = comparison.verdict
        if verdict in ("differs", "scaled") and comparison.source_sample is not None:
            layer.strange.append(
                _Strange(
                    name,
                    route,
                    shape,
                    label,
                    comparison.error,
                    comparison.bound,
                    comparison.gain if verdict == "scaled" else None,
                    comparison.source2 == 0.0,
                    comparison.source_sample,
                )
            )
        elif verdict == "tiles":
            self._measure(
                route.source,
                f"source {route.source!r}: {{value}} of its {route.stored.label} groups are "
                f"nothing that rounding base {self._table.plan.base!r} explains, expected "
                "{bound}. Their scales or codes are damaged: re-export the module, or choose "
                "another source.",
                name,
                comparison.wrong_tiles / comparison.tiles,
                0.0,
            )

    def report(self, log: FindingLog) -> None:
        """Log all that was noted."""
        for layer in self._layers.values():
            self._report_strange(layer, log)
        self._report_folded(log)
        for (_, text, _), found in self._measured.items():
            values, bounds = zip(*found.values(), strict=True)
            low, high = min(values), max(values)
            value = " to ".join(dict.fromkeys((_spell(low), _spell(high))))
            text = text.format(value=value, bound=_spell(max(bounds)))
            for name in found:
                log.add("error", "weights-differ", name, text)

    def _measure(self, source: str, text: str, name: str, value: float, bound: float) -> None:
        """Put findings whose names differ in numbers together; ``text`` has their numbers open."""
        key = (source, text, generalise(name))
        self._measured.setdefault(key, {})[name] = (value, bound)

    def _report_strange(self, layer: _Layer, log: FindingLog) -> None:
        """Report weights that are not the base's, and which others of the layer they are."""
        base = self._table.plan.base
        swapped: dict[tuple[str, str], list[tuple[str, str]]] = {}
        twins = _find_twins(layer)
        for weight in layer.strange:
            name, source = weight.name, weight.route.source
            if name in twins:
                swapped.setdefault((source, generalise(name)), []).append((name, twins[name]))
            elif weight.is_zero:
                log.add(
                    "error",
                    "weights-differ",
                    name,
                    f"source {source!r}: all weights are zero, those of base {base!r} are not. "
                    "GPTQ leaves experts so that no text of its calibration reached: choose "
                    "another source.",
                )
            elif weight.gain is not None:
                self._measure(
                    source,
                    f"source {source!r}: as a whole {{value}} of base {base!r}'s weights, expected "
                    "{bound}. Its scales are damaged: re-export the module, or choose another "
                    "source.",
                    name,
                    weight.gain,
                    1.0,
                )
            else:
                self._measure(
                    source,
                    f"source {source!r}: differs from base {base!r} by {{value}} of its size, "
                    f"expected at most {{bound}} of {weight.label}. It was made from other "
                    "weights, or is damaged: choose another source, made from the base.",
                    name,
                    weight.error,
                    weight.bound,
                )
        for (source, _), pairs in swapped.items():
            for name, _ in pairs:
                log.add(
                    "error",
                    "weights-differ",
                    name,
                    f"source {source!r} holds another weight of base {base!r} here: "
                    f"{pairs[0][0]} holds {pairs[0][1]}. Its experts or projections are in "
                    "another order: choose another source.",
                )

    def _report_folded(self, log: FindingLog) -> None:
        """Report factors in columns or rows whose other half the plan takes from elsewhere."""
        routes = self._table.routes
        for module, sides in self._folded.items():
            route = routes[module]
            for side in sorted(sides):
                partners = other_halves(module, side, routes)
                if all(routes[name].source == route.source for name in partners):
                    continue
                log.add(
                    "error",
                    "weights-rescaled",
                    module,
                    f"source {route.source!r}: base {self._table.plan.base!r}'s weights but for a "
                    f"factor for each of its {side}, as AWQ and SmoothQuant fold them; the other "
                    f"half is in {generalise(partners[0])}, which the plan takes from elsewhere. "
                    "Take both from this source, or choose one that was quantised without folding.",
                )


def _find_twins(layer: _Layer) -> dict[str, str]:
    """Return strange weight -> the layer's other weight that the source holds in its place."""
    twins = {}
    for shape in {weight.shape for weight in layer.strange}:
        weights = [weight for weight in layer.strange if weight.shape == shape]
        base = [name for name, (_, other) in layer.base.items() if other == shape]
        alike = directions([weight.sample for weight in weights]) @ (
            directions([layer.base[name][0] for name in base]).t()
        )
        likeness, found = alike.max(1)
        for weight, best, index in zip(weights, likeness.tolist(), found.tolist(), strict=True):
            if best > _ALIKE and base[index] != weight.name:
                twins[weight.name] = base[index]
    return twins


def other_halves(module: str, side: Side, routes: Mapping[str, Route]) -> list[str]:
    """Return the modules that hold the inverse of a module's factors."""
    parent, _, leaf = module.rpartition(".")
    leaves = (_COLUMNS_FROM if side == "columns" else _ROWS_TO).get(leaf, ())
    names = [name for other in leaves if (name := f"{parent}.{other}") in routes]
    norm = feeding_norm(module) if side == "columns" else None
    return names + ([norm] if norm is not None and norm in routes else [])


def _spell(value: float) -> str:
    return "infinity" if value == inf else f"{100 * value:.3g} %"
