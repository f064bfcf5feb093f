# SPDX-License-Identifier: Apache-2.0
"""Whether a base's headers hold what its config.json and its other layers promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_mixprec.checkpoint.formats.base import WEIGHTS
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.checkpoint.parts import whole_stacks
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.fused import leaf_name
from vllm_mixprec.routing.indexers import compare_indexers, compare_schedules
from vllm_mixprec.routing.kinds import MLPS, SHARED_EXPERTS
from vllm_mixprec.routing.layers import Layer, gather_layers
from vllm_mixprec.routing.sources import CORRECTION_BIAS, ROUTER_NAMES
from vllm_mixprec.routing.structure import (
    CONFIG_REMEDY,
    DEEPSEEK_MODEL_TYPES,
    ModelDims,
    indexer_name,
    is_mtp_module,
    is_tower_module,
    layer_index,
    text_config,
)

_DOWN = frozenset({"down_proj", "w2"})
_MTP_PARTS = frozenset({"enorm", "hnorm", "eh_proj"})

# Architectures whose vLLM class writes parameters past their loaders, so that nothing could tell a
# tensor that is lost (models/gpt_oss.py, 0.32).
_UNMIXABLE = frozenset({"GptOssForCausalLM"})

# Model types with experts whose output head is the embeddings unless config.json denies it, as
# transformers' configs have it. Of models without experts, config.json has to say.
_TIED_TYPES = frozenset(
    "cohere2_moe diffusion_gemma ernie4_5_moe ernie4_5_vl_moe gemma4 gemma4_text jetmoe kimi_k25 "
    "lfm2_moe qwen3_vl_moe_text zaya".split()
)
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_FULLEST = 32  # sets of modules that a layer's is compared with; a sound model has a few

# Module below a layer -> (code, factor, terms): its rows are the factor, if any, times the sum of
# the terms, all keys of config.json. As vLLM's DeepseekV2MLAAttention and Indexer build them.
_ROWS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "self_attn.q_a_proj": ("config-attention", None, ("q_lora_rank",)),
    "self_attn.q_b_proj": (
        "config-attention",
        "num_attention_heads",
        ("qk_nope_head_dim", "qk_rope_head_dim"),
    ),
    "self_attn.kv_a_proj_with_mqa": (
        "config-attention",
        None,
        ("kv_lora_rank", "qk_rope_head_dim"),
    ),
    "self_attn.kv_b_proj": (
        "config-attention",
        "num_attention_heads",
        ("qk_nope_head_dim", "v_head_dim"),
    ),
    "self_attn.indexer.wq_b": ("config-indexer", "index_n_heads", ("index_head_dim",)),
    "self_attn.indexer.wk": ("config-indexer", None, ("index_head_dim",)),
    "self_attn.indexer.weights_proj": ("config-indexer", None, ("index_n_heads",)),
}


def compare_headers(checkpoint: Checkpoint, draft: bool, log: FindingLog) -> None:
    """Report where the headers of a checkpoint contradict its config.json.

    Args:
        draft: the MTP layers are loaded, so that a missing one is an error.
    """
    config = text_config(checkpoint.config)
    dims = ModelDims.from_config(checkpoint.config)
    place = str(checkpoint.path / "config.json")
    unmixable = _UNMIXABLE.intersection(checkpoint.config.get("architectures") or ())
    if unmixable:
        log.add(
            "error",
            "architecture-unmixable",
            place,
            f"{min(unmixable)} cannot be mixed: vLLM's class for it writes its weights in a way "
            "that no plan can follow. Serve the checkpoint as it is.",
        )
    layers = gather_layers(checkpoint.modules.values())
    _compare_layers(layers, dims, log)
    has_mtp_modules = any(is_mtp_module(name) for name in checkpoint.modules)
    _compare_mtp(layers, dims, draft, has_mtp_modules, place, log)
    _compare_groups(config, dims, place, log)
    known = {index: layers[index] for index in layers if _is_known(index, dims)}
    _report_absent(checkpoint, known, dims, draft, log)
    if dims.num_experts is not None:
        for index, layer in known.items():
            is_moe = None if dims.moe_layers is None else index in dims.moe_layers
            _compare_experts(layer, is_moe, dims.num_experts, config, log)
            _compare_expert_sizes(layer, config, log)
    _compare_vocabulary(checkpoint, config, log)
    if config.get("model_type") in DEEPSEEK_MODEL_TYPES:
        _compare_sizes(known, config, log)
        _compare_correction_bias(known, config, log)
        compare_indexers(known, dims, log)
        if dims.index_topk is not None:
            compare_schedules(config, dims, place, log)


def _is_known(index: int, dims: ModelDims) -> bool:
    return dims.num_layers is None or index < dims.num_layers or dims.is_mtp_layer(index)


def _compare_layers(layers: Mapping[int, Layer], dims: ModelDims, log: FindingLog) -> None:
    if dims.num_layers is None or not layers:
        return
    promised = f"num_hidden_layers {dims.num_layers}"
    if dims.num_mtp_layers:
        promised += f" and num_nextn_predict_layers {dims.num_mtp_layers}"
    for index, layer in layers.items():
        if not _is_known(index, dims):
            log.add(
                "error",
                "config-layers",
                layer.name,
                f"the files hold this layer, expected those of {promised} in config.json. "
                f"{CONFIG_REMEDY}",
                noun="layers",
            )
    for index in range(dims.num_layers):
        if index not in layers:
            log.add(
                "error",
                "config-layers",
                _name_of(index, layers),
                f"the files hold nothing of this layer, expected it by {promised} in "
                f"config.json. {CONFIG_REMEDY}",
                noun="layers",
            )


def _name_of(index: int, layers: Mapping[int, Layer]) -> str:
    """Spell the name of a layer that is not there as the others are."""
    return f"{next(iter(layers.values())).name.rpartition('.')[0]}.{index}"


def _compare_mtp(
    layers: Mapping[int, Layer],
    dims: ModelDims,
    draft: bool,
    has_mtp_modules: bool,
    place: str,
    log: FindingLog,
) -> None:
    if has_mtp_modules and draft:
        log.add(
            "error",
            "mtp-missing",
            place,
            "the files keep their next-token predictors below mtp, expected them as layers behind "
            "the last: a plan cannot draft with these. Serve without the draft.",
        )
    if dims.num_layers is None or not layers or has_mtp_modules:
        return
    if draft and not dims.num_mtp_layers:
        log.add(
            "error",
            "mtp-missing",
            place,
            "num_nextn_predict_layers is 0 or absent, expected 1 or more to draft with the "
            "model's own MTP layers. Serve without the draft, or choose a base that has them.",
        )
    decoder_parts = layers[dims.num_layers - 1].parts if dims.num_layers - 1 in layers else set()
    for index in range(dims.num_layers, dims.num_layers + dims.num_mtp_layers):
        if index not in layers:
            log.add(
                "error" if draft else "warning",
                "mtp-missing",
                _name_of(index, layers),
                "config.json promises this MTP layer (num_nextn_predict_layers "
                f"{dims.num_mtp_layers}), the files do not hold it: expected it for drafting. "
                "Choose a base that has it, or set num_nextn_predict_layers to 0.",
                noun="layers",
            )
            continue
        absent = sorted((_MTP_PARTS | decoder_parts) - layers[index].parts)
        if absent:
            log.add(
                "error",
                "mtp-missing",
                layers[index].name,
                f"this MTP layer lacks {', '.join(absent)}, expected all of a decoder layer and "
                f"{', '.join(sorted(_MTP_PARTS))}. Download the checkpoint again.",
                noun="layers",
            )


def _report_absent(
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

    Families name them in many ways: whatever stands beside the layers and is called so counts.
    """
    if not layers:
        return
    beside = next(iter(layers.values())).name.rpartition("layers.")[0]
    outside = [
        name
        for name in checkpoint.modules
        if layer_index(name) is None and not (is_tower_module(name) or is_mtp_module(name))
    ]
    leaves = [leaf_name(name) for name in outside if name.startswith(beside) or "." not in name]
    if not any("embed" in leaf or leaf == "wte" for leaf in leaves):
        yield f"{beside}embed_tokens", "as the model's embeddings"
    if not any("norm" in leaf or leaf == "ln_f" for leaf in leaves):
        yield f"{beside}norm", "as the norm behind the last layer"
    if _has_head(checkpoint.config, dims) and not any(
        "head" in name or name.endswith(("output", "embed_out")) for name in outside
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
    """Return the lists of a config.json with an entry a layer: layer_types, mlp_layer_types ..."""
    if dims.num_layers is None:
        return []
    sizes = range(max(1, dims.num_layers), dims.num_layers + dims.num_mtp_layers + 1)
    values = text_config(config).values()
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
            # _compare_experts says so of a layer without any experts, where it knows.
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

    Where many layers lack the same, they are made so: some families share keys and values.
    """
    counts = Counter(sets.values())
    common = [names for names, _ in counts.most_common(_FULLEST)]
    for index, names in sets.items():
        fuller = next((other for other in common if other > names), None)
        if fuller is not None and (counts[names] == 1 or 2 * counts[names] <= counts[fuller]):
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


def _compare_groups(
    config: Mapping[str, Any], dims: ModelDims, place: str, log: FindingLog
) -> None:
    """Report routing in groups of experts (DeepSeek-V3, section 2.1.2) that cannot work."""
    num_experts, num_groups = dims.num_experts, dims.num_expert_groups
    if num_experts is None:
        return
    per_token, chosen = dims.experts_per_token, dims.num_chosen_groups
    problems = []
    if per_token is not None and not 0 < per_token <= num_experts:
        problems.append(f"num_experts_per_tok is {per_token}, expected 1 to {num_experts}")
    if num_groups is not None and num_groups > 1:
        size, left = divmod(num_experts, num_groups)
        if left:
            problems.append(f"n_group is {num_groups}, expected a divisor of {num_experts} experts")
        elif size < 2 and config.get("topk_method") == "noaux_tc":
            problems.append(
                f"n_group is {num_groups}, expected 2 or more experts in each: noaux_tc ranks a "
                f"group of the {num_experts} by its best two"
            )
        elif chosen is not None and not 0 < chosen <= num_groups:
            problems.append(f"topk_group is {chosen}, expected 1 to {num_groups} (n_group)")
        elif chosen is not None and per_token is not None and chosen * size < per_token:
            problems.append(
                f"topk_group is {chosen}: groups of {chosen * size} experts in all, expected "
                f"{per_token} (num_experts_per_tok) or more"
            )
    for problem in problems:
        log.add("error", "config-groups", place, f"{problem}. {CONFIG_REMEDY}")


def _compare_experts(
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


def _compare_expert_sizes(layer: Layer, config: Mapping[str, Any], log: FindingLog) -> None:
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


def _compare_vocabulary(checkpoint: Checkpoint, config: Mapping[str, Any], log: FindingLog) -> None:
    """Report an embedding or output head of another shape than config.json has."""
    expected = (config.get("vocab_size"), config.get("hidden_size"))
    if not all(isinstance(size, int) for size in expected):
        return
    for name in ("model.embed_tokens", "lm_head"):
        module = checkpoint.modules.get(name)
        if module is not None and not module.problems and module.shape != expected:
            log.add(
                "error",
                "config-sizes",
                name,
                f"has shape {list(module.shape)}, expected {list(expected)} (vocab_size x "
                f"hidden_size in config.json). {CONFIG_REMEDY}",
            )


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


def _compare_correction_bias(
    layers: Mapping[int, Layer], config: Mapping[str, Any], log: FindingLog
) -> None:
    """Report routers whose correction bias vLLM's DeepseekV2MoE would not build, or not find."""
    builds = config.get("topk_method") == "noaux_tc"
    for layer in layers.values():
        router = layer.modules.get("mlp.gate")
        if router is None or (CORRECTION_BIAS in router.tensors) == builds:
            continue
        found = f"topk_method is {config.get('topk_method')!r} in config.json"
        log.add(
            "error",
            "config-experts",
            f"{router.name}.{CORRECTION_BIAS}",
            f"missing, expected it as {found}. {CONFIG_REMEDY}"
            if builds
            else f"{found}, expected 'noaux_tc', without which vLLM builds no place for this "
            "tensor. Set it.",
            noun="tensors",
        )


def _compare_sizes(layers: Mapping[int, Layer], config: Mapping[str, Any], log: FindingLog) -> None:
    for name, (code, factor, keys) in _ROWS.items():
        sizes = [config.get(key) for key in (factor, *keys) if key is not None]
        if not all(isinstance(size, int) for size in sizes):
            continue
        rows = sum(config[key] for key in keys) * (1 if factor is None else config[factor])
        formula = " + ".join(keys)
        if factor is not None:
            formula = f"{factor} * ({formula})" if len(keys) > 1 else f"{factor} * {formula}"
        for layer in layers.values():
            module = layer.modules.get(name)
            if module is None or module.problems or module.shape[:1] == (rows,):
                continue
            log.add(
                "error",
                code,
                module.name,
                f"has shape {list(module.shape)}, expected {rows} rows ({formula} in "
                "config.json). "
                f"{CONFIG_REMEDY}",
            )
