# SPDX-License-Identifier: Apache-2.0
"""The ``quantization_config`` of compressed-tensors: config groups, and what they target."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_mixprec.checkpoint.formats.settings import (
    Settings,
    bad_field,
    compile_field,
    matches,
    parse_block,
    read_objects,
)
from vllm_mixprec.expressions import Expression

_BLOCK = re.compile(r"[0-9]{1,9}x[0-9]{1,9}")


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

    @classmethod
    def parse(cls, raw: Settings) -> "CompressedTensors":
        """Read the ``quantization_config`` of quant_method "compressed-tensors".

        Of groups that name one target the last counts, and of patterns that match one module the
        first by spelling, in whatever order the groups stand (quantization/lifecycle/apply.py).

        Raises:
            CheckpointError: a field has the wrong type.
        """
        by_name: dict[str, WeightArgs] = {}
        by_pattern: dict[str, tuple[Expression, WeightArgs]] = {}
        for group, settings in read_objects(raw, "config_groups").items():
            where = f"config_groups.{group}"
            weights = settings.get("weights")
            if weights is None:
                continue  # it quantises activations or the KV cache alone
            args = _parse_weights(f"{where}.weights", weights)
            for target in _strings(f"{where}.targets", settings.get("targets")):
                if target.startswith("re:"):
                    by_pattern[target] = compile_field(f"{where}.targets", target[3:]), args
                else:
                    by_name[target] = args
        ignored = _strings("ignore", raw.get("ignore"))
        return cls(
            by_name=by_name,
            by_pattern=tuple(by_pattern[target] for target in sorted(by_pattern)),
            linear=by_name.get("Linear"),
            ignored_names=frozenset(ignored),
            ignored_patterns=tuple(
                compile_field("ignore", n[3:]) for n in ignored if n.startswith("re:")
            ),
        )

    def weights_of(self, name: str) -> WeightArgs | None:
        """Return the settings of a module, None when no group targets it.

        Names come before patterns, patterns before "Linear" (utils/match.py, ``match_targets``).
        """
        args = self.by_name.get(name)
        if args is not None:
            return args
        for pattern, args in self.by_pattern:
            if matches(pattern, name):
                return args
        return self.linear

    def ignores(self, name: str) -> bool:
        """Whether ``ignore`` keeps a module unquantised."""
        return name in self.ignored_names or any(
            matches(pattern, name) for pattern in self.ignored_patterns
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
    block = parse_block(f"{where}.block_structure", structure)
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
