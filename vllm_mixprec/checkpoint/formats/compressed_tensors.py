# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors "pack-quantized" integers, and where its config denies what a header shows.

compressed_tensors/compressors/pack_quantized, with ``p = 32 // bits`` weights to a word, the lowest
bits first, each stored plus ``2 ** (bits - 1)``: ``weight_packed`` (N, ceil(K/p)) I32;
``weight_scale`` (N, K/g), or (N, 1) for a scale a channel; ``weight_shape`` (2,) holds N and K;
``weight_zero_point`` (ceil(N/p), K/g) I32, packed along N, of asymmetric weights;
``weight_g_idx`` (K,) I32, where ``actorder`` is "group".
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
    integer_layouts,
    left_over,
    misfit,
    missing,
)
from vllm_mixprec.checkpoint.formats.config import QuantizationConfig
from vllm_mixprec.checkpoint.formats.ct_config import CompressedTensors
from vllm_mixprec.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from vllm_mixprec.checkpoint.packing import Integers

CT_BITS = (4, 8)


def recognise_ct_pack(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    """Recognise ``weight_packed``, asking the module's config group for all that it hides."""
    packed = tensors.get("weight_packed")
    if packed is None or packed.dtype == "U8":  # bytes are FP4's
        return None
    if packed.dtype != "I32" or len(packed.shape) != 2:
        raise UnsupportedError(f"ct_pack packed as {packed.dtype} {list(packed.shape)}")
    if config.compressed is None:
        raise UnsupportedError(f'weight_packed of quant_method "{config.method}"')
    words, has_order = packed.shape[1], "weight_g_idx" in tensors
    args = config.compressed.weights_of(name)
    if args is None or args.kind != "int":
        return _scheme(4, words * 8, True, has_order)  # ``contradictions`` says what is wrong
    if args.bits not in CT_BITS:
        raise UnsupportedError(f"ct_pack of {args.bits} bits")
    if args.strategy not in ("group", "channel"):
        raise UnsupportedError(f'ct_pack of strategy "{args.strategy}"')
    k = words * 32 // args.bits
    group_size = args.group_size or max(k, 1)
    has_order = (has_order or args.has_order) and group_size < k
    return _scheme(args.bits, group_size, args.symmetric, has_order)


@lru_cache
def _scheme(bits: int, group_size: int, symmetric: bool, desc_act: bool) -> Scheme:
    return Scheme(
        "ct_pack",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        desc_act=desc_act,
        zero_offset=0,
    )


def _shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    n, words = tensors["weight_packed"].shape
    return n, words * 32 // scheme.bits


def _problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    n, k = _shape(tensors, scheme)
    groups = -(-k // (scheme.group_size or k))
    problems: list[str] = []

    def check(suffix: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        spec = tensors.get(suffix)
        if spec is None:
            problems.append(missing(tensors, suffix, "weight_packed"))
        elif spec.shape != shape or spec.dtype not in dtypes:
            why = f"K={k}, N={n}, {scheme.bits} bits, group_size={scheme.group_size}"
            problems.append(misfit(spec, f"{' or '.join(dtypes)} {list(shape)}", why))

    check("weight_scale", (n, groups), SCALE_DTYPES)
    check("weight_shape", (2,), ("I64", "I32"))
    if not scheme.symmetric:
        check("weight_zero_point", (-(-n * scheme.bits // 32), groups), ("I32",))
    elif "weight_zero_point" in tensors:
        problems.append(left_over(tensors["weight_zero_point"], "the config says symmetric"))
    if "weight_g_idx" in tensors or scheme.desc_act:
        check("weight_g_idx", (k,), ("I32",))
    return problems


def _read(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> Integers:
    """compressed_tensors, pack_quantized/base.py, ``decompress``.

    Codes and zero points are stored plus ``2 ** (bits - 1)``, which cancels out of the difference.
    """
    import torch

    from vllm_mixprec.checkpoint import packing

    bits, group_size = packing.sizes(scheme, CT_BITS)
    packed = packing.stored(tensors, "weight_packed")
    n, k = packed.shape[0], packed.shape[1] * 32 // bits
    shape = packing.stored(tensors, "weight_shape", (2,)).tolist()
    if shape != [n, k]:
        raise CheckpointError(
            f"weight_shape: {shape}, expected {[n, k]} as weight_packed is {list(packed.shape)}. "
            "Re-export the module, or choose another source."
        )
    groups = -(-k // group_size)
    if scheme.symmetric:
        middle = torch.tensor(1 << (bits - 1), dtype=torch.int32, device=packed.device)
        zeros = middle.expand(groups, n)
    else:
        words = packing.stored(tensors, "weight_zero_point", (-(-n * bits // 32), groups))
        zeros = packing.unpack(words.t(), bits)[:, :n]
    return packing.Integers(
        shape=(n, k),
        codes_of=lambda part: packing.unpack(packed[part], bits).t(),
        words=("gptq", packed.t()),  # both run along K, the lowest bits first
        zeros=zeros,
        scales=packing.stored(tensors, "weight_scale", (n, groups)).t(),
        group=packing.row_groups(tensors, "weight_g_idx", k, group_size, groups, packed.device),
    )


CT_PACK = Format(
    name="ct_pack",
    suffixes=frozenset(
        {
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
            "weight_g_idx",
            "bias",
        }
    )
    | ACTIVATION_SCALES,
    recognise=recognise_ct_pack,
    shape=_shape,
    problems=_problems,
    read=_read,
    layouts=integer_layouts,
)


def contradictions(
    name: str, tensors: Tensors, scheme: Scheme, config: CompressedTensors
) -> list[str]:
    """List what ``config_groups`` and ``ignore`` say of a quantised module that cannot be true."""
    weight = tensors["weight_packed" if "weight_packed" in tensors else "weight"]
    if config.ignores(name):
        why = '"ignore" of quantization_config names the module'
        return [misfit(weight, "an unquantised weight", why)]
    args = config.weights_of(name)
    if args is None:
        if scheme.format != "ct_pack":
            return []  # the header tells everything about floats
        why = "nothing else tells its bits and groups"
        return [misfit(weight, "a group of config_groups that targets the module", why)]
    kind = "int" if scheme.format == "ct_pack" else "float"
    if (args.kind, args.bits) != (kind, scheme.bits):
        expected = f"a weight of type {args.kind} with {args.bits} bits"
        return [misfit(weight, expected, "config_groups of quantization_config")]
    return []
