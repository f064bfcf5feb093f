# SPDX-License-Identifier: Apache-2.0
"""The plan: which source each module comes from. Reads it, checks it, writes it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan.older import read_older
from vllm_mixprec.plan.patterns import Pattern, compile_pattern
from vllm_mixprec.plan.problems import Where, choices, join, show
from vllm_mixprec.plan.yaml_file import Location, load_yaml

_SHAPE = "version:, base:, sources: and rules:"

# A path or a revision: no null character, no line break.
_Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]

# A name becomes a folder of a composed model.
_SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(_Schema):
    """A checkpoint: a directory, or a Hugging Face hub id with an optional revision."""

    path: _Line
    revision: _Line | None = None

    _line: int | None = PrivateAttr(default=None)

    @property
    def line(self) -> int | None:
        """The source's line in the plan's file, from 1; None for a plan that has no file."""
        return self._line


class Options(_Schema):
    """What to do where formats, kernels or a source's weights do not fit."""

    mixed_fused: Literal["widen", "error"] = "widen"
    missing_kernel: Literal["dequantize", "error"] = "dequantize"
    weights_differ: Literal["warn", "error"] = "warn"

    @model_serializer(mode="wrap")
    def _leave_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans had no ``weights_differ`` when composed directories kept their hashes."""
        content: dict[str, Any] = serialize(self)
        if self.weights_differ == "warn":
            content.pop("weights_differ", None)
        return content


class Rule(_Schema):
    """Sends the modules that ``match`` matches to ``source``."""

    match: str
    source: str

    _line: int | None = PrivateAttr(default=None)
    _matches: Pattern = PrivateAttr()

    @property
    def line(self) -> int | None:
        """The rule's line in the plan's file, from 1; None for a plan that has no file."""
        return self._line

    @property
    def matches(self) -> Pattern:
        """Tells whether the rule matches a module, by its name in the base checkpoint."""
        return self._matches

    def model_post_init(self, context: Any, /) -> None:
        """Compile the pattern once; a malformed one is a PlanError."""
        self._matches = compile_pattern(self.match)


class Plan(_Schema):
    """A frozen plan. Rules are read from the top and the first match wins.

    ``weight_mapping:`` in the file has become ``rules``, an older spelling this one.
    """

    version: int = Field(ge=1, le=1)
    base: str
    sources: dict[_SourceName, Source] = Field(min_length=1)
    rules: list[Rule] = []
    options: Options = Options()

    _path: Path | None = PrivateAttr(default=None)
    _base_dir: Path | None = PrivateAttr(default=None)
    _dropped: tuple[str, ...] | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path | None:
        """The file that the plan was read from, absolute; None for a plan from a dict."""
        return self._path

    @property
    def base_dir(self) -> Path | None:
        """The folder that relative source paths start from; None for the working directory."""
        return self._base_dir

    @property
    def dropped(self) -> tuple[str, ...] | None:
        """Of a file in an older spelling the keys that are no part of a plan; None of another."""
        return self._dropped

    @property
    def sha256(self) -> str:
        """Hex digest of the content; comments, layout and the order of sources do not count."""
        content = json.dumps(self._content(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Plan":
        """Read a plan; relative source paths will start from its folder.

        Raises:
            PlanError: the file cannot be read, is no YAML, or is no plan; every line of the
                message begins with ``file:line``.
        """
        file = Path(path)
        data, lines = load_yaml(file)
        file = file.absolute()
        return _build(cls, data, Where(str(path), lines), file, file.parent)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], base_dir: str | Path | None = None) -> "Plan":
        """Build a plan from the same structure as the YAML has.

        Raises:
            PlanError: it is no plan; the message says which key.
        """
        folder = None if base_dir is None else Path(base_dir)
        return _build(cls, d, Where(None, {}), None, folder)

    def to_yaml(self) -> str:
        """Write the plan as YAML. Relative source paths stay as they are."""
        text: str = yaml.safe_dump(
            self._content(),
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
            width=100_000,
        )
        return text

    def _content(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


def _build(
    cls: type[Plan], data: Any, where: Where, path: Path | None, base_dir: Path | None
) -> Plan:
    """Validate, then connect: every error of one stage is reported at once."""
    if not isinstance(data, Mapping):
        found = "nothing" if data is None else show(data)
        raise PlanError(
            f"{where(())}: found {found}, expected a mapping with {_SHAPE}. Write them, or "
            "have vllm-mixprec plan write them."
        )
    older = read_older(data, where)
    if older is not None:
        data, dropped = older
    data, rule_locations = _mapping_to_rules(data, where)
    try:
        plan = cls.model_validate(data)
    except ValidationError as error:
        raise PlanError(join(_explain(e, where) for e in error.errors())) from None
    except PlanError:
        raise PlanError(join(_explain_patterns(data, rule_locations, where))) from None
    if where.file is not None:
        for name, source in plan.sources.items():
            source._line = where.line(("sources", name))
        for rule, location in zip(plan.rules, rule_locations, strict=True):
            rule._line = where.line(location)
    problems = join(_unknown_sources(plan, rule_locations, where))
    if problems:
        raise PlanError(problems)
    plan._path, plan._base_dir = path, base_dir
    plan._dropped = None if older is None else tuple(dropped)
    return plan


def _mapping_to_rules(
    data: Mapping[str, Any], where: Where
) -> tuple[Mapping[str, Any], list[Location]]:
    """Turn ``weight_mapping`` into rules; also return where each rule was written."""
    if "weight_mapping" not in data:
        rules = data.get("rules")
        return data, [("rules", i) for i in range(len(rules) if isinstance(rules, list) else 0)]
    mapping = data["weight_mapping"]
    if "rules" in data:
        raise PlanError(
            f"{where(('weight_mapping',))}: found beside rules:, expected one of the two. "
            "Move its entries into rules:."
        )
    if not isinstance(mapping, Mapping):
        raise PlanError(
            f"{where(('weight_mapping',))}: found {show(mapping)}, expected a mapping of module "
            "or pattern to source. For a list use rules:."
        )
    problems = join(
        f"{where(('weight_mapping', match))}: found {show(match)}: {show(source)}, expected a "
        "pattern and the name of a source, both strings. Quote them."
        for match, source in mapping.items()
        if not (isinstance(match, str) and isinstance(source, str))
    )
    if problems:
        raise PlanError(problems)
    data = {key: value for key, value in data.items() if key != "weight_mapping"}
    data["rules"] = [{"match": match, "source": source} for match, source in mapping.items()]
    return data, [("weight_mapping", match) for match in mapping]


def _explain_patterns(
    data: Mapping[str, Any], locations: list[Location], where: Where
) -> Iterator[str]:
    """Say what is wrong with each malformed pattern."""
    for rule, location in zip(data["rules"], locations, strict=True):
        match = rule.get("match") if isinstance(rule, Mapping) else None
        if isinstance(match, str):
            try:
                compile_pattern(match)
            except PlanError as error:
                yield f"{where(location)}: {error}"


def _unknown_sources(plan: Plan, locations: list[Location], where: Where) -> Iterator[str]:
    """Say which rules, or the base, name a source that is not there."""
    named: list[tuple[str, Location]] = [(plan.base, ("base",))]
    named += [(rule.source, location) for rule, location in zip(plan.rules, locations, strict=True)]
    return (
        f"{where(location)}: source {show(name)} is not among the sources, expected "
        f"{choices(name, plan.sources)}"
        for name, location in named
        if name not in plan.sources
    )


def _explain(error: Any, where: Where) -> str:
    """Turn one error of pydantic into where, found, expected, remedy."""
    location: Location = error["loc"]
    found = show(error["input"])
    if location[-1:] == ("[key]",):
        key = (*location[:-2], str(location[-2]))
        return (
            f"{where(key)}: found the name {found}, expected a string of letters, digits "
            'and "_", "." or "-" inside. Rename the source.'
        )
    match error["type"]:
        case "missing":
            keys = ", ".join(_keys(location))
            return f"{where(location[:-1])}: no key {show(location[-1])}, expected {keys}. Add it."
        case "extra_forbidden":
            known = choices(location[-1], _keys(location))
            return f"{where(location)}: unknown key, expected {known}"
        case "literal_error":
            expected = error["ctx"]["expected"]
            return f"{where(location)}: found {found}, expected {expected}. Correct it."
        case "int_type" | "greater_than_equal" | "less_than_equal":
            return (
                f"{where(location)}: found {found}, expected 1, the version that is read here. "
                "Write version: 1."
            )
        case "string_pattern_mismatch":
            return f"{where(location)}: found {found}, expected text in one line. Correct it."
        case "string_type":
            return f"{where(location)}: found {found}, expected a string. Quote it."
        case "model_type" | "model_attributes_type" | "dict_type" | "list_type":
            kind = "a list" if error["type"] == "list_type" else "a mapping"
            keys = "" if len(location) == 1 else f" with {', '.join(_keys((*location, '')))}"
            is_empty = error["input"] is None and location in (("rules",), ("options",))
            remedy = "Remove the empty key." if is_empty else "Correct it."
            return f"{where(location)}: found {found}, expected {kind}{keys}. {remedy}"
        case _:
            return f"{where(location)}: found {found}: {error['msg']}. Correct it."


def _keys(location: Location) -> list[str]:
    """Return the keys that the mapping has in which ``location`` names a key."""
    match location[:-1]:
        case ():
            return [*Plan.model_fields, "weight_mapping"]  # read in place of rules
        case ("sources", _):
            return list(Source.model_fields)
        case ("rules", _):
            return list(Rule.model_fields)
        case _:
            return list(Options.model_fields)
