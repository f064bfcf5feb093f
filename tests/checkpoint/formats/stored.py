# SPDX-License-Identifier: Apache-2.0
"""Modules for the tests of the formats: made-up headers, and tensors written to a real shard."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vllm_mixprec.checkpoint import Module, open_checkpoint
from vllm_mixprec.checkpoint.header import DTYPE_BITS, TensorSpec

NAME = "model.layers.0.self_attn.q_proj"

Float32 = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Tensors = dict[str, torch.Tensor]


def specs(**tensors: tuple[str, list[int]]) -> dict[str, TensorSpec]:
    """Make the specs of module ``NAME``: suffix=(dtype, shape)."""
    made = {}
    for suffix, (dtype, shape) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        nbytes = count * DTYPE_BITS[dtype] // 8
        file = Path("x.safetensors")
        made[suffix] = TensorSpec(f"{NAME}.{suffix}", dtype, tuple(shape), file, 0, nbytes)
    return made


def write(path: Path, tensors: Tensors, config: dict[str, Any] | None) -> tuple[Module, Tensors]:
    """Write a module as the only one of a checkpoint; return it as opened and as loaded."""
    path.mkdir(exist_ok=True)
    named = {f"{NAME}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    save_file(named, path / "model.safetensors")
    quantization = {} if config is None else {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(quantization, default=str))
    loaded = load_file(path / "model.safetensors")
    suffixes = {name.rpartition(".")[2]: tensor for name, tensor in loaded.items()}
    return open_checkpoint(path).modules[NAME], suffixes


def decode_e4m3(codes: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Float32:
    """Decode FP8 E4M3 by its definition: sign, 4 exponent bits with bias 7, 3 mantissa bits."""
    table = np.empty(256, dtype=np.float32)
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9
        if exponent == 15 and mantissa == 7:
            value = np.nan
        table[code] = -value if code >> 7 else value
    return table[codes]


def define_fp8(weight: torch.Tensor, scale: Float32, block: tuple[int, int]) -> Float32:
    """Weight [i, j] is its code's value times scale [i // bn, j // bk], in float32."""
    values = decode_e4m3(weight.view(torch.uint8).numpy())
    rows, columns = np.indices(values.shape)
    return values * scale[rows // block[0], columns // block[1]]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def gptq_specs(k: int, n: int, group_size: int, bits: int = 4) -> dict[str, TensorSpec]:
    """Make the specs of a GPTQ module (N, K)."""
    groups = -(-k // group_size)
    return specs(
        qweight=("I32", [k * bits // 32, n]),
        qzeros=("I32", [groups, n * bits // 32]),
        scales=("F16", [groups, n]),
        g_idx=("I32", [k]),
    )
