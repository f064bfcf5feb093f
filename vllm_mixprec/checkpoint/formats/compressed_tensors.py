# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors "pack-quantized" integers, and where its config denies what a header shows.

compressed_tensors/compressors/pack_quantized, with ``p = 32 // bits`` weights to a word, the lowest
bits first, each stored plus ``2 ** (bits - 1)``: ``weight_packed`` (N, ceil(K/p)) I32;
``weight_scale`` (N, K/g), or (N, 1) for a scale a channel; ``weight_shape`` (2,) holds N and K;
``weight_zero_point`` (ceil(N/p), K/g) I32, packed along N, of asymmetric weights;
``weight_g_idx`` (K,) I32, where ``actorder`` is "group".
"""

from functools import lru_cache

from vllm_mixprec.checkpoint.formats.base import (
    ACTIVATION_SCALES,
    SCALE_DTYPES,
    Format,
    Scheme,
    Tensors,
    left_over,
    misfit,
    missing,
)
from vllm_mixprec.checkpoint.formats.config import CompressedTensors, QuantizationConfig
from vllm_mixprec.errors import UnsupportedError

CT_BITS = (4, 8)


def recognise_ct_pack(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    """Recognise ``weight_packed``, asking the module's config group for all that it hides."""
    packed = tensors.get("weight_packed")
    if packed is None:
        return None
    if packed.dtype == "U8":
        is_nvfp4 = "weight_global_scale" in tensors
        raise UnsupportedError(f"compressed-tensors {'NVFP4' if is_nvfp4 else 'MXFP4'}")
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
    shape=_shape,
    problems=_problems,
)


def contradictions(
    name: str, tensors: Tensors, scheme: Scheme, config: CompressedTensors
) -> list[str]:
    """List what ``config_groups`` and ``ignore`` say of a quantised module that cannot be true."""
    weight = tensors["weight_packed" if scheme.format == "ct_pack" else "weight"]
    if config.ignores(name):
        why = '"ignore" of quantization_config names the module'
        return [misfit(weight, "an unquantised weight", why)]
    args = config.weights_of(name)
    if args is None:
        if scheme.format != "ct_pack":
            return []  # the header tells everything about fp8
        why = "nothing else tells its bits and groups"
        return [misfit(weight, "a group of config_groups that targets the module", why)]
    kind, bits = ("int", scheme.bits) if scheme.format == "ct_pack" else ("float", 8)
    if (args.kind, args.bits) != (kind, bits):
        expected = f"a weight of type {args.kind} with {args.bits} bits"
        return [misfit(weight, expected, "config_groups of quantization_config")]
    return []
