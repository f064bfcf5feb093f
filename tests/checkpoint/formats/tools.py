# SPDX-License-Identifier: Apache-2.0
"""Every format that is read, each written and read back by a tool that users have.

transformers makes FP8 in blocks, compressed-tensors its own formats and the FP8 of a scale a row or
a tensor; of GPTQ and AWQ vLLM's reference quantiser makes the codes and packs them. Nothing of
vllm_mixprec is used. docs/formats.md is the table of what was tested of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.quantization.utils import generate_gparam
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    awq_pack,
    gptq_pack,
    pack_cols,
    quantize_weights,
)
from vllm.scalar_type import ScalarType, scalar_types

from tests.checkpoint.formats.compressed import compress, config_of
from tests.checkpoint.formats.stored import Tensors
from tests.checkpoint.formats.test_fp8 import pack_exponents


@dataclass(frozen=True)
class Stored:
    """One weight (N, K) as a tool stores it.

    Attributes:
        tensors: suffix -> tensor, as in the file.
        weight: what the tool reads back, in ``dtype`` of the tool's own arithmetic.
        config: the ``quantization_config`` of the checkpoint, None of one that is not quantised.
    """

    tensors: Tensors
    weight: torch.Tensor
    config: dict[str, Any] | None


Store = Callable[[torch.Tensor], Stored]
"""Quantises a weight (N, K) float32."""


@dataclass(frozen=True)
class Case:
    """A format with its variant.

    Attributes:
        store: the tool.
        label: of the scheme as recognised, for a weight of K columns ("{k}").
        cpu, cuda, other: label of the layout in which it is served packed by a CPU with
            AVX512_BF16, by CUDA with compute capability 9.0, and, of linears, by a CPU with AVX512F
            only; None where it is dequantised at load.
        linears_only: experts are dequantised on any CPU.
    """

    store: Store
    label: str
    cpu: str | None
    cuda: str | None
    other: str | None = None
    linears_only: bool = False

    @property
    def experts(self) -> str | None:
        """As ``cpu``, of experts."""
        return None if self.linears_only else self.cpu


def fp8(
    block: tuple[int, int],
    scale_fmt: str = "float",
    change: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> Store:
    """FP8 of transformers; ``change`` stores the same scales in another form."""

    def store(weight: torch.Tensor) -> Stored:
        config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
        quantizer = SimpleNamespace(quantization_config=config)
        # transformers wants whole blocks: one that the weight cuts is filled up meanwhile.
        (n, k), (rows, columns) = weight.shape, block
        whole = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
        made = Fp8Quantize(quantizer).convert({"x.weight": whole})
        codes, scale = made["x.weight"], made["x.weight_scale_inv"]
        read = Fp8Dequantize(quantizer)._dequantize_one(codes, scale.float(), torch.float32)
        tensors = {"weight": codes[:n, :k].contiguous(), "weight_scale_inv": change(scale)}
        raw = {"quant_method": "fp8", "weight_block_size": list(block)}
        return Stored(tensors, read[:n, :k].contiguous(), raw)

    return store


def plain_fp8(strategy: str) -> Store:
    """FP8 with a scale a row or a tensor, in a checkpoint whose config says "fp8" only."""

    def store(weight: torch.Tensor) -> Stored:
        made = compressed("float-quantized", FP8 | {"strategy": strategy})(weight)
        return Stored(made.tensors, made.weight, {"quant_method": "fp8"})

    return store


def compressed(form: str, args: dict[str, Any], is_ordered: bool = False) -> Store:
    def store(weight: torch.Tensor) -> Stored:
        order = None
        if is_ordered:
            groups = torch.arange(weight.shape[1], dtype=torch.int32) // args["group_size"]
            order = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(6))]
        tensors, read, scheme = compress(
            form, tuple(weight.shape), args, g_idx=order, weight=weight
        )
        return Stored(tensors, read["weight"], config_of(scheme, form=form))

    return store


def nvfp4(weight: torch.Tensor) -> Stored:
    """NVFP4 of compressed-tensors, with the scale of the whole weight that it computes."""
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    whole = generate_gparam(weight.min(), weight.max())
    tensors, read, scheme = compress(
        "nvfp4-pack-quantized", tuple(weight.shape), args, weight=weight, global_scale=whole
    )
    return Stored(tensors, read["weight"], config_of(scheme, form="nvfp4-pack-quantized"))


def modelopt_nvfp4(weight: torch.Tensor) -> Stored:
    """The same codes as ModelOpt names them, its scale of the whole weight the other way up."""
    made = nvfp4(weight).tensors
    whole = 1 / made["weight_global_scale"].reshape(())
    tensors = {
        "weight": made["weight_packed"],
        "weight_scale": made["weight_scale"],
        "weight_scale_2": whole,
        "input_scale": torch.tensor(0.5),
    }
    read = dequantize_to_dtype(
        tensors["weight"], tensors["weight_scale"], whole, torch.float32, swizzle=False
    )
    return Stored(tensors, read, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def _codes(
    weight: torch.Tensor, kind: ScalarType, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise with vLLM: codes (K, N), float16 scales and zero points (K/g, N)."""
    has_zeros = not kind.has_bias()
    _, codes, scales, zeros = quantize_weights(weight.t(), kind, group_size, has_zeros)
    if not has_zeros:
        zeros = torch.full_like(scales, kind.bias, dtype=torch.int32)
    return codes, scales.to(torch.float16), zeros


def gptq(
    kind: ScalarType, group_size: int, is_ordered: bool = False, layout: str = "gptq"
) -> Store:
    def store(weight: torch.Tensor) -> Stored:
        (n, k), bits = weight.shape, kind.size_bits
        codes, scales, zeros = _codes(weight, kind, group_size)
        size = k if group_size == -1 else group_size
        g_idx = torch.arange(k, dtype=torch.int32) // size
        if is_ordered:
            order = torch.randperm(k, generator=torch.Generator().manual_seed(8))
            codes, g_idx = codes[order], g_idx[order]
        # v1 stores one less, and 16 as 15: a zero point of 0 it cannot say.
        offset = 1 if layout == "gptq" else 0
        zeros = zeros.clamp(min=offset)
        tensors = {
            "qweight": gptq_pack(codes, bits, k, n),
            "qzeros": pack_cols(zeros - offset, bits, k // size, n),
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


def awq(group_size: int, kind: ScalarType = scalar_types.uint4) -> Store:
    def store(weight: torch.Tensor) -> Stored:
        n, k = weight.shape
        codes, scales, zeros = _codes(weight, kind, group_size)
        size = k if group_size == -1 else group_size
        tensors = {
            "qweight": awq_pack(codes, 4, k, n),
            "qzeros": awq_pack(zeros, 4, k // size, n),
            "scales": scales,
        }
        group = torch.arange(k) // size
        config = {"quant_method": "awq", "bits": 4, "group_size": group_size}
        config["zero_point"] = not kind.has_bias()
        return Stored(tensors, ((codes - zeros[group]).float() * scales[group].float()).t(), config)

    return store


UINT4, UINT4B8 = scalar_types.uint4, scalar_types.uint4b8
PACK, FLOAT = "pack-quantized", "float-quantized"
FP8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
ASYM = {"symmetric": False}
CHANNEL = {"strategy": "channel", "group_size": None}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
BYTES = {"scale_dtype": torch.uint8}
WHOLE_BLOCK = {"strategy": "block", "block_structure": [128, 128]}

_128 = "fp8_block 128x128"
_G16 = ("gptq int4 g16", "gptq int4 g16", None, "gptq int4 g16")
_AWQ_G16 = ("awq int4 g16 asym", "awq int4 g16 asym", None, "awq int4 g16 asym")
CASES: dict[str, Case] = {
    "fp8-128x128": Case(fp8((128, 128)), _128, _128, _128),
    "fp8-64x128": Case(fp8((64, 128)), "fp8_block 64x128", "fp8_block 64x128", None),
    "fp8-256x256": Case(fp8((256, 256)), "fp8_block 256x256", _128, _128),
    "fp8-64x64": Case(fp8((64, 64)), "fp8_block 64x64", None, None),
    "fp8-e8m0": Case(fp8((128, 128), "ue8m0"), f"{_128} e8m0", _128, _128),
    "fp8-e8m0-packed": Case(
        fp8((128, 128), "ue8m0", lambda scale: pack_exponents(scale.float())),
        f"{_128} e8m0_packed",
        _128,
        _128,
    ),
    "fp8-mx": Case(fp8((1, 32), "ue8m0"), "fp8_block 1x32 e8m0", None, None),
    "fp8-channel": Case(plain_fp8("channel"), *["fp8_channel"] * 3),
    "fp8-tensor": Case(plain_fp8("tensor"), "fp8_tensor", _128, _128),
    "ct-fp8-block": Case(compressed(FLOAT, FP8 | WHOLE_BLOCK), "ct_fp8 128x128", _128, _128),
    "ct-fp8-channel": Case(
        compressed(FLOAT, FP8 | {"strategy": "channel"}), "ct_fp8 channel", *["fp8_channel"] * 2
    ),
    "ct-fp8-tensor": Case(
        compressed(FLOAT, FP8 | {"strategy": "tensor"}), "ct_fp8 tensor", _128, _128
    ),
    "ct-mxfp8": Case(
        compressed("mxfp8-quantized", FP8 | {"strategy": "group", "group_size": 32} | BYTES),
        "ct_fp8 1x32 e8m0",
        None,
        None,
    ),
    "gptq-g32": Case(gptq(UINT4B8, 32), *["gptq int4 g32"] * 4),
    "gptq-g128": Case(gptq(UINT4B8, 128), *["gptq int4 g128"] * 4),
    "gptq-channel": Case(gptq(UINT4B8, -1), *["gptq int4 g{k}"] * 4),
    "gptq-asym": Case(gptq(UINT4, 32), *["gptq int4 g32 asym"] * 2, None, "gptq int4 g32 asym"),
    "gptq-v2": Case(gptq(UINT4B8, 64, layout="gptq_v2"), *["gptq int4 g64"] * 4),
    "gptq-v2-asym": Case(
        gptq(UINT4, 64, layout="gptq_v2"),
        "gptq int4 g64 asym",
        *["awq int4 g64 asym"] * 2,
        "gptq int4 g64 asym",
    ),
    "gptq-act-order": Case(
        gptq(UINT4B8, 32, is_ordered=True), "gptq int4 g32 act-order", None, None
    ),
    "gptq-int8": Case(gptq(scalar_types.uint8b128, 64), "gptq int8 g64", None, "gptq int8 g64"),
    "awq-g32": Case(awq(32), *["awq int4 g32 asym"] * 4),
    "awq-g128": Case(awq(128), *["awq int4 g128 asym"] * 4),
    "awq-sym": Case(awq(64, UINT4B8), *["awq int4 g64"] * 4),
    "ct-int4": Case(compressed(PACK, INT4), "ct_pack int4 g32", *["gptq int4 g32"] * 3),
    "ct-int4-g128": Case(
        compressed(PACK, INT4 | {"group_size": 128}), "ct_pack int4 g128", *["gptq int4 g128"] * 3
    ),
    "ct-int4-channel": Case(
        compressed(PACK, INT4 | CHANNEL), "ct_pack int4 g{k}", *["gptq int4 g{k}"] * 3
    ),
    "ct-int4-asym": Case(
        compressed(PACK, INT4 | ASYM), "ct_pack int4 g32 asym", *["awq int4 g32 asym"] * 3
    ),
    "ct-int4-act-order": Case(
        compressed(PACK, INT4 | {"actorder": "group"}, is_ordered=True),
        "ct_pack int4 g32 act-order",
        None,
        None,
    ),
    "ct-int8": Case(
        compressed(PACK, INT4 | {"num_bits": 8}), "ct_pack int8 g32", None, "gptq int8 g32"
    ),
    "ct-int8-asym": Case(
        compressed(PACK, INT4 | {"num_bits": 8} | ASYM), "ct_pack int8 g32 asym", None, None
    ),
    "ct-nvfp4": Case(nvfp4, "nvfp4 1x16", None, None),
    "modelopt-nvfp4": Case(modelopt_nvfp4, "nvfp4 1x16", None, None),
    "ct-mxfp4": Case(
        compressed("mxfp4-pack-quantized", MXFP4 | BYTES), "mxfp4 1x32 e8m0", None, None
    ),
    "gptq-g16": Case(gptq(UINT4B8, 16), *_G16, linears_only=True),
    "awq-g16": Case(awq(16), *_AWQ_G16, linears_only=True),
}


_TOOLS = {
    "fp8-channel": "compressed-tensors",
    "fp8-tensor": "compressed-tensors",
    "fp8": "transformers",
    "ct": "compressed-tensors",
    "modelopt": "compressed-tensors, read by vLLM",
    "gptq": "vLLM's packer",
    "awq": "vLLM's packer",
}


def tool_of(case: str) -> str:
    """Name the tool that stored a case."""
    return next(tool for prefix, tool in _TOOLS.items() if case.startswith(prefix))


def make_weight(n: int, k: int, seed: int) -> torch.Tensor:
    """Make a random weight (N, K) off centre, so that zero points differ and matter."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(-1, 1, n)[:, None]
    return (torch.randn(n, k, generator=generator) + drift) * k**-0.5
