# SPDX-License-Identifier: Apache-2.0
"""An indexer's ``wk`` in every format that a checkpoint may store it in, each written by a tool.

transformers and compressed-tensors quantise, pack and read back; of GPTQ and AWQ, vLLM's own
reference quantiser makes the codes and packs them, and auto-round wrote those of the fixtures.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.scalar_type import scalar_types

from tests.checkpoint.formats.stored import Tensors, define_fp8
from tests.checkpoint.formats.test_fp8 import pack_exponents
from tests.checkpoint.formats.tools import (
    CASES,
    FLOAT,
    FP8,
    Store,
    Stored,
    compressed,
    fp8,
    gptq,
    make_weight,
    plain_fp8,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
Shape = tuple[int, int]
Make = Callable[[Shape], Stored]
"""Stores a random weight of a shape (N, K)."""


def of(store: Store) -> Make:
    return lambda shape: store(make_weight(*shape, seed=7))


def plain(dtype: torch.dtype) -> Store:
    def store(weight: torch.Tensor) -> Stored:
        return Stored({"weight": weight.to(dtype)}, weight.to(dtype), None)

    return store


def renamed(store: Store, suffix: str, shape_of_scale: tuple[int, ...] | None = None) -> Store:
    """FP8 with its scales under another name, or in another shape of as many numbers."""

    def rename(weight: torch.Tensor) -> Stored:
        made = store(weight)
        tensors = dict(made.tensors)
        (found,) = tensors.keys() - {"weight"}
        scale = tensors.pop(found)
        tensors[suffix] = scale if shape_of_scale is None else scale.reshape(shape_of_scale)
        return Stored(tensors, made.weight, made.config)

    return rename


def uneven_blocks(shape: Shape) -> Stored:
    """Blocks that do not divide the weight, with BF16 scales; by FP8's definition."""
    block = (48, 40)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scale = torch.rand(grid, generator=generator).to(torch.bfloat16)
    expected = torch.from_numpy(define_fp8(weight, scale.float().numpy(), block))
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    return Stored({"weight": weight, "weight_scale_inv": scale}, expected, config)


def pack(scale: torch.Tensor) -> torch.Tensor:
    return pack_exponents(scale.float())


def with_input_scale(weight: torch.Tensor) -> Stored:
    made = renamed(plain_fp8("tensor"), "weight_scale", ())(weight)
    return Stored(made.tensors | {"input_scale": torch.tensor(0.5)}, made.weight, made.config)


def gptq_of_auto_round(checkpoint: str) -> Make:
    """The first columns of an expert of random-moe, its words unpacked by vLLM."""

    def store(shape: Shape) -> Stored:
        folder = FIXTURES / "random-moe" / checkpoint
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        expert, k = "model.layers.0.mlp.experts.0.gate_proj.", shape[1]
        found = {
            name.removeprefix(expert): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
            if name.startswith(expert)
        }
        groups = k // config["group_size"]
        rows = {"qweight": k // 8, "qzeros": groups, "scales": groups, "g_idx": k}
        tensors = {suffix: tensor[: rows[suffix]] for suffix, tensor in found.items()}
        uint4 = scalar_types.uint4
        codes = unpack_quantized_values_into_int32(tensors["qweight"], uint4, 0)
        zeros = unpack_quantized_values_into_int32(tensors["qzeros"], uint4, 1) + 1
        group = tensors["g_idx"].long()
        weight = ((codes - zeros[group]).float() * tensors["scales"].float()[group]).t()
        return Stored(tensors, weight, config)

    return store


def awq_of_auto_round(shape: Shape) -> Stored:
    """Two linears of the AWQ fixture, one upon the other, the second one twice side by side.

    auto-round's weights are rounded to float16 before ours are to bfloat16, which changes none of
    this fixture's.
    """
    folder = FIXTURES / "formats" / "awq"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found, read = (
        load_file(folder / "model.safetensors"),
        load_file(folder / "expected.safetensors"),
    )
    down, query = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
    tensors = {}
    for suffix in ("qweight", "qzeros", "scales"):
        upper, lower = found[f"{down}.{suffix}"], found[f"{query}.{suffix}"]
        tensors[suffix] = torch.cat([upper, torch.cat([lower, lower])], dim=1)
    return Stored(tensors, torch.cat([read[down], torch.cat([read[query]] * 2, 1)]), config)


SAME = (
    *("fp8-128x128", "fp8-channel", "gptq-g128", "gptq-asym", "gptq-act-order", "gptq-int8"),
    *("gptq-v2-asym", "awq-g32", "awq-g128", "ct-int4", "ct-int4-asym", "ct-int4-channel"),
    *("ct-int4-act-order", "ct-int8", "ct-fp8-channel", "ct-mxfp8"),
)
"""Of the table in docs/formats.md; what follows are others of the same formats."""

FORMATS: dict[str, Make] = {name: of(CASES[name].store) for name in SAME} | {
    "bf16": of(plain(torch.bfloat16)),
    "fp16": of(plain(torch.float16)),
    "fp32": of(plain(torch.float32)),
    "fp8-64x32": of(renamed(fp8((64, 32)), "weight_scale")),
    "fp8-32x64": of(fp8((32, 64))),
    "fp8-48x40-bf16": uneven_blocks,
    "fp8-channel-inv": of(renamed(plain_fp8("channel"), "weight_scale_inv", (-1,))),
    "fp8-tensor": of(renamed(plain_fp8("tensor"), "weight_scale", ())),
    "fp8-tensor-inv": of(renamed(plain_fp8("tensor"), "weight_scale_inv")),
    "fp8-input-scale": of(with_input_scale),
    "fp8-128x128-ue8m0": of(fp8((128, 128), "ue8m0")),
    "mx": of(fp8((1, 32), "ue8m0")),
    "mx-bytes": of(
        renamed(fp8((1, 32), "ue8m0", lambda scale: scale.view(torch.uint8)), "weight_scale")
    ),
    "mx-packed": of(fp8((1, 32), "ue8m0", pack)),
    "fp8-32x64-packed": of(renamed(fp8((32, 64), "ue8m0", pack), "weight_scale")),
    "fp8-128x128-packed-rows": of(
        fp8((128, 128), "ue8m0", lambda scale: pack(scale.float().repeat_interleave(128, 0)))
    ),
    "gptq-asym-act-order": of(gptq(scalar_types.uint4, 64, is_ordered=True)),
    "gptq-auto-round": gptq_of_auto_round("gptq"),
    "gptq-auto-round-asym": gptq_of_auto_round("gptq-asym"),
    "awq-auto-round": awq_of_auto_round,
    "ct-fp8-block": of(compressed(FLOAT, FP8 | {"strategy": "block", "block_structure": [64, 32]})),
}


def write_source(folder: Path, base: Path, modules: Mapping[str, Stored]) -> Path:
    """Write modules of one quantization_config: every suffix has a file, scales before weights."""
    folder.mkdir(parents=True)
    files: dict[str, Tensors] = {}
    for module, stored in modules.items():
        for suffix, tensor in stored.tensors.items():
            files.setdefault(suffix, {})[f"{module}.{suffix}"] = tensor.contiguous()
    weight_map = {}
    for number, suffix in enumerate(sorted(files, key=lambda s: (s.endswith("weight"), s))):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(files[suffix], folder / file)
        weight_map |= dict.fromkeys(files[suffix], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((base / "config.json").read_text())
    quantization = next(iter(modules.values())).config
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder
