# SPDX-License-Identifier: Apache-2.0
"""FP4 weights: NVFP4 and MXFP4, one module a weight.

The codes are E2M1 (OCP Microscaling Formats 1.0), two to a byte along K, the lower nibble first:
``weight_packed`` of compressed-tensors (nvfp4-pack-quantized, mxfp4-pack-quantized) or ``weight``
of ModelOpt, (N, K/2) U8. ``weight_scale``:

- nvfp4: (N, K/16) F8_E4M3, over ``weight_global_scale`` (compressed-tensors, [1] F32), or times
  ``weight_scale_2`` (ModelOpt, [] F32).
- mxfp4: (N, K/32) U8, E8M0: a byte ``b`` for ``2 ** (b - 127)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_mixprec.checkpoint.formats.base import (
    ACTIVATION_SCALES,
    Format,
    Scheme,
    Tensors,
    misfit,
    missing,
)
from vllm_mixprec.checkpoint.formats.config import QuantizationConfig
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from vllm_mixprec.checkpoint.packing import StoredWeight

GLOBAL_SCALES = ("weight_global_scale", "weight_scale_2")
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; 8 to 15 are their negatives."""

_NVFP4 = Scheme("nvfp4", bits=4, block=(1, 16))
_MXFP4 = Scheme("mxfp4", bits=4, block=(1, 32), scale_format="e8m0")


def recognise_fp4(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    """Recognise bytes of codes by what lies beside them."""
    codes = tensors.get("weight_packed")
    if codes is None and "weight_scale_2" in tensors:
        codes = tensors.get("weight")
    if codes is None or codes.dtype != "U8":
        return None
    if len(codes.shape) != 2:
        raise UnsupportedError(f"FP4 of {len(codes.shape)} dimensions")
    return _MXFP4 if _global_scale(tensors) is None else _NVFP4


def _global_scale(tensors: Tensors) -> TensorSpec | None:
    return next((tensors[suffix] for suffix in GLOBAL_SCALES if suffix in tensors), None)


def _codes(tensors: Tensors) -> TensorSpec:
    packed = tensors.get("weight_packed")
    return tensors["weight"] if packed is None else packed


def _shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    n, half = _codes(tensors).shape
    return n, 2 * half


def _problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    assert scheme.block is not None
    n, k = _shape(tensors, scheme)
    group, codes = scheme.block[1], _codes(tensors)
    problems = []
    if k % group:
        problems.append(misfit(codes, f"K a multiple of {group}", f"K={k}, whole groups"))
    scale = tensors.get("weight_scale")
    dtypes = ("F8_E4M3",) if scheme.format == "nvfp4" else ("U8", "F8_E8M0")
    if scale is None:
        problems.append(missing(tensors, "weight_scale", codes.name.rpartition(".")[2]))
    elif scale.shape != (n, -(-k // group)) or scale.dtype not in dtypes:
        expected = f"{' or '.join(dtypes)} {[n, -(-k // group)]}"
        problems.append(misfit(scale, expected, f"N={n}, K={k}, a scale for {group}"))
    whole = _global_scale(tensors)
    if whole is not None and (whole.dtype != "F32" or whole.shape not in ((), (1,))):
        problems.append(misfit(whole, "F32 [] or [1]", "one scale for the tensor"))
    return problems


def _read(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> StoredWeight:
    """compressed_tensors, nvfp4/base.py and mxfp4/base.py, ``decompress``."""
    import torch

    from vllm_mixprec.checkpoint import packing

    assert scheme.block is not None
    codes = packing.stored(tensors, "weight_packed" if "weight_packed" in tensors else "weight")
    n, k = codes.shape[0], 2 * codes.shape[1]
    scale = packing.stored(tensors, "weight_scale", (n, -(-k // scheme.block[1])))
    if scheme.format == "mxfp4":
        scale = packing.exponents(scale.view(torch.uint8))
    elif "weight_scale_2" in tensors:
        scale = scale.float() * packing.stored(tensors, "weight_scale_2").float()
    else:
        scale = scale.float() / packing.stored(tensors, "weight_global_scale").float()
    values = torch.tensor((*MAGNITUDES, *(-value for value in MAGNITUDES)), device=codes.device)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        return values[torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1).int()]

    return packing.Scaled(
        shape=(n, k), weight=codes, decode=decode, scale=scale, block=scheme.block
    )


def fp4(name: str) -> Format:
    """Make the entry of one FP4 format."""
    suffixes = {"weight_packed", "weight", "weight_scale", "bias", *GLOBAL_SCALES}
    return Format(
        name, frozenset(suffixes) | ACTIVATION_SCALES, recognise_fp4, _shape, _problems, _read
    )
