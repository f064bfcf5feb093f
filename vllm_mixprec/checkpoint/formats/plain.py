# SPDX-License-Identifier: Apache-2.0
"""Unquantised: the weight as it is, and any bare parameters beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_mixprec.checkpoint.formats.base import (
    PLAIN_DTYPES,
    WEIGHT_COMPANIONS,
    WEIGHTS,
    Format,
    Scheme,
    Tensors,
    left_over,
    main_tensor,
)
from vllm_mixprec.checkpoint.formats.config import QuantizationConfig

if TYPE_CHECKING:
    import torch

    from vllm_mixprec.checkpoint.packing import StoredWeight

_SCHEMES = {
    dtype: Scheme(name, bits=32 if name == "fp32" else 16) for name, dtype in PLAIN_DTYPES.items()
}
_LEFT_OVER = WEIGHT_COMPANIONS | {"input_scale"}


def recognise_plain(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    """Recognise a weight, or bare parameters, in a dtype that models compute in."""
    if "qweight" in tensors or "weight_packed" in tensors:
        return None
    scheme = _SCHEMES.get(main_tensor(tensors).dtype)
    if scheme is None and _is_orphaned(tensors):
        return _SCHEMES["F32"]  # bytes or words of scales; the problem says the rest
    return scheme


def plain(name: str) -> Format:
    """Make the entry of one unquantised format."""
    return Format(name, frozenset(), recognise_plain, _shape, _problems, _read)


def _read(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> StoredWeight:
    from vllm_mixprec.checkpoint import packing

    return packing.Plain(packing.stored(tensors, "weight"))


def _is_orphaned(tensors: Tensors) -> bool:
    return WEIGHTS.isdisjoint(tensors) and not WEIGHT_COMPANIONS.isdisjoint(tensors)


def _shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    return main_tensor(tensors).shape


def _problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    if _LEFT_OVER.isdisjoint(tensors):
        return []
    if "weight" in tensors:
        why = f"the weight beside it is {scheme.label}"
        return [left_over(tensors[suffix], why) for suffix in tensors if suffix in _LEFT_OVER]
    return [
        f"{tensors[suffix].name}: the weight that it belongs to never comes, found only "
        f"{', '.join(tensors)}. Download the checkpoint again, or choose another source."
        for suffix in tensors
        if suffix in WEIGHT_COMPANIONS
    ]
