# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint directory: config, shards, and the modules that their headers hold."""

import gc
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_mixprec.checkpoint.bounded_json import parse_json
from vllm_mixprec.checkpoint.files import open_file
from vllm_mixprec.checkpoint.formats import Module, QuantizationConfig, recognise
from vllm_mixprec.checkpoint.header import TensorSpec, read_header
from vllm_mixprec.errors import CheckpointError, UnsupportedError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_JSON_BYTES = 64 << 20
"""Of config.json and of an index; the largest index known, of 92,000 tensors, has 9 MB."""

HEADER_THREADS = 16
DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint, from its headers.

    Attributes:
        name: the source's name in the plan; empty outside of a plan.
        path: its directory.
        config: config.json.
        tensors: tensor name -> spec, shard by shard.
        modules: module name -> module, in the order of the tensors.
        problems: where index and directory disagree: shards that the index names and the
            directory lacks, the reverse, tensors that are not in the shard that the index says.
            The problems of a module are the module's own.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    modules: dict[str, Module]
    problems: tuple[str, ...]


def open_checkpoint(path: Path, name: str = "") -> Checkpoint:
    """Read the headers of a checkpoint directory; no tensor data is read.

    With ``model.safetensors.index.json`` the shards are exactly those that it names, else
    ``model.safetensors`` alone, else every ``*.safetensors``.

    Raises:
        CheckpointError: the directory or its config is missing or unreadable, a shard is cut
            short or malformed, a tensor occurs in two files, or nothing is left to read.
        UnsupportedError: the weights are not in safetensors, or in a format that is not known.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: not a directory, expected a checkpoint with config.json and safetensors "
            "files. Correct the source's path."
        )
    config = _read_object(path / "config.json")
    with collector_paused():
        if (path / INDEX_FILE).exists():
            tensors, problems = _open_indexed(path)
        else:
            tensors, problems = _open_unindexed(path), []
        modules = _group_modules(path, tensors, config)
    return Checkpoint(name, path, config, tensors, modules, tuple(problems))


def resolve_path(path_or_hub_id: str, revision: str | None, base_dir: Path | None) -> Path:
    """Return the directory of a source, downloading it when it is a Hugging Face hub id.

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
    if not _HUB_ID.fullmatch(path_or_hub_id):
        raise CheckpointError(
            f"{directory}: no such directory, and {path_or_hub_id!r} is not a hub id "
            "(owner/model). Correct the source's path."
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                path_or_hub_id, revision=revision, allow_patterns=DOWNLOADED_FILES
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path_or_hub_id}: no directory {directory}, and the Hugging Face hub does not give "
            f"it (revision {revision or 'main'}: {reason}). Correct the path, or download the "
            "model first."
        ) from error


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


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: it would walk 100,000s of live specs many times."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        descriptor, stamp = open_file(file)
        with open(descriptor, "rb") as stream:
            if stamp.size_bytes > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{file}: {stamp.size_bytes} bytes, expected at most {MAX_JSON_BYTES}. "
                    "Download the file again."
                )
            raw = stream.read(stamp.size_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}), expected a JSON file. "
            "Download the checkpoint again, or correct the source's path."
        ) from error
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: not valid JSON ({error}). Download the file again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: a JSON {type(content).__name__}, expected an object. Download the file again."
        )
    return content


def _open_indexed(path: Path) -> tuple[dict[str, TensorSpec], list[str]]:
    """Read the shards that the index names, and compare them with it."""
    index = path / INDEX_FILE
    expected = _tensors_by_shard(index)
    present = [shard for shard in expected if os.path.exists(path / shard)]
    if not present:
        raise CheckpointError(
            f"{index}: none of its {len(expected)} shards is in the directory, e.g. "
            f"{next(iter(expected), 'none named')}. Download the shards."
        )
    problems = [
        f"{path / shard}: missing, though {INDEX_FILE} keeps {len(names)} tensors there, e.g. "
        f"{names[0]}. Download the shard."
        for shard, names in expected.items()
        if shard not in present
    ]
    problems += [
        f"{path / shard}: {INDEX_FILE} does not name this shard, it is not read. "
        "Remove the file, or download the index again."
        for shard in sorted(file.name for file in path.glob("*.safetensors"))
        if shard not in expected
    ]
    tensors: dict[str, TensorSpec] = {}
    for shard, found in zip(present, _read_headers(path, present), strict=True):
        named = expected[shard]
        absent = [name for name in named if name not in found]
        if absent:
            problems.append(
                f"{path / shard}: lacks {len(absent)} tensors that {INDEX_FILE} keeps there, "
                f"e.g. {absent[0]}. Download the shard and the index again."
            )
        if len(found) + len(absent) > len(named):
            unnamed = found.keys() - set(named)
            problems.append(
                f"{path / shard}: holds {len(unnamed)} tensors that {INDEX_FILE} does not keep "
                f"there, e.g. {min(unnamed)}; they are not read. Download the index again."
            )
            found = {name: spec for name, spec in found.items() if name not in unnamed}
        tensors.update(found)
    return tensors, problems


def _tensors_by_shard(index: Path) -> dict[str, list[str]]:
    """Read an index: shard file name, sorted -> names of its tensors."""
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: weight_map is {type(weight_map).__name__}, expected an object of tensor "
            "name to shard. Download the index again."
        )
    by_shard: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        names = by_shard.get(shard) if type(shard) is str else None
        if names is None:
            if type(shard) is not str or not _stays_inside(shard):
                raise CheckpointError(
                    f"{index}: tensor {tensor!r} is in {shard!r}, expected the name of a "
                    "safetensors file in the same directory. Download the index again."
                )
            names = by_shard[shard] = []
        names.append(tensor)
    return dict(sorted(by_shard.items()))


def _stays_inside(shard: str) -> bool:
    """Whether a shard's name, which a stranger may have written, stays in its directory."""
    parts = PurePosixPath(shard).parts
    return shard.endswith(".safetensors") and parts[0] != "/" and ".." not in parts


def _open_unindexed(path: Path) -> dict[str, TensorSpec]:
    """Read the only shard, or all shards of a directory that has no index."""
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE_FILE in shards:
        shards = [SINGLE_FILE]
    if not shards:
        if any(path.glob("*.bin")):
            raise UnsupportedError(
                f"{path}: only PyTorch .bin weights, which are not supported yet; expected "
                "*.safetensors. Convert the checkpoint, or choose another source."
            )
        raise CheckpointError(
            f"{path}: no *.safetensors file and no {INDEX_FILE}. Download the checkpoint again, "
            "or correct the source's path."
        )
    tensors: dict[str, TensorSpec] = {}
    for found in _read_headers(path, shards):
        twice = tensors.keys() & found.keys()
        if twice:
            example = min(twice)
            raise CheckpointError(
                f"{found[example].file}: {len(twice)} tensors are also in "
                f"{tensors[example].file.name}, e.g. {example}, and no {INDEX_FILE} says which "
                "count. Remove the file that does not belong here."
            )
        tensors.update(found)
    return tensors


def _read_headers(path: Path, shards: list[str]) -> list[dict[str, TensorSpec]]:
    files = [path / shard for shard in shards]
    if len(files) == 1:
        return [read_header(files[0])]
    threads = min(HEADER_THREADS, len(files), 4 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(read_header, files))


def _group_modules(
    path: Path, tensors: dict[str, TensorSpec], config: dict[str, Any]
) -> dict[str, Module]:
    """Collect the tensors of each module and recognise its format."""
    groups: dict[str, dict[str, TensorSpec]] = {}
    for tensor, spec in tensors.items():
        module, _, suffix = tensor.rpartition(".")
        group = groups.get(module)
        if group is None:
            group = groups[module] = {}
        group[suffix] = spec
    try:
        quantization = QuantizationConfig.parse(_quantization_config(config))
        return {module: recognise(module, group, quantization) for module, group in groups.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}{os.sep}{error}") from error  # it begins with config.json


def _quantization_config(config: dict[str, Any]) -> Any:
    """Find ``quantization_config``: multimodal configs keep it beside the language model's.

    Old compressed-tensors checkpoints name it ``compression_config``, as vLLM reads it.
    """
    found = config.get("quantization_config")
    if found is None and isinstance(text_config := config.get("text_config"), dict):
        found = text_config.get("quantization_config")
    return config.get("compression_config") if found is None else found
