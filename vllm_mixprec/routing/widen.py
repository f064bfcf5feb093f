# SPDX-License-Identifier: Apache-2.0
"""Decides how packed modules are served: as stored, laid out anew, or dequantised at load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from vllm_mixprec.checkpoint.formats import FORMATS, Scheme
from vllm_mixprec.plan.plan import Plan
from vllm_mixprec.routing.assign import Assignment
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.fused import Kind, Unit, group_units, leaf_name, unquantized_reason
from vllm_mixprec.routing.kernels import (
    KERNELS,
    Kernel,
    kernels_for,
    missing_kernel,
    unserved_experts,
)
from vllm_mixprec.routing.parallel import Shard, shard_weight
from vllm_mixprec.routing.platform import Platform
from vllm_mixprec.routing.route import Layout, Route
from vllm_mixprec.routing.structure import PLAIN_EXPERT, ExpertArithmetic, ModelDims

PER_CHANNEL = -1  # group_size of experts whose projections have one group each, of unlike K

_STACKED_EXPERT_PARTS = frozenset({"gate_proj", "up_proj", "w1", "w3"})


_NO_ROUTE = Route("", "", Scheme("bf16", 16), Scheme("bf16", 16), None, {}, ())


class _Part(NamedTuple):
    """What a decision about one module of a unit depends on, and nothing else.

    ``scheme`` is how it is stored, or a layout in which it could be served. ``unquantized`` is why
    vLLM holds it in plain weights only, None where it does not. ``arithmetic`` is of its expert, if
    it is part of one.
    """

    leaf: str
    shape: tuple[int, ...]
    scheme: Scheme
    unquantized: str | None
    arithmetic: ExpertArithmetic = PLAIN_EXPERT


@dataclass(frozen=True, slots=True)
class _Widening:
    """Why a unit is served in the base's dtype.

    ``refused_by`` is the option that forbids it; ``remedy`` is given where it cannot be served so
    either.
    """

    code: str
    reason: str
    refused_by: str | None
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class _Decision:
    """How a unit is served, by which kernel if packed.

    ``uncut`` says by part why tensor parallelism cannot cut it.
    """

    served: tuple[Scheme, ...]
    kernel: str | None
    widening: _Widening | None
    uncut: tuple[str | None, ...] | None


class Widener:
    """Turns assignments into routes for one base dtype, layout and platform.

    Units that are alike but for layer and expert numbers are decided once. Those that no rank
    loads get routes too, but nothing is reported of them. ``missing_kernel: error`` also refuses
    to widen what vLLM holds in plain weights only: there is no kernel for it anywhere.
    """

    def __init__(
        self,
        plan: Plan,
        base_scheme: Scheme,
        dims: ModelDims,
        layout: Layout,
        platform: Platform,
        log: FindingLog,
    ) -> None:
        self._options = plan.options
        self._base_scheme = base_scheme
        self._dims = dims
        self._layout = layout
        self._platform = platform
        self._log = log
        self._decisions: dict[tuple[Kind, tuple[_Part, ...]], _Decision] = {}
        self._experts: dict[
            tuple[ExpertArithmetic, tuple[tuple[str, int], ...]], tuple[_Decision, bool]
        ] = {}

    def route(self, assignments: Mapping[str, Assignment]) -> dict[str, Route]:
        """Return a route for every assignment, in the same order."""
        routes: dict[str, Route] = dict.fromkeys(assignments, _NO_ROUTE)  # for their order
        for unit in group_units(assignments, self._dims.model_type):
            assigned = [assignments[module] for module in unit.modules]
            decision, is_cast = self._decide_once(unit, assigned)
            widening = decision.widening
            for module, part, served in zip(unit.modules, assigned, decision.served, strict=True):
                routes[module] = _make_route(module, part, served, decision.kernel, widening)
            if widening is None and decision.uncut is None and not is_cast:
                continue
            if not any(self._dims.is_loaded(name, self._layout.draft) for name in unit.modules):
                continue
            made = [routes[module] for module in unit.modules]
            if widening is not None:
                fused = {assignment.fused for assignment in assigned}
                where = next(iter(fused)) if len(fused) == 1 else None
                self._report(where or unit.name, widening, made)
            if decision.uncut is not None:
                self._report_uncut(unit, decision.uncut)
            self._report_casts(made)
        return routes

    def _decide_once(self, unit: Unit, assigned: list[Assignment]) -> tuple[_Decision, bool]:
        """Decide on a unit as on others like it; also whether any part is cast to another dtype.

        What looks alike is known by its looks, which each are one object among a source's modules.
        """
        looks: tuple[tuple[str, int], ...] = ()
        if unit.kind == "experts" and all(part.looks is not None for part in assigned):
            leaves = map(leaf_name, unit.modules)
            looks = tuple(zip(leaves, [id(part.looks) for part in assigned], strict=True))
        is_expert = unit.kind == "experts"
        arithmetic = self._dims.expert_arithmetic(unit.name) if is_expert else PLAIN_EXPERT
        alike = (arithmetic, looks)
        if alike in self._experts:
            return self._experts[alike]
        if is_expert and any("bias" in part.tensors for part in assigned):
            arithmetic = arithmetic._replace(has_biases=True)
        parts = tuple(
            self._part(module, part, arithmetic)
            for module, part in zip(unit.modules, assigned, strict=True)
        )
        key = (unit.kind, parts)
        decision = self._decisions.get(key)
        if decision is None:
            decision = self._decisions[key] = self._decide(*key)
        is_cast = any(
            served != part.module.scheme and not part.module.scheme.is_quantized
            for served, part in zip(decision.served, assigned, strict=True)
        )
        if looks:
            self._experts[alike] = decision, is_cast
        return decision, is_cast

    def _part(self, module: str, assignment: Assignment, arithmetic: ExpertArithmetic) -> _Part:
        stored = assignment.module.scheme
        scheme = stored if stored.is_quantized else self._base_scheme
        shape = assignment.module.shape
        return _Part(leaf_name(module), shape, scheme, unquantized_reason(module), arithmetic)

    def _decide(self, kind: Kind, parts: tuple[_Part, ...]) -> _Decision:
        shards = [
            shard_weight(part.leaf, part.shape, kind == "experts", self._layout, self._dims)
            for part in parts
        ]
        uncut = tuple(shard.problem for shard in shards)
        served, kernel, widening = self._serve(kind, parts, shards)
        return _Decision(served, kernel, widening, uncut if any(uncut) else None)

    def _serve(
        self, kind: Kind, parts: tuple[_Part, ...], shards: list[Shard]
    ) -> tuple[tuple[Scheme, ...], str | None, _Widening | None]:
        """Return the parts' schemes as served, by which kernel, and why they are widened if so."""
        widened = (self._base_scheme,) * len(parts)
        is_split = self._layout.expert_parallel and self._layout.expert_ranks > 1
        unserved = unserved_experts(self._platform, parts[0].arithmetic, is_split)
        if unserved is not None:
            reason, remedy = unserved
            return widened, None, _Widening("kernel-missing", reason, None, remedy)
        if not any(part.scheme.is_quantized for part in parts):
            return tuple(part.scheme for part in parts), None, None
        no_kernel = "missing_kernel" if self._options.missing_kernel == "error" else None
        for part in parts:
            if part.unquantized is not None:
                return widened, None, _Widening("layer-unquantized", part.unquantized, no_kernel)
        ways = [
            (way, kernels_for(self._platform, way[0].scheme.format, kind))
            for way in _shared_layouts(parts)
        ]
        for place in range(max((len(kernels) for _, kernels in ways), default=0)):
            for way, kernels in ways:
                best = kernels[place : place + 1]
                if best and self._problem(kind, way, shards, best, no_kernel) is None:
                    return tuple(part.scheme for part in way), best[0].name, None
        if ways:
            # A layout that has a kernel here has the reason that helps; else the one stored.
            family = self._platform.family
            known = (each for each in ways if (family, each[0][0].scheme.format) in KERNELS)
            way, kernels = next(known, ways[0])
            problem = self._problem(kind, way, shards, kernels, no_kernel)
            # None where each part has a kernel, but no two the same.
            first = problem or self._problem(kind, way, shards, kernels[:1], no_kernel)
            return widened, None, first
        refused_by = "mixed_fused" if self._options.mixed_fused == "error" else None
        return widened, None, _Widening("fused-mixed", _describe_mix(kind, parts), refused_by)

    def _problem(
        self,
        kind: Kind,
        parts: tuple[_Part, ...],
        shards: list[Shard],
        kernels: Sequence[Kernel],
        no_kernel: str | None,
    ) -> _Widening | None:
        """Say why no kernel of some serves parts of one scheme, None when one does."""
        for part, shard in zip(parts, shards, strict=True):
            reason = _cut_reason(part.scheme, shard)
            if reason is not None:
                return _Widening("parallel-cut", f"{part.leaf}: {reason}", None)
        reason = _seam_reason(kind, parts, shards)
        if reason is not None:
            return _Widening("fused-seam", reason, None)
        for part, shard in zip(parts, shards, strict=True):
            reason = self._kernel_reason(kind, part, shard, kernels)
            if reason is not None:
                return _Widening("kernel-missing", reason, no_kernel)
        sizes = {part.scheme.group_size for part in parts}
        if kind == "experts" and len(sizes) > 1 and all(each.one_group_size for each in kernels):
            names = ", ".join(kernel.name for kernel in kernels)
            reason = f"{names}: it takes groups of one size, not of {sorted(sizes, key=str)}"
            return _Widening("kernel-missing", reason, no_kernel)
        return None

    def _kernel_reason(
        self, kind: Kind, part: _Part, shard: Shard, kernels: Sequence[Kernel]
    ) -> str | None:
        if len(part.shape) != 2:
            return f"no kernel for {part.scheme.label} of {len(part.shape)} dimensions"
        shape = (shard.rows, shard.columns)
        return missing_kernel(
            self._platform,
            part.scheme,
            kind,
            shape,
            self._base_scheme.format,
            part.arithmetic,
            kernels,
        )

    def _report(self, where: str, widening: _Widening, made: list[Route]) -> None:
        if widening.remedy is not None:
            self._log.add("error", widening.code, where, f"{widening.reason}. {widening.remedy}")
            return
        if widening.refused_by is not None:
            value = "widen" if widening.refused_by == "mixed_fused" else "dequantize"
            self._log.add(
                "error",
                widening.code,
                where,
                f"{widening.reason}, and options.{widening.refused_by} is error. Route it to "
                f"another source, or set {widening.refused_by}: {value}.",
            )
            return
        cost_bytes = sum(route.served_bytes - route.stored_bytes for route in made if route.widened)
        self._log.add(
            "warning",
            widening.code,
            where,
            f"{widening.reason}; dequantised to {self._base_scheme.label} at load",
            cost_bytes=cost_bytes,
        )

    def _report_uncut(self, unit: Unit, problems: tuple[str | None, ...]) -> None:
        for module, problem in zip(unit.modules, problems, strict=True):
            if problem is not None:
                self._log.add(
                    "error",
                    "parallel-size",
                    module,
                    f"{self._size(unit.kind)} does not fit: {problem}. Choose another size.",
                )

    def _size(self, kind: Kind) -> str:
        """Name the parallel size that cuts a unit of this kind."""
        size = f"tensor parallel size {self._layout.tensor_parallel_size}"
        if kind == "experts" and self._layout.data_parallel_size > 1:
            return f"{size} in each of {self._layout.data_parallel_size} data-parallel replicas"
        return size

    def _report_casts(self, made: list[Route]) -> None:
        for route in made:
            if route.served != route.stored and not route.stored.is_quantized:
                self._log.add(
                    "note",
                    "cast",
                    route.module,
                    f"source {route.source!r} stores {route.stored.label}, served as "
                    f"{route.served.label}, the base's dtype",
                    group=f"source {route.source!r}",
                )


def _shared_layouts(parts: tuple[_Part, ...]) -> Iterator[tuple[_Part, ...]]:
    """Yield the parts in each scheme that all of them can be laid out in, as stored first."""
    each = [(part.scheme, *FORMATS[part.scheme.format].layouts(part.scheme)) for part in parts]
    for schemes in product(*each):
        if shared_scheme([(s, part.shape) for s, part in zip(schemes, parts, strict=True)]):
            yield tuple(p._replace(scheme=s) for p, s in zip(parts, schemes, strict=True))


def _make_route(
    module: str,
    assignment: Assignment,
    served: Scheme,
    kernel: str | None,
    widening: _Widening | None,
) -> Route:
    source, chosen, tensors, _, looks = assignment
    stored, reason = chosen.scheme, None
    if widening is not None and stored.is_quantized:
        reason = widening.reason
    return Route(module, source, stored, served, reason, tensors, chosen.shape, looks, kernel)


def shared_scheme(weights: Sequence[tuple[Scheme, tuple[int, ...]]]) -> Scheme | None:
    """Return the one scheme of several weights, None when they have more than one.

    A group that spans all of K is as long as K; weights of unlike K that are all stored so share
    a scheme of group_size -1.
    """
    schemes = {scheme for scheme, _ in weights}
    if len(schemes) == 1:
        return schemes.pop()
    whole = {
        replace(scheme, group_size=PER_CHANNEL)
        if len(shape) == 2 and scheme.group_size == shape[1]
        else scheme
        for scheme, shape in weights
    }
    return whole.pop() if len(whole) == 1 else None


def _describe_mix(kind: Kind, parts: tuple[_Part, ...]) -> str:
    by_scheme: dict[Scheme, list[str]] = {}
    for part in parts:
        by_scheme.setdefault(part.scheme, []).append(part.leaf)
    described = ", ".join(
        f"{' and '.join(leaves)} {'is' if len(leaves) == 1 else 'are'} {scheme.label}"
        for scheme, leaves in by_scheme.items()
    )
    return f"{described}: {'one expert' if kind == 'experts' else 'one fused layer'}"


def _cut_reason(scheme: Scheme, shard: Shard) -> str | None:
    """Say which block or group a tensor-parallel cut runs through, None when none."""
    if scheme.block is not None:
        block_rows, block_columns = scheme.block
        if shard.rows_cut and shard.rows % block_rows:
            return f"a tensor-parallel shard of {shard.rows} rows cuts a block of {block_rows}"
        if shard.columns_cut and shard.columns % block_columns:
            return (
                f"a tensor-parallel shard of {shard.columns} columns cuts a block of "
                f"{block_columns}"
            )
    if scheme.group_size is not None and shard.columns_cut:
        if scheme.desc_act:
            return "a tensor-parallel shard's columns are in groups of every rank (act-order)"
        if shard.columns % scheme.group_size:
            return (
                f"a tensor-parallel shard of {shard.columns} columns cuts a group of "
                f"{scheme.group_size}"
            )
    if scheme.format == "gptq" and shard.rows_cut:
        rows_per_word = 32 // math.gcd(32, scheme.bits)
        if shard.rows % rows_per_word:
            return (
                f"a tensor-parallel shard of {shard.rows} rows cuts a word of {rows_per_word} "
                "packed zero points"
            )
    return None


def _seam_reason(kind: Kind, parts: tuple[_Part, ...], shards: list[Shard]) -> str | None:
    """Say where stacking parts of a fused layer would put a seam inside a block.

    The last part may end in the middle of one, unless it is an expert's (vLLM
    quantization/utils/fp8_utils.py validate_fp8_block_shape and validate_fp8_block_shape_moe).
    """
    for index, (part, shard) in enumerate(zip(parts, shards, strict=True)):
        stacked = (
            part.leaf in _STACKED_EXPERT_PARTS if kind == "experts" else index < len(parts) - 1
        )
        if stacked and part.scheme.block is not None and shard.rows % part.scheme.block[0]:
            return (
                f"{part.leaf} ends inside a block: its {shard.rows} rows are no multiple of "
                f"{part.scheme.block[0]}"
            )
    return None
