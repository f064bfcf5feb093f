# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are headers only: true names, shapes, dtypes and sizes, and no data."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors dtype, shape)."""

_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4}
_BLOCK = 128

GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
}

# zai-org/GLM-5, whose sizes are the defaults of transformers' GlmMoeDsaConfig.
GLM_5: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "tie_word_embeddings": False,
}

# deepseek-ai/DeepSeek-V3's config.json, less what decides neither names nor shapes.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
}

# GLM-5 with everything that can be small made small.
TINY_GLM = GLM_5 | {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "index_topk": 64,
    "index_n_heads": 4,
}


def glm_header(config: Mapping[str, Any], fp8: bool = False) -> Header:
    """Return the tensors of a GLM-5, DeepSeek-V3 or V3.2 checkpoint, spelled as theirs are.

    With ``fp8`` the linears have a ``weight_scale_inv`` for each 128 x 128 block, but those that
    Z.ai's FP8 export leaves alone: embeddings, head, router, ``weights_proj``, ``eh_proj``.
    """
    header: Header = {}
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    decoders = config["num_hidden_layers"]
    header["model.embed_tokens.weight"] = ("BF16", (vocab, hidden))
    for index in range(decoders + config.get("num_nextn_predict_layers", 0)):
        _add_layer(header, config, index, fp8)
        if index >= decoders:
            layer = f"model.layers.{index}"
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                header[f"{layer}.{norm}.weight"] = ("BF16", (hidden,))
            header[f"{layer}.eh_proj.weight"] = ("BF16", (hidden, 2 * hidden))
            header[f"{layer}.embed_tokens.weight"] = ("BF16", (vocab, hidden))
            header[f"{layer}.shared_head.head.weight"] = ("BF16", (vocab, hidden))
    header["model.norm.weight"] = ("BF16", (hidden,))
    header["lm_head.weight"] = ("BF16", (vocab, hidden))
    return header


def _add_layer(header: Header, config: Mapping[str, Any], index: int, fp8: bool) -> None:
    layer, hidden = f"model.layers.{index}", config["hidden_size"]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        header[f"{layer}.{norm}.weight"] = ("BF16", (hidden,))
    _add_attention(header, config, f"{layer}.self_attn", fp8)
    if index < config["first_k_dense_replace"]:
        _add_mlp(header, f"{layer}.mlp", hidden, config["intermediate_size"], fp8)
        return
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    header[f"{layer}.mlp.gate.weight"] = ("BF16", (experts, hidden))
    header[f"{layer}.mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
    shared_width = width * config["n_shared_experts"]
    _add_mlp(header, f"{layer}.mlp.shared_experts", hidden, shared_width, fp8)
    for expert in range(experts):
        _add_mlp(header, f"{layer}.mlp.experts.{expert}", hidden, width, fp8)


def _add_attention(header: Header, config: Mapping[str, Any], name: str, fp8: bool) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value = config["v_head_dim"]
    linears = {
        "q_a_proj": (q_rank, hidden),
        "q_b_proj": (heads * (nope + rope), q_rank),
        "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "kv_b_proj": (heads * (nope + value), kv_rank),
        "o_proj": (hidden, heads * value),
    }
    for norm, size in (("q_a_layernorm", q_rank), ("kv_a_layernorm", kv_rank)):
        header[f"{name}.{norm}.weight"] = ("BF16", (size,))
    if "index_topk" in config:
        index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
        linears["indexer.wq_b"] = (index_heads * index_dim, q_rank)
        linears["indexer.wk"] = (index_dim, hidden)
        header[f"{name}.indexer.weights_proj.weight"] = ("BF16", (index_heads, hidden))
        for suffix in ("weight", "bias"):
            header[f"{name}.indexer.k_norm.{suffix}"] = ("BF16", (index_dim,))
    for leaf, shape in linears.items():
        _add_linear(header, f"{name}.{leaf}", shape, fp8)


def _add_mlp(header: Header, name: str, hidden: int, width: int, fp8: bool) -> None:
    _add_linear(header, f"{name}.gate_proj", (width, hidden), fp8)
    _add_linear(header, f"{name}.up_proj", (width, hidden), fp8)
    _add_linear(header, f"{name}.down_proj", (hidden, width), fp8)


def _add_linear(header: Header, name: str, shape: tuple[int, int], fp8: bool) -> None:
    header[f"{name}.weight"] = ("F8_E4M3" if fp8 else "BF16", shape)
    if fp8:
        blocks = (-(-shape[0] // _BLOCK), -(-shape[1] // _BLOCK))
        header[f"{name}.weight_scale_inv"] = ("F32", blocks)


def gptq_experts(header: Header) -> Header:
    """Return a BF16 header with its routed experts in GPTQ int4, groups of ``GPTQ``'s size."""
    packed: Header = {}
    group = GPTQ["group_size"]
    for name, (dtype, shape) in header.items():
        module, _, suffix = name.rpartition(".")
        if ".mlp.experts." not in name or suffix != "weight":
            packed[name] = (dtype, shape)
            continue
        rows, columns = shape
        packed |= {
            f"{module}.qweight": ("I32", (columns // 8, rows)),
            f"{module}.qzeros": ("I32", (columns // group, rows // 8)),
            f"{module}.scales": ("F16", (columns // group, rows)),
            f"{module}.g_idx": ("I32", (columns,)),
        }
    return packed


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], header: Header, shards: int = 1
) -> Path:
    """Write config.json and the shards' headers; the data is a hole in each file.

    Tensors go to the shards in their order, about the same number to each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(dtype == "F8_E4M3" for dtype, _ in header.values()):
        block = {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK]}
        config = {**config, "quantization_config": block}
    if any(name.endswith(".qweight") for name in header):
        config = {**config, "quantization_config": GPTQ}
    (folder / "config.json").write_text(json.dumps(config))
    names = list(header)
    size = -(-len(names) // shards)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * size : (shard + 1) * size]
        weight_map |= dict.fromkeys(part, file)
        _write_shard(folder / file, {name: header[name] for name in part})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_shard(file: Path, header: Header) -> None:
    entries, end = {}, 0
    for name, (dtype, shape) in header.items():
        begin, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
