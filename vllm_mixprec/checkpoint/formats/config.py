# SPDX-License-Identifier: Apache-2.0
"""The ``quantization_config`` of a checkpoint, normalised once: what each module's settings are."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_mixprec.checkpoint.formats.ct_config import CompressedTensors
from vllm_mixprec.checkpoint.formats.settings import (
    Settings,
    bad_field,
    compile_field,
    describe_field,
    matches,
    parse_block,
    read_field,
    read_objects,
)
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.expressions import Expression

# What makes vLLM take a key of auto-round's ``extra_config`` for an expression.
_SPECIAL = re.compile(r"[*+?^$()\[\]{}|\\]")

_LEADING_FLAGS = re.compile(r"(?:\(\?[aiLmsux]+\))*")


@dataclass(frozen=True, slots=True)
class IntegerArgs:
    """Settings of a GPTQ or AWQ weight; a ``group_size`` of -1 is still unresolved."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The ``quantization_config`` of a checkpoint, normalised once.

    Attributes:
        method: ``quant_method``; None without a ``quantization_config``.
        block: fp8: ``weight_block_size``.
        packing: who packed ``qweight``, "gptq" or "awq"; None for nobody that is known.
        layout: the setting that says so, for a message.
        zero_offset: of ``packing``, as in ``Scheme``.
        bits, group_size, symmetric, desc_act: gptq, awq: the global settings, as in ``Scheme``,
            but with ``group_size`` -1 still unresolved.
        overrides: (matches the module's name, settings that replace the global ones), from
            GPTQModel's ``dynamic``, and from the keys of auto-round's ``extra_config`` that are
            no plain names. The first match wins, as in vLLM's ``get_dynamic_override``.
        exact_overrides: the same by a module's name or the end of it, from auto-round's
            ``extra_config``.
        shapes_tell_overrides: ``overrides`` change bits and group size only, so that a module
            whose shapes fit the global ones has none.
        compressed: compressed-tensors: its groups.
    """

    method: str | None = None
    block: tuple[int, int] | None = None
    packing: str | None = None
    layout: str = ""
    zero_offset: int = 0
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    desc_act: bool = False
    overrides: tuple[tuple[Expression, Settings], ...] = ()
    exact_overrides: Mapping[str, Settings] = field(default_factory=dict)
    shapes_tell_overrides: bool = True
    compressed: CompressedTensors | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any] | None) -> "QuantizationConfig":
        """Normalise the dict found in config.json.

        Raises:
            CheckpointError: a field has the wrong type.
            UnsupportedError: the weights were rotated.
        """
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping):
            raise bad_field("", raw, "an object")
        _refuse_rotations(raw)
        named = read_field(raw, "quant_method", str, "").lower()
        method = _METHODS.get(named, named) or None
        block = parse_block("weight_block_size", raw.get("weight_block_size"))
        if method == "compressed-tensors":
            return cls(method=method, block=block, compressed=CompressedTensors.parse(raw))
        if method not in _LAYOUT_KEYS:
            return cls(method=method, block=block)
        data_type = raw.get("data_type", "int")
        if data_type != "int":
            return cls(method=method, block=block, layout=f'data_type "{data_type}"')
        layouts = _parse_layouts(method, raw)
        packings = {_PACKINGS.get((method, layout.lower())) for layout in layouts.values()}
        found = packings.pop() if len(packings) == 1 else None  # else they contradict each other
        packing, zero_offset = found or (None, 0)
        extra = read_objects(raw, "extra_config")
        overrides = (*_parse_dynamic(raw.get("dynamic") or {}), *_parse_extra_patterns(extra))
        has_zero_points = read_field(raw, "zero_point", bool, method == "awq")
        return cls(
            method=method,
            block=block,
            packing=packing,
            layout=" and ".join(f'{key} "{layout}"' for key, layout in layouts.items()),
            zero_offset=zero_offset,
            bits=read_field(raw, "bits", int, read_field(raw, "w_bit", int)),
            group_size=read_field(raw, "group_size", int, read_field(raw, "q_group_size", int)),
            symmetric=read_field(raw, "sym", bool, not has_zero_points),
            desc_act=read_field(raw, "desc_act", bool) is True,
            overrides=overrides,
            exact_overrides=extra,
            shapes_tell_overrides=not any(
                "sym" in own or "desc_act" in own for _, own in overrides
            ),
        )

    @property
    def is_uniform(self) -> bool:
        """Whether it says of no module anything else than of the others."""
        return not (self.overrides or self.exact_overrides or self.compressed)

    def integers_of(self, name: str, fits: Callable[[int, int], bool]) -> IntegerArgs:
        """Return the settings of a module that GPTQ or AWQ packed.

        Args:
            name: the module's name.
            fits: whether the module's shapes are those of (bits, group_size).

        Raises:
            CheckpointError: bits or group_size are missing, or are no sizes.
        """
        own = self._override(name, fits)
        bits = read_field(own, "bits", int, self.bits)
        group_size = read_field(own, "group_size", int, self.group_size)
        if bits is None or group_size is None:
            raise bad_field("bits and group_size", (bits, group_size), "two integers")
        if group_size <= 0 and group_size != -1:
            raise bad_field("group_size", group_size, "-1 or a positive integer")
        return IntegerArgs(
            bits,
            group_size,
            read_field(own, "sym", bool, self.symmetric),
            read_field(own, "desc_act", bool, self.desc_act),
        )

    def _override(self, name: str, fits: Callable[[int, int], bool]) -> Settings:
        """Return the settings that a module has of its own; empty when none.

        A mixed export can have thousands of patterns for 90,000 modules. They are searched only
        where shapes contradict the global settings, or a pattern changes what no shape tells.
        """
        if self.exact_overrides and (key := self._exact_key(name)) is not None:
            return self.exact_overrides[key]
        if not self.overrides:
            return {}
        if (
            self.shapes_tell_overrides
            and self.bits
            and self.group_size
            and fits(self.bits, self.group_size)
        ):
            return {}
        for pattern, settings in self.overrides:
            if matches(pattern, name):
                return settings
        return {}

    def _exact_key(self, name: str) -> str | None:
        """Find the key that is the name, else the first that ends it after a dot, as in vLLM.

        (layers/quantization/inc/config_parser.py, ``_resolve_raw``.)
        """
        if name in self.exact_overrides:
            return name
        parts = name.split(".")
        ends = [".".join(parts[first:]) for first in range(1, len(parts))]
        found = [end for end in ends if end in self.exact_overrides]
        if len(found) < 2:
            return found[0] if found else None
        return next(key for key in self.exact_overrides if key in found)


# What vLLM calls its own versions of a quant_method, and reads from a config too.
_METHODS = {"gptq_marlin": "gptq", "awq_marlin": "awq"}

# quant_method -> the settings that tell how integers are packed. GPTQModel's own is ``format``, and
# it writes the others beside it; AutoGPTQ and AutoAWQ know theirs only.
_LAYOUT_KEYS = {
    "gptq": ("checkpoint_format", "format"),
    "auto-round": ("packing_format",),
    "awq": ("version", "format", "checkpoint_format"),
}

# (quant_method, such a setting) -> packing, what is added to a stored zero point.
_PACKINGS = {
    ("gptq", "gptq"): ("gptq", 1),
    ("gptq", "gptq_v2"): ("gptq", 0),
    # auto_round/inference/backend.py: GPTQ_FORMAT and GPTQ_FORMAT_NO_ZP.
    ("auto-round", "auto_round:auto_gptq"): ("gptq", 1),
    ("auto-round", "auto_round:gptqmodel"): ("gptq", 0),
    ("auto-round", "auto_round"): ("gptq", 0),
    ("auto-round", "auto_round:auto_awq"): ("awq", 0),
    ("awq", "gemm"): ("awq", 0),
}

_DEFAULT_LAYOUTS = {"gptq": "gptq", "auto-round": "auto_round:auto_gptq", "awq": "gemm"}

# Where compressed-tensors, GPTQModel and auto-round say how they rotated weights.
_ROTATIONS = ("transform_config", "rotation", "rotation_config", "spinquant_config")


def _refuse_rotations(raw: Settings) -> None:
    """Refuse weights that were multiplied by a rotation: nothing in their tensors shows it."""
    for name in _ROTATIONS:
        found = raw.get(name)
        if name == "transform_config" and isinstance(found, Mapping):
            found = found.get("config_groups")  # without any it changes nothing
        if found:
            raise UnsupportedError(
                f"{describe_field(name, raw[name])}, expected none: the weights were multiplied by "
                "a rotation that the model would have to undo while it runs. Choose a source that "
                "was quantised without."
            )


def _parse_layouts(method: str, raw: Settings) -> dict[str, str]:
    """Return the settings that tell how integers are packed, the default where there is none."""
    keys = _LAYOUT_KEYS[method]
    layouts = {key: read_field(raw, key, str) for key in keys}
    layouts = {key: layout for key, layout in layouts.items() if layout is not None}
    if method == "auto-round" and not layouts:
        backend: str = read_field(raw, "backend", str, "auto")
        if backend != "auto" and backend.startswith("auto"):
            return {"backend": backend}  # where old versions named the packing
    return layouts or {keys[0]: _DEFAULT_LAYOUTS[method]}


def _parse_dynamic(dynamic: Any) -> list[tuple[Expression, Settings]]:
    """Read GPTQModel's ``dynamic``: "+:REGEX" changes settings; "-:REGEX" excludes modules.

    The first that matches counts, also where it changes nothing. That a module is not quantised
    shows in its tensors, so an exclusion, ``false`` or "-:" with any value, only ends the search.
    """
    if not isinstance(dynamic, Mapping):
        raise bad_field("dynamic", dynamic, "an object of objects")
    entries: list[tuple[str, Settings]] = []
    for key, settings in dynamic.items():
        if key.startswith("-:") or settings is False:
            settings = {}
        elif not isinstance(settings, Mapping):
            raise bad_field("dynamic", dynamic, "an object of objects")
        entries.append((key[2:] if key.startswith(("+:", "-:")) else key, settings))
    while entries and not entries[-1][1]:
        entries.pop()  # what is found there is found without it
    return [(compile_field("dynamic", key), settings) for key, settings in entries]


def _parse_extra_patterns(extra: Mapping[str, Settings]) -> list[tuple[Expression, Settings]]:
    """Read the keys of auto-round's ``extra_config`` that are searched for in a module's name.

    One that is no regular expression, such as ``*.mtp``, is skipped, since auto-round
    (inference/utils.py, ``_expand_regex_config``) and vLLM skip it too. Nothing says so: a note has
    no way out of here, and settings that shapes contradict are a problem of the module.
    """
    patterns = []
    for key, settings in extra.items():
        if not _SPECIAL.search(key):
            continue
        try:
            re.compile(key)
        except re.error:
            continue
        except (OverflowError, RecursionError):
            pass  # the guarded compiler says so
        rest = _LEADING_FLAGS.sub("", key, count=1)
        searched = f"{key.removesuffix(rest)}.*(?:{rest})"
        patterns.append((compile_field("extra_config", searched), settings))
    return patterns
