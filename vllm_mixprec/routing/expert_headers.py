# SPDX-License-Identifier: Apache-2.0
"""Whether the experts that a base's headers hold are those that its config.json promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_mixprec.checkpoint.parts import whole_stacks
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.layers import Layer
from vllm_mixprec.routing.sources import CORRECTION_BIAS, ROUTER_NAMES
from vllm_mixprec.routing.structure import CONFIG_REMEDY

_DOWN = frozenset({"down_proj", "w2"})


def compare_experts(
    layer: Layer,
    is_moe: bool | None,
    num_experts: int,
    config: Mapping[str, Any],
    log: FindingLog,
) -> None:
    stacked = {
        module.name[: module.name.rindex("experts") + len("experts")]
        for name, module in layer.modules.items()
        if "experts" in name.split(".")
        and any(len(tensor.shape) == 3 for tensor in module.tensors.values())
    }
    if stacked and not _compare_stacks(layer, num_experts, config, log):
        for name in sorted(stacked):
            log.add(
                "warning",
                "experts-fused",
                name,
                "one tensor holds a projection of all experts, in a layout that cannot be told: "
                "expected [experts, rows, columns] or [experts, columns, rows], of sizes that fit "
                "config.json and each other. They can only be served as a whole and unquantised. "
                "To mix precisions within a layer use a base that stores a module for each expert.",
                noun="layers",
            )
    if not layer.experts:
        if is_moe and not stacked:
            log.add(
                "error",
                "config-experts",
                layer.name,
                f"the files hold no experts here, expected {num_experts} by config.json. "
                f"{CONFIG_REMEDY}",
                noun="layers",
            )
        return
    if is_moe is False:
        log.add(
            "error",
            "config-experts",
            layer.experts_name,
            f"the files hold experts here, expected a dense MLP by config.json. {CONFIG_REMEDY}",
            noun="layers",
        )
    expected = set(range(num_experts))
    found = set().union(*layer.experts.values())
    if found != expected:
        log.add(
            "error",
            "config-experts",
            layer.experts_name,
            f"the files hold {_describe_ids(found, expected)}, expected 0 to {num_experts - 1} by "
            f"config.json. {CONFIG_REMEDY}",
            noun="layers",
        )
    for projection, ids in layer.experts.items():
        for expert in sorted(found - ids):
            log.add(
                "error",
                "config-experts",
                f"{layer.experts_name}.{expert}",
                f"lacks {projection}, which the layer's other experts have. Download the "
                "checkpoint again.",
                noun="experts",
            )
    _compare_router(layer, num_experts, log)


def _compare_stacks(
    layer: Layer, num_experts: int, config: Mapping[str, Any], log: FindingLog
) -> bool:
    """Report tensors of all experts that contradict config.json; return whether any does."""
    inner, hidden = _expert_sizes(config)
    is_contradicted = False
    for module in layer.modules.values():
        for projection, (spec, parts) in whole_stacks(module).items():
            count, *sizes = spec.shape
            expected = [hidden, inner] if projection in _DOWN else [inner and inner * parts, hidden]
            # Packed integers are of other sizes, and of interleaved rows nothing is known.
            is_sized = None not in expected and not module.scheme.is_quantized
            if count != num_experts:
                code, found = "config-experts", f"holds {count} experts"
                wanted = f"{num_experts} by config.json"
            elif is_sized and sizes not in (expected, expected[::-1]):
                code, found = "config-sizes", f"has shape {list(spec.shape)}"
                wanted = (
                    f"{[num_experts, *expected]}, or rows and columns exchanged, by hidden_size "
                    "and moe_intermediate_size in config.json"
                )
            else:
                continue
            is_contradicted = True
            log.add(
                "error",
                code,
                spec.name,
                f"{found}, expected {wanted}. {CONFIG_REMEDY}",
                noun="layers",
            )
    return is_contradicted


def _describe_ids(found: set[int], expected: set[int]) -> str:
    described = f"{len(found)} experts"
    if absent := sorted(expected - found):
        described += f", {absent[0]} not among them"
    if beyond := sorted(found - expected):
        described += f", {beyond[-1]} among them"
    return described


def compare_expert_sizes(layer: Layer, config: Mapping[str, Any], log: FindingLog) -> None:
    """Report experts of another shape than vLLM's RoutedExperts takes, which would end in torch."""
    inner, hidden = _expert_sizes(config)
    if inner is None or hidden is None:
        return
    for (projection, shape), module in layer.expert_shapes.items():
        is_down = projection in _DOWN
        expected = (hidden, inner) if is_down else (inner, hidden)
        if module.problems or shape == expected:
            continue
        keys = ("hidden_size", "moe_intermediate_size")
        log.add(
            "error",
            "config-experts",
            module.name,
            f"has shape {list(shape)}, expected {list(expected)} "
            f"({' x '.join(keys if is_down else keys[::-1])} in config.json). {CONFIG_REMEDY}",
            noun="experts",
        )


def _expert_sizes(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return rows and columns of an expert's gate by config.json; None where it does not tell."""
    inner, hidden = config.get("moe_intermediate_size"), config.get("hidden_size")
    is_known = isinstance(inner, int) and isinstance(hidden, int)
    return (inner, hidden) if is_known and "moe_latent_size" not in config else (None, None)


def _compare_router(layer: Layer, num_experts: int, log: FindingLog) -> None:
    block = layer.experts_name.removesuffix(".experts")[len(layer.name) + 1 :]
    sizes = []
    for leaf in sorted(ROUTER_NAMES):
        router = layer.modules.get(f"{block}.{leaf}")
        if router is not None and len(router.shape) == 2:
            sizes.append((router.name, router.shape[0], "rows"))
    for name in (block, *(f"{block}.{leaf}" for leaf in sorted(ROUTER_NAMES))):
        module = layer.modules.get(name)
        bias = module.tensors.get(CORRECTION_BIAS) if module is not None else None
        if bias is not None:
            sizes.append((bias.name, bias.shape[0] if bias.shape else 0, "entries"))
    for name, size, what in sizes:
        if size != num_experts:
            log.add(
                "error",
                "config-experts",
                name,
                f"has {size} {what}, expected {num_experts}, one an expert of config.json. "
                f"{CONFIG_REMEDY}",
                noun="routers",
            )
