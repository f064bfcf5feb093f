# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint's JSON files: its config, and the index that says where each tensor is."""

from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_mixprec.checkpoint.bounded_json import parse_json
from vllm_mixprec.checkpoint.files import open_file
from vllm_mixprec.checkpoint.shards import Container
from vllm_mixprec.checkpoint.usual_json import decode_weight_map
from vllm_mixprec.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
"""Of config.json and of an index; the largest index known, of 92,000 tensors, has 9 MB."""


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, unreadable, or no JSON object.
    """
    file = path / "config.json"
    return _parse_object(file, _read(file))


def tensors_by_shard(index: Path, container: Container) -> dict[str, list[str]]:
    """Read an index: shard file name, sorted -> names of its tensors.

    Raises:
        CheckpointError: it is missing, unreadable or malformed, or names a file elsewhere.
    """
    raw = _read(index)
    weight_map: Any = decode_weight_map(raw)
    if weight_map is None:
        weight_map = _parse_object(index, raw).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: weight_map is {type(weight_map).__name__}, expected an object of tensor "
            "name to shard. Download the index again."
        )
    by_shard: dict[str, list[str]] = {}
    names: list[str] = []
    last = object()  # no name of a shard is equal to it
    for tensor, shard in weight_map.items():
        if shard != last:  # a shard's tensors mostly follow each other
            if type(shard) is not str or not (shard in by_shard or _stays_inside(shard, container)):
                raise CheckpointError(
                    f"{index}: tensor {tensor!r} is in {shard!r}, expected the name of a "
                    f"{container.kind} file in the same directory. Download the index again."
                )
            last = shard
            names = by_shard.setdefault(shard, [])
        names.append(tensor)
    return dict(sorted(by_shard.items()))


def refuse_large_json(file: str | PathLike[str], size_bytes: int) -> None:
    """Refuse a JSON file before it is read.

    Raises:
        CheckpointError: it is larger than any that is meant.
    """
    if size_bytes > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{file}: {size_bytes} bytes, expected at most {MAX_JSON_BYTES}. "
            "Download the file again."
        )


def _stays_inside(shard: str, container: Container) -> bool:
    """Whether a shard's name, which a stranger may have written, stays in its directory."""
    parts = PurePosixPath(shard).parts
    is_relative = not shard.startswith("/")  # of "//x" the first part is "//"
    return shard.endswith(f".{container.kind}") and is_relative and ".." not in parts


def _read(file: Path) -> bytes:
    """Read a JSON file, of a size that can be parsed."""
    try:
        descriptor, stamp = open_file(file)
        with open(descriptor, "rb") as stream:
            refuse_large_json(file, stamp.size_bytes)
            return stream.read(stamp.size_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}), expected a JSON file. "
            "Download the checkpoint again, or correct the source's path."
        ) from error


def _parse_object(file: Path, raw: bytes) -> dict[str, Any]:
    """Parse a JSON file that holds an object."""
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
