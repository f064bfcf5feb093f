# SPDX-License-Identifier: Apache-2.0
"""Parses a plan's YAML, which a stranger may have written: bounded, and with line numbers."""

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vllm_mixprec.errors import PlanError

MAX_FILE_BYTES = 8 << 20
MAX_DEPTH = 32
MAX_SCALARS = 250_000
"""Of one file: PyYAML takes half a kilobyte for each; a mapping of 100,000 modules has 200,000."""
MAX_ALIASED_NODES = 100_000
"""How many nodes the aliases of a file may repeat: far above use, far below a "billion laughs"."""

_SHARD_ENDS = (".safetensors", ".bin")
_NAMED = 3  # files that a message lists

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The same language; libyaml's parser is ten times as fast where PyYAML was built with it."""

Location = tuple[Hashable, ...]
"""Keys and list indices from the document's root: ``("rules", 3, "match")``."""


def load_yaml(file: Path) -> tuple[Any, dict[Location, int]]:
    """Parse one YAML document without running anything in it.

    Returns:
        The data, and the line of each key and list item by its location in the data.
    """
    raw = _read(file)
    lines: dict[Location, int] = {}
    try:
        _check_depth(file, raw)
        loader = _SafeLoader(raw)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, lines
            _NodeCheck(file, lines).visit(node, ())
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        if "nesting depth" in (error.problem or ""):  # libyaml 0.2.6 has a bound of its own
            raise _too_deep(file, line) from error
        raise PlanError(
            f"{file}:{line}: not valid YAML ({error.problem or error.context}). Correct the line."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise PlanError(f"{file}:1: not valid YAML ({reason}). Correct the file.") from error


def has_comments(file: Path) -> bool:
    """Whether a YAML document that was parsed has comments: a # between two of its tokens.

    Raises:
        PlanError: the file cannot be read.
    """
    raw = _read(file)
    text = raw.decode("utf-16" if raw[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig")
    end = 0
    for token in yaml.scan(text, Loader=_SafeLoader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return "#" in text[end:]


def _read(file: Path) -> bytes:
    if file.suffix in _SHARD_ENDS:
        raise PlanError(
            f"{file}: a shard of a checkpoint, expected a plan's YAML file. vllm-mixprec inspect "
            f"{file.parent} shows what its directory holds."
        )
    try:
        with open(file, "rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError as error:
        raise PlanError(
            f"{file}: a directory, expected a plan's YAML file. {_suggest_inside(file)}"
        ) from error
    except OSError as error:
        raise PlanError(
            f"{file}: cannot be read ({error.strerror or error}). Correct the plan's path."
        ) from error
    if len(raw) > MAX_FILE_BYTES:
        raise PlanError(
            f"{file}: larger than {MAX_FILE_BYTES} bytes, expected a plan. Use patterns in "
            "place of one rule for each module."
        )
    return raw


def _suggest_inside(directory: Path) -> str:
    """Say what can be done with a directory that was taken for a plan."""
    plans = sorted(path for end in ("yaml", "yml") for path in directory.glob(f"*.{end}"))
    if plans:
        return f"Name the file: {', '.join(map(str, plans[:_NAMED]))}."
    if (directory / "config.json").is_file():
        return (
            "It looks like a checkpoint: vllm-mixprec inspect shows what it holds, vllm-mixprec "
            "plan writes a plan that takes weights from it."
        )
    return "Correct the plan's path."


def _check_depth(file: Path, raw: bytes) -> None:
    """Bound depth and size before anything recurses: libyaml's composer would overrun the stack."""
    depth = scalars = 0
    for event in yaml.parse(raw, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep(file, event.start_mark.line + 1 if event.start_mark else 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent):
            scalars += 1
            if scalars > MAX_SCALARS:
                raise PlanError(
                    f"{file}:1: more than {MAX_SCALARS} keys and values, expected a plan. Use "
                    "patterns in place of one rule for each module."
                )


def _too_deep(file: Path, line: int) -> PlanError:
    return PlanError(
        f"{file}:{line}: nested more than {MAX_DEPTH} deep, expected a plan. Correct the brackets."
    )


class _NodeCheck:
    """Walks a YAML document: notes lines, refuses duplicate keys and runaway aliases."""

    def __init__(self, file: Path, lines: dict[Location, int]) -> None:
        self.file = file
        self.lines = lines
        self.seen: set[int] = set()
        self.open: set[int] = set()
        self.aliased_nodes = 0

    def visit(self, node: yaml.Node, location: Location) -> None:
        """Visit a node and all below it, as often as aliases repeat them."""
        if isinstance(node, yaml.ScalarNode):
            return
        if id(node) in self.open:
            self._refuse(node, "an alias inside its own anchor, expected no cycle. Remove it")
        if id(node) in self.seen:
            self.aliased_nodes += len(node.value)
            if self.aliased_nodes > MAX_ALIASED_NODES:
                self._refuse(
                    node,
                    f"aliases repeat more than {MAX_ALIASED_NODES} nodes, expected a plan. "
                    "Write the rules out",
                )
        self.seen.add(id(node))
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, location)
        else:
            for i, item in enumerate(node.value):
                self.lines.setdefault((*location, i), item.start_mark.line + 1)
                self.visit(item, (*location, i))
        self.open.remove(id(node))

    def _visit_mapping(self, node: yaml.MappingNode, location: Location) -> None:
        first_lines: dict[tuple[str, str], int] = {}
        merged = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "a key that is a list or a mapping, expected a string")
            first = first_lines.get((key.tag, key.value))
            if first is not None:
                self._refuse(
                    key, f'key "{key.value}" is also in line {first}, expected once. Remove one'
                )
            first_lines[(key.tag, key.value)] = line
            if key.tag == "tag:yaml.org,2002:merge":
                merged.append(value)
                continue
            self.lines[(*location, key.value)] = line
            self.visit(value, (*location, key.value))
        for value in merged:
            mappings = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for mapping in mappings:
                self.visit(mapping, location)

    def _refuse(self, node: yaml.Node, what: str) -> None:
        raise PlanError(f"{self.file}:{node.start_mark.line + 1}: {what}.")
