# SPDX-License-Identifier: Apache-2.0
"""What is served: the plan, where each expert comes from and in which format."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import vllm
from vllm.platforms import current_platform

from vllm_mixprec.checkpoint.index import resolve_path
from vllm_mixprec.quant.config import METHOD, load_table, plan_path
from vllm_mixprec.routing import Route, RouteTable
from vllm_mixprec.routing.fused import parse_expert
from vllm_mixprec.routing.kinds import find_runs
from vllm_mixprec.routing.parts import describe_layers
from vllm_mixprec.routing.structure import ModelDims, is_mtp_module, layer_index

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def has_plan(vllm_config: "VllmConfig") -> bool:
    """Whether the model is served through a plan."""
    return bool(vllm_config.model_config.quantization == METHOD)


def describe_model(vllm_config: "VllmConfig") -> dict[str, Any]:
    """Describe the served model as JSON types; reads the headers of a plan's checkpoints.

    Raises:
        MixPrecError: the plan or its checkpoints cannot be read any more, or are others by now.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    table = load_served_table(vllm_config) if has_plan(vllm_config) else None
    return {
        "model": str(model.served_model_name),
        "path": model.model,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layout": {
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
            "expert_parallel": parallel.enable_expert_parallel,
        },
        "platform": {
            "device": current_platform.device_type,
            "kernels": None if table is None else table.platform.name,
            "broken_kernels": {} if table is None else dict(table.platform.broken),
        },
        "versions": {"vllm": vllm.__version__, "vllm_mixprec": version("vllm-mixprec")},
        **(_NO_PLAN if table is None else describe_table(table, _plan_of(vllm_config))),
    }


_NO_PLAN: dict[str, Any] = {
    "plan": None,
    "sources": [],
    "bytes": [],
    "widened": [],
    "notes": [],
    "layers": [],
    "expert_layers": [],
}


def _plan_of(vllm_config: "VllmConfig") -> dict[str, Any]:
    model = vllm_config.model_config
    path = plan_path(model.model, model.hf_config)
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def load_served_table(vllm_config: "VllmConfig") -> RouteTable:
    """Resolve the plan as the workers did.

    Raises:
        MixPrecError: as ``load_table``.
    """
    model = vllm_config.model_config
    return load_table(vllm_config, plan_path(model.model, model.hf_config))


def describe_table(table: RouteTable, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a plan and what it routes as JSON types."""
    sources = table.plan.sources.items()
    return {
        "plan": {**plan, "base": table.plan.base},
        "sources": [
            {
                "source": name,
                "path": str(resolve_path(source.path, source.revision, table.plan.base_dir)),
                "revision": source.revision,
            }
            for name, source in sources
        ],
        "bytes": [
            {"source": source, "format": stored, "bytes": size}
            for (source, stored), size in table.bytes_by_source().items()
        ],
        "widened": _describe_widened(table),
        "notes": [note.to_dict() for note in table.notes],
        "layers": describe_layers(table),
        "expert_layers": _describe_experts(table),
    }


def _describe_widened(table: RouteTable) -> list[dict[str, Any]]:
    """What is dequantised at load, by reason; ``extra_bytes`` is what that takes more in memory."""
    dims = ModelDims.from_config(table.base_config)
    reasons: dict[str, list[Route]] = {}
    for module, route in table.routes.items():
        if route.widened and dims.is_loaded(module, table.layout.draft):
            reasons.setdefault(route.reason or "", []).append(route)
    return [
        {
            "reason": reason,
            "modules": [route.module for route in routes],
            "extra_bytes": sum(route.served_bytes - route.stored_bytes for route in routes),
        }
        for reason, routes in reasons.items()
    ]


def _describe_experts(table: RouteTable) -> list[dict[str, Any]]:
    """Layers with their experts by source and format; labels as in the statistics.

    Experts are runs of (first, last), so that 60 layers of 256 stay a few kilobytes.
    """
    dims = ModelDims.from_config(table.base_config)
    layers: dict[str, dict[int, list[Route]]] = {}
    for module, route in table.routes.items():
        part = parse_expert(module)
        if part is not None and dims.is_loaded(module, table.layout.draft):
            layers.setdefault(part.layer, {}).setdefault(part.expert, []).append(route)
    drafts = {name for name in layers if _is_draft(name, dims)}
    numbers = {name: layer_index(name) for name in layers}
    taken = {numbers[name] for name in layers if name not in drafts}
    described = []
    for name, experts in layers.items():
        number = numbers[name]
        label = name if number is None else str(number)
        collides = name in drafts and number in taken
        described.append(
            {
                "layer": f"draft.{label}" if collides else label,
                "name": name,
                "draft": name in drafts,
                "experts": len(experts),
                "groups": _group(experts),
            }
        )
    return described


def _is_draft(layer: str, dims: ModelDims) -> bool:
    number = layer_index(layer)
    return is_mtp_module(layer) or (number is not None and dims.is_mtp_layer(number))


def _group(experts: Mapping[int, list[Route]]) -> list[dict[str, Any]]:
    """Experts alike in source, stored and served format; parts that differ are listed in full."""
    groups: dict[tuple[str, str, str, str, int], list[int]] = {}
    for expert, routes in sorted(experts.items()):
        key = (
            _join(route.source for route in routes),
            _join(route.stored.label for route in routes),
            _join(route.served.label for route in routes),
            _join(route.served.format for route in routes),
            max(route.served.bits for route in routes),
        )
        groups.setdefault(key, []).append(expert)
    return [
        {
            "source": source,
            "stored": stored,
            "served": served,
            "format": format,
            "bits": bits,
            "experts": find_runs(members),
        }
        for (source, stored, served, format, bits), members in groups.items()
    ]


def _join(names: Any) -> str:
    return " + ".join(dict.fromkeys(names))
