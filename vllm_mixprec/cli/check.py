# SPDX-License-Identifier: Apache-2.0
"""``vllm-mixprec check``: every finding about a plan, and what it takes in memory."""

import argparse
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_mixprec.checkpoint.index import collector_paused
from vllm_mixprec.cli.output import (
    Progress,
    count_findings,
    print_bytes_by_source,
    print_findings,
    print_json,
    print_table,
)
from vllm_mixprec.composition import composed_plan, composed_quantization, plan_change
from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Finding, Layout, Platform, Report, check
from vllm_mixprec.routing.findings import format_bytes

_DESCRIPTION = """\
Report everything that is wrong or notable about a plan. Nothing is read but headers and the few
megabytes of routers and norms; with --deep, every tensor that is served. Exit code 1 with errors,
and with --strict also with warnings and notes."""

_EXAMPLE = """\
example:
  vllm-mixprec check plan.yaml -tp 2 --strict"""

_PLATFORMS = "cpu-avx512, cpu-other, cuda-<compute capability> such as cuda-90, or other"
_PLATFORM = re.compile(r"cpu-avx512|cpu-other|cuda-\d{2,3}|other")
_PLACE = re.compile(r"(?P<where>.+?:\d+): (?P<message>.+)")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="every finding about a plan, and bytes per rank",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "plan",
        metavar="PLAN",
        type=Path,
        help="the plan's YAML file, or a directory made by compose",
    )
    add_layout(parser)
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also read the tensors: broken scales, and weights that differ from the base's by "
        "more than their format explains",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 for warnings and notes too"
    )
    return parser


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how and where a model will be served."""
    parser.add_argument(
        "-tp", "--tensor-parallel-size", metavar="N", type=_size, default=1, help="default: 1"
    )
    parser.add_argument(
        "-pp", "--pipeline-parallel-size", metavar="N", type=_size, default=1, help="default: 1"
    )
    parser.add_argument(
        "-ep",
        "--enable-expert-parallel",
        action="store_true",
        help="tensor-parallel ranks hold whole experts, not slices",
    )
    parser.add_argument(
        "--mtp",
        action="store_true",
        help="for serving with --speculative-config mtp: count the model's own multi-token "
        "prediction layers, loaded as the draft model, and require them",
    )
    add_platform(parser)


def layout_of(arguments: argparse.Namespace) -> Layout:
    """Return the layout that the options say."""
    return Layout(
        arguments.tensor_parallel_size,
        arguments.pipeline_parallel_size,
        arguments.enable_expert_parallel,
        arguments.mtp,
    )


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 1 or more")
    return int(text)


def add_platform(parser: argparse.ArgumentParser) -> None:
    """Add the option that names where a model will be served."""
    parser.add_argument(
        "--platform",
        metavar="NAME",
        type=_platform,
        help=f"whose kernels count: {_PLATFORMS}; a CPU so named has no AMX; default: this machine",
    )


def _platform(text: str) -> Platform:
    if not _PLATFORM.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected {_PLATFORMS}")
    return Platform(text)


def run(arguments: argparse.Namespace) -> int:
    """Check the plan, print the report, return the exit code."""
    directory = arguments.plan
    arguments.plan = composed_plan(directory) or directory
    with nullcontext() if arguments.deep else collector_paused():
        report = _check(arguments, composed_quantization(directory) or {})
        if arguments.json:
            print_json(_describe(report, arguments))
        else:
            _print(report, arguments)
    return 1 if not report.ok or (arguments.strict and report.findings) else 0


def _describe(report: Report, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the report as JSON types; what it was asked for is there with errors too."""
    return {
        "plan": str(arguments.plan),
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "pipeline_parallel_size": arguments.pipeline_parallel_size,
        "expert_parallel": arguments.enable_expert_parallel,
        "draft": arguments.mtp,
        "deep": arguments.deep,
        **report.to_dict(),
    }


def _check(arguments: argparse.Namespace, quantization: Mapping[str, Any]) -> Report:
    try:
        plan = Plan.from_yaml(arguments.plan)
    except PlanError as error:
        return Report(_plan_findings(arguments.plan, error), (), None)
    with Progress() as progress:
        report = check(
            plan,
            tensor_parallel_size=arguments.tensor_parallel_size,
            pipeline_parallel_size=arguments.pipeline_parallel_size,
            expert_parallel=arguments.enable_expert_parallel,
            platform=arguments.platform,
            progress=progress,
            draft=arguments.mtp,
            deep=arguments.deep,
        )
    changed = plan_change(plan, quantization)
    if changed is None:
        return report
    finding = Finding("error", "plan-invalid", str(arguments.plan), changed)
    return replace(report, findings=(finding, *report.findings), table=None)


def _plan_findings(plan: Path, error: PlanError) -> tuple[Finding, ...]:
    """Turn the lines of a PlanError into findings, so that a broken plan is reported alike."""
    findings = []
    for line in str(error).splitlines():
        place = _PLACE.fullmatch(line)
        where, message = str(plan), line.removeprefix(f"{plan}: ")
        if place is not None:
            where, message = place.group("where", "message")
        findings.append(Finding("error", "plan-invalid", where, message))
    return tuple(findings)


def _print(report: Report, arguments: argparse.Namespace) -> None:
    print_findings(report.findings)
    print_bytes_per_rank(report, arguments.tensor_parallel_size)
    if report.sampled_routers:
        sources = ", ".join(report.sampled_routers)
        print(f"Routers of {sources}: the first rows were compared, the rest is on the hub.")
    counts = count_findings(report.findings)
    if report.table is None:
        print(f"{arguments.plan}: {counts}. The plan cannot be served.")
        return
    print_bytes_by_source(report.table.bytes_by_source())
    verdict = f"{counts}; the plan can be served" if counts else "no findings"
    print(f"{arguments.plan}: {verdict} on {report.table.platform.name}.")


def print_bytes_per_rank(report: Report, tp_size: int) -> None:
    """Print what the weights take in each rank's memory, when that could be counted."""
    if not report.bytes_per_rank:
        return
    rows = [
        [str(rank), str(rank // tp_size), str(rank % tp_size), format_bytes(size_bytes)]
        for rank, size_bytes in enumerate(report.bytes_per_rank)
    ]
    columns = ["rank", "pipeline stage", "tensor-parallel rank", "weights in memory"]
    print_table(columns, rows, right=columns)
