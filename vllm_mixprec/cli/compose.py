# SPDX-License-Identifier: Apache-2.0
"""``vllm-mixprec compose``: a directory that vLLM serves as it is."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from vllm_mixprec.checkpoint.index import collector_paused
from vllm_mixprec.cli.check import add_platform, print_bytes_per_rank
from vllm_mixprec.cli.output import (
    Progress,
    count_findings,
    print_bytes_by_source,
    print_findings,
    print_json,
)
from vllm_mixprec.composition import PLAN_FILE, ComposeRefused, compose
from vllm_mixprec.plan import Plan

_DESCRIPTION = """\
Write a directory that vLLM serves as it is: config.json, the plan, tokenizer and generation files,
and links to the shards in use. No tensor bytes are copied. The plan is checked first; with errors
nothing is written."""

_EXAMPLE = """\
example:
  vllm-mixprec compose plan.yaml -o mixed/
  vllm serve mixed/"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compose",
        help="write a directory that vLLM serves as it is",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument("plan", metavar="PLAN", type=Path, help="the plan's YAML file")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="the directory to write"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also replace a directory that is not empty and that compose did not make",
    )
    add_platform(parser)
    return parser


@collector_paused()
def run(arguments: argparse.Namespace) -> int:
    """Check and compose, say where it went, return the exit code."""
    plan = Plan.from_yaml(arguments.plan)
    with Progress() as progress:
        progress("checking and composing", 0, 1)
        try:
            report = compose(plan, arguments.output, arguments.force, arguments.platform)
            code = 0
        except ComposeRefused as refused:
            report = refused.report
            code = 1
    serve = f"vllm serve {shlex.quote(str(arguments.output))}"
    if arguments.json:
        print_json(report.to_dict() | _describe_output(arguments.output, serve, code == 0))
        return code
    print_findings(report.findings)
    if report.table is None:
        print(f"{arguments.plan}: {count_findings(report.findings)}. Nothing was written.")
        return code
    print_bytes_per_rank(report, tp_size=1)
    print_bytes_by_source(report.table.bytes_by_source())
    print(f"wrote {arguments.output.resolve()}")
    print(serve)
    return code


def _describe_output(directory: Path, serve: str, is_written: bool) -> dict[str, Any]:
    """Say what was written; its plan has paths of its own, and so a hash of its own."""
    if not is_written:
        return {"directory": None}
    composed = Plan.from_yaml(directory / PLAN_FILE)
    return {"directory": str(directory.resolve()), "plan_sha256": composed.sha256, "serve": serve}
