# SPDX-License-Identifier: Apache-2.0
"""``vllm-mixprec plan``: writes a plan by kind of module, or from one in an older spelling."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from vllm_mixprec.checkpoint import open_checkpoint, resolve_path
from vllm_mixprec.checkpoint.index import local_path
from vllm_mixprec.cli.draft import (
    Choice,
    DraftSource,
    draft_rules,
    read_draft,
    spell_path,
    write_draft,
)
from vllm_mixprec.cli.output import (
    Progress,
    bytes_by_source_list,
    count_findings,
    print_bytes_by_source,
    print_json,
)
from vllm_mixprec.composition import SOURCES_FOLDER, composed_plan
from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan import Plan
from vllm_mixprec.plan.yaml_file import has_comments
from vllm_mixprec.routing import resolve
from vllm_mixprec.routing.kinds import Kind

_DESCRIPTION = """\
Write a plan that takes each kind of module from one source. What no option names comes from the
base. The bytes that are read from each source go to stderr.

With --from rewrite a plan in an older spelling (mixed_precision:) or with weight_mapping: as rules.
Its sections inference: and server:, model.name, paths that are empty, and comments are dropped and
named; any other key that is not known is an error."""

_EXAMPLE = """\
example:
  vllm-mixprec plan --base bf16 --source bf16=/models/Qwen3-30B-A3B \\
    --source fp8=/models/Qwen3-30B-A3B-FP8 --source int4=Qwen/Qwen3-30B-A3B-GPTQ-Int4@main \\
    --attention fp8 --experts int4 -o plan.yaml

--experts also takes several sources, for the logical experts 0-7 and 12, and for all others:
    --experts 0-7=int4,12=int4,fp8

  vllm-mixprec plan --from mixed_precision_config.yaml -o plan.yaml"""

# Option -> the kind that it names a source for, in the order of the rules.
_KIND_OPTIONS: dict[str, Kind] = {
    "attention": "attention",
    "mlp": "dense_mlp",
    "shared_experts": "shared_experts",
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_EXPERTS = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+))?=(?P<source>.+)")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="write a plan by kind of module, or rewrite an older one",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "--base",
        metavar="N",
        help="the source that gives config.json, tokenizer and all that no option names",
    )
    parser.add_argument(
        "--source",
        metavar="N=PATH",
        dest="sources",
        action="append",
        type=_source,
        default=[],
        help="a checkpoint and its name: a directory, or a hub id with an optional @REVISION",
    )
    parser.add_argument("--attention", metavar="N", help="source of the attention projections")
    parser.add_argument("--mlp", metavar="N", help="source of the dense layers' MLP")
    parser.add_argument(
        "--experts",
        metavar="N",
        type=_experts,
        default=[],
        help="source of the routed experts; or FIRST-LAST=N,... for some of them",
    )
    parser.add_argument("--shared-experts", metavar="N", help="source of the shared experts")
    parser.add_argument(
        "--from", metavar="OLD", dest="older", type=Path, help="the plan to rewrite, alone"
    )
    parser.add_argument(
        "-o", "--output", metavar="PLAN", type=Path, help="the file to write; default: stdout"
    )
    parser.add_argument("--force", action="store_true", help="also replace a file that is there")
    return parser


def _source(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not path or not _NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected N=PATH with a name of letters, digits, '_', '.' and '-'"
        )
    return name, path


def _experts(text: str) -> list[Choice]:
    """Read ``int4``, or ``0-7=int4,12=int4,fp8``, in the order of the rules."""
    choices: list[Choice] = []
    named: frozenset[int] = frozenset()
    for item in text.split(","):
        if choices and choices[-1].experts is None:
            raise argparse.ArgumentTypeError(f"{text!r}: nothing is left for {item!r}")
        found = _EXPERTS.fullmatch(item)
        if found is None:
            if not _NAME.fullmatch(item):
                raise argparse.ArgumentTypeError(
                    f"{text!r}, expected a source's name, or FIRST-LAST=NAME,..."
                )
            choices.append(Choice("routed_experts", item, except_experts=named))
            continue
        first, last = int(found["first"]), int(found["last"] or found["first"])
        experts = frozenset(range(first, last + 1))
        if not experts or experts & named:
            raise argparse.ArgumentTypeError(
                f"{item!r} runs backwards or repeats experts, expected FIRST-LAST=NAME"
            )
        choices.append(Choice("routed_experts", found["source"], experts))
        named |= experts
    return choices


def run(arguments: argparse.Namespace) -> int:
    """Draft the plan, write it, say what is read from where; or rewrite one.

    Raises:
        PlanError: the output is there already; before anything is read.
    """
    if arguments.output is not None and not arguments.force and os.path.isfile(arguments.output):
        raise PlanError(
            f"{arguments.output}: there already, expected a new file. Choose another, or pass "
            "--force to replace it."
        )
    if arguments.older is not None:
        return _rewrite(arguments)
    if arguments.base is None or not arguments.sources:
        arguments.parser.error(
            "the following arguments are required: --base and --source, or --from"
        )
    choices = _choices(arguments)
    folder = arguments.output.parent if arguments.output is not None else Path()
    sources = []
    with Progress() as progress:
        for number, (name, path) in enumerate(arguments.sources):
            progress(f"reading headers of {name}", number, len(arguments.sources))
            sources.append(_open(name, path, folder))
    opened = {source.name: source.checkpoint for source in sources}
    rules = [
        rule
        for choice in choices
        if choice.source != arguments.base or choice.experts is not None
        for rule in draft_rules(choice, opened[arguments.base], opened[choice.source])
    ]
    text = write_draft(arguments.base, sources, rules)
    plan = read_draft(text, folder)
    table = resolve(plan, opened)
    sizes = table.bytes_by_source()
    findings = [finding.to_dict() for finding in table.notes]
    more = {"bytes_by_source": bytes_by_source_list(sizes), "findings": findings}
    _put_out(arguments, plan, text, more)
    if arguments.json:
        return 0
    print_bytes_by_source(sizes, to_stderr=True)
    if table.notes:
        print(f"{count_findings(table.notes)}; vllm-mixprec check lists them", file=sys.stderr)
    return 0


def _rewrite(arguments: argparse.Namespace) -> int:
    """Write a plan in today's spelling, with its paths as seen from where it is written."""
    options = ("base", "sources", *_KIND_OPTIONS, "experts")
    if any(getattr(arguments, option) for option in options):
        arguments.parser.error("--from takes the whole plan from a file; leave the others out")
    old = Plan.from_yaml(arguments.older)
    is_commented = has_comments(arguments.older)  # now, for it may be the file that is written
    folder = arguments.output.parent if arguments.output is not None else Path()
    sources = {
        name: {"path": _respell(source.path, arguments.older.parent, folder)}
        | ({} if source.revision is None else {"revision": source.revision})
        for name, source in old.sources.items()
    }
    plan = Plan.from_dict(old.model_dump(exclude_none=True) | {"sources": sources}, folder)
    text = plan.to_yaml()
    dropped = [*(old.dropped or ()), *(["comments"] if is_commented else [])]
    _put_out(arguments, plan, text, {"dropped": dropped})
    if not arguments.json:
        rules = f"{len(plan.rules)} rule{'s' if len(plan.rules) != 1 else ''}"
        said = f"dropped: {', '.join(dropped)}" if dropped else "nothing was dropped"
        print(f"{arguments.older}: {rules}; {said}", file=sys.stderr)
    return 0


def _respell(path: str, old: Path, new: Path) -> str:
    """Spell a source's path for a plan in another folder; a hub id stays what it is."""
    directory = local_path(path, old)
    is_relative = not os.path.isabs(os.path.expanduser(path))
    moves = is_relative and (directory.is_dir() or path.startswith(os.curdir))
    return spell_path(directory, new) if moves else path


def _choices(arguments: argparse.Namespace) -> list[Choice]:
    """Gather the options by kind; a source that was not given is wrong usage."""
    choices = [
        Choice(kind, source)
        for option, kind in _KIND_OPTIONS.items()
        if (source := getattr(arguments, option)) is not None
    ]
    choices += arguments.experts
    names = [name for name, _ in arguments.sources]
    for name in names:
        if names.count(name) > 1:
            arguments.parser.error(f"--source {name} is given twice")
    for name in [arguments.base, *(choice.source for choice in choices)]:
        if name not in names:
            arguments.parser.error(f"no --source {name}=PATH; given are {', '.join(names)}")
    return choices


def _open(name: str, spelt: str, folder: Path) -> DraftSource:
    """Open a source: a directory below the working directory, else a hub id."""
    directory = Path(spelt).expanduser()
    if composed_plan(directory) is not None:
        raise PlanError(
            f"{directory}: made by compose, expected a checkpoint. Name one of its sources, "
            f"{directory / SOURCES_FOLDER / 'NAME'}."
        )
    if directory.is_dir():
        path = spell_path(directory, folder)
        return DraftSource(name, path, None, open_checkpoint(directory, name))
    hub_id, separator, revision = spelt.partition("@")
    found = resolve_path(hub_id, revision if separator else None, None)
    return DraftSource(name, hub_id, revision if separator else None, open_checkpoint(found, name))


def _put_out(arguments: argparse.Namespace, plan: Plan, text: str, more: dict[str, Any]) -> None:
    """Write the plan where it was asked for; with ``--json`` describe it, and ``more``."""
    if arguments.output is not None:
        _write(arguments.output, text)
    elif not arguments.json:
        print(text, end="")
    if arguments.json:
        print_json(
            {
                "path": str(arguments.output) if arguments.output is not None else None,
                "plan_sha256": plan.sha256,
                "plan": plan.model_dump(exclude_none=True),
                "yaml": text,
            }
            | more
        )


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"{file}: cannot be written ({error.strerror or error}). Choose another file."
        ) from error
