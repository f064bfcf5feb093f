# SPDX-License-Identifier: Apache-2.0
"""Tiny dense models in BF16, FP8 and GPTQ int4: built by transformers, quantised by tools."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from vllm.scalar_type import scalar_types

from tests.checkpoint.formats.tools import fp8, gptq

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
STORES = {"fp8": fp8((128, 128)), "int4": gptq(scalar_types.uint4b8, 128)}


def write_dense(folder: Path, name: str) -> dict[str, Path]:
    """Write ``llama``, with its head tied to the embeddings, or ``qwen3``; returns its sources."""
    torch.manual_seed(9)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
        if name == "llama"
        else Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False))
    )
    sources = {form: folder / name / form for form in ("bf16", *STORES)}
    model.bfloat16().save_pretrained(sources["bf16"])
    config = json.loads((sources["bf16"] / "config.json").read_text())
    weights = load_file(sources["bf16"] / "model.safetensors")
    assert ("lm_head.weight" in weights) == (name == "qwen3")
    for form, store in STORES.items():
        stored = {}
        for weight, tensor in weights.items():
            if "_proj." not in weight:
                stored[weight] = tensor
                continue
            made = store(tensor.float())
            module = weight.removesuffix("weight")
            stored |= {f"{module}{suffix}": part for suffix, part in made.tensors.items()}
        sources[form].mkdir()
        save_file(stored, sources[form] / "model.safetensors", metadata={"format": "pt"})
        content = config | {"quantization_config": made.config}
        (sources[form] / "config.json").write_text(json.dumps(content))
    return sources
