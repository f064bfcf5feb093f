# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3-MoE with a layer for each format: its o_proj and first two experts are stored so.

Each format is a source of its own, written by its tool (``tests.checkpoint.formats.tools``); the
rest of the model is the base's, in BF16. One source is a PyTorch file. Another such model has
sources of several schemes each, which their configs tell apart.
"""

import json
from collections.abc import Callable, Iterable
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


Config = dict[str, Any]


def _by_dynamic(layers: range, configs: list[Config]) -> Config:
    """GPTQModel's overrides, where a minus excludes."""
    low, high, plain = (rf"model\.layers\.{layer}\." for layer in layers)
    own = {key: configs[1][key] for key in ("bits", "group_size")}
    return configs[0] | {"dynamic": {f"-:{plain}.*": {}, f"+:{high}.*": own}}


def _by_extra_config(layers: range, configs: list[Config]) -> Config:
    """auto-round's: by name and by expression; 16 bits are none."""
    low, high, plain = layers
    own = {key: configs[1][key] for key in ("bits", "group_size")}
    unquantised = {"bits": 16, "data_type": "float"}
    extra = {
        f"model.layers.{high}.self_attn.o_proj": own,
        rf".*layers\.{high}\.mlp\.experts.*": own,
        f"model.layers.{plain}.self_attn.o_proj": unquantised,
        rf".*layers\.{plain}\.mlp\.experts.*": unquantised,
    }
    layout = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    return configs[0] | layout | {"extra_config": extra}


def _by_groups(layers: range, configs: list[Config]) -> Config:
    """compressed-tensors' groups of a format each, and what they ignore."""
    groups = {
        f"group_{number}": {
            **config["config_groups"]["group_0"],
            "targets": [rf"re:.*layers\.{layer}\..*"],
            "format": config["format"],
        }
        for number, (layer, config) in enumerate(zip(layers, configs, strict=False))
    }
    ignore = ["lm_head", rf"re:.*layers\.{layers[-1]}\..*"]
    return configs[0] | {"format": "mixed-precision", "config_groups": groups, "ignore": ignore}


def _by_ignored_layers(layers: range, configs: list[Config]) -> Config:
    """FP8's list, by either of its names."""
    names = list(modules_of(layers[-1]))
    return configs[0] | {"ignored_layers": names, "modules_to_not_convert": names}


# Source -> the case of each of its layers, None for BF16, and what makes one config of theirs.
SEVERAL: dict[str, tuple[tuple[str | None, ...], Callable[[range, list[Config]], Config]]] = {
    "dynamic": (("gptq-g128", "gptq-int8", None), _by_dynamic),
    "extra_config": (("gptq-g32", "gptq-int8", None), _by_extra_config),
    "config_groups": (("ct-int4", "ct-fp8-channel", None), _by_groups),
    "ignored_layers": (("fp8-128x128", None), _by_ignored_layers),
}


def write_several(folder: Path) -> tuple[dict[str, Any], Tensors, dict[str, str]]:
    """Write a base, and sources that hold several schemes each.

    Returns:
        The plan, the weights as :func:`write_formats` has them, and the label of each module that
        is not the base's.
    """
    count = sum(len(cases) for cases, _ in SEVERAL.values())
    config = _config(count)
    weights = base_tensors(count)
    _write(folder / "base", weights, config)
    sources, rules, labels = {"base": {"path": str(folder / "base")}}, [], {}
    first = 0
    for source, (cases, merge) in SEVERAL.items():
        layers = range(first, first + len(cases))
        tensors: Tensors = {}
        configs = []
        for layer, case in zip(layers, cases, strict=True):
            for number, (module, shape) in enumerate(modules_of(layer).items()):
                made = make_weight(*shape, seed=100 * layer + number)
                rules.append({"match": module, "source": source})
                if case is None:
                    tensors[f"{module}.weight"] = weights[f"{module}.weight"] = made.bfloat16()
                    labels[module] = "bf16"
                    continue
                stored = CASES[case].store(made)
                for suffix, tensor in stored.tensors.items():
                    tensors[f"{module}.{suffix}"] = tensor.contiguous()
                weights[f"{module}.weight"] = stored.weight
                labels[module] = CASES[case].label.format(k=shape[1])
            if case is not None:
                configs.append(stored.config)
        merged = config | {"quantization_config": merge(layers, configs)}
        _write(folder / source, tensors, merged)
        sources[source] = {"path": str(folder / source)}
        first = layers.stop
    plan = {"version": 1, "base": "base", "sources": sources, "rules": rules}
    return plan, {name: weight.float().contiguous() for name, weight in weights.items()}, labels


def _config(layers: int) -> Config:
    config: Config = json.loads((RANDOM / "bf16" / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "num_local_experts": EXPERTS, "vocab_size": 256}
    return config | {"num_experts_per_tok": 2, "eos_token_id": None}


def write_formats(folder: Path, cases: Iterable[str] = CASES) -> tuple[dict[str, Any], Tensors]:
    """Write base and sources.

    Returns:
        The plan, and the weights in float32 as the tools read them, by the base's names.
    """
    cases = list(cases)
    config = _config(len(cases))
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
