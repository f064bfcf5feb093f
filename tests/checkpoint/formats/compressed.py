# SPDX-License-Identifier: Apache-2.0
"""Modules as the compressed-tensors library compresses them."""

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams

from tests.checkpoint.formats.stored import Tensors


def config_of(
    *schemes: QuantizationScheme, form: str, ignore: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the quantization_config that the library writes."""
    groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes)}
    config = QuantizationConfig(config_groups=groups, format=form, ignore=list(ignore))
    return config.model_dump(mode="json")


def compress(
    form: str,
    shape: tuple[int, int],
    args: dict[str, Any],
    scale_dtype: torch.dtype = torch.float32,
    g_idx: torch.Tensor | None = None,
    targets: tuple[str, ...] = ("Linear",),
    weight: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> tuple[Tensors, Tensors, QuantizationScheme]:
    """Compress a weight (N, K), else a random one, with scales and zero points of its minima and
    maxima.

    Returns:
        What is stored, what the library makes of it, and the scheme.
    """
    torch.manual_seed(0)
    if weight is None:  # off centre, so that zero points are not all the same
        weight = torch.randn(shape) + torch.linspace(-1, 1, shape[0])[:, None]
    weight = weight.to(scale_dtype)
    scheme = QuantizationScheme(targets=list(targets), weights=QuantizationArgs(**args))
    low, high = _ranges(weight, scheme.weights, g_idx)
    scale, zero_point = calculate_qparams(low, high, scheme.weights, global_scale=global_scale)
    state = {"weight": weight, "weight_scale": scale.to(scale_dtype)}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale.reshape(1)
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = zero_point.to(torch.int8)
    if g_idx is not None:
        state["weight_g_idx"] = g_idx
    compressor = BaseCompressor.load_from_registry(form)
    with torch.compiler.set_stance("force_eager"):  # FP4's rounding would be compiled
        stored = compressor.compress(state, scheme)
    if scheme.weights.strategy == "block":  # ``decompress`` takes one column of blocks for channels
        weight = dequantize(stored["weight"], stored["weight_scale"], args=scheme.weights)
        return stored, {"weight": weight}, scheme
    return stored, compressor.decompress(dict(stored), scheme), scheme


def _ranges(
    weight: torch.Tensor, args: QuantizationArgs, g_idx: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return minima and maxima of all that shares a scale, in the shape of the scales."""
    n, k = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy in ("group", "tensor_group"):
        if g_idx is not None:
            weight = weight[:, torch.argsort(g_idx, stable=True)]
        groups = weight.reshape(n, -1, args.group_size)
        return groups.amin(2), groups.amax(2)
    bn, bk = args.block_structure
    padded = torch.nn.functional.pad(weight, (0, -k % bk, 0, -n % bn))
    blocks = padded.reshape(-(-n // bn), bn, -(-k // bk), bk)
    return blocks.amin((1, 3)), blocks.amax((1, 3))
