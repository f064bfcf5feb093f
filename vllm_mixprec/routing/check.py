# SPDX-License-Identifier: Apache-2.0
"""Every finding about a plan at once: from headers, routers and norms, or from every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from vllm_mixprec.checkpoint.hub import fetch, is_available
from vllm_mixprec.checkpoint.index import Checkpoint, collector_paused, local_path
from vllm_mixprec.errors import CheckpointError, PlanError, RouteError, UnsupportedError
from vllm_mixprec.plan.plan import Plan
from vllm_mixprec.routing.agreement import compare_headers
from vllm_mixprec.routing.arithmetic import compare_arithmetic
from vllm_mixprec.routing.assign import used_sources
from vllm_mixprec.routing.findings import Finding, FindingLog, source_place
from vllm_mixprec.routing.indexers import report_split_selections
from vllm_mixprec.routing.norms import compare_norms
from vllm_mixprec.routing.platform import Platform, detect_platform
from vllm_mixprec.routing.route import Layout
from vllm_mixprec.routing.sources import compare_configs, compare_routers
from vllm_mixprec.routing.structure import ModelDims
from vllm_mixprec.routing.table import RouteTable, build_table, open_source

CACHE_SCALES = frozenset({"q_scale", "k_scale", "v_scale", "prob_scale"})

__all__ = ["Finding", "Progress", "Report", "check"]

Progress = Callable[[str, int, int], None]
"""Called as progress(what is done next, steps done, steps in all)."""


@dataclass(frozen=True)
class Report:
    """What ``check`` found.

    Attributes:
        findings: errors first.
        bytes_per_rank: what the weights take in memory as served, by rank as :class:`Layout`
            numbers them; empty when a source is missing or a module cannot be routed.
        table: the route table; None when there are errors.
        sampled_routers: sources that are on the hub, of whose routers only the first rows were
            compared with the base's.
    """

    findings: tuple[Finding, ...]
    bytes_per_rank: tuple[int, ...]
    table: RouteTable | None
    sampled_routers: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the plan can be served: no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, without the routes."""
        report: dict[str, Any] = {
            "ok": self.ok,
            "findings": [finding.to_dict() for finding in self.findings],
            "bytes_per_rank": list(self.bytes_per_rank),
            "sampled_routers": list(self.sampled_routers),
        }
        if self.table is not None:
            layout = self.table.layout
            report |= {
                "plan_sha256": self.table.plan.sha256,
                "platform": self.table.platform.name,
                "tensor_parallel_size": layout.tensor_parallel_size,
                "pipeline_parallel_size": layout.pipeline_parallel_size,
                "expert_parallel": layout.expert_parallel,
                "draft": layout.draft,
                "data_parallel_size": layout.data_parallel_size,
                "bytes_by_source": [
                    {"source": source, "format": stored, "bytes": size_bytes}
                    for (source, stored), size_bytes in self.table.bytes_by_source().items()
                ],
            }
        return report


def check(
    plan: Plan,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    expert_parallel: bool = False,
    platform: Platform | None = None,
    progress: Progress | None = None,
    dtype: str | None = None,
    *,
    draft: bool = False,
    data_parallel_size: int = 1,
    deep: bool = False,
) -> Report:
    """Find everything that is wrong or notable about a plan; nothing is raised for its faults.

    Args:
        platform: whose kernels count; None for this machine.
        progress: told before each step.
        dtype: format that the model computes in, such as "bf16"; None for the base's own.
        draft: load the model's own MTP layers as the draft model, and require them.
        data_parallel_size: replicas that share the routed experts.
        deep: read the tensors too, and compare what is routed with the base. Imports torch; shows
            a bar on stderr where there is a ``progress``.

    Raises:
        ValueError: a parallel size below 1.
        UnsupportedError: VLLM_MIXPREC_PLATFORM holds no platform's name; ``deep`` without torch.
    """
    report, _ = examine(
        plan,
        Layout(
            tensor_parallel_size,
            pipeline_parallel_size,
            expert_parallel,
            draft,
            data_parallel_size,
        ),
        platform,
        progress,
        dtype,
        deep=deep,
    )
    return report


def examine(
    plan: Plan,
    layout: Layout | None = None,
    platform: Platform | None = None,
    progress: Progress | None = None,
    dtype: str | None = None,
    *,
    deep: bool = False,
) -> tuple[Report, dict[str, Checkpoint]]:
    """As ``check``; also return the plan's checkpoints that could be opened, by source."""
    layout = layout or Layout()
    platform = platform or detect_platform()
    # Paused throughout: when the collector runs again it walks all that was made meanwhile.
    with nullcontext() if deep else collector_paused():
        return _examine(plan, layout, platform, progress, dtype, deep)


def _examine(
    plan: Plan,
    layout: Layout,
    platform: Platform,
    progress: Progress | None,
    dtype: str | None,
    deep: bool,
) -> tuple[Report, dict[str, Checkpoint]]:
    log = FindingLog()
    _report_older_spelling(plan, log)
    sources = used_sources(plan)
    steps = len(sources) + (3 if deep else 2)

    def step(what: str, done: int) -> None:
        if progress is not None:
            progress(what, done, steps)

    checkpoints: dict[str, Checkpoint] = {}
    for index, name in enumerate(sources):
        step(f"reading headers of {name}", index)
        checkpoint = _open(plan, name, log)
        if checkpoint is not None:
            checkpoints[name] = checkpoint
    _report_unused(plan, log)
    if plan.base not in checkpoints:
        return Report(log.findings(), (), None), checkpoints

    compare_headers(checkpoints[plan.base], layout.draft, log)
    for name in compare_configs(plan, checkpoints, log):
        del checkpoints[name]  # what another model's files lack or hold is no news
    compare_arithmetic(plan, checkpoints, log)
    step("comparing routers", len(sources))
    sampled = compare_routers(plan, checkpoints, log)
    step("routing modules", len(sources) + 1)
    try:
        table = build_table(plan, checkpoints, layout, platform, log, dtype)
    except PlanError as error:  # a pattern that cannot be tried on the names there are
        log.add("error", "plan-invalid", str(plan.path or "plan"), str(error))
        return Report(log.findings(), (), None), checkpoints
    _report_absent_shards(table, log)
    compare_norms(table, checkpoints, log)
    _report_cache_scales(table, log)
    bytes_per_rank = _bytes_per_rank(table, checkpoints[plan.base], log)
    if deep:
        step("reading tensors", len(sources) + 2)
        _read_tensors(table, checkpoints, log, has_bar=progress is not None)
    step("done", steps)
    served = None if log.has_errors else table
    return Report(log.findings(), bytes_per_rank, served, sampled), checkpoints


def _report_older_spelling(plan: Plan, log: FindingLog) -> None:
    if plan.dropped is None:
        return
    ignored = f"; not read, as no part of a plan: {', '.join(plan.dropped)}" if plan.dropped else ""
    log.add(
        "note",
        "older-spelling",
        str(plan.path or "plan"),
        f"mixed_precision: is an older spelling of a plan{ignored}. Rewrite it with vllm-mixprec "
        "plan --from.",
    )


def _report_cache_scales(table: RouteTable, log: FindingLog) -> None:
    """Report scales of the key-value cache that are no companions of a quantised weight.

    Those are dropped with a note; these would reach the model, which has no place for them.
    """
    dims = ModelDims.from_config(table.base_config)
    for module, route in table.routes.items():
        if CACHE_SCALES.isdisjoint(route.tensors):
            continue
        scales = CACHE_SCALES.intersection(route.tensors)
        if dims.is_loaded(module, table.layout.draft):
            log.add(
                "error",
                "cache-scale",
                module,
                f"source {route.source!r} has {', '.join(sorted(scales))} here: a mixed model's "
                "key-value cache has no scales, and no place for them. Remove these tensors from "
                "the checkpoint, or choose another source.",
            )


def _read_tensors(
    table: RouteTable, checkpoints: Mapping[str, Checkpoint], log: FindingLog, has_bar: bool
) -> None:
    try:
        from tqdm import tqdm

        from vllm_mixprec.routing import deep
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"--deep reads tensors with {error.name}, which is not installed; expected torch and "
            "numpy. Install vLLM beside this package, or torch alone"
        ) from error
    fetch(file for file in deep.files(table, checkpoints) if is_available(file))
    with tqdm(
        total=deep.count_bytes(table, checkpoints),
        desc="Reading tensors",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not has_bar,
    ) as bar:
        deep.examine(table, checkpoints, log, bar.update)


def _open(plan: Plan, name: str, log: FindingLog) -> Checkpoint | None:
    try:
        checkpoint = open_source(plan, name)
        ModelDims.from_config(checkpoint.config)
        for note in checkpoint.notes:
            log.add("note", "source-files", source_place(plan, name), note)
        return checkpoint
    except CheckpointError as error:
        log.add("error", "source-unreadable", source_place(plan, name), str(error))
    except UnsupportedError as error:
        log.add("error", "source-unsupported", source_place(plan, name), str(error))
    return None


def _report_unused(plan: Plan, log: FindingLog) -> None:
    """Warn of declared sources that no rule uses and that are not there either."""
    used = used_sources(plan)
    for name, source in plan.sources.items():
        is_local = source.path.startswith(("/", ".", "~"))  # else it may be a hub id
        if name in used or not is_local:
            continue
        try:
            path = local_path(source.path, plan.base_dir)
            problem = "" if path.is_dir() else f"{path}: no such directory."
        except CheckpointError as error:
            problem = str(error)
        if problem:
            log.add(
                "warning",
                "source-unreadable",
                source_place(plan, name),
                f"{problem} No rule uses it: remove the source, or correct its path.",
            )


def _report_absent_shards(table: RouteTable, log: FindingLog) -> None:
    """Report shards of which only the header is here, though the plan takes tensors from them."""
    for files in table.shards_by_source().values():
        for file in files:
            if not is_available(file):
                log.add(
                    "error",
                    "index-mismatch",
                    str(file),
                    "only its header is here, expected the shard, from which the plan takes "
                    "tensors. Download it, or compose the plan again where its sources are.",
                    noun="shards",
                )


def _bytes_per_rank(table: RouteTable, base: Checkpoint, log: FindingLog) -> tuple[int, ...]:
    dims = ModelDims.from_config(base.config)
    try:
        sizes = table.bytes_per_rank()
        if not table.platform.family.startswith("cpu"):  # there DSA is served dense
            report_split_selections(dims, table.layout, log)
    except RouteError as error:
        log.add("error", "parallel-size", "pipeline parallel size", str(error))
        return ()
    absent = base.modules.keys() - table.routes.keys()
    return () if any(dims.is_loaded(name, table.layout.draft) for name in absent) else sizes
