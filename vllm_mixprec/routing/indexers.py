# SPDX-License-Identifier: Apache-2.0
"""Whether the indexers of DeepSeek's sparse attention are those that config.json promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.layers import Layer
from vllm_mixprec.routing.parallel import PP_PARTITION_VARIABLE, split_layers
from vllm_mixprec.routing.route import Layout
from vllm_mixprec.routing.structure import (
    CONFIG_REMEDY,
    ModelDims,
    indexer_name,
    scheduled_indexers,
    typed_indexers,
)

_INDEXER = "self_attn.indexer"
_INDEXER_PARTS = ("wq_b", "wk", "weights_proj", "k_norm")


def compare_indexers(layers: Mapping[int, Layer], dims: ModelDims, log: FindingLog) -> None:
    for index, layer in layers.items():
        if dims.index_topk is None:
            if any(indexer_name(module.name) for module in layer.modules.values()):
                log.add(
                    "error",
                    "config-indexer",
                    f"{layer.name}.{_INDEXER}",
                    "the files hold an indexer, expected none as config.json has no index_topk: "
                    f"vLLM would attend to every token. {CONFIG_REMEDY}",
                    noun="layers",
                )
        elif dims.builds_indexer(index):
            absent = [part for part in _INDEXER_PARTS if f"{_INDEXER}.{part}" not in layer.modules]
            norm = layer.modules.get(f"{_INDEXER}.k_norm")
            if norm is not None:  # a LayerNorm, where the others are RMSNorm
                absent += [f"k_norm.{s}" for s in ("weight", "bias") if s not in norm.tensors]
            if absent:
                log.add(
                    "error",
                    "config-indexer",
                    f"{layer.name}.{_INDEXER}",
                    f"lacks {', '.join(absent)}, expected in every layer that selects tokens "
                    "itself (index_topk_freq, index_topk_pattern or indexer_types in "
                    f"config.json). {CONFIG_REMEDY}",
                    noun="layers",
                )


def compare_schedules(
    config: Mapping[str, Any], dims: ModelDims, place: str, log: FindingLog
) -> None:
    """Report settings that say differently which layers select tokens themselves."""
    if dims.num_layers is None:
        return
    num_layers, problems = dims.num_layers, []
    pattern, types = config.get("index_topk_pattern"), config.get("indexer_types")
    every = config.get("index_topk_freq")
    if isinstance(every, int) and every < 1:
        problems.append(f"index_topk_freq is {every}, expected 1 or more")
    for key, kinds, known in (
        ("index_topk_pattern", pattern, {"F", "S"}),
        ("indexer_types", types, {"full", "shared"}),
    ):
        if kinds is None:
            continue
        if not isinstance(kinds, (str, list)):
            problems.append(f"{key} is {kinds!r}, expected {num_layers} entries, one a layer")
            continue
        if len(kinds) != num_layers:
            problems.append(f"{key} has {len(kinds)} entries, expected {num_layers}, one a layer")
        if strange := sorted({str(kind) for kind in kinds} - known):
            problems.append(f"{key} holds {strange[0]!r}, expected {' or '.join(sorted(known))}")
        elif kinds and kinds[0] in ("S", "shared"):
            problems.append(f"{key} begins with {kinds[0]!r}, expected a layer with an indexer")
    scheduled, typed = scheduled_indexers(config, num_layers), typed_indexers(config)
    if not problems and scheduled is not None and typed is not None and scheduled != typed:
        first = min(scheduled ^ typed)
        says, other = ("full", "shared") if first in typed else ("shared", "full")
        problems.append(
            f"indexer_types has layer {first} {says}, expected {other} by "
            f"{'index_topk_freq' if pattern is None else 'index_topk_pattern'}, which vLLM reads"
        )
    for problem in problems:
        log.add("error", "config-indexer", place, f"{problem}. Correct config.json.")


def report_split_selections(dims: ModelDims, layout: Layout, log: FindingLog) -> None:
    """Report pipeline stages whose first layer would reuse a selection made on another stage.

    vLLM 0.32 hands only hidden states and residuals to the next stage (deepseek_v2.py and
    models/deepseek_v32), so such a layer would attend to whatever its buffer holds.

    Raises:
        RouteError: the layers cannot be split over that many stages.
    """
    if dims.index_topk is None or dims.indexer_layers is None or dims.num_layers is None:
        return
    first = 0
    for stage, count in enumerate(split_layers(dims.num_layers, layout.pipeline_parallel_size)):
        if count and not dims.builds_indexer(first):
            own = max((i for i in dims.indexer_layers if i < first), default=0)
            log.add(
                "error",
                "indexer-stage",
                f"pipeline stage {stage}",
                f"begins with layer {first}, which reuses the selection that layer {own} makes on "
                "an earlier stage; vLLM does not pass it on. Begin it at a layer with an indexer, "
                f"such as {own}, through {PP_PARTITION_VARIABLE}.",
            )
        first += count
