# SPDX-License-Identifier: Apache-2.0
"""Which tensors make up a module, and how its weight is stored: told from headers alone.

``FORMATS`` is the table of everything that this version reads. A new format is one more entry.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import CheckpointError, UnsupportedError

Tensors = Mapping[str, TensorSpec]
"""The tensors of one module: suffix ("weight", "qweight", ...) -> spec."""

DEFAULT_FP8_BLOCK = (128, 128)
"""What DeepSeek-V3 introduced, and every checkpoint uses whose config says nothing."""

GPTQ_BITS = (2, 4, 8)
SCALE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a module's weight is stored. Modules of equal schemes can share one kernel call.

    Attributes:
        format: a key of ``FORMATS``.
        bits: of one weight.
        group_size: gptq: rows of K that share a scale; a -1 in the config has become K.
        block: fp8_block: weights of N and of K that share a scale.
        symmetric: gptq: the config promises the zero point ``2 ** (bits - 1)`` everywhere.
        desc_act: gptq: ``g_idx`` is not simply ``k // group_size``, as the config has it; only
            a reader of the data can verify it.
        zero_offset: gptq: what is added to a stored zero point. 1 for the original layout, 0 for
            ``checkpoint_format`` "gptq_v2".
    """

    format: str
    bits: int
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    desc_act: bool = False
    zero_offset: int = 1

    @property
    def is_quantized(self) -> bool:
        """Whether the weight has scales, and so needs a kernel of its own or dequantising."""
        return self.format not in PLAIN_DTYPES

    @property
    def label(self) -> str:
        """The scheme in a few words: "bf16", "fp8_block 128x128", "gptq int4 g64 asym"."""
        parts = [self.format]
        if self.block is not None:
            parts.append(f"{self.block[0]}x{self.block[1]}")
        if self.group_size is not None:
            parts.append(f"int{self.bits} g{self.group_size}")
        if not self.symmetric:
            parts.append("asym")
        if self.desc_act:
            parts.append("act-order")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Module:
    """A module of a checkpoint with all the tensors that belong together.

    Attributes:
        name: "model.layers.0.self_attn.q_proj". A bare parameter belongs to its parent:
            ``mlp.gate.e_score_correction_bias`` to ``mlp.gate``.
        tensors: suffix ("weight", "weight_scale_inv", "qweight", ...) -> spec.
        scheme: how the weight is stored.
        shape: logical shape of the weight, whatever the packing: (N, K) = (out, in) of a linear
            layer. Of a module without a weight, the shape of its largest tensor.
        problems: scales missing or of the wrong count or dtype, shapes that do not fit; each
            begins with the tensor's name. Empty for a sound module.
    """

    name: str
    tensors: dict[str, TensorSpec]
    scheme: Scheme
    shape: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the module in the file."""
        return sum(spec.nbytes for spec in self.tensors.values())


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The ``quantization_config`` of a checkpoint, normalised once.

    Attributes:
        method: ``quant_method``; None without a ``quantization_config``.
        block: fp8: ``weight_block_size``.
        bits, group_size, symmetric, desc_act, zero_offset: gptq, as in ``Scheme``, but with
            ``group_size`` -1 still unresolved.
        overrides: gptq: (matches the module's name, settings that replace the global ones), from
            GPTQModel's ``dynamic``. The first match wins, as in vLLM's ``get_dynamic_override``.
        exact_overrides: the same by exact module name, from auto-round's ``extra_config``.
        shapes_tell_overrides: gptq: ``overrides`` change bits and group size only, so that a
            module whose shapes fit the global ones has none.
    """

    method: str | None = None
    block: tuple[int, int] | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    desc_act: bool = False
    zero_offset: int | None = None
    overrides: tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...] = ()
    exact_overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shapes_tell_overrides: bool = True

    @classmethod
    def parse(cls, raw: Mapping[str, Any] | None) -> "QuantizationConfig":
        """Normalise the dict found in config.json.

        Raises:
            CheckpointError: a field has the wrong type.
        """
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping):
            raise _bad_field("", raw, "an object")
        method = _field(raw, "quant_method", str)
        block = _parse_block(raw.get("weight_block_size"))
        if method not in _GPTQ_METHODS or raw.get("data_type", "int") != "int":
            return cls(method=method, block=block)
        overrides = _parse_dynamic(_settings_by_name(raw, "dynamic"))
        return cls(
            method=method,
            block=block,
            bits=_field(raw, "bits", int),
            group_size=_field(raw, "group_size", int),
            symmetric=_field(raw, "sym", bool) is not False,
            desc_act=_field(raw, "desc_act", bool) is True,
            zero_offset=_parse_zero_offset(raw, method),
            overrides=overrides,
            exact_overrides=_settings_by_name(raw, "extra_config"),
            shapes_tell_overrides=not any(
                "sym" in own or "desc_act" in own for _, own in overrides
            ),
        )


def _bad_field(name: str, found: Any, expected: str) -> CheckpointError:
    key = f"quantization_config.{name}" if name else "quantization_config"
    return CheckpointError(
        f"config.json: {key} is {found!r}, expected {expected}. "
        "Correct the config, or download it again."
    )


def _field(raw: Mapping[str, Any], name: str, kind: type) -> Any:
    value = raw.get(name)
    if value is not None and type(value) is not kind:
        raise _bad_field(name, value, f"of type {kind.__name__}")
    return value


def _settings_by_name(raw: Mapping[str, Any], name: str) -> Mapping[str, Mapping[str, Any]]:
    value = raw.get(name) or {}
    if not isinstance(value, Mapping) or not all(
        isinstance(own, Mapping) for own in value.values()
    ):
        raise _bad_field(name, value, "an object of objects")
    return value


def _parse_block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(size) is not int or size <= 0 for size in value)
    ):
        raise _bad_field("weight_block_size", value, "two positive integers")
    return value[0], value[1]


def _parse_dynamic(
    dynamic: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...]:
    """Read GPTQModel's ``dynamic``: "+:REGEX" changes settings; "-:REGEX" excludes modules.

    The exclusions are not needed: that a module is not quantised shows in its tensors.
    """
    overrides = []
    for key, settings in dynamic.items():
        if key.startswith("-:") or not settings:
            continue
        try:
            overrides.append((re.compile(key.removeprefix("+:")), settings))
        except re.error as error:
            raise _bad_field("dynamic", key, f"a regular expression ({error})") from error
    return tuple(overrides)


_GPTQ_METHODS = ("gptq", "auto-round")
_ZERO_OFFSETS = {
    ("gptq", None): 1,
    ("gptq", "gptq"): 1,
    ("gptq", "gptq_v2"): 0,
    # auto_round/inference/backend.py: GPTQ_FORMAT and GPTQ_FORMAT_NO_ZP.
    ("auto-round", "auto_round:auto_gptq"): 1,
    ("auto-round", "auto_round:gptqmodel"): 0,
    ("auto-round", "auto_round"): 0,
}


def _parse_zero_offset(raw: Mapping[str, Any], method: str) -> int | None:
    """Return what is added to a stored zero point; None for a packing that is not GPTQ's."""
    key = "checkpoint_format" if method == "gptq" else "packing_format"
    return _ZERO_OFFSETS.get((method, _field(raw, key, str)))


@dataclass(frozen=True, slots=True)
class Format:
    """One way of storing a weight.

    Attributes:
        name: its key in ``FORMATS``.
        suffixes: tensors that a module of this format may have; others are left over. Empty:
            any.
        recognise: tells the scheme of a module that is stored so, None for any other; raises
            UnsupportedError for a variant that cannot be read.
        shape: the logical shape of the weight.
        problems: what does not fit together, one line each.
    """

    name: str
    suffixes: frozenset[str]
    recognise: Callable[[Tensors, QuantizationConfig, str], Scheme | None]
    shape: Callable[[Tensors, Scheme], tuple[int, ...]]
    problems: Callable[[Tensors, Scheme], list[str]]


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
    if not _FOREIGN_SUFFIXES.keys().isdisjoint(tensors):
        foreign = next(suffix for suffix in tensors if suffix in _FOREIGN_SUFFIXES)
        raise _unsupported(name, tensors, _FOREIGN_SUFFIXES[foreign])
    for known in FORMATS.values():
        scheme = known.recognise(tensors, config, name)
        if scheme is not None:
            problems = known.problems(tensors, scheme)
            if known.suffixes and not known.suffixes.issuperset(tensors):
                problems += [
                    f"{tensors[suffix].name}: left over, {known.name} does not use it. "
                    "Re-export the module, or choose another source."
                    for suffix in tensors
                    if suffix not in known.suffixes
                ]
            return Module(name, tensors, scheme, known.shape(tensors, scheme), tuple(problems))
    raise _unsupported(name, tensors, f"a weight stored as {_main_tensor(tensors).dtype}")


_FOREIGN_SUFFIXES = {
    "weight_packed": "compressed-tensors pack-quantized (ct_pack)",
    "weight_zero_point": "compressed-tensors with zero points",
    "weight_global_scale": "compressed-tensors NVFP4",
    "weight_scale_2": "ModelOpt NVFP4",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes int8",
    "W_q": "HQQ",
    "trellis": "EXL3",
    "q_weight": "EXL2",
}
"""Suffixes that give away a format which this version does not read."""


def _unsupported(name: str, tensors: Tensors, what: str) -> UnsupportedError:
    given = ", ".join(f"{suffix} {t.dtype} {list(t.shape)}" for suffix, t in tensors.items())
    file = next(iter(tensors.values())).file
    return UnsupportedError(
        f"{file}: module {name or '(root)'}: {what} is not supported yet (tensors: {given}); "
        f"expected one of {', '.join(FORMATS)}. Choose another source for this model."
    )


def _misfit(spec: TensorSpec, expected: str, why: str) -> str:
    return (
        f"{spec.name}: {spec.dtype} {list(spec.shape)}, expected {expected} ({why}). "
        "Re-export the module, or choose another source."
    )


def _missing(tensors: Tensors, suffix: str, owner: str) -> str:
    spec = tensors[owner]
    return (
        f"{spec.name.removesuffix(owner)}{suffix}: missing, though {owner} is "
        f"{spec.dtype} {list(spec.shape)}. Re-export the module, or choose another source."
    )


# Unquantised: the weight as it is, and any bare parameters beside it.

PLAIN_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Unquantised format -> safetensors dtype."""

_COMPANIONS = frozenset({"weight_scale_inv", "weight_scale", "input_scale", "scales", "qzeros"})


def _main_tensor(tensors: Tensors) -> TensorSpec:
    weight = tensors.get("weight")
    return max(tensors.values(), key=lambda spec: spec.nbytes) if weight is None else weight


def _plain(name: str, bits: int) -> Format:
    dtype, scheme = PLAIN_DTYPES[name], Scheme(name, bits)

    def recognise_plain(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
        is_plain = _main_tensor(tensors).dtype == dtype and "qweight" not in tensors
        return scheme if is_plain else None

    return Format(name, frozenset(), recognise_plain, _plain_shape, _plain_problems)


def _plain_shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    return _main_tensor(tensors).shape


def _plain_problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    if "weight" not in tensors or _COMPANIONS.isdisjoint(tensors):
        return []
    return [
        f"{tensors[suffix].name}: left over, the weight beside it is {scheme.label}. "
        "Re-export the module, or choose another source."
        for suffix in tensors
        if suffix in _COMPANIONS
    ]


# FP8 with one scale a block of (bn, bk) weights: DeepSeek-V3, inference/kernel.py weight_dequant.
# weight (N, K) F8_E4M3; weight_scale_inv (ceil(N/bn), ceil(K/bk)), multiplied despite its name.


def _recognise_fp8_block(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    weight = tensors.get("weight")
    if weight is None or weight.dtype != "F8_E4M3":
        return None
    if "weight_scale" in tensors and "weight_scale_inv" not in tensors:
        raise _unsupported(name, tensors, "FP8 with weight_scale (fp8_tensor, fp8_channel, ct_fp8)")
    if len(weight.shape) != 2:
        raise _unsupported(name, tensors, f"FP8 of {len(weight.shape)} dimensions")
    return _fp8_block_scheme(config.block or DEFAULT_FP8_BLOCK)


@lru_cache
def _fp8_block_scheme(block: tuple[int, int]) -> Scheme:
    return Scheme("fp8_block", bits=8, block=block)


def _fp8_block_shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    return tensors["weight"].shape


def _fp8_block_problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    scale = tensors.get("weight_scale_inv")
    if scale is None:
        return [_missing(tensors, "weight_scale_inv", "weight")]
    n, k = tensors["weight"].shape
    bn, bk = scheme.block or DEFAULT_FP8_BLOCK
    problems = []
    if scale.shape != (-(-n // bn), -(-k // bk)):
        expected = f"[{-(-n // bn)}, {-(-k // bk)}]"
        problems.append(_misfit(scale, expected, f"N={n}, K={k}, block {bn}x{bk}"))
    if scale.dtype not in SCALE_DTYPES:
        problems.append(_misfit(scale, " or ".join(SCALE_DTYPES), "dtype of a scale"))
    return problems


# GPTQ, as AutoGPTQ packs it (auto_gptq/nn_modules/qlinear): qweight (K*bits/32, N) I32, the
# lowest bits of a word are the first row; qzeros (K/g, N*bits/32) I32; scales (K/g, N); g_idx (K,).

_GPTQ_SUFFIXES = frozenset({"qweight", "qzeros", "scales", "g_idx", "bias"})


def _recognise_gptq(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    qweight = tensors.get("qweight")
    if qweight is None:
        return None
    if config.method is None:
        what = "packed integers without a quantization_config in config.json"
        raise _unsupported(name, tensors, what)
    if config.method not in _GPTQ_METHODS:
        raise _unsupported(name, tensors, f'quant_method "{config.method}"')
    if config.zero_offset is None:
        what = f'a checkpoint_format or packing_format of "{config.method}" other than GPTQ\'s own'
        raise _unsupported(name, tensors, what)
    if len(qweight.shape) != 2 or qweight.dtype != "I32":
        raise _unsupported(name, tensors, f"GPTQ packed as {qweight.dtype} {list(qweight.shape)}")
    bits, group_size = config.bits, config.group_size
    symmetric, desc_act = config.symmetric, config.desc_act
    has_own = config.overrides or config.exact_overrides
    if has_own and (own := _override(config, name, tensors)):
        bits = _own(own, "bits", int, bits)
        group_size = _own(own, "group_size", int, group_size)
        symmetric = _own(own, "sym", bool, symmetric)
        desc_act = _own(own, "desc_act", bool, desc_act)
    if bits is None or group_size is None:
        raise _bad_field("bits and group_size", (bits, group_size), "two integers")
    if bits not in GPTQ_BITS:
        raise _unsupported(name, tensors, f"GPTQ of {bits} bits")
    k = qweight.shape[0] * 32 // bits
    if group_size == -1:
        group_size = max(k, 1)
    if group_size <= 0:
        raise _bad_field("group_size", group_size, "-1 or a positive integer")
    # With one group, the order of the rows decides nothing: every g_idx is 0.
    has_order = desc_act and group_size < k
    return _gptq_scheme(bits, group_size, symmetric, has_order, config.zero_offset)


def _override(config: QuantizationConfig, name: str, tensors: Tensors) -> Mapping[str, Any]:
    """Return the settings that a module has of its own; empty when none.

    A mixed export can have thousands of patterns for 90,000 modules. They are searched only
    where shapes contradict the global settings, or a pattern changes what no shape tells.
    """
    if settings := config.exact_overrides.get(name):
        return settings
    if config.shapes_tell_overrides and _fits_global(config, tensors):
        return {}
    for pattern, settings in config.overrides:
        if pattern.match(name):
            return settings
    return {}


def _fits_global(config: QuantizationConfig, tensors: Tensors) -> bool:
    """Whether the shapes of a module are those of the global bits and group size."""
    scales, qzeros = tensors.get("scales"), tensors.get("qzeros")
    if not (scales and qzeros and config.bits and config.group_size):
        return False
    rows, n = tensors["qweight"].shape
    k = rows * 32 // config.bits
    groups = 1 if config.group_size == -1 else -(-k // config.group_size)
    return scales.shape == (groups, n) and qzeros.shape == (groups, n * config.bits // 32)


def _own(settings: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = _field(settings, name, kind)
    return default if value is None else value


@lru_cache
def _gptq_scheme(
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


def _gptq_shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    rows, n = tensors["qweight"].shape
    return n, rows * 32 // scheme.bits


def _gptq_problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    n, k = _gptq_shape(tensors, scheme)
    groups = -(-k // (scheme.group_size or k))
    problems: list[str] = []

    def check(suffix: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        spec = tensors.get(suffix)
        if spec is None:
            problems.append(_missing(tensors, suffix, "qweight"))
        elif spec.shape != shape or spec.dtype not in dtypes:
            why = f"K={k}, N={n}, {scheme.bits} bits, group_size={scheme.group_size}"
            problems.append(_misfit(spec, f"{' or '.join(dtypes)} {list(shape)}", why))

    check("scales", (groups, n), SCALE_DTYPES)
    check("qzeros", (groups, n * scheme.bits // 32), ("I32",))
    if "g_idx" in tensors or scheme.desc_act:
        check("g_idx", (k,), ("I32",))
    if n * scheme.bits % 32:
        whole = f"N a multiple of {32 // scheme.bits}"
        problems.append(_misfit(tensors["qweight"], whole, "zero points fill whole words"))
    return problems


FORMATS: dict[str, Format] = {
    "bf16": _plain("bf16", bits=16),
    "fp16": _plain("fp16", bits=16),
    "fp32": _plain("fp32", bits=32),
    "fp8_block": Format(
        name="fp8_block",
        suffixes=frozenset({"weight", "weight_scale_inv", "bias"}),
        recognise=_recognise_fp8_block,
        shape=_fp8_block_shape,
        problems=_fp8_block_problems,
    ),
    "gptq": Format(
        name="gptq",
        suffixes=_GPTQ_SUFFIXES,
        recognise=_recognise_gptq,
        shape=_gptq_shape,
        problems=_gptq_problems,
    ),
}
"""Every format that this version reads, in the order in which it is tried."""
