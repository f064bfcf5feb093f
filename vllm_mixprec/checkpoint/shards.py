# SPDX-License-Identifier: Apache-2.0
"""The shards of a directory, and their headers: read from them, or kept in one file beside them.

``compose`` keeps headers, so that each of many workers opens one file rather than hundreds, and
shards that no tensor comes from need not be there; so does the hub's reader, for shards that were
not downloaded. For each shard the file holds a line of JSON, then the header as it is in the shard,
then a newline.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_mixprec.checkpoint.bounded_json import parse_json
from vllm_mixprec.checkpoint.files import open_file, stamp_of
from vllm_mixprec.checkpoint.header import (
    MAX_HEADER_BYTES,
    Kinds,
    RawHeader,
    TensorSpec,
    parse_header,
    read_raw,
)
from vllm_mixprec.checkpoint.torch_file import read_torch_header
from vllm_mixprec.errors import CheckpointError

HEADERS_FILE = "mixprec_headers"
HEADER_THREADS = 16
_LINE_BYTES = 64 << 10  # more than any that keep_headers writes: a path has at most 4 KiB


@dataclass(frozen=True, slots=True)
class Container:
    """One kind of shards.

    Attributes:
        index: name of the file that says which shard holds a tensor.
        single: name of the shard that needs no index.
        files: pattern of all shards.
    """

    index: str
    single: str
    files: str

    @property
    def kind(self) -> str:
        """What the names of its files end in, "safetensors" or "bin"."""
        return self.single.rpartition(".")[2]


SAFETENSORS = Container("model.safetensors.index.json", "model.safetensors", "*.safetensors")
TORCH = Container("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin")


class Shards:
    """The shards of one directory, with those on the hub that are not here.

    Attributes:
        rewritten: names of those that are not as they were when their headers were kept.
    """

    def __init__(self, path: Path, container: Container = SAFETENSORS) -> None:
        """Look which headers are kept and still stand for their shards.

        Raises:
            CheckpointError: the file of kept headers is unreadable or damaged.
        """
        self.container = container
        self._path = path
        self._kept: dict[str, RawHeader] = {}
        self.rewritten: list[str] = []
        for shard, kept in (kept_headers(path) if container is SAFETENSORS else {}).items():
            header = _current(path / shard, kept)
            if header is not None:
                self._kept[shard] = header
            elif self.has(shard):
                self.rewritten.append(shard)

    def names(self) -> list[str]:
        """Return the names of those in the directory itself, sorted."""
        kept = {shard for shard in self._kept if "/" not in shard}
        return sorted(kept.union(file.name for file in self._path.glob(self.container.files)))

    def has(self, shard: str) -> bool:
        """Whether a shard's header can be had."""
        # os.path.exists, which says no to what is no path at all.
        return shard in self._kept or os.path.exists(self._path / shard)

    def headers(self, shards: Sequence[str]) -> Iterator[RawHeader]:
        """Yield the header of each shard, read in threads.

        Raises:
            CheckpointError: a shard cannot be read, or is too short for its header.
        """
        with ThreadPoolExecutor(min(HEADER_THREADS, len(shards) or 1)) as pool:
            yield from pool.map(self._header, shards)

    def read(self, shards: Sequence[str]) -> Iterator[dict[str, TensorSpec]]:
        """Yield the specs of each shard's tensors.

        Raises:
            CheckpointError: as ``headers``, or a header is malformed.
            UnsupportedError: a ``.bin`` of another make than torch's, as ``read_torch_header``.
        """
        if self.container is TORCH:
            yield from (read_torch_header(self._path / shard) for shard in shards)
            return
        known: Kinds = {}
        for shard, header in zip(shards, self.headers(shards), strict=True):
            yield parse_header(self._path / shard, header, known)

    def _header(self, shard: str) -> RawHeader:
        return self._kept.get(shard) or read_raw(self._path / shard)


def keep_headers(folder: Path, headers: Mapping[str, RawHeader]) -> None:
    """Write the headers of a directory's shards, by file name; what was there is replaced at once.

    Raises:
        OSError: the directory cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=f"{HEADERS_FILE}.", dir=folder)
    try:
        with open(descriptor, "wb") as stream:
            for shard, header in headers.items():
                line = {
                    "shard": shard,
                    "file_bytes": header.file_bytes,
                    "mtime_ns": header.mtime_ns,
                    "header_bytes": len(header.text),
                    "header_crc32": zlib.crc32(header.text),
                }
                stream.write(json.dumps(line).encode() + b"\n" + header.text + b"\n")
        os.chmod(name, 0o644)
        os.replace(name, folder / HEADERS_FILE)
    except BaseException:
        os.unlink(name)
        raise


def kept_headers(folder: Path) -> dict[str, RawHeader]:
    """Return shard's file name -> header; none for a directory that keeps none.

    Raises:
        CheckpointError: the file is unreadable or damaged.
    """
    file = folder / HEADERS_FILE
    headers: dict[str, RawHeader] = {}
    try:
        descriptor, _ = open_file(file)
        with open(descriptor, "rb") as stream:
            while line := stream.readline(_LINE_BYTES):
                entry = parse_json(line)
                shard, header_bytes = entry["shard"], entry["header_bytes"]
                if type(shard) is not str or "\0" in shard:  # no file system has such a name
                    raise ValueError(f"shard is {shard!r}")
                if type(header_bytes) is not int or not 0 <= header_bytes <= MAX_HEADER_BYTES:
                    raise ValueError(f"header_bytes of {shard} is {header_bytes!r}")
                text = stream.read(header_bytes)
                if len(text) != header_bytes or stream.read(1) != b"\n":
                    raise ValueError(f"cut short in the header of {shard}")
                # Directories that were composed before there were checksums have none.
                if entry.get("header_crc32") not in (None, zlib.crc32(text)):
                    raise ValueError(f"the header of {shard} was changed")
                written = entry["mtime_ns"]
                headers[shard] = RawHeader(
                    text, int(entry["file_bytes"]), None if written is None else int(written)
                )
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}), expected the headers of the shards. Remove the "
            "file, or compose the directory again."
        ) from error
    return headers


def _current(file: Path, header: RawHeader) -> RawHeader | None:
    """Return a kept header with its shard's stamp; None where the shard is another by now.

    A hub's shard need not be here, and does not change.
    """
    stamp = stamp_of(file)
    if stamp is None:
        return header if header.mtime_ns is None else None
    if stamp.size_bytes != header.file_bytes or header.mtime_ns not in (None, stamp.modified_ns):
        return None
    return replace(header, stamp=stamp)
