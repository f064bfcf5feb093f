# SPDX-License-Identifier: Apache-2.0
"""The ``quantization_config`` of a checkpoint, normalised once: what each module's settings are."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_mixprec.errors import CheckpointError, UnsupportedError
from vllm_mixprec.expressions import Expression, compile_expression

Settings = Mapping[str, Any]

# What makes vLLM take a key of auto-round's ``extra_config`` for an expression.
_SPECIAL = re.compile(r"[*+?^$()\[\]{}|\\]")

_LEADING_FLAGS = re.compile(r"(?:\(\?[aiLmsux]+\))*")
_BLOCK = re.compile(r"[0-9]{1,9}x[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class IntegerArgs:
    """Settings of a GPTQ or AWQ weight; a ``group_size`` of -1 is still unresolved."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool


@dataclass(frozen=True, slots=True)
class WeightArgs:
    """``weights`` of a compressed-tensors config group (quantization/quant_args.py).

    Attributes:
        kind: "int" or "float".
        bits: ``num_bits``.
        strategy: "tensor", "channel", "group", "block", ...
        group_size: of strategy "group".
        block: ``block_structure`` of strategy "block".
        has_order: ``actorder`` "group": weight_g_idx tells a column's group.
    """

    kind: str
    bits: int
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool
    has_order: bool


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """``config_groups`` and ``ignore`` of compressed-tensors, by what their targets name.

    Attributes:
        by_name: settings of targets that are a module's name.
        by_pattern: of targets that start with "re:", matched from the name's beginning; sorted.
        linear: of the target "Linear", which stands for every linear layer.
        ignored_names, ignored_patterns: modules that are not quantised.
    """

    by_name: Mapping[str, WeightArgs]
    by_pattern: tuple[tuple[Expression, WeightArgs], ...]
    linear: WeightArgs | None
    ignored_names: frozenset[str]
    ignored_patterns: tuple[Expression, ...]

    def weights_of(self, name: str) -> WeightArgs | None:
        """Return the settings of a module, None when no group targets it.

        Names come before patterns, patterns before "Linear" (utils/match.py, ``match_targets``).
        """
        args = self.by_name.get(name)
        if args is not None:
            return args
        for pattern, args in self.by_pattern:
            if _matches(pattern, name):
                return args
        return self.linear

    def ignores(self, name: str) -> bool:
        """Whether ``ignore`` keeps a module unquantised."""
        return name in self.ignored_names or any(
            _matches(pattern, name) for pattern in self.ignored_patterns
        )


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
        named = _own(raw, "quant_method", str, "").lower()
        method = _METHODS.get(named, named) or None
        block = _parse_block("weight_block_size", raw.get("weight_block_size"))
        if method == "compressed-tensors":
            return cls(method=method, block=block, compressed=_parse_compressed(raw))
        if method not in _LAYOUT_KEYS:
            return cls(method=method, block=block)
        data_type = raw.get("data_type", "int")
        if data_type != "int":
            return cls(method=method, block=block, layout=f'data_type "{data_type}"')
        layouts = _parse_layouts(method, raw)
        packings = {_PACKINGS.get((method, layout.lower())) for layout in layouts.values()}
        found = packings.pop() if len(packings) == 1 else None  # else they contradict each other
        packing, zero_offset = found or (None, 0)
        extra = _settings_by_name(raw, "extra_config")
        overrides = (*_parse_dynamic(raw.get("dynamic") or {}), *_parse_extra_patterns(extra))
        has_zero_points = _own(raw, "zero_point", bool, method == "awq")
        return cls(
            method=method,
            block=block,
            packing=packing,
            layout=" and ".join(f'{key} "{layout}"' for key, layout in layouts.items()),
            zero_offset=zero_offset,
            bits=_own(raw, "bits", int, _field(raw, "w_bit", int)),
            group_size=_own(raw, "group_size", int, _field(raw, "q_group_size", int)),
            symmetric=_own(raw, "sym", bool, not has_zero_points),
            desc_act=_field(raw, "desc_act", bool) is True,
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
        bits = _own(own, "bits", int, self.bits)
        group_size = _own(own, "group_size", int, self.group_size)
        if bits is None or group_size is None:
            raise bad_field("bits and group_size", (bits, group_size), "two integers")
        if group_size <= 0 and group_size != -1:
            raise bad_field("group_size", group_size, "-1 or a positive integer")
        return IntegerArgs(
            bits,
            group_size,
            _own(own, "sym", bool, self.symmetric),
            _own(own, "desc_act", bool, self.desc_act),
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
            if _matches(pattern, name):
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


def bad_field(name: str, found: Any, expected: str) -> CheckpointError:
    """Make the error of a malformed setting; an empty name stands for all of the config."""
    return CheckpointError(
        f"{_setting(name, found)}, expected {expected}. Correct the config, or download it again."
    )


def _setting(name: str, found: Any) -> str:
    key = f"quantization_config.{name}" if name else "quantization_config"
    shown = repr(found)
    shown = shown if len(shown) <= 300 else f"{shown[:297]}..."
    return f"config.json: {key} is {shown}"


def _refuse_rotations(raw: Settings) -> None:
    """Refuse weights that were multiplied by a rotation: nothing in their tensors shows it."""
    for name in _ROTATIONS:
        found = raw.get(name)
        if name == "transform_config" and isinstance(found, Mapping):
            found = found.get("config_groups")  # without any it changes nothing
        if found:
            raise UnsupportedError(
                f"{_setting(name, raw[name])}, expected none: the weights were multiplied by a "
                "rotation that the model would have to undo while it runs. Choose a source that "
                "was quantised without."
            )


def _parse_layouts(method: str, raw: Settings) -> dict[str, str]:
    """Return the settings that tell how integers are packed, the default where there is none."""
    keys = _LAYOUT_KEYS[method]
    layouts = {key: _field(raw, key, str) for key in keys}
    layouts = {key: layout for key, layout in layouts.items() if layout is not None}
    if method == "auto-round" and not layouts:
        backend: str = _own(raw, "backend", str, "auto")
        if backend != "auto" and backend.startswith("auto"):
            return {"backend": backend}  # where old versions named the packing
    return layouts or {keys[0]: _DEFAULT_LAYOUTS[method]}


def _field(raw: Settings, name: str, kind: type) -> Any:
    value = raw.get(name)
    if value is not None and type(value) is not kind:
        raise bad_field(name, value, f"of type {kind.__name__}")
    return value


def _own(settings: Settings, name: str, kind: type, default: Any) -> Any:
    value = _field(settings, name, kind)
    return default if value is None else value


def _settings_by_name(raw: Settings, name: str) -> Mapping[str, Settings]:
    value = raw.get(name) or {}
    if not isinstance(value, Mapping) or not all(
        isinstance(own, Mapping) for own in value.values()
    ):
        raise bad_field(name, value, "an object of objects")
    return value


def _parse_block(name: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(size) is not int or size <= 0 for size in value)
    ):
        raise bad_field(name, value, "two positive integers")
    return value[0], value[1]


def _compile(name: str, expression: str) -> Expression:
    try:
        return compile_expression(expression)
    except ValueError as error:
        raise bad_field(name, expression, f"a regular expression ({error})") from error


def _matches(pattern: Expression, name: str) -> bool:
    try:
        return pattern.match(name) is not None
    except ValueError as error:
        raise CheckpointError(
            f"config.json: quantization_config: {error}, or choose another source."
        ) from error


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
    return [(_compile("dynamic", key), settings) for key, settings in entries]


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
        patterns.append((_compile("extra_config", searched), settings))
    return patterns


def _parse_compressed(raw: Settings) -> CompressedTensors:
    # As quantization/lifecycle/apply.py: of groups that name one target the last counts, and of
    # patterns that match one module the first by spelling, in whatever order the groups stand.
    by_name: dict[str, WeightArgs] = {}
    by_pattern: dict[str, tuple[Expression, WeightArgs]] = {}
    for group, settings in _settings_by_name(raw, "config_groups").items():
        where = f"config_groups.{group}"
        weights = settings.get("weights")
        if weights is None:
            continue  # it quantises activations or the KV cache alone
        args = _parse_weights(f"{where}.weights", weights)
        for target in _strings(f"{where}.targets", settings.get("targets")):
            if target.startswith("re:"):
                by_pattern[target] = _compile(f"{where}.targets", target[3:]), args
            else:
                by_name[target] = args
    ignored = _strings("ignore", raw.get("ignore"))
    return CompressedTensors(
        by_name=by_name,
        by_pattern=tuple(by_pattern[target] for target in sorted(by_pattern)),
        linear=by_name.get("Linear"),
        ignored_names=frozenset(ignored),
        ignored_patterns=tuple(_compile("ignore", n[3:]) for n in ignored if n.startswith("re:")),
    )


def _parse_weights(where: str, raw: Any) -> WeightArgs:
    if not isinstance(raw, Mapping):
        raise bad_field(where, raw, "an object")
    group_size = raw.get("group_size")
    if group_size is not None and type(group_size) is not int:
        raise bad_field(f"{where}.group_size", group_size, "of type int")
    # The library takes enums in any case, and a block as "128x128" too.
    strategy = _lower(raw.get("strategy"))
    if strategy is None:  # what QuantizationArgs infers
        strategy = "tensor" if group_size is None else "group" if group_size > 0 else "channel"
    if strategy == "group" and (group_size is None or group_size <= 0):
        raise bad_field(f"{where}.group_size", group_size, "a positive integer")
    bits = raw.get("num_bits", 8)
    if type(bits) is not int:
        raise bad_field(f"{where}.num_bits", bits, "of type int")
    structure = raw.get("block_structure")
    if isinstance(structure, str) and _BLOCK.fullmatch(structure):
        structure = [int(size) for size in structure.split("x")]
    block = _parse_block(f"{where}.block_structure", structure)
    if strategy == "block" and block is None:
        raise bad_field(f"{where}.block_structure", block, "two positive integers")
    return WeightArgs(
        kind=str(_lower(raw.get("type", "int"))),
        bits=bits,
        strategy=str(strategy),
        group_size=group_size if strategy == "group" else None,
        block=block if strategy == "block" else None,
        symmetric=raw.get("symmetric", True) is not False,
        has_order=_lower(raw.get("actorder")) in (True, "group", "dynamic"),
    )


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _strings(where: str, value: Any) -> list[str]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(type(item) is str for item in value):
        raise bad_field(where, value, "a list of strings")
    return value
