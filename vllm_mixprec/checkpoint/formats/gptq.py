# SPDX-License-Identifier: Apache-2.0
"""GPTQ, as AutoGPTQ packs it (auto_gptq/nn_modules/qlinear).

``qweight`` (K*bits/32, N) I32, the lowest bits of a word are the first row; ``qzeros``
(K/g, N*bits/32) I32, packed the same way along N; ``scales`` (K/g, N); ``g_idx`` (K,) I32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_mixprec.checkpoint.formats.base import (
    ACTIVATION_SCALES,
    SCALE_DTYPES,
    Format,
    Scheme,
    Tensors,
    integer_bytes,
    integer_layouts,
    misfit,
    missing,
)
from vllm_mixprec.checkpoint.formats.config import QuantizationConfig
from vllm_mixprec.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from vllm_mixprec.checkpoint.packing import Integers

GPTQ_BITS = (2, 4, 8)


def recognise_gptq(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    """Recognise ``qweight`` of a config whose packing is GPTQ's."""
    qweight = tensors.get("qweight")
    if qweight is None or config.packing != "gptq":
        return None
    if len(qweight.shape) != 2 or qweight.dtype != "I32":
        raise UnsupportedError(f"GPTQ packed as {qweight.dtype} {list(qweight.shape)}")
    rows, n = qweight.shape

    def fits(bits: int, group_size: int) -> bool:
        return has_companions(tensors, n, rows * 32 // bits, bits, group_size)

    args = config.integers_of(name, fits)
    if args.bits not in GPTQ_BITS:
        raise UnsupportedError(f"GPTQ of {args.bits} bits")
    k = rows * 32 // args.bits
    group_size = max(k, 1) if args.group_size == -1 else args.group_size
    # With one group, the order of the rows decides nothing: every g_idx is 0.
    has_order = args.desc_act and group_size < k
    return _scheme(args.bits, group_size, args.symmetric, has_order, config.zero_offset)


def has_companions(tensors: Tensors, n: int, k: int, bits: int, group_size: int) -> bool:
    """Whether scales and qzeros are those of (N, K), bits and group size."""
    scales, qzeros = tensors.get("scales"), tensors.get("qzeros")
    if scales is None or qzeros is None:
        return False
    groups = 1 if group_size == -1 else -(-k // group_size)
    return scales.shape == (groups, n) and qzeros.shape == (groups, n * bits // 32)


@lru_cache
def _scheme(
    bits: int, group_size: int, symmetric: bool, desc_act: bool, zero_offset: int
) -> Scheme:
    return Scheme(
        "gptq",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        desc_act=desc_act,
        zero_offset=zero_offset,
    )


def _shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    rows, n = tensors["qweight"].shape
    return n, rows * 32 // scheme.bits


def companion_problems(tensors: Tensors, scheme: Scheme, n: int, k: int) -> list[str]:
    """Check scales, qzeros and g_idx against a ``qweight`` of (N, K)."""
    groups = -(-k // (scheme.group_size or k))
    problems: list[str] = []

    def check(suffix: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        spec = tensors.get(suffix)
        if spec is None:
            problems.append(missing(tensors, suffix, "qweight"))
        elif spec.shape != shape or spec.dtype not in dtypes:
            why = f"K={k}, N={n}, {scheme.bits} bits, group_size={scheme.group_size}"
            problems.append(misfit(spec, f"{' or '.join(dtypes)} {list(shape)}", why))

    check("scales", (groups, n), SCALE_DTYPES)
    check("qzeros", (groups, n * scheme.bits // 32), ("I32",))
    if "g_idx" in tensors or scheme.desc_act:
        check("g_idx", (k,), ("I32",))
    return problems


def _problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    n, k = _shape(tensors, scheme)
    problems = companion_problems(tensors, scheme, n, k)
    if n * scheme.bits % 32:
        whole = f"N a multiple of {32 // scheme.bits}"
        problems.append(misfit(tensors["qweight"], whole, "zero points fill whole words"))
    return problems


def _read(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> Integers:
    """AutoGPTQ, qlinear_cuda_old.py: (code - zero point) times the scale of the row's group.

    ``zero_offset`` is added without wrapping round, as auto-round's own reader does
    (qlinear_torch_zp.py): of 4 bits, a stored 15 stands for a zero point of 16.
    """
    import torch

    from vllm_mixprec.checkpoint import packing

    bits, group_size = packing.sizes(scheme, GPTQ_BITS)
    qweight = packing.stored(tensors, "qweight")
    n, k = qweight.shape[1], qweight.shape[0] * 32 // bits
    groups = -(-k // group_size)
    qzeros = packing.stored(tensors, "qzeros", (groups, n * bits // 32))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)[:, None]
    return packing.Integers(
        shape=(n, k),
        codes_of=lambda part: ((qweight[:, None, part] >> shifts) & ((1 << bits) - 1)).flatten(
            0, 1
        ),
        words=("gptq", qweight),
        zeros=packing.unpack(qzeros, bits) + scheme.zero_offset,
        scales=packing.stored(tensors, "scales", (groups, n)),
        group=packing.row_groups(tensors, "g_idx", k, group_size, groups, qweight.device),
    )


GPTQ = Format(
    name="gptq",
    suffixes=frozenset({"qweight", "qzeros", "scales", "g_idx", "bias"}) | ACTIVATION_SCALES,
    recognise=recognise_gptq,
    shape=_shape,
    problems=_problems,
    read=_read,
    layouts=integer_layouts,
    held_bytes=integer_bytes,
)
