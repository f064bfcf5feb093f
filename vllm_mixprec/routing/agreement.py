# SPDX-License-Identifier: Apache-2.0
"""Whether a base's headers hold what its config.json and its other layers promise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.completeness import report_absent
from vllm_mixprec.routing.expert_headers import compare_expert_sizes, compare_experts
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.indexers import compare_indexers, compare_schedules
from vllm_mixprec.routing.layers import Layer, gather_layers
from vllm_mixprec.routing.sources import CORRECTION_BIAS
from vllm_mixprec.routing.structure import (
    CONFIG_REMEDY,
    DEEPSEEK_MODEL_TYPES,
    ModelDims,
    is_mtp_module,
    text_config,
)

_MTP_PARTS = frozenset({"enorm", "hnorm", "eh_proj"})

# Architectures whose vLLM class writes parameters past their loaders, so that nothing could tell a
# tensor that is lost (models/gpt_oss.py, 0.32).
_UNMIXABLE = frozenset({"GptOssForCausalLM"})

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
    report_absent(checkpoint, known, dims, draft, log)
    if dims.num_experts is not None:
        for index, layer in known.items():
            is_moe = None if dims.moe_layers is None else index in dims.moe_layers
            compare_experts(layer, is_moe, dims.num_experts, config, log)
            compare_expert_sizes(layer, config, log)
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
