# SPDX-License-Identifier: Apache-2.0
"""What only the tensors themselves say: broken scales, and weights that are not the base's.

Every routed module is read from its source, in the order of its files, and its counterpart from
the base, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

from vllm_mixprec.checkpoint.formats import Module
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.folds import judge
from vllm_mixprec.routing.pairs import pairs_of, report_packing, scan
from vllm_mixprec.routing.route import Route
from vllm_mixprec.routing.structure import ModelDims
from vllm_mixprec.routing.table import RouteTable
from vllm_mixprec.routing.verdicts import Verdicts


def examine(
    table: RouteTable,
    checkpoints: Mapping[str, Checkpoint],
    log: FindingLog,
    advance: Callable[[int], object],
    only: Container[str] | None = None,
) -> None:
    """Read every tensor that is served and report what is wrong with it.

    Some 50 MiB of tensors live at a time, besides the stored words of one GPTQ or AWQ module, of
    the one that takes its folded factors back and of their counterparts, and a kilobyte for each
    weight that was read.

    Args:
        advance: told the bytes of each module that is done; :func:`count_bytes` in all.
        only: modules that are read; None for all.

    Raises:
        CheckpointError: a file changed since its header was read.
    """
    verdicts = Verdicts(table)
    alone: list[str] = []
    for route, module, base in _modules(table, checkpoints, only):
        if base is None and route.source != table.plan.base:
            alone.append(route.module)
        if not module.problems and module.shape == route.shape:
            for pair in pairs_of(route, base):
                comparison = None if report_packing(pair, log) else scan(pair, table, log)
                if comparison is None:
                    continue
                judge(pair, comparison, table, checkpoints, verdicts)
        advance(route.stored_bytes + (base.nbytes if base is not None else 0))
    verdicts.report(log)
    if alone and only is None:
        log.add(
            "note",
            "not-compared",
            str(checkpoints[table.plan.base].path),
            f"the base's shards of {len(alone)} modules, {alone[0]} among them, are not here: what "
            "their sources hold was read, and compared with nothing. Check the plan that the "
            "directory was composed from.",
        )


def files(table: RouteTable, checkpoints: Mapping[str, Checkpoint]) -> set[Path]:
    """Return the shards that :func:`examine` reads, be they here or on the hub."""
    routes = [route for route in table.routes.values() if route.tensors]
    specs = [spec for route in routes for spec in route.tensors.values()]
    for route in routes:
        if route.source != table.plan.base:
            specs += checkpoints[table.plan.base].modules[route.module].tensors.values()
    return {spec.file for spec in specs}


def count_bytes(table: RouteTable, checkpoints: Mapping[str, Checkpoint]) -> int:
    """Return how many bytes :func:`examine` reads."""
    return sum(
        route.stored_bytes + (base.nbytes if base is not None else 0)
        for route, _, base in _modules(table, checkpoints)
    )


def _modules(
    table: RouteTable,
    checkpoints: Mapping[str, Checkpoint],
    only: Container[str] | None = None,
) -> Iterator[tuple[Route, Module, Module | None]]:
    """Yield what is served in file order: route, its module, the base's when that is another."""
    dims = ModelDims.from_config(table.base_config)
    routes = [
        route
        for module, route in table.routes.items()
        if route.tensors
        and (only is None or module in only)
        and dims.is_loaded(module, table.layout.draft)
    ]
    base = table.plan.base
    for route in sorted(routes, key=_position):
        module = checkpoints[route.source].find(route.module)
        assert module is not None, f"{route.module} is routed to {route.source}"
        other = None if route.source == base else checkpoints[base].modules[route.module]
        if other is not None and not all(s.file.exists() for s in other.tensors.values()):
            other = None  # in a shard that compose did not need
        yield route, module, other


def _position(route: Route) -> tuple[str, int]:
    first = min(route.tensors.values(), key=lambda spec: spec.start)
    return str(first.file), first.start
