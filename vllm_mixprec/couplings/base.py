# SPDX-License-Identifier: Apache-2.0
"""One coupling to vLLM, and how to tell whether it holds."""

import importlib
import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Coupling:
    """One thing of vLLM's that the package uses.

    Attributes:
        symbol: ``module:attribute``; ``torch:ops._C.NAME`` for a compiled operator.
        relies_on: what the package takes for granted about it.
        parameters: that its signature, for a class its constructor's, takes by these names. For an
            operator, which is called by position: all of its arguments, in order.
        members: attributes and methods that a class has, be it only after its constructor.
        family: the platform family (``cpu-avx512``, ``cpu`` for both of these, ``cuda``) that alone
            needs it; None for all.
    """

    symbol: str
    relies_on: str
    parameters: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    family: str | None = None


def find_problem(coupling: Coupling) -> str | None:
    """Say why a coupling does not hold on the installed vLLM; None when it holds.

    Imports vLLM, which writes to stdout and stderr.
    """
    module, _, path = coupling.symbol.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever a broken install raises is the finding
        return f"{module} cannot be imported: {_first_line(error)}"
    try:
        for name in path.split("."):
            found = getattr(found, name)
    except (AttributeError, ImportError) as error:
        return f"not there: {_first_line(error)}"
    return _find_missing(found, coupling.members) or _find_misfit(found, coupling.parameters)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def wrong_members(missing: Iterable[str]) -> str | None:
    """Word what a class or module lacks; None for nothing."""
    names = ", ".join(missing)
    return f"lacks {names}" if names else None


def wrong_parameters(expected: Iterable[str], taken: Collection[str]) -> str | None:
    """Word which parameters a signature does not take; None when it takes all that are expected."""
    missing = [name for name in expected if name not in taken]
    return f"takes no {', '.join(missing)}, only {', '.join(taken)}" if missing else None


def wrong_arguments(expected: tuple[str, ...], taken: tuple[str, ...]) -> str | None:
    """Word how an operator's arguments differ, which are passed by position; None when not."""
    if taken == expected:
        return None
    return f"takes ({', '.join(taken)}), expected ({', '.join(expected)})"


def _find_missing(found: Any, members: Iterable[str]) -> str | None:
    return wrong_members(name for name in members if not _has_member(found, name))


def _has_member(found: Any, name: str) -> bool:
    """Whether an object has an attribute, or a class gives it to its instances."""
    if hasattr(found, name) or name in getattr(found, "__dataclass_fields__", {}):
        return True
    for cls in getattr(found, "__mro__", ()):
        if name in getattr(cls, "__annotations__", {}):
            return True
        code = getattr(cls.__dict__.get("__init__"), "__code__", None)
        if code is not None and name in code.co_names:
            return True
    return False


def _find_misfit(found: Any, parameters: tuple[str, ...]) -> str | None:
    if not parameters:
        return None
    schema = getattr(getattr(found, "default", None), "_schema", None)
    if schema is not None:
        return wrong_arguments(parameters, tuple(argument.name for argument in schema.arguments))
    try:
        taken = _parameter_names(found)
    except (TypeError, ValueError) as error:
        return f"has no signature: {_first_line(error)}"
    return wrong_parameters(parameters, taken)


def _parameter_names(found: Any) -> list[str]:
    """Names that a call takes; a constructor with ``**kwargs`` passes those of its base on."""
    if not isinstance(found, type):
        return list(inspect.signature(found).parameters)
    names: dict[str, None] = {}
    for cls in found.__mro__:
        if "__init__" not in cls.__dict__:
            continue
        parameters = inspect.signature(cls.__dict__["__init__"]).parameters
        names |= dict.fromkeys(parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return [name for name in names if name != "self"]
