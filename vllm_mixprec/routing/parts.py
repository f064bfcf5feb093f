# SPDX-License-Identifier: Apache-2.0
"""What each layer is served from and by: the rows that ``inspect``, the log and the routes show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_mixprec.routing.findings import format_bytes
from vllm_mixprec.routing.fused import leaf_name, parse_expert
from vllm_mixprec.routing.kernels import FUSED_EXPERTS, bf16_experts_kernel
from vllm_mixprec.routing.kinds import (
    KIND_LABELS,
    KINDS,
    find_runs,
    kind_of,
    layer_of,
    spell_ranges,
)
from vllm_mixprec.routing.route import Route
from vllm_mixprec.routing.structure import ModelDims, indexer_name
from vllm_mixprec.routing.table import RouteTable

_OWN = "vLLM's own"
_INDEXER = "indexer"
_ORDER = (*KINDS[:1], _INDEXER, *KINDS[1:])
_LABELS: dict[str, str] = {str(kind): label for kind, label in KIND_LABELS.items()}
_LABELS[_INDEXER] = "indexer"
_NOT_LOADED = "not loaded"


@dataclass(frozen=True, slots=True)
class Part:
    """Modules of one kind in one layer that come and are served alike.

    Attributes:
        kind: one of ``KINDS``, or ``indexer``.
        stored, served: labels of schemes; ``served`` is "not loaded" of what no rank loads.
        kernel: what computes with it; "vLLM's own" of what is not packed.
        reason: why it is widened; None when it is not.
        experts: logical ids, sorted; empty for other kinds.
        served_bytes: in memory, over all ranks.
    """

    kind: str
    source: str
    stored: str
    served: str
    kernel: str | None
    reason: str | None
    experts: tuple[int, ...]
    modules: int
    stored_bytes: int
    served_bytes: int

    @property
    def label(self) -> str:
        """The kind in words."""
        return _LABELS[self.kind]

    @property
    def is_loaded(self) -> bool:
        """Whether any rank loads it."""
        return self.served != _NOT_LOADED

    def to_dict(self) -> dict[str, Any]:
        """Return the part as JSON types; ``widened`` is the reason, or null."""
        return {
            "kind": self.kind,
            "source": self.source,
            "stored": self.stored,
            "served": self.served,
            "kernel": self.kernel,
            "widened": self.reason,
            **({"experts": list(self.experts)} if self.experts else {}),
            "modules": self.modules,
            "stored_bytes": self.stored_bytes,
            "served_bytes": self.served_bytes,
        }


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers that are served alike; without numbers, what lies outside of the layers."""

    numbers: tuple[int, ...]
    is_mtp: bool
    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        """The numbers as a plan spells them, ``0-7,12``; ``-`` for none."""
        return (spell_ranges(self.numbers) or "-") + (" (MTP)" if self.is_mtp else "")


def layer_parts(table: RouteTable) -> dict[int | None, tuple[Part, ...]]:
    """Return layer -> its parts by kind; what lies outside of the layers is under None, last."""
    dims = ModelDims.from_config(table.base_config)
    groups: dict[int | None, dict[tuple[Any, ...], list[Route]]] = {}
    for route in table.routes.values():
        is_loaded = dims.is_loaded(route.module, table.layout.draft)
        kind = _INDEXER if indexer_name(route.module) is not None else kind_of(route.module)
        key = (
            _ORDER.index(kind),
            route.source,
            route.stored.label,
            route.served.label if is_loaded else _NOT_LOADED,
            _kernel_of(table, route) if is_loaded else "",
            route.reason or "" if is_loaded else "",
        )
        groups.setdefault(layer_of(route.module), {}).setdefault(key, []).append(route)
    order = sorted(groups, key=lambda layer: (layer is None, layer))
    return {
        layer: tuple(_make_part(*item) for item in sorted(groups[layer].items())) for layer in order
    }


def _make_part(key: tuple[Any, ...], routes: Sequence[Route]) -> Part:
    kind, source, stored, served, kernel, reason = key
    experts = {expert.expert for route in routes if (expert := parse_expert(route.module))}
    return Part(
        kind=_ORDER[kind],
        source=source,
        stored=stored,
        served=served,
        kernel=kernel or None,
        reason=reason or None,
        experts=tuple(sorted(experts)),
        modules=len(routes),
        stored_bytes=sum(route.stored_bytes for route in routes),
        served_bytes=0 if served == _NOT_LOADED else sum(route.served_bytes for route in routes),
    )


def _kernel_of(table: RouteTable, route: Route) -> str:
    platform, is_expert = table.platform, parse_expert(route.module) is not None
    if route.served.is_quantized:
        if is_expert and platform.family == "cpu-avx512" and route.served.format != "fp8_channel":
            return FUSED_EXPERTS  # one operator for all other formats (quant/cpu_ops.py)
        assert route.kernel is not None, f"{route.module} is served packed by no kernel"
        return route.kernel
    return (is_expert and _fast_bf16(table, route)) or _OWN


def _fast_bf16(table: RouteTable, route: Route) -> str | None:
    """Name our CPU kernel of unquantised experts, as quant/methods.py does; None of others."""
    layout, dims = table.layout, ModelDims.from_config(table.base_config)
    if table.platform.family != "cpu-avx512" or len(route.shape) != 2:
        return None
    rows, columns = route.shape
    if leaf_name(route.module) in ("down_proj", "w2"):
        rows, columns = columns, rows
    experts, ranks = dims.num_experts or 1, layout.expert_ranks
    if layout.expert_parallel:
        experts = -(-experts // ranks)
    else:
        rows //= ranks
    if (
        table.base_scheme.format != "bf16"
        or not dims.expert_arithmetic(route.module).is_plain
        or "bias" in route.tensors
        or rows % 32
        or columns % 32
    ):
        return None
    return bf16_experts_kernel(table.platform, experts * 2 * rows * columns)


def fold_layers(table: RouteTable) -> tuple[LayerRange, ...]:
    """Join layers whose parts are equal; what lies outside of the layers comes last."""
    dims = ModelDims.from_config(table.base_config)
    folded: dict[tuple[bool, tuple[Part, ...]], list[int]] = {}
    for layer, parts in layer_parts(table).items():
        is_mtp = layer is not None and dims.is_mtp_layer(layer)
        numbers = folded.setdefault((is_mtp, parts), [])
        if layer is not None:
            numbers.append(layer)
    return tuple(
        LayerRange(tuple(numbers), is_mtp, parts) for (is_mtp, parts), numbers in folded.items()
    )


def spell_layers(table: RouteTable) -> list[str]:
    """Return a line for each range of layers: what is loaded, from where, and how it is served.

    Such as ``layers 0-23: routed experts 0-7 gptq int4 g128 of int4, fused_experts_cpu; ...``.
    """
    lines = []
    for layers in fold_layers(table):
        spelt = [_spell(part) for part in layers.parts if part.is_loaded]
        if spelt:
            noun = "layer" if len(layers.numbers) == 1 else "layers"
            where = f"{noun} {layers.label}" if layers.numbers else "outside of the layers"
            lines.append(f"{where}: {'; '.join(spelt)}")
    return lines


def _spell(part: Part) -> str:
    experts = f" {spell_ranges(part.experts)}" if part.experts else ""
    how = part.kernel
    if part.reason is not None:
        more = format_bytes(part.served_bytes - part.stored_bytes)
        how = f"widened to {part.served} ({more} more): {part.reason}"
    elif part.served != part.stored:
        how = f"as {part.served}, {part.kernel}"
    return f"{part.label}{experts} {part.stored} of {part.source}, {how}"


def describe_layers(table: RouteTable) -> list[dict[str, Any]]:
    """Return the ranges as JSON types; experts are runs of [first, last]."""
    return [
        {
            "layers": list(layers.numbers),
            "mtp": layers.is_mtp,
            "parts": [
                part.to_dict() | ({"experts": find_runs(part.experts)} if part.experts else {})
                for part in layers.parts
            ],
        }
        for layers in fold_layers(table)
    ]
