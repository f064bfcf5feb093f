# SPDX-License-Identifier: Apache-2.0
"""Whether a base has all modules: what every model has, and what its own other layers have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_mixprec.checkpoint.formats.base import WEIGHTS
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.fused import leaf_name
from vllm_mixprec.routing.kinds import MLPS, SHARED_EXPERTS
from vllm_mixprec.routing.layers import Layer
from vllm_mixprec.routing.structure import (
    ModelDims,
    indexer_name,
    is_mtp_module,
    is_tower_module,
    layer_index,
    text_config,
)

# Model types with experts whose output head is the embeddings unless config.json denies it, as
# transformers' configs have it. Of models without experts, config.json has to say.
_TIED_TYPES = frozenset(
    "cohere2_moe diffusion_gemma ernie4_5_moe ernie4_5_vl_moe gemma4 gemma4_text jetmoe kimi_k25 "
    "lfm2_moe qwen3_vl_moe_text zaya".split()
)
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_FULLEST = 32  # sets of modules that a layer's is compared with; a sound model has a few


def report_absent(
    checkpoint: Checkpoint,
    layers: Mapping[int, Layer],
    dims: ModelDims,
    draft: bool,
    log: FindingLog,
) -> None:
    """Report what a base lacks that every model has, or its own other layers."""
    loaded = {i: layer for i, layer in layers.items() if draft or not dims.is_mtp_layer(i)}
    absent = dict(_absent_ends(checkpoint, layers, dims))
    for name in _absent_of_kind(loaded, dims, _schedules(checkpoint.config, dims)):
        absent[name] = "as other layers of its kind have it"
    for name in _absent_of_mlps(loaded):
        absent.setdefault(name, "as the model's experts have it")
    for name, why in absent.items():
        log.add(
            "error",
            "module-missing",
            name,
            f"not in the base's files, expected {why}. Download the checkpoint again.",
        )


def _absent_ends(
    checkpoint: Checkpoint, layers: Mapping[int, Layer], dims: ModelDims
) -> Iterator[tuple[str, str]]:
    """Yield embeddings, last norm and output head that are not there: name, why it is expected.

    Families name them in many ways: whatever stands outside of the layers and is called so counts.
    Of norms without weights there is none, and a bare model, saved for embeddings, has no head.
    """
    if not layers:
        return
    beside = next(iter(layers.values())).name.partition("layers.")[0]
    outside = [
        name
        for name in checkpoint.modules
        if layer_index(name) is None and not (is_tower_module(name) or is_mtp_module(name))
    ]
    leaves = [leaf_name(name) for name in outside]
    has_norms = any("norm" in name for layer in layers.values() for name in layer.modules)
    if not any("embed" in leaf or leaf == "wte" for leaf in leaves):
        yield f"{beside}embed_tokens", "as the model's embeddings"
    if has_norms and not any("norm" in leaf or leaf == "ln_f" for leaf in leaves):
        yield f"{beside}norm", "as the norm behind the last layer"
    if (
        beside
        and _has_head(checkpoint.config, dims)
        and not any("head" in name or name.endswith(("output", "embed_out")) for name in outside)
    ):
        yield "lm_head", "as config.json does not tie the output head to the embeddings"


def _has_head(config: Mapping[str, Any], dims: ModelDims) -> bool:
    """Whether a model has an output head of its own."""
    classes = config.get("architectures") or ()
    if classes and not any(str(name).endswith(_WITH_HEAD) for name in classes):
        return False
    text = text_config(config)
    if config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is not None:
        return not dims.tied_embeddings
    return dims.num_experts is not None and config.get("model_type") not in _TIED_TYPES


def _schedules(config: Mapping[str, Any], dims: ModelDims) -> list[list[Any]]:
    """Return the lists of a config.json with an entry a layer: layer_types, mlp_layer_types ...

    Also those one object further in, such as ``sparse_attention_config``'s.
    """
    if dims.num_layers is None:
        return []
    sizes = range(max(1, dims.num_layers), dims.num_layers + dims.num_mtp_layers + 1)
    values = list(text_config(config).values())
    values += [each for value in values if isinstance(value, dict) for each in value.values()]
    return [value for value in values if isinstance(value, list) and len(value) in sizes]


def _absent_of_kind(
    layers: Mapping[int, Layer], dims: ModelDims, schedules: list[list[Any]]
) -> Iterator[str]:
    """Yield what a layer, or a part of one, lacks of what others of its kind have.

    Attention is compared with attention and MLP with MLP, since a model may have one dense layer
    only. Of one kind are those for which config.json's schedules say the same; an MTP layer is of
    the last decoder layer's. Indexers are left to ``compare_indexers``.
    """
    parts: dict[tuple[tuple[str, ...], str], dict[int, frozenset[str]]] = {}
    for index, layer in layers.items():
        kind = tuple(str(schedule[min(index, len(schedule) - 1)]) for schedule in schedules)
        by_part: dict[str, set[str]] = {}
        for name in _compared_names(layer, dims):
            by_part.setdefault(name.partition(".")[0], set()).add(name)
        for part, names in by_part.items():
            parts.setdefault((kind, part), {})[index] = frozenset(names)
        if not dims.is_mtp_layer(index):  # of which _compare_mtp compares the parts
            parts.setdefault((kind, ""), {})[index] = frozenset(by_part)
    for sets in parts.values():
        for index, name in _find_absent(sets):
            layer = layers[index]
            # compare_experts says so of a layer without any experts, where it knows.
            if ".experts." not in name or layer.experts or dims.moe_layers is None:
                yield f"{layer.name}.{name}"


def _compared_names(layer: Layer, dims: ModelDims) -> set[str]:
    """Return the names below a layer of what has a weight and is loaded.

    All routed experts have the names of one, or that of the tensors that hold them whole.
    """
    experts = layer.experts_name[len(layer.name) + 1 :]
    names = {f"{experts}.*.{projection}" for projection in layer.experts}
    for name, module in layer.modules.items():
        if not dims.is_loaded(module.name, draft=True) or indexer_name(module.name) is not None:
            continue
        parent, is_stack, _ = f"{name}.".partition(".experts.")
        if is_stack and not layer.experts:
            names.add(f"{parent}.experts")
        elif not is_stack and not WEIGHTS.isdisjoint(module.tensors):
            names.add(name)
    return names


def _find_absent(sets: Mapping[int, frozenset[str]]) -> Iterator[tuple[int, str]]:
    """Yield what a layer's set lacks of the most common one that holds all of it and more.

    Only of a layer that is alone in it: where several lack the same they may be made so, as those
    that share keys and values. The start's ledger names what nothing fills in any case.
    """
    counts = Counter(sets.values())
    common = [names for names, _ in counts.most_common(_FULLEST)]
    for index, names in sets.items():
        fuller = next((other for other in common if other > names), None)
        if fuller is not None and counts[names] == 1:
            yield from ((index, name) for name in sorted(fuller - names))


def _absent_of_mlps(layers: Mapping[int, Layer]) -> Iterator[str]:
    """Yield projections that a dense MLP or a shared expert lacks and the routed experts have.

    A model's MLPs are of one make, and often a single layer has a dense one.
    """
    projections = max((set(layer.experts) for layer in layers.values()), key=len, default=set())
    for layer in layers.values():
        found: dict[str, set[str]] = {}
        for module in layer.modules.values():
            parent, _, leaf = module.name.rpartition(".")
            if leaf in projections and leaf_name(parent) in MLPS | SHARED_EXPERTS:
                found.setdefault(parent, set()).add(leaf)
        for parent, leaves in found.items():
            if f"{parent[len(layer.name) + 1 :]}.gate_up_proj" not in layer.modules:
                yield from (f"{parent}.{leaf}" for leaf in sorted(projections - leaves))
