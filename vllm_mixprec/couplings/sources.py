# SPDX-License-Identifier: Apache-2.0
"""Whether a coupling holds in the sources of a vLLM, in a wheel or a directory, without importing.

Names are followed through imports and base classes as far as the sources go; what comes from
another package counts as there.
"""

import ast
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_mixprec.couplings.base import Coupling, wrong_arguments, wrong_members, wrong_parameters

_PACKAGE = "vllm"
_OPERATORS = "torch:ops._C."
_LIBRARIES = ("vllm/_C.abi3.so",)  # of a CPU's build, the only one whose operators we call
_DEEPEST = 32  # no import or class is that far from where it is used

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class _External:
    """Something of another package: nothing is known of it."""


@dataclass(frozen=True)
class _Module:
    """A parsed file. ``name`` is ``vllm.config``."""

    name: str
    is_package: bool
    tree: ast.Module

    @cached_property
    def bindings(self) -> dict[str, ast.stmt | ast.alias]:
        """Top-level names -> what binds them, the last one; inside ``if`` and ``try`` too."""
        found: dict[str, ast.stmt | ast.alias] = {}
        for statement in _flatten(self.tree.body):
            found.update(dict.fromkeys(_bound_names(statement), statement))
        return found

    @property
    def stars(self) -> list[ast.ImportFrom]:
        """``from x import *``."""
        return [
            node
            for node in _flatten(self.tree.body)
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        ]


_Found = tuple[_Module, ast.AST] | _Module | _External


class VllmSources:
    """The files of one vLLM.

    Args:
        read: file name, such as ``vllm/config/__init__.py``, -> its bytes, None without it.
        libraries: names of the compiled libraries in the package's folder.
    """

    def __init__(self, read: Callable[[str], bytes | None], libraries: Iterable[str] = ()) -> None:
        self._read = read
        self._library_names = tuple(libraries)
        self._modules: dict[str, _Module | None] = {}
        self._libraries: bytes | None = None

    @classmethod
    def of(cls, path: Path) -> "VllmSources":
        """Open a wheel, or a directory with the package ``vllm`` in it.

        Raises:
            OSError, zipfile.BadZipFile: it cannot be read.
        """
        if path.is_dir():

            def read(name: str) -> bytes | None:
                file = path / name
                return file.read_bytes() if file.is_file() else None

            return cls(read, (f"vllm/{file.name}" for file in path.glob("vllm/*.so")))
        archive = zipfile.ZipFile(path)
        names = set(archive.namelist())
        libraries = (name for name in names if name.endswith(".so") and name.count("/") == 1)
        return cls(lambda name: archive.read(name) if name in names else None, libraries)

    @property
    def family(self) -> str:
        """The platform family that this vLLM is built for: ``cpu`` or ``cuda``."""
        return "cuda" if any("_moe_C" in name for name in self._library_names) else "cpu"

    def find_problem(self, coupling: Coupling) -> str | None:
        """Say why a coupling does not hold here; None when it does."""
        if coupling.symbol.startswith(_OPERATORS):
            name = coupling.symbol.removeprefix(_OPERATORS)
            return self._find_operator_problem(name, coupling.parameters)
        module_name, _, path = coupling.symbol.partition(":")
        module = self._module(module_name)
        if module is None:
            return f"{module_name} cannot be imported: there is no such file"
        found: _Found | None = module
        for name in path.split("."):
            found = self._attribute(found, name)
            if found is None:
                return f"not there: {module_name} has no {path}"
        if isinstance(found, _External):
            return None
        return self._find_missing(found, coupling) or self._find_misfit(found, coupling)

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            stem = name.replace(".", "/")
            self._modules[name] = None
            for file, is_package in ((f"{stem}/__init__.py", True), (f"{stem}.py", False)):
                text = self._read(file)
                if text is not None:
                    self._modules[name] = _Module(name, is_package, ast.parse(text, file))
                    break
        return self._modules[name]

    def _attribute(self, found: _Found | None, name: str, depth: int = 0) -> _Found | None:
        """Look a name up in a module, a class or an instance of one; None when it is not there."""
        if found is None or isinstance(found, _External) or depth > _DEEPEST:
            return found if isinstance(found, _External) else None
        if isinstance(found, _Module):
            return self._in_module(found, name, depth)
        for module, node in self._lineage(found):
            for statement in _flatten(node.body):
                if name in _bound_names(statement):
                    return self._follow(module, statement, name, depth)
        return None

    def _in_module(self, module: _Module, name: str, depth: int) -> _Found | None:
        statement = module.bindings.get(name)
        if statement is not None:
            return self._follow(module, statement, name, depth)
        if module.is_package and (below := self._module(f"{module.name}.{name}")) is not None:
            return below
        for star in module.stars:
            source = self._imported(module, star)
            found = self._attribute(source, name, depth + 1)
            if found is not None:
                return found
        return None

    def _follow(self, module: _Module, statement: ast.AST, name: str, depth: int) -> _Found | None:
        """Return what a statement binds to a name, through imports."""
        if isinstance(statement, ast.ImportFrom):
            source = self._imported(module, statement)
            original = next(a.name for a in statement.names if (a.asname or a.name) == name)
            return self._attribute(source, original, depth + 1)
        if isinstance(statement, ast.Import):
            alias = next(a for a in statement.names if (a.asname or a.name.split(".")[0]) == name)
            target = alias.name if alias.asname else alias.name.split(".")[0]
            return self._module(target) if _is_own(target) else _External()
        return module, statement

    def _imported(self, module: _Module, statement: ast.ImportFrom) -> _Module | _External | None:
        """Return the module that a ``from ... import`` names."""
        name = statement.module or ""
        if statement.level:
            parts = module.name.split(".")
            kept = len(parts) - statement.level + (1 if module.is_package else 0)
            name = ".".join([*parts[:kept], *([name] if name else [])])
        return self._module(name) if _is_own(name) else _External()

    def _lineage(self, found: tuple[_Module, ast.AST]) -> list[tuple[_Module, ast.ClassDef]]:
        """Return a class, or that of an instance, and its bases, in the order of Python's MRO.

        That is depth first, a class that several others have for a base after the last of these.
        """
        order: dict[int, tuple[_Module, ast.ClassDef]] = {}

        def visit(module: _Module, node: ast.AST, depth: int) -> None:
            if depth > _DEEPEST:
                return
            if isinstance(node, ast.ClassDef):
                order.pop(id(node), None)
                order[id(node)] = module, node
                parents = node.bases
            else:
                made = _constructed(node)
                parents = [made] if made is not None else []
            for parent in parents:
                target = self._resolve(module, parent)
                if isinstance(target, tuple) and target[1] is not node:
                    visit(*target, depth + 1)

        visit(*found, 0)
        return list(order.values())

    def _resolve(self, module: _Module, expression: ast.expr) -> _Found | None:
        """Return what ``a.b[c]`` stands for at the top of a module."""
        if isinstance(expression, ast.Subscript):
            return self._resolve(module, expression.value)
        if isinstance(expression, ast.Attribute):
            return self._attribute(self._resolve(module, expression.value), expression.attr)
        if isinstance(expression, ast.Name):
            return self._in_module(module, expression.id, 0)
        return None

    def _find_missing(self, found: _Found, coupling: Coupling) -> str | None:
        if isinstance(found, _Module):
            return wrong_members(
                name for name in coupling.members if self._attribute(found, name) is None
            )
        if isinstance(found, _External) or not coupling.members:
            return None
        known = {name for _, node in self._lineage(found) for name in (*_class_names(node),)}
        return wrong_members(name for name in coupling.members if name not in known)

    def _find_misfit(self, found: _Found, coupling: Coupling) -> str | None:
        if not coupling.parameters or not isinstance(found, tuple):
            return None
        taken = self._parameters(found)
        return wrong_parameters(coupling.parameters, taken)

    def _parameters(self, found: tuple[_Module, ast.AST]) -> list[str]:
        """Names that a call takes; a constructor with ``**kwargs`` passes those of its base on."""
        if isinstance(found[1], Function):
            return [name for name in _argument_names(found[1]) if name not in ("self", "cls")]
        names: dict[str, None] = {}
        for _, node in self._lineage(found):
            constructor = next(
                (
                    statement
                    for statement in node.body
                    if isinstance(statement, Function) and statement.name == "__init__"
                ),
                None,
            )
            if constructor is None:
                fields = [s for s in node.body if isinstance(s, ast.AnnAssign)]
                if node.decorator_list and fields:  # a dataclass
                    names |= {ast.unparse(field.target): None for field in fields}
                continue
            names |= dict.fromkeys(_argument_names(constructor))
            if constructor.args.kwarg is None:
                break
        return [name for name in names if name != "self"]

    def _find_operator_problem(self, name: str, parameters: tuple[str, ...]) -> str | None:
        """Look for an operator's schema, which compiled libraries hold as text."""
        if self._libraries is None:
            self._libraries = b"".join(
                self._read(name) or b"" for name in self._library_names if name in _LIBRARIES
            )
        schema = re.compile(rb"(?<![\w:])" + name.encode() + rb"\(((?:[^()]|\([^()]*\))*)\) -> ")
        for match in schema.finditer(self._libraries):
            text = match[1].decode(errors="replace")
            if "::" not in text:  # else a C++ signature
                arguments = tuple(
                    argument.split("=")[0].split()[-1] for argument in text.split(", ") if argument
                )
                return wrong_arguments(parameters, arguments)
        return f"not there: no compiled library has an operator {name}"


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE


def _flatten(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, and those inside of ``if``, ``try`` and ``with``."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _flatten(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from _flatten(handler.body)


def _bound_names(statement: ast.AST) -> list[str]:
    """Return the names that one statement binds."""
    if isinstance(statement, Function | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names if alias.name != "*"]
    if isinstance(statement, ast.Import):
        return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [
        node.id
        for target in targets
        for node in ast.walk(target)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]


def _constructed(node: ast.AST) -> ast.expr | None:
    """Return the class whose instance an assignment binds: its annotation's, or that it calls."""
    if isinstance(node, ast.AnnAssign):
        return node.annotation
    value = getattr(node, "value", None)
    if isinstance(value, ast.Call):
        return value.func
    return value if isinstance(value, ast.Name) else None


def _class_names(node: ast.ClassDef) -> set[str]:
    """Return what a class gives its instances: its own names, and those its methods assign."""
    names = {name for statement in _flatten(node.body) for name in _bound_names(statement)}
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id in ("self", "cls")
        ):
            names.add(inner.attr)
    return names


def _argument_names(function: Function) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [arguments.kwarg.arg] if arguments.kwarg is not None else []
    return [argument.arg for argument in named] + starred
