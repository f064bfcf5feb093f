# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3-MoE with a layer for each format: its o_proj and first two experts are stored so.

Each format is a source of its own, written by its tool (``tests.checkpoint.formats.tools``); the
rest of the model is the base's, in BF16. One source is a PyTorch file.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoint.formats.tools import CASES, make_weight
from tests.engine.mixes import RANDOM

Tensors = dict[str, torch.Tensor]
HIDDEN, INNER, EXPERTS, QUANTISED = 256, 128, 4, 2
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
PICKLED = "gptq-asym"
"""The case whose source is a ``pytorch_model.bin``."""


def modules_of(layer: int) -> dict[str, tuple[int, int]]:
    """Modules of a layer that are stored in its format -> (N, K)."""
    prefix = f"model.layers.{layer}"
    experts = {
        f"{prefix}.mlp.experts.{expert}.{part}": shape
        for expert in range(QUANTISED)
        for part, shape in SHAPES.items()
    }
    return {f"{prefix}.self_attn.o_proj": (HIDDEN, HIDDEN), **experts}


def base_tensors(layers: int) -> Tensors:
    """Random BF16 tensors of the whole model."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    tensors = {
        "model.embed_tokens.weight": random(256, HIDDEN) * HIDDEN**0.5,
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": random(256, HIDDEN),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{prefix}.self_attn.{norm}.weight"] = torch.ones(64, dtype=torch.bfloat16)
        for part in "qkvo":
            tensors[f"{prefix}.self_attn.{part}_proj.weight"] = random(HIDDEN, HIDDEN)
        tensors[f"{prefix}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for part, shape in SHAPES.items():
                tensors[f"{prefix}.mlp.experts.{expert}.{part}.weight"] = random(*shape)
    return tensors


def write_formats(folder: Path, cases: Iterable[str] = CASES) -> tuple[dict[str, Any], Tensors]:
    """Write base and sources.

    Returns:
        The plan, and the weights in float32 as the tools read them, by the base's names.
    """
    cases = list(cases)
    config = json.loads((RANDOM / "bf16" / "config.json").read_text())
    config |= {"num_hidden_layers": len(cases), "num_local_experts": EXPERTS, "vocab_size": 256}
    config |= {"num_experts_per_tok": 2, "eos_token_id": None}
    weights = base_tensors(len(cases))
    _write(folder / "base", weights, config)
    sources, rules = {"base": {"path": str(folder / "base")}}, []
    for layer, case in enumerate(cases):
        tensors: Tensors = {}
        raw = None
        for number, (module, shape) in enumerate(modules_of(layer).items()):
            stored = CASES[case].store(make_weight(*shape, seed=100 * layer + number))
            tensors |= {
                f"{module}.{suffix}": t.contiguous() for suffix, t in stored.tensors.items()
            }
            weights[f"{module}.weight"] = stored.weight
            rules.append({"match": module, "source": case})
            raw = stored.config
        _write(folder / case, tensors, config | {"quantization_config": raw}, case == PICKLED)
        sources[case] = {"path": str(folder / case)}
    plan = {"version": 1, "base": "base", "sources": sources, "rules": rules}
    return plan, {name: weight.float().contiguous() for name, weight in weights.items()}


def _write(
    folder: Path, tensors: Tensors, config: dict[str, Any], is_pickled: bool = False
) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    if is_pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
