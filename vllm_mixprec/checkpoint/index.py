# SPDX-License-Identifier: Apache-2.0
"""Finds and opens a checkpoint's directory: config, shards, the modules that their headers hold."""

import difflib
import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from vllm_mixprec.checkpoint.formats import Module, QuantizationConfig
from vllm_mixprec.checkpoint.formats.base import ACTIVATION_SCALES, misfit
from vllm_mixprec.checkpoint.header import DTYPE_BITS, UNREAD_DTYPES, TensorSpec
from vllm_mixprec.checkpoint.json_files import read_config, tensors_by_shard
from vllm_mixprec.checkpoint.parts import read_modules
from vllm_mixprec.checkpoint.shards import SAFETENSORS, TORCH, Container, Shards
from vllm_mixprec.checkpoint.spelling import canonical_name, index_by_key, mark_clashes
from vllm_mixprec.errors import CheckpointError, UnsupportedError

_SIBLINGS = 10_000  # entries of a folder that are looked at for a name that was meant

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, from its headers.

    Attributes:
        name: the source's name in the plan; empty outside of a plan.
        path: its directory.
        config: config.json.
        tensors: tensor name -> spec, shard by shard.
        modules: module name -> module, in the order of the tensors; fused ones by their parts.
        problems: where index and directory disagree: shards that the index names and the
            directory lacks, the reverse, tensors that are not in the shard that the index says.
            The problems of a module are the module's own.
        container: the kind of its shards.
        notes: what is worth knowing about its files, and no problem.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    modules: dict[str, Module]
    problems: tuple[str, ...]
    container: Container = SAFETENSORS
    notes: tuple[str, ...] = ()

    @cached_property
    def by_key(self) -> dict[str, Module]:
        """Canonical name -> module, as ``spelling.canonical_name`` gives it.

        Made when it is asked for: sources mostly spell their modules alike.
        """
        return index_by_key(self.modules.values())

    def find(self, name: str) -> Module | None:
        """Return a module by its name or any other spelling of it, None when it is not here."""
        return self.modules.get(name) or self.by_key.get(canonical_name(name))


def open_checkpoint(path: Path, name: str = "") -> Checkpoint:
    """Read the headers of a checkpoint directory; no tensor data is read.

    Headers that are kept in one file (``checkpoint.shards``) stand for shards that have not changed
    since, and for shards on the hub that are not here.

    With ``model.safetensors.index.json`` the shards are exactly those that it names, else
    ``model.safetensors`` alone, else every ``*.safetensors``. Without any of these PyTorch's files
    are read in the same way: ``pytorch_model.bin.index.json``, ``pytorch_model.bin``.

    Raises:
        CheckpointError: the directory or its config is missing or unreadable, a shard is cut
            short, malformed or dangerous, a tensor occurs in two files, or nothing is left to read.
        UnsupportedError: the weights are in a format or a kind of file that is not known.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: not a directory, expected a checkpoint with config.json and safetensors "
            "files. Correct the source's path."
        )
    config = read_config(path)
    if _is_composed(config):
        raise CheckpointError(
            f"{path}: a directory that compose made, expected a checkpoint's. Name one of its "
            "sources, sources/NAME in it."
        )
    container, notes = _choose_container(path)
    with collector_paused():
        shards = Shards(path, container)
        notes += _note_rewritten(path, shards)
        if (path / container.index).exists():
            tensors, problems = _open_indexed(path, shards)
        else:
            tensors, problems = _open_unindexed(path, shards), []
        modules = _group_modules(path, tensors, config)
    return Checkpoint(name, path, config, tensors, modules, tuple(problems), container, notes)


def _choose_container(path: Path) -> tuple[Container, tuple[str, ...]]:
    """Return the kind of shards to read, and what to know about that choice."""
    torch_files = sorted(file.name for file in path.glob(TORCH.files))
    has_torch = bool(torch_files) or (path / TORCH.index).exists()
    if (path / SAFETENSORS.index).exists() or Shards(path).names():
        if not has_torch:
            return SAFETENSORS, ()
        shown = torch_files[0] if torch_files else TORCH.index
        return SAFETENSORS, (f"{path / shown}: not read, since safetensors files lie beside it",)
    if not has_torch:
        return SAFETENSORS, ()
    return TORCH, (
        f"{path}: its shards are pickles; torch.load reads their tensors with weights_only=True "
        "and runs no code of theirs",
    )


def _note_rewritten(path: Path, shards: Shards) -> tuple[str, ...]:
    if not shards.rewritten:
        return ()
    count, first = len(shards.rewritten), min(shards.rewritten)
    which = first if count == 1 else f"{count} shards, {first} among them"
    return (f"{path}: {which}: copied or written to since their headers were kept, and read anew",)


def resolve_path(path_or_hub_id: str, revision: str | None, base_dir: Path | None) -> Path:
    """Return the directory of a source; of a Hugging Face hub id the one in the hub's cache.

    Of a model on the hub all but its shards are downloaded; of those only the headers, which are
    kept beside the rest. ``hub.fetch`` brings the shards that a plan turns out to use.

    Args:
        path_or_hub_id: a directory, absolute or relative to ``base_dir``; else ``owner/model``.
        revision: branch, tag or commit of a hub id; a directory has none.
        base_dir: the plan's folder; None for the working directory.

    Raises:
        CheckpointError: it is no path, or there is no such directory, and no such model on the hub
            or, under ``HF_HUB_OFFLINE``, in the hub's cache.
    """
    directory = local_path(path_or_hub_id, base_dir)
    if directory.is_dir():
        return directory.resolve()
    if directory.exists():
        raise CheckpointError(
            f"{directory}: a file, expected the directory of a checkpoint. Name the directory that "
            "the file lies in."
        )
    if not _HUB_ID.fullmatch(path_or_hub_id):
        raise CheckpointError(
            f"{directory}: no such directory, and {path_or_hub_id!r} is not a hub id "
            f"(owner/model). {suggest_directories(directory)}Correct the source's path."
        )
    from vllm_mixprec.checkpoint.hub import open_snapshot  # it imports this module

    return open_snapshot(path_or_hub_id, revision, directory)


def local_path(path: str, base_dir: Path | None) -> Path:
    """Return where a source would lie if its path is a directory's, whether one is there or not.

    Raises:
        CheckpointError: no file system has such a path.
    """
    try:
        directory = Path(base_dir or ".") / Path(path).expanduser()
        os.stat(directory)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, "~nobody", a null character
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path!r}: no path of a directory ({reason}). Correct the source's path."
        ) from error
    return directory


def suggest_directories(directory: Path) -> str:
    """Name those beside the first folder of a path that is not there whose names are near its own.

    Returns:
        ``Nearest: /models/Qwen3-FP8. ``, or nothing where none is near.
    """
    while directory.parent != directory and not os.path.isdir(directory.parent):
        directory = directory.parent
    try:
        with os.scandir(directory.parent) as entries:
            names = [entry.name for entry in islice(entries, _SIBLINGS) if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(directory.name, sorted(names))
    paths = ", ".join(str(directory.parent / name) for name in near)
    return f"Nearest: {paths}. " if near else ""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: it would walk 100,000s of live specs many times."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # what somebody froze is to stay so
                gc.freeze()  # all that lives becomes old, so that enabling does not walk it
                gc.unfreeze()
            gc.enable()


def _open_indexed(path: Path, shards: Shards) -> tuple[dict[str, TensorSpec], list[str]]:
    """Read the shards that the index names, and compare them with it."""
    container = shards.container
    index = path / container.index
    expected = tensors_by_shard(index, container)
    present = [shard for shard in expected if shards.has(shard)]
    if not present:
        raise CheckpointError(
            f"{index}: none of its {len(expected)} shards is in the directory, e.g. "
            f"{next(iter(expected), 'none named')}. Download the shards."
        )
    problems = [
        f"{path / shard}: missing, though {container.index} keeps {len(names)} tensors there, e.g. "
        f"{names[0]}. Download the shard."
        for shard, names in expected.items()
        if not shards.has(shard)
    ]
    problems += [
        f"{path / shard}: {container.index} does not name this shard, it is not read. "
        "Remove the file, or download the index again."
        for shard in shards.names()
        if shard not in expected
    ]
    tensors: dict[str, TensorSpec] = {}
    for shard, found in zip(present, shards.read(present), strict=True):
        named = expected[shard]
        if len(found) == len(named) and all(map(found.__contains__, named)):
            tensors.update(found)
            continue
        absent = [name for name in named if name not in found]
        if absent:
            problems.append(
                f"{path / shard}: lacks {len(absent)} tensors that {container.index} keeps there, "
                f"e.g. {absent[0]}. Download the shard and the index again."
            )
        if len(found) + len(absent) > len(named):
            unnamed = found.keys() - set(named)
            problems.append(
                f"{path / shard}: holds {len(unnamed)} tensors that {container.index} does not "
                f"keep there, e.g. {min(unnamed)}; they are not read. Download the index again."
            )
            found = {name: spec for name, spec in found.items() if name not in unnamed}
        tensors.update(found)
    return tensors, problems


def _open_unindexed(path: Path, found_shards: Shards) -> dict[str, TensorSpec]:
    """Read the only shard, or all shards of a directory that has no index."""
    container = found_shards.container
    shards = found_shards.names()
    if container.single in shards:
        shards = [container.single]
    if not shards:
        raise CheckpointError(
            f"{path}: no {container.files} file and no {container.index}, nor {TORCH.files}. "
            "Download the checkpoint again, or correct the source's path."
        )
    tensors: dict[str, TensorSpec] = {}
    for found in found_shards.read(shards):
        twice = tensors.keys() & found.keys()
        if twice:
            example = min(twice)
            raise CheckpointError(
                f"{found[example].file}: {len(twice)} tensors are also in "
                f"{tensors[example].file.name}, e.g. {example}, and no {container.index} says "
                "which count. Remove the file that does not belong here."
            )
        tensors.update(found)
    return tensors


def _group_modules(
    path: Path, tensors: dict[str, TensorSpec], config: dict[str, Any]
) -> dict[str, Module]:
    """Collect the tensors of each module and recognise its format."""
    groups: dict[str, dict[str, TensorSpec]] = {}
    group: dict[str, TensorSpec] = {}
    suffixes: dict[str, str] = {}  # so that equal ones are one object
    last = None
    for tensor, spec in tensors.items():
        module, _, suffix = tensor.rpartition(".")
        if module != last:  # a module's tensors mostly lie together
            last = module
            group = groups.setdefault(module, {})
        group[suffixes.setdefault(suffix, suffix)] = spec
    try:
        quantization = QuantizationConfig.parse(_quantization_config(config))
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{path}{os.sep}{error}") from error  # it begins with config.json
    try:
        modules = mark_clashes(read_modules(groups, quantization, config))
    except CheckpointError as error:
        raise CheckpointError(f"{path}{os.sep}{error}") from error  # it begins with config.json
    if UNREAD_DTYPES.isdisjoint(map(attrgetter("dtype"), tensors.values())):
        return modules
    return {name: _mark_unread(module) for name, module in modules.items()}


def _mark_unread(module: Module) -> Module:
    """Give a sound module a problem for each tensor, such as a bias, of a dtype not read.

    It is an error once the module is served. Scales of activations are not loaded.
    """
    if module.problems:
        return module
    unused = ACTIVATION_SCALES if module.scheme.is_quantized else frozenset()
    expected = f"one of {', '.join(sorted(DTYPE_BITS.keys() - UNREAD_DTYPES))}"
    problems = tuple(
        misfit(spec, expected, "no layer takes another dtype")
        for suffix, spec in module.tensors.items()
        if spec.dtype in UNREAD_DTYPES and suffix not in unused
    )
    return replace(module, problems=problems) if problems else module


def _is_composed(config: dict[str, Any]) -> bool:
    found = _quantization_config(config)
    return isinstance(found, dict) and found.get("quant_method") == "mixprec"


def _quantization_config(config: dict[str, Any]) -> Any:
    """Find ``quantization_config``: multimodal configs keep it beside the language model's.

    Old compressed-tensors checkpoints name it ``compression_config``, as vLLM reads it.
    """
    found = config.get("quantization_config")
    if found is None and isinstance(text_config := config.get("text_config"), dict):
        found = text_config.get("quantization_config")
    return config.get("compression_config") if found is None else found
