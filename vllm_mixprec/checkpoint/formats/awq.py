# SPDX-License-Identifier: Apache-2.0
"""AWQ, as AutoAWQ packs it for its GEMM kernel (awq/modules/linear/gemm.py).

``qweight`` (K, N/8) I32: the nibbles of a word, from the lowest, are columns 0, 2, 4, 6, 1, 3, 5, 7
of its eight; ``qzeros`` (K/g, N/8) I32 likewise; ``scales`` (K/g, N).
"""

from functools import lru_cache

from vllm_mixprec.checkpoint.formats.base import ACTIVATION_SCALES, Format, Scheme, Tensors
from vllm_mixprec.checkpoint.formats.config import QuantizationConfig
from vllm_mixprec.checkpoint.formats.gptq import companion_problems, has_companions
from vllm_mixprec.errors import UnsupportedError


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


AWQ = Format(
    name="awq",
    suffixes=frozenset({"qweight", "qzeros", "scales", "bias"}) | ACTIVATION_SCALES,
    shape=_shape,
    problems=_problems,
)
