# SPDX-License-Identifier: Apache-2.0
"""``vllm-mixprec inspect``: what a checkpoint or a plan holds, layer by layer."""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_mixprec.checkpoint import Checkpoint, open_checkpoint, resolve_path
from vllm_mixprec.cli.check import add_layout, layout_of
from vllm_mixprec.cli.output import (
    Progress,
    bytes_by_source_list,
    print_bytes_by_source,
    print_findings,
    print_json,
    print_table,
)
from vllm_mixprec.composition import composed_plan, composed_quantization, plan_change
from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Layout, RouteTable, load_route_table
from vllm_mixprec.routing.findings import format_bytes
from vllm_mixprec.routing.fused import parse_expert
from vllm_mixprec.routing.kinds import KIND_LABELS, KINDS, Kind, kind_of, spell_ranges
from vllm_mixprec.routing.parts import fold_layers, layer_parts
from vllm_mixprec.routing.structure import ModelDims, layer_index, layer_name, text_config

_DESCRIPTION = """\
Show what a source holds: architecture, layers, experts, formats, bytes by kind, companions missing
or left over. For a plan or a composed directory: where each layer comes from, in which format, and
what is widened and why, in one process on this machine or as the options say. Headers only. Exit
code 1 when companions or shards are missing or left over."""

_EXAMPLE = """\
examples:
  vllm-mixprec inspect /models/Qwen3-30B-A3B-FP8
  vllm-mixprec inspect Qwen/Qwen3-30B-A3B-GPTQ-Int4 --json
  vllm-mixprec inspect plan.yaml
  vllm-mixprec inspect mixed/ -tp 8 --platform cuda-90"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="what a checkpoint, plan or composed directory holds",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=_source,
        help="a checkpoint directory, a hub id, a plan, or a directory made by compose",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_layout(parser.add_argument_group("of a plan or a composed directory"))
    return parser


def _source(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("'', expected a directory, a hub id or a plan")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Describe the source, return 1 when something in it does not fit together.

    Raises:
        PlanError: the plan of a composed directory is not the one that was composed.
        RouteError: the plan cannot be served so.
        SystemExit: with code 2, of options that are not for such a source.
    """
    source = Path(arguments.source).expanduser()
    plan = source if source.is_file() else composed_plan(source)
    _refuse_options(arguments, plan)
    with Progress() as progress:
        progress("reading headers", 0, 1)
        if plan is not None:
            read = Plan.from_yaml(plan)
            changed = plan_change(read, composed_quantization(source) or {})
            if changed is not None:
                raise PlanError(f"{plan}: {changed}")
            table = load_route_table(read, layout_of(arguments), arguments.platform)
            table.bytes_per_rank()  # refuses layers that cannot be split over so many stages
        else:
            path = resolve_path(arguments.source, arguments.revision, None)
            checkpoint = open_checkpoint(path)
    if plan is not None:
        if arguments.json:
            print_json(describe_plan(plan, table))
        else:
            _print_plan(plan, table)
        return 0
    problems = find_problems(checkpoint)
    if arguments.json:
        print_json(describe_checkpoint(checkpoint))
    else:
        _print_checkpoint(checkpoint, problems)
    return 1 if problems else 0


def _refuse_options(arguments: argparse.Namespace, plan: Path | None) -> None:
    """Refuse what would change nothing of what is shown."""
    if plan is not None and arguments.revision is not None:
        arguments.parser.error(
            f"--revision is of a hub id; the sources of the plan {plan} name theirs"
        )
    is_served = arguments.platform is not None or layout_of(arguments) != Layout()
    if plan is None and is_served:
        arguments.parser.error(
            f"{arguments.source} is no plan and no composed directory, which alone are shown as "
            "they are served. Leave the options of serving out"
        )


def find_problems(checkpoint: Checkpoint) -> list[str]:
    """Return what is missing or left over: shards first, then companions."""
    modules = checkpoint.modules.values()
    found = [*checkpoint.problems, *(problem for module in modules for problem in module.problems)]
    return list(dict.fromkeys(found))  # the parts of a fused module share its problems


def describe_model(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Return architecture, layers and experts as JSON types; None where nothing tells."""
    text = text_config(config)
    dims = ModelDims.from_config(config)
    modules = tuple(modules)
    expert_layers = {expert.layer for module in modules if (expert := parse_expert(module))}
    return {
        "architectures": config.get("architectures"),
        "model_type": config.get("model_type"),
        "num_layers": dims.num_layers,
        "num_moe_layers": len({layer for layer in expert_layers if not _is_mtp(layer, dims)}),
        "num_mtp_layers": len({layer_name(name) for name in modules if _is_mtp(name, dims)}),
        "num_experts": dims.num_experts,
        "num_experts_per_tok": text.get("num_experts_per_tok"),
        "num_shared_experts": text.get("n_shared_experts", text.get("num_shared_experts")),
    }


def _is_mtp(name: str, dims: ModelDims) -> bool:
    layer = layer_index(name)
    return layer is not None and dims.is_mtp_layer(layer)


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint as JSON types."""
    formats: dict[str, Counter[str]] = {}
    kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for module in checkpoint.modules.values():
        total = formats.setdefault(module.scheme.label, Counter())
        total.update(modules=1, bytes=module.nbytes)
        kinds[kind_of(module.name)] += module.nbytes
    return {
        "type": "checkpoint",
        "path": str(checkpoint.path),
        **describe_model(checkpoint.config, checkpoint.modules),
        "formats": [{"format": label, **total} for label, total in formats.items()],
        "bytes_by_kind": dict(kinds),
        "bytes": kinds.total(),
        "modules": len(checkpoint.modules),
        "tensors": len(checkpoint.tensors),
        "problems": find_problems(checkpoint),
    }


def _print_model(path: Path, described: Mapping[str, Any]) -> None:
    layers = f"{described['num_layers']}, {described['num_moe_layers']} of them with experts"
    if described["num_mtp_layers"]:
        layers += f"; {described['num_mtp_layers']} for multi-token prediction (MTP)"
    experts = f"{described['num_experts']}, {described['num_experts_per_tok']} a token"
    if described["num_experts"] is None:
        experts = "none"
    if described["num_shared_experts"]:
        experts += f", {described['num_shared_experts']} shared"
    print(path)
    print(f"  architecture  {', '.join(described['architectures'] or ['not in config.json'])}")
    print(f"  layers        {layers}")
    print(f"  experts       {experts}")


def _print_checkpoint(checkpoint: Checkpoint, problems: Sequence[str]) -> None:
    described = describe_checkpoint(checkpoint)
    _print_model(checkpoint.path, described)
    formats = (
        f"{item['format']} ({item['modules']} module{'s' if item['modules'] > 1 else ''})"
        for item in described["formats"]
    )
    print(f"  formats       {', '.join(formats)}")
    totals: dict[tuple[Kind, str], Counter[str]] = {}
    for module in checkpoint.modules.values():
        total = totals.setdefault((kind_of(module.name), module.scheme.label), Counter())
        total.update(modules=1, bytes=module.nbytes)
    rows = [
        [KIND_LABELS[kind], label, str(total["modules"]), format_bytes(total["bytes"])]
        for (kind, label), total in sorted(totals.items(), key=lambda item: _kind_order(item[0]))
    ]
    rows.append(["all", "", str(described["modules"]), format_bytes(described["bytes"])])
    print_table(["kind", "format", "modules", "bytes"], rows, right=["modules", "bytes"])
    if not problems:
        print("no companions missing or left over")
        return
    print(f"missing or left over ({len(problems)})")
    for problem in problems:
        print(f"  {problem}")


def _kind_order(key: tuple[Kind, str]) -> tuple[int, str]:
    return KINDS.index(key[0]), key[1]


def describe_plan(path: Path, table: RouteTable) -> dict[str, Any]:
    """Describe a resolved plan as JSON types."""
    dims = ModelDims.from_config(table.base_config)
    kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for route in table.routes.values():
        kinds[kind_of(route.module)] += route.served_bytes
    return {
        "type": "plan",
        "path": str(path),
        "plan_sha256": table.plan.sha256,
        "base": table.plan.base,
        **describe_model(table.base_config, table.routes),
        "platform": table.platform.name,
        "tensor_parallel_size": table.layout.tensor_parallel_size,
        "pipeline_parallel_size": table.layout.pipeline_parallel_size,
        "expert_parallel": table.layout.expert_parallel,
        "draft": table.layout.draft,
        "layers": [
            {
                "layer": layer,
                "mtp": layer is not None and dims.is_mtp_layer(layer),
                "parts": [part.to_dict() for part in parts],
            }
            for layer, parts in layer_parts(table).items()
        ],
        "bytes_by_kind": dict(kinds),
        "bytes": kinds.total(),
        "bytes_by_source": bytes_by_source_list(table.bytes_by_source()),
        "findings": [finding.to_dict() for finding in table.notes],
    }


def _print_plan(path: Path, table: RouteTable) -> None:
    _print_model(path, describe_model(table.base_config, table.routes))
    print(f"  base          {table.plan.base}, served on {table.platform.label}")
    rows = []
    for layers in fold_layers(table):
        where = layers.label
        for part in layers.parts:
            rows.append(
                [
                    where,
                    part.label,
                    spell_ranges(part.experts),
                    part.source,
                    part.stored,
                    part.served if part.served != part.stored else "as stored",
                    part.kernel or "",
                    format_bytes(part.served_bytes * max(len(layers.numbers), 1)),
                ]
            )
            where = ""
    columns = ["layers", "kind", "experts", "source", "stored as", "served as", "kernel"]
    columns.append("in memory")
    print_table(columns, rows, right=["in memory"])
    print_bytes_by_source(table.bytes_by_source())
    print_findings(table.notes)
