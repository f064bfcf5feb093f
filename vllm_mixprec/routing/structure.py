# SPDX-License-Identifier: Apache-2.0
"""What a config.json says about the model's layers, experts and indexers, normalised once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from vllm_mixprec.errors import CheckpointError

# Model types that vLLM 0.32 serves with model_executor/models/deepseek_v2.py or, on CUDA,
# models/deepseek_v32: MLA, and with index_topk an indexer a layer (DSA). In other families an
# ``index_topk`` means something else, or an indexer sits elsewhere.
DEEPSEEK_MODEL_TYPES = frozenset("deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 glm_moe_dsa".split())

CONFIG_REMEDY = "Correct config.json, or download the checkpoint again."
_LARGEST = 1_000_000  # no count of layers, experts or heads comes near

# Where a config says what its experts' gate is put through, the family's own key first, and of what
# magnitude the outcome may be, for all layers or for each (nemotron_h.py, gemma4.py; deepseek_v4,
# exaone_moe.py, step3p5.py, bailing_moe_v3.py).
_ACTIVATION_KEYS = ("mlp_hidden_act", "hidden_activation", "hidden_act")
_LIMIT_KEYS = ("swiglu_limit", "swiglu_limits", "expert_swiglu_limit_list")
# transformers' names (activations.py, ACT2FN) -> vLLM's (fused_moe/activation.py MoEActivation).
_ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")

# Layers of a vision or audio tower and those below ``mtp`` are none of the language model's.
_LAYER = re.compile(r"((?:(?!visual|vision|audio|mtp\.)[^.]+\.)*?layers\.)(\d+)(?:\.|$)")
_TOWER = re.compile(r"(?:^|\.)(?:visual|vision|audio)")
_MTP_MODULES = re.compile(r"(?:^|\.)mtp\.")
_INDEXER = re.compile(r"(.*\.indexer)(?:\.|$)")
# What an MTP layer's checkpoint repeats of the model. vLLM gives the draft the model's own
# (v1/spec_decode/llm_base_proposer.py _maybe_share_lm_head and _maybe_share_embeddings;
# v1/worker/gpu/spec_decode/eagle/utils.py load_eagle_model).
_SHARED_WITH_DRAFT = ("embed_tokens", "shared_head.head")
# Modules that old conversions store and every model computes (vLLM AutoWeightsLoader).
_COMPUTED = ("rotary_emb", "rotary_pos_emb")


class ExpertArithmetic(NamedTuple):
    """What a routed expert computes, ``down(activation(gate) * up)`` and what else.

    ``activation`` is as vLLM's ``MoEActivation`` names it; ``limit`` clamps, 0 does not;
    ``weighs_inputs`` is vLLM's ``apply_router_weight_on_input``.
    """

    activation: str = "silu"
    limit: float = 0.0
    weighs_inputs: bool = False
    has_biases: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is ``down(silu(gate) * up)`` and no more."""
        return self == PLAIN_EXPERT

    def __str__(self) -> str:
        clamped = f" clamped at {self.limit:g}" if self.limit else ""
        weighed = " of weighed inputs" if self.weighs_inputs else ""
        return f"{self.activation}{clamped}{weighed}{' with biases' if self.has_biases else ''}"


PLAIN_EXPERT = ExpertArithmetic()


@dataclass(frozen=True, slots=True)
class ModelDims:
    """What a config.json says; None where it does not.

    Attributes:
        num_layers: decoder layers, without those of multi-token prediction (MTP).
        num_heads, num_kv_heads: attention heads.
        num_experts: routed experts of a MoE layer.
        tied_embeddings: the output head is the embeddings.
        num_mtp_layers: layers after the last that predict further tokens
            (``num_nextn_predict_layers``); only a draft model loads them.
        moe_layers: decoder and MTP layers that have routed experts; None where the config's
            family does not say.
        experts_per_token: routed experts that a token visits.
        num_expert_groups, num_chosen_groups: ``n_group`` groups of experts, of which a token's
            experts come from ``topk_group``.
        index_topk, num_index_heads, index_head_dim: of DeepSeek sparse attention (DSA).
        indexer_layers: layers for which vLLM builds an indexer, empty without DSA; None in
            families other than ``DEEPSEEK_MODEL_TYPES``.
        model_type: of the language model.
        experts: what routed experts compute, less their biases, which a config does not say, and
            less ``expert_limits``, by layer where each has its own.
    """

    num_layers: int | None
    num_heads: int | None
    num_kv_heads: int | None
    num_experts: int | None
    tied_embeddings: bool
    num_mtp_layers: int = 0
    moe_layers: frozenset[int] | None = None
    experts_per_token: int | None = None
    num_expert_groups: int | None = None
    num_chosen_groups: int | None = None
    index_topk: int | None = None
    num_index_heads: int | None = None
    index_head_dim: int | None = None
    indexer_layers: frozenset[int] | None = None
    model_type: str | None = None
    experts: ExpertArithmetic = PLAIN_EXPERT
    expert_limits: tuple[float, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelDims:
        """Read a config, of its ``text_config`` when it has one."""
        text = text_config(config)
        num_layers = _integer(text, "num_hidden_layers")
        num_mtp_layers = _integer(text, "num_nextn_predict_layers") or 0
        return cls(
            num_layers=num_layers,
            num_heads=_integer(text, "num_attention_heads"),
            num_kv_heads=_integer(text, "num_key_value_heads", "num_attention_heads"),
            num_experts=_integer(text, *_EXPERT_KEYS),
            tied_embeddings=bool(
                config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            ),
            num_mtp_layers=num_mtp_layers,
            moe_layers=_moe_layers(text, num_layers, num_mtp_layers),
            experts_per_token=_integer(text, "num_experts_per_tok"),
            num_expert_groups=_integer(text, "n_group"),
            num_chosen_groups=_integer(text, "topk_group"),
            index_topk=_integer(text, "index_topk"),
            num_index_heads=_integer(text, "index_n_heads"),
            index_head_dim=_integer(text, "index_head_dim"),
            indexer_layers=_indexer_layers(text, num_layers, num_mtp_layers),
            model_type=_string(text, "model_type"),
            experts=_expert_arithmetic(text),
            expert_limits=_limits_by_layer(text),
        )

    def expert_arithmetic(self, module: str) -> ExpertArithmetic:
        """Return what the routed experts of a module's layer compute, less their biases."""
        index = layer_index(module) if self.expert_limits else None
        if index is None or index >= len(self.expert_limits):
            return self.experts
        return self.experts._replace(limit=self.expert_limits[index])

    def is_mtp_layer(self, index: int) -> bool:
        """Whether a layer is one of multi-token prediction."""
        return self.num_layers is not None and (
            self.num_layers <= index < self.num_layers + self.num_mtp_layers
        )

    def is_known(self, module: str) -> bool:
        """Whether a module is in no layer, or in one that the config counts."""
        index = layer_index(module)
        return (
            index is None
            or self.num_layers is None
            or (index < self.num_layers + self.num_mtp_layers)
        )

    def builds_indexer(self, index: int) -> bool:
        """Whether vLLM builds a layer's indexer; it drops the indexer tensors of the others."""
        return self.indexer_layers is None or index in self.indexer_layers

    def is_loaded(self, module: str, draft: bool = False) -> bool:
        """Whether any rank loads a module; ``draft`` as in ``Layout``.

        Not loaded are MTP layers without a draft and their copies of embeddings and head, layers
        that the config does not know, and indexers that vLLM does not build.
        """
        if is_mtp_module(module):
            return draft
        if module.endswith(_COMPUTED):
            return False
        index = layer_index(module)
        if index is None:
            return True
        if self.num_layers is not None and index >= self.num_layers:
            is_copy = module.endswith(_SHARED_WITH_DRAFT)
            if is_copy or not (draft and self.is_mtp_layer(index)):
                return False
        return self.builds_indexer(index) or indexer_name(module) is None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


@lru_cache(maxsize=1 << 17)  # asked of each of 50,000 modules several times
def layer_index(module: str) -> int | None:
    """Return which layer of the language model a module is in, or is; None for one outside."""
    found = _LAYER.match(module)
    return int(found[2]) if found is not None else None


def layer_name(module: str) -> str | None:
    """Return the name of a module's layer, such as ``model.layers.3``; None for one outside."""
    found = _LAYER.match(module)
    return found[1] + found[2] if found is not None else None


def indexer_name(module: str) -> str | None:
    """Return the name of the indexer that a module is part of; None for any other module."""
    found = _INDEXER.match(module) if ".indexer" in module else None
    return found[1] if found is not None else None


def is_tower_module(module: str) -> bool:
    """Whether a module belongs to a vision or audio tower."""
    return _TOWER.search(module) is not None


def is_mtp_module(module: str) -> bool:
    """Whether a module lies below ``mtp``, where Qwen and others keep what predicts ahead."""
    return "mtp." in module and _MTP_MODULES.search(module) is not None


def _integer(text: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = text.get(key)
        if isinstance(value, int):
            if abs(value) > _LARGEST:  # a stranger's file; sets of layers are made of it
                raise CheckpointError(
                    f"config.json: {key} is {value}, expected at most {_LARGEST}. {CONFIG_REMEDY}"
                )
            return value
    return None


def _string(text: Mapping[str, Any], *keys: str) -> str | None:
    return next((text[key] for key in keys if isinstance(text.get(key), str)), None)


def _expert_arithmetic(text: Mapping[str, Any]) -> ExpertArithmetic:
    activation = _string(text, *_ACTIVATION_KEYS) or "silu"
    # llama4.py passes True; laguna.py what its config says.
    is_llama4 = text.get("model_type") in ("llama4", "llama4_text")
    return ExpertArithmetic(
        _ACTIVATIONS.get(activation, activation),
        max(map(_limit, map(text.get, _LIMIT_KEYS))),
        is_llama4 or text.get("moe_apply_router_weight_on_input") is True,
    )


def _limits_by_layer(text: Mapping[str, Any]) -> tuple[float, ...]:
    lists = (text[key] for key in _LIMIT_KEYS if isinstance(text.get(key), list))
    return tuple(map(_limit, next(lists, ())))


def _limit(value: object) -> float:
    """Return a clamp as a number; 0 for none, which is spelled null, 0 or left out."""
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0


def _moe_layers(
    text: Mapping[str, Any], num_layers: int | None, num_mtp_layers: int
) -> frozenset[int] | None:
    """Return the layers with routed experts, as vLLM's model files tell them."""
    if num_layers is None or _integer(text, *_EXPERT_KEYS) is None:
        return None
    layers = range(num_layers)
    first, every = _integer(text, "first_k_dense_replace"), text.get("moe_layer_freq", 1)
    if first is not None and isinstance(every, int) and every > 0:  # deepseek_v2.py, glm4_moe.py
        with_mtp = range(num_layers + num_mtp_layers)
        return frozenset(i for i in with_mtp if i >= first and i % every == 0)
    for key, sparse in (("mlp_layer_types", "sparse"), ("moe_layer_freq", 1)):
        kinds = text.get(key)
        if isinstance(kinds, list) and len(kinds) == num_layers:
            return frozenset(i for i in layers if kinds[i] == sparse)
    step = _integer(text, "decoder_sparse_step")
    if step:  # qwen3_moe.py
        dense = text["mlp_only_layers"] if isinstance(text.get("mlp_only_layers"), list) else ()
        return frozenset(i for i in layers if (i + 1) % step == 0 and i not in dense)
    return None


def _indexer_layers(
    text: Mapping[str, Any], num_layers: int | None, num_mtp_layers: int
) -> frozenset[int] | None:
    """Return the layers that select tokens themselves, not as the layer before did.

    As vLLM's DeepseekV2MLAAttention and DeepseekV32Attention; where neither a pattern nor a
    frequency is given, transformers' ``indexer_types`` decides. MTP layers always have one.
    """
    if num_layers is None or text.get("model_type") not in DEEPSEEK_MODEL_TYPES:
        return None
    if _integer(text, "index_topk") is None:
        return frozenset()
    scheduled = scheduled_indexers(text, num_layers)
    own = typed_indexers(text) if scheduled is None else scheduled
    mtp = range(num_layers, num_layers + num_mtp_layers)
    return frozenset(range(num_layers) if own is None else own).union(mtp)


def scheduled_indexers(text: Mapping[str, Any], num_layers: int) -> frozenset[int] | None:
    """Layers with an indexer by ``index_topk_pattern`` or ``index_topk_freq``; None without."""
    pattern, every = text.get("index_topk_pattern"), _integer(text, "index_topk_freq")
    layers = range(num_layers)
    if isinstance(pattern, (str, list)):
        return frozenset(i for i in layers if i >= len(pattern) or pattern[i] != "S")
    if every is None:
        return None
    given = _integer(text, "index_skip_topk_offset")
    offset = 2 if given is None else given
    return frozenset(i for i in layers if max(i - offset + 1, 0) % max(every, 1) == 0)


def typed_indexers(text: Mapping[str, Any]) -> frozenset[int] | None:
    """Layers with an indexer by transformers' ``indexer_types``; None without."""
    types = text.get("indexer_types")
    if not isinstance(types, list):
        return None
    return frozenset(i for i, kind in enumerate(types) if kind != "shared")
