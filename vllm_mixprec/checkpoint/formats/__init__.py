# SPDX-License-Identifier: Apache-2.0
"""Which tensors make up a module, and how its weight is stored: told from headers alone.

``FORMATS`` is the table of everything that this version reads. A new format is one more entry and
one more file: docs/formats.md shows one.
"""

from collections.abc import Mapping
from typing import Any

from vllm_mixprec.checkpoint.formats.awq import AWQ
from vllm_mixprec.checkpoint.formats.base import (
    PLAIN_DTYPES,
    Format,
    Module,
    Scheme,
    Tensors,
    left_over,
    main_tensor,
)
from vllm_mixprec.checkpoint.formats.compressed_tensors import CT_PACK, contradictions
from vllm_mixprec.checkpoint.formats.config import QuantizationConfig
from vllm_mixprec.checkpoint.formats.fp4 import fp4
from vllm_mixprec.checkpoint.formats.fp8 import fp8
from vllm_mixprec.checkpoint.formats.gptq import GPTQ
from vllm_mixprec.checkpoint.formats.plain import plain
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import UnsupportedError

__all__ = [
    "FORMATS",
    "PLAIN_DTYPES",
    "Format",
    "Module",
    "QuantizationConfig",
    "Scheme",
    "Tensors",
    "recognise",
]

FORMATS: dict[str, Format] = {
    "bf16": plain("bf16"),
    "fp16": plain("fp16"),
    "fp32": plain("fp32"),
    "fp8_block": fp8("fp8_block"),
    "fp8_channel": fp8("fp8_channel"),
    "fp8_tensor": fp8("fp8_tensor"),
    "gptq": GPTQ,
    "awq": AWQ,
    "ct_fp8": fp8("ct_fp8"),
    "ct_pack": CT_PACK,
    "nvfp4": fp4("nvfp4"),
    "mxfp4": fp4("mxfp4"),
}
"""Every format that this version reads; a module is of the first that recognises it."""

_RECOGNISERS = tuple(dict.fromkeys(known.recognise for known in FORMATS.values()))

FOREIGN_SUFFIXES = {
    "gate_up_proj_blocks": "MXFP4 of gpt-oss, all experts of a layer in one tensor,",
    "down_proj_blocks": "MXFP4 of gpt-oss, all experts of a layer in one tensor,",
    "bitmask": "compressed-tensors sparse",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes int8",
    "W_q": "HQQ",
    "trellis": "EXL3",
    "q_weight": "EXL2",
}
"""Suffixes that give away a format which this version does not read."""


def recognise(
    name: str,
    tensors: dict[str, TensorSpec],
    quantization_config: Mapping[str, Any] | QuantizationConfig | None,
) -> Module:
    """Recognise how one module is stored.

    Args:
        name: the module's name, as the files spell it.
        tensors: suffix -> spec, at least one.
        quantization_config: as in config.json; a caller with many modules parses it once.

    Raises:
        UnsupportedError: no entry of ``FORMATS`` reads these tensors.
        CheckpointError: ``quantization_config`` is malformed.
    """
    config = (
        quantization_config
        if isinstance(quantization_config, QuantizationConfig)
        else QuantizationConfig.parse(quantization_config)
    )
    try:
        scheme = _scheme(name, tensors, config)
    except UnsupportedError as what:
        raise _unsupported(name, tensors, str(what)) from None
    known = FORMATS[scheme.format]
    problems = known.problems(tensors, scheme)
    if config.compressed is not None and scheme.is_quantized:
        problems += contradictions(name, tensors, scheme, config.compressed)
    if known.suffixes and not known.suffixes.issuperset(tensors):
        problems += [
            left_over(tensors[suffix], f"{known.name} does not use it")
            for suffix in tensors
            if suffix not in known.suffixes
        ]
    return Module(name, tensors, scheme, known.shape(tensors, scheme), tuple(problems))


def _scheme(name: str, tensors: Tensors, config: QuantizationConfig) -> Scheme:
    """Ask the recognisers; raises UnsupportedError with what was found and nothing more."""
    if not FOREIGN_SUFFIXES.keys().isdisjoint(tensors):
        foreign = next(suffix for suffix in tensors if suffix in FOREIGN_SUFFIXES)
        raise UnsupportedError(FOREIGN_SUFFIXES[foreign])
    for recognise_family in _RECOGNISERS:
        scheme = recognise_family(tensors, config, name)
        if scheme is not None:
            return scheme
    if "qweight" not in tensors:
        method = f' of quant_method "{config.method}"' if config.method else ""
        raise UnsupportedError(f"a weight stored as {main_tensor(tensors).dtype}{method}")
    if config.method is None:
        raise UnsupportedError("packed integers without a quantization_config in config.json")
    layout = f" with {config.layout}" if config.layout else ""
    raise UnsupportedError(f'quant_method "{config.method}"{layout}')


def _unsupported(name: str, tensors: Tensors, what: str) -> UnsupportedError:
    given = ", ".join(f"{suffix} {t.dtype} {list(t.shape)}" for suffix, t in tensors.items())
    file = next(iter(tensors.values())).file
    return UnsupportedError(
        f"{file}: module {name or '(root)'}: {what} is not supported yet (tensors: {given}); "
        f"expected one of {', '.join(FORMATS)}. Choose another source for this model."
    )
