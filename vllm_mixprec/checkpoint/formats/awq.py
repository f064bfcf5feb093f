# SPDX-License-Identifier: Apache-2.0
"""AWQ, as AutoAWQ packs it for its GEMM kernel (awq/modules/linear/gemm.py).

``qweight`` (K, N/8) I32: the nibbles of a word, from the lowest, are columns 0, 2, 4, 6, 1, 3, 5, 7
of its eight; ``qzeros`` (K/g, N/8) I32 likewise; ``scales`` (K/g, N).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_mixprec.checkpoint.formats.base import (
    ACTIVATION_SCALES,
    Format,
    Scheme,
    Tensors,
    integer_bytes,
    integer_layouts,
)
from vllm_mixprec.checkpoint.formats.config import QuantizationConfig
from vllm_mixprec.checkpoint.formats.gptq import companion_problems, has_companions
from vllm_mixprec.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from vllm_mixprec.checkpoint.packing import Integers


def recognise_awq(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    """Recognise ``qweight`` of a config whose packing is AutoAWQ's."""
    qweight = tensors.get("qweight")
    if qweight is None or config.packing != "awq":
        return None
    if len(qweight.shape) != 2 or qweight.dtype != "I32":
        raise UnsupportedError(f"AWQ packed as {qweight.dtype} {list(qweight.shape)}")
    k, words = qweight.shape

    def fits(bits: int, group_size: int) -> bool:
        return has_companions(tensors, words * 32 // bits, k, bits, group_size)

    args = config.integers_of(name, fits)
    if args.bits != 4:
        raise UnsupportedError(f"AWQ of {args.bits} bits")
    group_size = max(k, 1) if args.group_size == -1 else args.group_size
    return _scheme(group_size, args.symmetric)


@lru_cache
def _scheme(group_size: int, symmetric: bool) -> Scheme:
    return Scheme("awq", bits=4, group_size=group_size, symmetric=symmetric, zero_offset=0)


def _shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    k, words = tensors["qweight"].shape
    return words * 8, k


def _problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    n, k = _shape(tensors, scheme)
    return companion_problems(tensors, scheme, n, k)


def _read(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> Integers:
    """AutoAWQ, awq/utils/packing_utils.py, ``dequantize_gemm``."""
    import torch

    from vllm_mixprec.checkpoint import packing

    bits, group_size = packing.sizes(scheme, (4,))
    qweight = packing.stored(tensors, "qweight")
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = -(-k // group_size)
    qzeros = packing.stored(tensors, "qzeros", (groups, n // 8))
    return packing.Integers(
        shape=(n, k),
        codes_of=lambda part: packing.unpack(
            qweight[:, part.start // 8 : part.stop // 8], bits, packing.AWQ_ORDER
        ),
        words=("awq", qweight),
        zeros=packing.unpack(qzeros, bits, packing.AWQ_ORDER),
        scales=packing.stored(tensors, "scales", (groups, n)),
        group=torch.arange(k, device=qweight.device) // group_size,
    )


AWQ = Format(
    name="awq",
    suffixes=frozenset({"qweight", "qzeros", "scales", "bias"}) | ACTIVATION_SCALES,
    recognise=recognise_awq,
    shape=_shape,
    problems=_problems,
    read=_read,
    layouts=integer_layouts,
    held_bytes=integer_bytes,
)
