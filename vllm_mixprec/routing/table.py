# SPDX-License-Identifier: Apache-2.0
"""The frozen route table: a plan and the headers of its checkpoints, resolved."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_mixprec.checkpoint.formats import PLAIN_DTYPES, Module, Scheme
from vllm_mixprec.checkpoint.index import (
    Checkpoint,
    collector_paused,
    open_checkpoint,
    resolve_path,
)
from vllm_mixprec.errors import CheckpointError, RouteError, UnsupportedError
from vllm_mixprec.plan.plan import Plan
from vllm_mixprec.routing.alike import Alike, gather_alike
from vllm_mixprec.routing.assign import assign_sources, used_sources
from vllm_mixprec.routing.findings import Finding, FindingLog, format_bytes, source_place
from vllm_mixprec.routing.parallel import Placement
from vllm_mixprec.routing.platform import Platform, detect_platform
from vllm_mixprec.routing.route import ExpertGroup, Layout, Route
from vllm_mixprec.routing.structure import ModelDims, indexer_name, layer_index, text_config
from vllm_mixprec.routing.widen import Widener, shared_scheme

__all__ = [
    "ExpertGroup",
    "Layout",
    "Route",
    "RouteTable",
    "build_table",
    "dtype_scheme",
    "load_route_table",
    "open_source",
    "resolve",
]

_PLAIN = {"bf16": Scheme("bf16", 16), "fp16": Scheme("fp16", 16), "fp32": Scheme("fp32", 32)}
_TORCH_DTYPES = {
    "bfloat16": _PLAIN["bf16"],
    "float16": _PLAIN["fp16"],
    "half": _PLAIN["fp16"],
    "float32": _PLAIN["fp32"],
    "float": _PLAIN["fp32"],
}


@dataclass(frozen=True)
class RouteTable:
    """Where every module of the base comes from and how it is served.

    Built once a process and never changed; loader and layers read it. The same plan, headers,
    layout and platform give the same table.

    Attributes:
        plan: the plan it was resolved from.
        base_config: config.json of the base.
        base_scheme: the unquantised scheme that the model computes in.
        layout: parallel sizes that it holds for.
        platform: machine whose kernels it counts on.
        routes: module -> route, for every module of the base, in the base's order; less those
            that no rank loads and their source lacks.
        notes: what is widened, cast or dropped.
    """

    plan: Plan
    base_config: Mapping[str, Any]
    base_scheme: Scheme
    layout: Layout
    platform: Platform
    routes: Mapping[str, Route]
    notes: tuple[Finding, ...]
    _groups: Mapping[str, tuple[ExpertGroup, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_groups", _group_experts(self.alike))

    @cached_property
    def alike(self) -> tuple[Alike, ...]:
        """The routes, those together that differ in nothing but the expert's number."""
        return gather_alike(self.routes)

    @property
    def expert_layers(self) -> tuple[str, ...]:
        """Layers of routed experts, such as ``model.layers.3.mlp.experts``, in base order."""
        return tuple(self._groups)

    def expert_groups(self, layer: str) -> tuple[ExpertGroup, ...]:
        """Return a layer's experts by served scheme: lowest expert first, unquantised last.

        Raises:
            RouteError: the base has no routed experts under that name.
        """
        groups = self._groups.get(layer)
        if groups is None:
            known = f"{self.expert_layers[0]} ..." if self._groups else "none"
            raise RouteError(
                f"{layer}: no layer of routed experts; expected one of the base's ({known}). "
                "Use the base checkpoint's spelling."
            )
        return groups

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which layers are built and how they compute.

        Equal plans need not be equal models: a source can be replaced in place, and a kernel can
        be missing on one machine.
        """
        digest = hashlib.sha256(repr((self.platform, self.layout, self.base_scheme)).encode())
        for module, route in self.routes.items():
            digest.update(repr((module, route.served, route.shape)).encode())
        return digest.hexdigest()

    def digests(self) -> dict[str, str]:
        """Return source -> SHA-256 over what it gives: each tensor's place, and how it is served.

        Equal on all machines that hold the same files, in whatever directories; of a hub's its
        commit counts, which its directory is named after.
        """
        spelt: dict[Scheme | Path, str] = {}
        found: dict[str, Any] = {}
        for module, route in self.routes.items():
            for scheme in (route.stored, route.served):
                if scheme not in spelt:
                    spelt[scheme] = repr(scheme)
            lines = [f"{module} {spelt[route.stored]} {spelt[route.served]}"]
            for suffix, spec in route.tensors.items():
                file = spec.file
                if file not in spelt:
                    is_hub = file.parent.parent.name == "snapshots"
                    spelt[file] = f"{file.parent.name}/{file.name}" if is_hub else file.name
                place = f"{spelt[file]} {spec.start} {spec.end} {spec.view}"
                lines.append(f"{suffix} {spec.name} {spec.dtype} {spec.shape} {place}")
            digest = found.setdefault(route.source, hashlib.sha256())
            digest.update("\n".join(lines).encode())
        return {source: digest.hexdigest() for source, digest in found.items()}

    def bytes_by_source(self) -> dict[tuple[str, str], int]:
        """Return (source, stored format) -> bytes in the files of the tensors that are loaded."""
        dims = ModelDims.from_config(self.base_config)
        totals: Counter[tuple[str, str]] = Counter()
        for alike in self.alike:
            route = alike.example
            if dims.is_loaded(route.module, self.layout.draft):
                totals[route.source, route.stored.format] += alike.num_routes * route.stored_bytes
        return dict(totals)

    def shards_by_source(self) -> dict[str, tuple[Path, ...]]:
        """Return source -> the files, sorted, that routes take tensors from."""
        used: dict[str, set[Path]] = {}
        last = None
        for route in self.routes.values():
            for spec in route.tensors.values():
                if spec.file is not last:  # a path's hash takes longer, and few files follow
                    last = spec.file
                    used.setdefault(route.source, set()).add(last)
        return {source: tuple(sorted(files)) for source, files in used.items()}

    def bytes_per_rank(self) -> tuple[int, ...]:
        """Return what the weights take in memory on each rank, as :class:`Layout` numbers them.

        Raises:
            RouteError: the layers cannot be split over that many pipeline stages.
        """
        placement = Placement(self.layout, ModelDims.from_config(self.base_config))
        return placement.bytes_per_rank(self.alike)


def _group_experts(gathered: Iterable[Alike]) -> dict[str, tuple[ExpertGroup, ...]]:
    layers: dict[str, dict[int, list[Route]]] = {}
    for alike in gathered:
        if alike.layer is not None:
            experts = layers.setdefault(alike.layer, {})
            for expert in alike.experts:
                experts.setdefault(expert, []).append(alike.example)
    return {layer: _group_layer(layer, experts) for layer, experts in layers.items()}


def _group_layer(layer: str, experts: Mapping[int, list[Route]]) -> tuple[ExpertGroup, ...]:
    """Put a layer's experts together that are served alike; one route may stand for several's."""
    schemes: dict[tuple[int, ...], Scheme] = {}
    members: dict[Scheme, list[int]] = {}
    for expert, routes in sorted(experts.items()):
        key = tuple(map(id, routes))
        if key not in schemes:
            scheme = shared_scheme([(route.served, route.shape) for route in routes])
            if scheme is None:
                raise RouteError(
                    f"{layer}.{expert}: its projections are served in several schemes; expected "
                    "one an expert. Resolve the plan again instead of editing routes."
                )
            schemes[key] = scheme
        members.setdefault(schemes[key], []).append(expert)
    ordered = sorted(members.items(), key=lambda item: not item[0].is_quantized)
    return tuple(ExpertGroup(scheme, tuple(ids)) for scheme, ids in ordered)


def dtype_scheme(config: Mapping[str, Any], modules: Mapping[str, Module]) -> Scheme:
    """Return the unquantised scheme that a model computes in, quantised or not.

    It is the config's ``dtype`` (older spelling: ``torch_dtype``); without one, the unquantised
    scheme that holds the most bytes.
    """
    for part in (config, text_config(config)):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key, "")).removeprefix("torch.")
            if name in _TORCH_DTYPES:
                return _TORCH_DTYPES[name]
    sizes: Counter[Scheme] = Counter()
    for module in modules.values():
        if module.scheme.format in PLAIN_DTYPES:
            sizes[module.scheme] += module.nbytes
    return sizes.most_common(1)[0][0] if sizes else _TORCH_DTYPES["bfloat16"]


def build_table(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    layout: Layout,
    platform: Platform,
    log: FindingLog,
    dtype: str | None = None,
) -> RouteTable:
    """Route every module that can be routed; ``log`` takes errors and notes alike.

    With errors in ``log`` the table is only good for counting bytes. ``dtype`` is as in
    :func:`resolve`.
    """
    base = checkpoints[plan.base]
    base_scheme = _PLAIN[dtype] if dtype else dtype_scheme(base.config, base.modules)
    dims = ModelDims.from_config(base.config)
    with collector_paused():
        assignments = assign_sources(plan, checkpoints, dims.is_loaded, layout.draft, log)
        routes = Widener(plan, base_scheme, dims, layout, platform, log).route(assignments)
        _note_shared_indexers(routes, dims, log)
        notes = tuple(finding for finding in log.findings() if finding.level != "error")
        return RouteTable(plan, base.config, base_scheme, layout, platform, routes, notes)


def _note_shared_indexers(routes: Mapping[str, Route], dims: ModelDims, log: FindingLog) -> None:
    """Say which indexers are not loaded, and how much that saves."""
    if dims.index_topk is None:
        return
    shared: Counter[str] = Counter()
    for module, route in routes.items():
        index, indexer = layer_index(module), indexer_name(module)
        if index is not None and indexer is not None and not dims.builds_indexer(index):
            shared[indexer] += route.stored_bytes
    for indexer in shared:
        log.add(
            "note",
            "indexer-shared",
            indexer,
            "config.json has these layers reuse the selection of the layer before: such indexers "
            f"are not loaded, {format_bytes(shared.total())} in all",
            noun="indexers",
        )


def resolve(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    layout: Layout | None = None,
    platform: Platform | None = None,
    dtype: str | None = None,
) -> RouteTable:
    """Route every module of the base to its source; ``check`` lists every problem instead.

    Args:
        checkpoints: the base and every source that a rule names, by the plan's names.
        layout: parallel sizes; None for one rank.
        platform: None for this machine.
        dtype: format that the model computes in, such as "bf16"; None for the base's own.

    Raises:
        RouteError: the first thing that cannot be routed.
    """
    for source in used_sources(plan):
        if source not in checkpoints:
            raise RouteError(
                f"source {source!r} is used by the plan but was not opened; expected "
                f"{', '.join(used_sources(plan))}. Open it, or call load_route_table."
            )
    log = FindingLog()
    layout, platform = layout or Layout(), platform or detect_platform()
    table = build_table(plan, checkpoints, layout, platform, log, dtype)
    for finding in log.findings():
        if finding.level == "error":
            raise RouteError(f"{finding.where}: {finding.message}")
    return table


def open_source(plan: Plan, name: str) -> Checkpoint:
    """Open one of a plan's checkpoints, its path relative to the plan's folder.

    Raises:
        CheckpointError, UnsupportedError: as ``resolve_path`` and ``open_checkpoint`` do.
    """
    source = plan.sources[name]
    return open_checkpoint(resolve_path(source.path, source.revision, plan.base_dir), name)


def load_route_table(
    plan: Plan,
    layout: Layout | None = None,
    platform: Platform | None = None,
    dtype: str | None = None,
) -> RouteTable:
    """Open the checkpoints that a plan uses and resolve it.

    Raises:
        RouteError, CheckpointError, UnsupportedError: the first problem found.
    """
    checkpoints = {}
    for name in used_sources(plan):
        try:
            checkpoints[name] = open_source(plan, name)
        except (CheckpointError, UnsupportedError) as error:
            raise type(error)(f"{source_place(plan, name)}: {error}") from error
    return resolve(plan, checkpoints, layout, platform, dtype)
