# SPDX-License-Identifier: Apache-2.0
"""Writes a directory that vLLM serves as it is: config, plan, and links to the shards in use."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from vllm_mixprec.checkpoint.hub import fetch
from vllm_mixprec.checkpoint.index import Checkpoint, local_path
from vllm_mixprec.checkpoint.json_files import read_config
from vllm_mixprec.checkpoint.shards import SAFETENSORS, Shards, keep_headers
from vllm_mixprec.errors import CheckpointError, MixPrecError, RouteError
from vllm_mixprec.plan.plan import Plan
from vllm_mixprec.routing.check import Report, examine
from vllm_mixprec.routing.platform import Platform
from vllm_mixprec.routing.table import RouteTable

__all__ = [
    "PLAN_FILE",
    "QUANT_METHOD",
    "SOURCES_FOLDER",
    "ComposeRefused",
    "compose",
    "composed_plan",
    "composed_quantization",
    "plan_change",
]

PLAN_FILE = "mixprec_plan.yaml"
SOURCES_FOLDER = "sources"
QUANT_METHOD = "mixprec"

# What a model directory holds beside its weights and config.json. A quantizer's own config
# (quantize_config.json, hf_quant_config.json) must stay behind: vLLM would read it.
COPIED_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "*.jinja",
    "*preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "LICENSE*",
    "additional_chat_templates/*",
)
MAX_COPIED_BYTES = 1 << 30
"""Of one such file. Tokenizers take tens of megabytes; a sparse file could fill the disk."""

_SHOWN_ERRORS = 20


class ComposeRefused(RouteError):
    """``check`` found errors, so nothing was written; ``report`` holds every finding."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def compose(
    plan: Plan,
    out: str | os.PathLike[str],
    force: bool = False,
    platform: Platform | None = None,
) -> Report:
    """Write a mixed model to ``out``; tensor data is linked, never copied.

    ::

        out/config.json            the base's, with our quantization_config
        out/mixprec_plan.yaml      the plan, its sources those below
        out/tokenizer.json ...     copied from the base
        out/sources/NAME/          config.json, the index, headers, links to the shards in use

    Of a base in a directory every shard is linked. Of one on the hub the shards that no tensor
    comes from are not downloaded, and their headers, which name the modules, stand for them. So
    it is with a source that gives nothing but that a rule names for modules that it lacks.
    The directory is built beside ``out`` and swapped in when it is complete.

    Args:
        force: also replace a directory that is not empty and that compose did not make.
        platform: where it will be served; None for this machine.

    Returns:
        The report of ``check``, which has no errors.

    Raises:
        ComposeRefused: the plan has errors.
        MixPrecError: ``out`` holds something else, the plan, a source or the working directory;
            or it cannot be written.
    """
    with _writing(Path(out)):
        target = Path(os.path.abspath(out))
        _require_replaceable(target, plan, force)
    report, checkpoints = examine(plan, platform=platform)
    if report.table is None:
        raise ComposeRefused(_summarise(report), report)
    shards = _shards_in_use(report.table, checkpoints)
    for files in shards.values():
        _require_outside(target, "a shard that the plan uses", files)
    fetch(file for files in report.table.shards_by_source().values() for file in files)

    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(
            tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".tmp", dir=target.parent)
        )
        try:
            building.chmod(0o755)
            _write(building, plan, checkpoints, shards)
            _swap(building, target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return report


def composed_plan(directory: Path) -> Path | None:
    """Return the plan of a directory that compose made; None of any other path."""
    quantization = composed_quantization(directory)
    return None if quantization is None else directory / str(quantization.get("plan", PLAN_FILE))


def composed_quantization(directory: Path) -> dict[str, Any] | None:
    """Return ``quantization_config`` of a directory that compose made; None of any other path."""
    try:
        quantization: dict[str, Any] = read_config(directory)["quantization_config"]
        return quantization if quantization["quant_method"] == QUANT_METHOD else None
    except (CheckpointError, KeyError, TypeError):
        return None  # whoever opens it as something else says what is wrong


def plan_change(plan: Plan, quantization: Mapping[str, Any]) -> str | None:
    """Say that a composed directory's plan is not the one compose wrote there; None if it is.

    A plan that was cut short between two rules is a plan, too.

    Args:
        quantization: ``quantization_config`` of the directory's config.json.
    """
    composed = quantization.get("plan_sha256")
    if composed in (None, plan.sha256):
        return None
    return (
        f"SHA-256 of its content is {plan.sha256}, expected {composed}, which config.json has of "
        "the plan that was composed: it was edited or cut short. Compose the directory again."
    )


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into a MixPrecError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and error.filename != str(target):
            reason += f": {error.filename}"
        raise MixPrecError(
            f"{target}: cannot be written ({reason}), expected a directory that can. Choose "
            "another."
        ) from error


def _require_replaceable(target: Path, plan: Plan, force: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise MixPrecError(
            f"{target}: a link or a file, expected a directory or nothing. Choose another "
            "directory."
        )
    if not target.exists():
        return
    own = composed_plan(target)
    _require_apart(target, plan, own)
    if any(target.iterdir()) and (own is None or not own.is_file()) and not force:
        raise MixPrecError(
            f"{target}: not empty, and without a config.json and a plan of compose, so that it did "
            "not make it; expected an empty directory or one made by compose. Choose another, or "
            "pass --force."
        )


def _require_apart(target: Path, plan: Plan, own: Path | None) -> None:
    """Refuse to replace the directory that somebody works in, or that the plan or a source is in.

    A composed directory's ``own`` plan can be composed in place: its sources are links.
    """
    with suppress(FileNotFoundError):  # the working directory itself may have been removed
        _require_outside(target, "the working directory", [Path.cwd()])
    linked = None
    if plan.path is not None:
        if own is not None and os.path.realpath(own) == os.path.realpath(plan.path):
            linked = Path(os.path.realpath(target)) / SOURCES_FOLDER
        else:
            _require_outside(target, "the plan", [plan.path])
    for name, source in plan.sources.items():
        with suppress(CheckpointError):  # no path at all; the check reports it
            directory = Path(os.path.realpath(local_path(source.path, plan.base_dir)))
            if os.path.exists(directory) and not (linked and directory.is_relative_to(linked)):
                _require_outside(target, f"source {name!r}", [directory])


def _summarise(report: Report) -> str:
    errors = [finding for finding in report.findings if finding.level == "error"]
    lines = [f"{finding.where}: {finding.message}" for finding in errors[:_SHOWN_ERRORS]]
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"... and {len(errors) - _SHOWN_ERRORS} more; see vllm-mixprec check")
    return "nothing was composed, the plan has errors:\n" + "\n".join(lines)


def _shards_in_use(
    table: RouteTable, checkpoints: Mapping[str, Checkpoint]
) -> dict[str, tuple[Path, ...]]:
    """Return source -> shard files, in the source's directory, sorted."""
    used = table.shards_by_source()
    base = checkpoints[table.plan.base]
    for name in {base.name} | _lacking_sources(table, base, used):
        specs = checkpoints[name].tensors.values()
        used[name] = tuple(sorted({spec.file for spec in specs}))
    return {name: used[name] for name in checkpoints if name in used}


def _lacking_sources(table: RouteTable, base: Checkpoint, used: Container[str]) -> set[str]:
    """Return sources, not used, whose rules win for modules that they lack and nothing loads.

    Such as a draft's. Without these rules the modules would come from elsewhere in silence.
    """
    if all(rule.source in used for rule in table.plan.rules):
        return set()
    absent = [module for name, module in base.modules.items() if name not in table.routes]
    winners = {
        next(
            (
                rule.source
                for rule in table.plan.rules
                if rule.matches(module.name) or (module.fused and rule.matches(module.fused))
            ),
            base.name,
        )
        for module in absent
    }
    return {name for name in winners if name not in used}


def _require_outside(target: Path, what: str, paths: Iterable[Path]) -> None:
    """Refuse to replace a directory that is one of the paths, or in which one lies."""
    inside = os.path.realpath(target)
    for path in paths:
        if Path(os.path.realpath(path)).is_relative_to(inside):
            raise MixPrecError(
                f"{path}: {what}, expected outside of {target}, which would be replaced. Choose "
                "another output directory."
            )


def _write(
    building: Path,
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    shards: Mapping[str, tuple[Path, ...]],
) -> None:
    for name, files in shards.items():
        _write_source(building / SOURCES_FOLDER / name, checkpoints[name], files)
    composed = _rewrite_plan(plan, shards)
    base = checkpoints[plan.base]
    _copy_files(base.path, building, building / SOURCES_FOLDER / plan.base)
    (building / PLAN_FILE).write_text(composed.to_yaml(), encoding="utf-8")
    _write_json(building / "config.json", _compose_config(base.config, composed))


def _write_source(folder: Path, checkpoint: Checkpoint, files: tuple[Path, ...]) -> None:
    folder.mkdir(parents=True)
    shutil.copyfile(checkpoint.path / "config.json", folder / "config.json")
    names = {file.relative_to(checkpoint.path).as_posix(): file for file in files}
    for name, file in names.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            link.symlink_to(file.resolve())
    if checkpoint.container is SAFETENSORS:
        headers = Shards(checkpoint.path).headers(list(names))
        keep_headers(folder, dict(zip(names, headers, strict=True)))
    index_file = checkpoint.path / checkpoint.container.index
    if index_file.is_file():
        index = json.loads(index_file.read_bytes())
        index["weight_map"] = {
            tensor: shard for tensor, shard in index["weight_map"].items() if shard in names
        }
        _write_json(folder / index_file.name, index)


def _rewrite_plan(plan: Plan, used: Container[str]) -> Plan:
    """Return the plan with its sources in ``sources/``; those that are not used are left out.

    Their rules go with them: others above take all that these match.
    """
    return Plan.from_dict(
        {
            "version": plan.version,
            "base": plan.base,
            "sources": {
                name: {"path": f"{SOURCES_FOLDER}/{name}"} for name in plan.sources if name in used
            },
            "rules": [
                {"match": rule.match, "source": rule.source}
                for rule in plan.rules
                if rule.source in used
            ],
            "options": plan.options.model_dump(),
        }
    )


def _copy_files(base: Path, building: Path, base_folder: Path) -> None:
    """Copy the base's tokenizer and other small files, and link them into its source folder.

    The links keep ``sources/BASE`` a whole checkpoint, of which another model can be composed.
    """
    found = {file for pattern in COPIED_FILES for file in base.glob(pattern) if file.is_file()}
    for file in sorted(found):
        size_bytes = file.stat().st_size
        if size_bytes > MAX_COPIED_BYTES:
            raise CheckpointError(
                f"{file}: {size_bytes} bytes, expected at most {MAX_COPIED_BYTES} of a file that "
                "is copied. Download the file again."
            )
        name = file.relative_to(base)
        copy, link = building / name, base_folder / name
        copy.parent.mkdir(exist_ok=True)
        link.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
        link.symlink_to(os.path.relpath(copy, link.parent))


def _compose_config(base_config: Mapping[str, Any], composed: Plan) -> dict[str, Any]:
    config = _without_quantization(base_config)
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = _without_quantization(text)
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "plan": PLAN_FILE,
        "plan_sha256": composed.sha256,
    }
    return config


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("quantization_config", "compression_config")
    return {key: value for key, value in config.items() if key not in left_out}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    # json.dumps with an indent takes a second for an index of 90,000 tensors, in Python.
    text = msgspec.json.format(json.dumps(content, ensure_ascii=False), indent=2)
    file.write_text(text + "\n", encoding="utf-8")


def _swap(building: Path, target: Path) -> None:
    """Put the finished directory in its place; what stood there is removed last."""
    if not target.exists():
        building.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old)
    try:
        building.rename(target)
    except OSError:
        old.rename(target)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise MixPrecError(
            f"{old}: what stood in {target} before cannot be removed "
            f"({error.strerror or error}); the new directory is in place. Remove it yourself."
        ) from error
