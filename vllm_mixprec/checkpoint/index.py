# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint directory: config, shards, and the modules that their headers hold."""

import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_mixprec.checkpoint.formats import Module, QuantizationConfig, recognise
from vllm_mixprec.checkpoint.header import TensorSpec, read_header
from vllm_mixprec.checkpoint.torch_file import read_torch_header
from vllm_mixprec.errors import CheckpointError

HEADER_THREADS = 16
TORCH_FILES = "pytorch_model*.bin"
DOWNLOADED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Container:
    """One kind of shards.

    Attributes:
        index: name of the file that says which shard holds a tensor.
        single: name of the shard that needs no index.
        files: pattern of all shards.
        read: the specs of one shard.
    """

    index: str
    single: str
    files: str
    read: Callable[[Path], dict[str, TensorSpec]]

    @property
    def kind(self) -> str:
        """What the names of its files end in, "safetensors" or "bin"."""
        return self.single.rpartition(".")[2]


SAFETENSORS = Container(
    "model.safetensors.index.json", "model.safetensors", "*.safetensors", read_header
)
TORCH = Container(
    "pytorch_model.bin.index.json", "pytorch_model.bin", TORCH_FILES, read_torch_header
)


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


def open_checkpoint(path: Path, name: str = "") -> Checkpoint:
    """Read the headers of a checkpoint directory; no tensor data is read.

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
    config = _read_object(path / "config.json")
    container, notes = _choose_container(path)
    with collector_paused():
        if (path / container.index).exists():
            tensors, problems = _open_indexed(path, container)
        else:
            tensors, problems = _open_unindexed(path, container), []
        modules = _group_modules(path, tensors, config)
    return Checkpoint(name, path, config, tensors, modules, tuple(problems), container, notes)


def _choose_container(path: Path) -> tuple[Container, tuple[str, ...]]:
    """Return the kind of shards to read, and what to know about that choice."""
    torch_files = sorted(file.name for file in path.glob(TORCH_FILES))
    has_torch = bool(torch_files) or (path / TORCH.index).exists()
    if (path / SAFETENSORS.index).exists() or any(path.glob(SAFETENSORS.files)):
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


def resolve_path(path_or_hub_id: str, revision: str | None, base_dir: Path | None) -> Path:
    """Return the directory of a source, downloading it when it is a Hugging Face hub id.

    Args:
        path_or_hub_id: a directory, absolute or relative to ``base_dir``; else ``owner/model``.
        revision: branch, tag or commit of a hub id; a directory has none.
        base_dir: the plan's folder; None for the working directory.

    Raises:
        CheckpointError: there is no such directory, and no such model on the hub or, under
            ``HF_HUB_OFFLINE``, in the hub's cache.
    """
    directory = Path(base_dir or ".") / Path(path_or_hub_id).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if not _HUB_ID.fullmatch(path_or_hub_id):
        raise CheckpointError(
            f"{directory}: no such directory, and {path_or_hub_id!r} is not a hub id "
            "(owner/model). Correct the source's path."
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                path_or_hub_id, revision=revision, allow_patterns=patterns
            )
        )

    try:
        directory = download(DOWNLOADED_FILES)
        if any(directory.glob(SAFETENSORS.files)):
            return directory
        return download([*DOWNLOADED_FILES, TORCH_FILES])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path_or_hub_id}: no directory {directory}, and the Hugging Face hub does not give "
            f"it (revision {revision or 'main'}: {reason}). Correct the path, or download the "
            "model first."
        ) from error


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
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}), expected a JSON file. "
            "Download the checkpoint again, or correct the source's path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not valid JSON ({error}). Download the file again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: a JSON {type(content).__name__}, expected an object. Download the file again."
        )
    return content


def _open_indexed(path: Path, container: Container) -> tuple[dict[str, TensorSpec], list[str]]:
    """Read the shards that the index names, and compare them with it."""
    index = path / container.index
    expected = _tensors_by_shard(index, container)
    present = [shard for shard in expected if (path / shard).exists()]
    if not present:
        raise CheckpointError(
            f"{index}: none of its {len(expected)} shards is in the directory, e.g. "
            f"{next(iter(expected), 'none named')}. Download the shards."
        )
    problems = [
        f"{path / shard}: missing, though {container.index} keeps {len(names)} tensors there, e.g. "
        f"{names[0]}. Download the shard."
        for shard, names in expected.items()
        if shard not in present
    ]
    problems += [
        f"{path / shard}: {container.index} does not name this shard, it is not read. "
        "Remove the file, or download the index again."
        for shard in sorted(file.name for file in path.glob(container.files))
        if shard not in expected
    ]
    tensors: dict[str, TensorSpec] = {}
    for shard, found in zip(present, _read_headers(path, present, container), strict=True):
        named = expected[shard]
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


def _tensors_by_shard(index: Path, container: Container) -> dict[str, list[str]]:
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
            if type(shard) is not str or not _stays_inside(shard, container):
                raise CheckpointError(
                    f"{index}: tensor {tensor!r} is in {shard!r}, expected the name of a "
                    f"{container.kind} file in the same directory. Download the index again."
                )
            names = by_shard[shard] = []
        names.append(tensor)
    return dict(sorted(by_shard.items()))


def _stays_inside(shard: str, container: Container) -> bool:
    """Whether a shard's name, which a stranger may have written, stays in its directory."""
    parts = PurePosixPath(shard).parts
    return shard.endswith(f".{container.kind}") and parts[0] != "/" and ".." not in parts


def _open_unindexed(path: Path, container: Container) -> dict[str, TensorSpec]:
    """Read the only shard, or all shards of a directory that has no index."""
    shards = sorted(file.name for file in path.glob(container.files))
    if container.single in shards:
        shards = [container.single]
    if not shards:
        raise CheckpointError(
            f"{path}: no {container.files} file and no {container.index}, nor {TORCH_FILES}. "
            "Download the checkpoint again, or correct the source's path."
        )
    tensors: dict[str, TensorSpec] = {}
    for found in _read_headers(path, shards, container):
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


def _read_headers(
    path: Path, shards: list[str], container: Container
) -> list[dict[str, TensorSpec]]:
    files = [path / shard for shard in shards]
    if len(files) == 1:
        return [container.read(files[0])]
    threads = min(HEADER_THREADS, len(files), 4 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(container.read, files))


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
