# SPDX-License-Identifier: Apache-2.0
"""Tiny dense models in BF16, FP8 and GPTQ int4: built by transformers, quantised by tools."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    gptq_pack,
    pack_cols,
    quantize_weights,
)
from vllm.scalar_type import scalar_types

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # fewer, and blocks of FP8 would end between k and v
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUP = 128


def write_dense(folder: Path, name: str) -> dict[str, Path]:
    """Write ``llama``, with its head tied to the embeddings, or ``qwen3``; returns its sources."""
    torch.manual_seed(9)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
        if name == "llama"
        else Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False))
    )
    sources = {form: folder / name / form for form in ("bf16", "fp8", "int4")}
    model.bfloat16().save_pretrained(sources["bf16"])
    config = json.loads((sources["bf16"] / "config.json").read_text())
    weights = load_file(sources["bf16"] / "model.safetensors")
    assert ("lm_head.weight" in weights) == (name == "qwen3")
    for form, quantise, quantization in (("fp8", _fp8, FP8), ("int4", _int4, INT4)):
        stored = {}
        for weight, tensor in weights.items():
            stored |= quantise(weight, tensor) if "_proj." in weight else {weight: tensor}
        sources[form].mkdir()
        save_file(stored, sources[form] / "model.safetensors", metadata={"format": "pt"})
        content = config | {"quantization_config": quantization}
        (sources[form] / "config.json").write_text(json.dumps(content))
    return sources


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}


def _fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """transformers wants whole blocks: what is less is filled up meanwhile."""
    rows, columns = weight.shape
    whole = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128, dtype=weight.dtype)
    whole[:rows, :columns] = weight
    block = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    made = Fp8Quantize(SimpleNamespace(quantization_config=block)).convert({name: whole})
    made[name] = made[name][:rows, :columns].contiguous()
    return made


def _int4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    n, k = weight.shape
    _, codes, scales, _ = quantize_weights(weight.float().t(), scalar_types.uint4b8, GROUP)
    zeros = torch.full((k // GROUP, n), 7, dtype=torch.int32)  # GPTQ stores one less than 8
    module = name.removesuffix("weight")
    return {
        f"{module}qweight": gptq_pack(codes, 4, k, n),
        f"{module}qzeros": pack_cols(zeros, 4, k // GROUP, n),
        f"{module}scales": scales.half(),
        f"{module}g_idx": torch.arange(k, dtype=torch.int32) // GROUP,
    }
