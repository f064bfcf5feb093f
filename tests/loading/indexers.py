# SPDX-License-Identifier: Apache-2.0
"""An indexer's ``wk`` in every format that a checkpoint may store it in, each written by a tool.

transformers and compressed-tensors quantise, pack and read back; of GPTQ and AWQ, vLLM's own
reference quantiser makes the codes and packs them, and auto-round wrote those of the fixtures.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    awq_pack,
    gptq_pack,
    pack_cols,
    quantize_weights,
    unpack_quantized_values_into_int32,
)
from vllm.scalar_type import ScalarType, scalar_types

from tests.checkpoint.formats.compressed import compress, config_of
from tests.checkpoint.formats.stored import Tensors, define_fp8
from tests.checkpoint.formats.test_fp8 import pack_exponents, quantize

FIXTURES = Path(__file__).parents[1] / "fixtures"
PACK = "pack-quantized"
FP8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
Shape = tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """One weight (N, K).

    Attributes:
        tensors: suffix -> tensor, as in the file.
        weight: what the tool reads back.
        config: the ``quantization_config`` of the checkpoint.
    """

    tensors: Tensors
    weight: torch.Tensor
    config: dict[str, Any] | None


def plain(dtype: torch.dtype) -> Callable[[Shape], Stored]:
    def store(shape: Shape) -> Stored:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        return Stored({"weight": weight}, weight, None)

    return store


def blocks(
    block: Shape,
    scale_fmt: str = "float",
    suffix: str = "weight_scale_inv",
    change: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> Callable[[Shape], Stored]:
    """FP8 of transformers, its scales under another name or in another form of the same numbers."""

    def store(shape: Shape) -> Stored:
        tensors, weight = quantize(shape, block, scale_fmt)
        tensors[suffix] = change(tensors.pop("weight_scale_inv"))
        return Stored(tensors, weight, {"quant_method": "fp8", "weight_block_size": list(block)})

    return store


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


def whole(
    strategy: str, shape_of_scale: tuple[int, ...], suffix: str = "weight_scale"
) -> Callable[[Shape], Stored]:
    """FP8 of compressed-tensors with a scale a channel or a tensor, in a plain FP8 checkpoint."""

    def store(shape: Shape) -> Stored:
        tensors, read, _ = compress("float-quantized", shape, FP8 | {"strategy": strategy})
        tensors[suffix] = tensors.pop("weight_scale").reshape(shape_of_scale)
        return Stored(tensors, read["weight"], {"quant_method": "fp8"})

    return store


def with_input_scale(shape: Shape) -> Stored:
    made = whole("tensor", ())(shape)
    return Stored(made.tensors | {"input_scale": torch.tensor(0.5)}, made.weight, made.config)


def compressed(form: str, args: dict[str, Any], is_ordered: bool = False):
    def store(shape: Shape) -> Stored:
        order = None
        if is_ordered:
            groups = torch.arange(shape[1], dtype=torch.int32) // args["group_size"]
            order = groups[torch.randperm(shape[1], generator=torch.Generator().manual_seed(6))]
        tensors, read, scheme = compress(form, shape, args, g_idx=order)
        return Stored(tensors, read["weight"], config_of(scheme, form=form))

    return store


def _codes(shape: Shape, kind: ScalarType, group_size: int) -> tuple[torch.Tensor, ...]:
    """Quantise with vLLM: codes (K, N), float16 scales and zero points (K/g, N)."""
    n, k = shape
    weight = torch.randn(k, n, generator=torch.Generator().manual_seed(7))
    has_zeros = not kind.has_bias()
    _, codes, scales, zeros = quantize_weights(weight, kind, group_size, has_zeros)
    if not has_zeros:
        zeros = torch.full_like(scales, kind.bias, dtype=torch.int32)
    return codes, scales.to(torch.float16), zeros


def gptq(
    kind: ScalarType, group_size: int, is_ordered: bool = False, layout: str = "gptq"
) -> Callable[[Shape], Stored]:
    def store(shape: Shape) -> Stored:
        (n, k), bits = shape, kind.size_bits
        codes, scales, zeros = _codes(shape, kind, group_size)
        g_idx = torch.arange(k, dtype=torch.int32) // group_size
        if is_ordered:
            order = torch.randperm(k, generator=torch.Generator().manual_seed(8))
            codes, g_idx = codes[order], g_idx[order]
        stored_zeros = zeros - 1 if layout == "gptq" else zeros
        tensors = {
            "qweight": gptq_pack(codes, bits, k, n),
            "qzeros": pack_cols(stored_zeros, bits, k // group_size, n),
            "scales": scales,
            "g_idx": g_idx,
        }
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": kind.has_bias(),
            "desc_act": is_ordered,
            "checkpoint_format": layout,
        }
        group = g_idx.long()
        return Stored(tensors, ((codes - zeros[group]).float() * scales[group].float()).t(), config)

    return store


def awq(group_size: int) -> Callable[[Shape], Stored]:
    def store(shape: Shape) -> Stored:
        n, k = shape
        codes, scales, zeros = _codes(shape, scalar_types.uint4, group_size)
        tensors = {
            "qweight": awq_pack(codes, 4, k, n),
            "qzeros": awq_pack(zeros, 4, k // group_size, n),
            "scales": scales,
        }
        group = torch.arange(k) // group_size
        config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
        return Stored(tensors, ((codes - zeros[group]).float() * scales[group].float()).t(), config)

    return store


def gptq_of_auto_round(checkpoint: str) -> Callable[[Shape], Stored]:
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


UINT8 = torch.uint8
FORMATS: dict[str, Callable[[Shape], Stored]] = {
    "bf16": plain(torch.bfloat16),
    "fp16": plain(torch.float16),
    "fp32": plain(torch.float32),
    "fp8-128x128": blocks((128, 128)),
    "fp8-64x32": blocks((64, 32), suffix="weight_scale"),
    "fp8-32x64": blocks((32, 64)),
    "fp8-48x40-bf16": uneven_blocks,
    "fp8-channel": whole("channel", (-1, 1)),
    "fp8-channel-inv": whole("channel", (-1,), "weight_scale_inv"),
    "fp8-tensor": whole("tensor", ()),
    "fp8-tensor-inv": whole("tensor", (1,), "weight_scale_inv"),
    "fp8-input-scale": with_input_scale,
    "fp8-128x128-ue8m0": blocks((128, 128), "ue8m0"),
    "mx": blocks((1, 32), "ue8m0"),
    "mx-bytes": blocks((1, 32), "ue8m0", "weight_scale", lambda scale: scale.view(UINT8)),
    "mx-packed": blocks((1, 32), "ue8m0", change=lambda scale: pack_exponents(scale.float())),
    "fp8-32x64-packed": blocks(
        (32, 64), "ue8m0", "weight_scale", lambda scale: pack_exponents(scale.float())
    ),
    "fp8-128x128-packed-rows": blocks(
        (128, 128),
        "ue8m0",
        change=lambda scale: pack_exponents(scale.float().repeat_interleave(128, 0)),
    ),
    "gptq-g128": gptq(scalar_types.uint4b8, 128),
    "gptq-g32-asym": gptq(scalar_types.uint4, 32),
    "gptq-act-order": gptq(scalar_types.uint4b8, 32, is_ordered=True),
    "gptq-asym-act-order": gptq(scalar_types.uint4, 64, is_ordered=True),
    "gptq-int8": gptq(scalar_types.uint8b128, 64),
    "gptq-v2-asym": gptq(scalar_types.uint4, 32, layout="gptq_v2"),
    "gptq-auto-round": gptq_of_auto_round("gptq"),
    "gptq-auto-round-asym": gptq_of_auto_round("gptq-asym"),
    "awq-g32": awq(32),
    "awq-g128": awq(128),
    "awq-auto-round": awq_of_auto_round,
    "ct-int4": compressed(PACK, INT4),
    "ct-int4-asym": compressed(PACK, INT4 | {"symmetric": False}),
    "ct-int4-channel": compressed(PACK, INT4 | {"strategy": "channel", "group_size": None}),
    "ct-int4-act-order": compressed(PACK, INT4 | {"actorder": "group"}, is_ordered=True),
    "ct-int8": compressed(PACK, INT4 | {"num_bits": 8}),
    "ct-fp8-channel": compressed("float-quantized", FP8 | {"strategy": "channel"}),
    "ct-fp8-block": compressed(
        "float-quantized", FP8 | {"strategy": "block", "block_structure": [64, 32]}
    ),
    "ct-mx": compressed(
        "mxfp8-quantized",
        FP8 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
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
