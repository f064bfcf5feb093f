# SPDX-License-Identifier: Apache-2.0
"""Single settings of a ``quantization_config``: each of the type that it must have, or an error."""

from collections.abc import Mapping
from typing import Any

from vllm_mixprec.errors import CheckpointError
from vllm_mixprec.expressions import Expression, compile_expression

Settings = Mapping[str, Any]


def bad_field(name: str, found: Any, expected: str) -> CheckpointError:
    """Make the error of a malformed setting; an empty name stands for all of the config."""
    return CheckpointError(
        f"{describe_field(name, found)}, expected {expected}. Correct the config, or download it "
        "again."
    )


def describe_field(name: str, found: Any) -> str:
    """Word where a setting stands and what it is, cut short where that is long."""
    key = f"quantization_config.{name}" if name else "quantization_config"
    shown = repr(found)
    shown = shown if len(shown) <= 300 else f"{shown[:297]}..."
    return f"config.json: {key} is {shown}"


def read_field(settings: Settings, name: str, kind: type, default: Any = None) -> Any:
    """Return a setting, ``default`` where it is absent or null.

    Raises:
        CheckpointError: it is of another type than ``kind``.
    """
    value = settings.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        raise bad_field(name, value, f"of type {kind.__name__}")
    return value


def read_objects(raw: Settings, name: str) -> Mapping[str, Settings]:
    """Return a setting that is an object of objects, an empty one where it is absent."""
    value = raw.get(name) or {}
    if not isinstance(value, Mapping) or not all(
        isinstance(own, Mapping) for own in value.values()
    ):
        raise bad_field(name, value, "an object of objects")
    return value


def parse_block(name: str, value: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a block, None for null."""
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(size) is not int or size <= 0 for size in value)
    ):
        raise bad_field(name, value, "two positive integers")
    return value[0], value[1]


def compile_field(name: str, expression: str) -> Expression:
    """Compile an expression that the setting ``name`` holds.

    Raises:
        CheckpointError: it is none, or may take too long to match.
    """
    try:
        return compile_expression(expression)
    except ValueError as error:
        raise bad_field(name, expression, f"a regular expression ({error})") from error


def matches(pattern: Expression, name: str) -> bool:
    """Whether an expression matches a module's name from its beginning.

    Raises:
        CheckpointError: the name is too long for it.
    """
    try:
        return pattern.match(name) is not None
    except ValueError as error:
        raise CheckpointError(
            f"config.json: quantization_config: {error}, or choose another source."
        ) from error
