# SPDX-License-Identifier: Apache-2.0
"""Sources on the Hugging Face hub: headers by range, shards only once a plan uses them.

A source's directory is its snapshot in the hub's own cache. Shards that lie there never change, and
its name tells repository and commit, so that a shard's path is all that is needed to fetch it. The
headers of those that do not lie there are kept beside them.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vllm_mixprec.checkpoint.files import FileStamp, reopen, require_unchanged
from vllm_mixprec.checkpoint.header import RawHeader, header_length
from vllm_mixprec.checkpoint.index import suggest_directories
from vllm_mixprec.checkpoint.json_files import tensors_by_shard
from vllm_mixprec.checkpoint.shards import (
    HEADER_THREADS,
    HEADERS_FILE,
    SAFETENSORS,
    TORCH,
    keep_headers,
    kept_headers,
)
from vllm_mixprec.errors import CheckpointError

SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
"""What a model directory holds beside its weights."""

_FIRST_BYTES = 128 << 10  # holds nearly every header
_SNAPSHOT = re.compile(r"(.*/)models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/(.+)")

logger = logging.getLogger("vllm.mixprec")


class HubFile(NamedTuple):
    """A file of one commit of a model on the hub; ``repo_id`` is ``owner/model``.

    ``cache`` is the hub's cache that it has its place in, maybe not the one of ``HF_HUB_CACHE``.
    """

    cache: Path
    repo_id: str
    commit: str
    name: str


def open_snapshot(repo_id: str, revision: str | None, directory: Path) -> Path:
    """Return the cached directory of a model: its small files, and the headers of its shards.

    A model that has no safetensors is downloaded whole.

    Args:
        directory: where the source was looked for before; for the message.

    Raises:
        CheckpointError: there is no such model on the hub or, under ``HF_HUB_OFFLINE``, in the
            hub's cache; the hub cannot be reached; or a header is damaged.
    """
    import huggingface_hub
    from huggingface_hub import constants

    with _explained(
        f"{repo_id}: no directory {directory}, and the Hugging Face hub does not give its revision "
        f"{revision or 'main'}",
        suggest_directories(directory),
    ):
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=SMALL_FILES
            )
        )
        if not constants.HF_HUB_OFFLINE and not _keep_absent(folder):
            # Pickles: where a tensor lies in one is told by the whole file.
            huggingface_hub.snapshot_download(
                repo_id, revision=folder.name, allow_patterns=[TORCH.files]
            )
    return folder


def hub_file(file: Path) -> HubFile | None:
    """Tell which file of the hub a path in its cache stands for; None for any other path."""
    found = _SNAPSHOT.fullmatch(file.as_posix())
    if found is None:
        return None
    cache, owner, model, commit, name = found.groups()
    return HubFile(Path(cache), f"{owner}/{model}", commit, name)


def is_available(file: Path) -> bool:
    """Whether a shard is here, or can be fetched."""
    if file.exists():
        return True
    if hub_file(file) is None:
        return False
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE


def fetch(files: Iterable[Path]) -> None:
    """Download the shards that are not here, with a progress bar; of other paths nothing.

    Raises:
        CheckpointError: one is still not here: the hub cannot be reached or lacks it,
            ``HF_HUB_OFFLINE`` is set, or it cannot be written.
    """
    wanted: dict[tuple[Path, str, str], dict[str, Path]] = {}
    for file in sorted(set(files)):
        remote = None if file.exists() else hub_file(file)
        if remote is not None:
            snapshot = remote.cache, remote.repo_id, remote.commit
            wanted.setdefault(snapshot, {})[remote.name] = file
    if not wanted:
        return
    import huggingface_hub

    for (cache, repo_id, commit), shards in wanted.items():
        names = list(shards)
        with _explained(f"{repo_id}: {len(names)} shards cannot be downloaded, {names[0]} first"):
            huggingface_hub.snapshot_download(
                repo_id,
                revision=commit,
                cache_dir=cache,
                allow_patterns=[glob.escape(name) for name in names],
            )
        # Its client, where it cannot ask the hub, may be content with the directory as it is.
        absent = [file for file in shards.values() if not file.exists()]
        if absent:
            raise CheckpointError(
                f"{absent[0]}: not there after it was asked for from the hub, expected it to be "
                f"downloaded ({len(absent)} of {len(names)} shards are absent). Let "
                "it reach the hub (HF_HUB_OFFLINE unset), or download the model first."
            )


def read_range(file: Path, start: int, end: int, stamp: FileStamp | None) -> bytes:
    """Read the bytes from ``start`` up to ``end`` of a file, of one that is not here by network.

    Raises:
        CheckpointError: neither disk nor hub gives it, or it is not the file that has ``stamp``.
    """
    remote = None if file.exists() else hub_file(file)
    if remote is not None:
        with _explained(f"{file.name} of {remote.repo_id}: cannot be read from the hub"):
            return _request(remote, start, end)[0]
    with open(reopen(file, stamp), "rb") as stream:
        stream.seek(start)
        content = stream.read(end - start)
        require_unchanged(file, stream.fileno(), stamp)
    return content


def _keep_absent(folder: Path) -> bool:
    """Fetch the headers of shards that are not in a snapshot, once for its lifetime.

    Returns:
        Whether the model has safetensors at all.
    """
    shards = _shards(folder)
    if all(os.path.exists(folder / shard) for shard in shards):
        return bool(shards)
    if shards <= kept_headers(folder).keys():
        return True
    names = sorted(shards)
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        headers = list(pool.map(lambda shard: _remote_header(folder / shard), names))
    try:
        keep_headers(folder, dict(zip(names, headers, strict=True)))
    except OSError as error:  # the cache may be another user's; what is absent is reported later
        logger.warning(
            "%s: cannot be written (%s), so shards that are not in the directory are not read; "
            "make it writable, or download the model first",
            folder / HEADERS_FILE,
            error.strerror or error,
        )
    return True


def _shards(folder: Path) -> set[str]:
    """Return the shards of a snapshot: those that its index names, else those on the hub.

    The hub is not asked where the only shard is here, or all that PyTorch's files hold.
    """
    if (folder / SAFETENSORS.index).exists():
        return set(tensors_by_shard(folder / SAFETENSORS.index, SAFETENSORS))
    if (folder / SAFETENSORS.single).exists():
        return {SAFETENSORS.single}
    has_index = (folder / TORCH.index).exists()
    pickles = tensors_by_shard(folder / TORCH.index, TORCH) if has_index else [TORCH.single]
    if pickles and all(os.path.exists(folder / shard) for shard in pickles):
        return set()
    from huggingface_hub import HfApi

    model = hub_file(folder / SAFETENSORS.single)
    assert model is not None, f"{folder} is a snapshot in the hub's cache"
    listed = HfApi().list_repo_files(model.repo_id, revision=model.commit)
    shards = {name for name in listed if name.endswith(".safetensors") and "/" not in name}
    return {SAFETENSORS.single} & shards or shards


def _remote_header(file: Path) -> RawHeader:
    remote = hub_file(file)
    assert remote is not None, f"{file} is in a snapshot in the hub's cache"
    first, file_bytes = _request(remote, 0, _FIRST_BYTES)
    end = 8 + header_length(file, first, file_bytes)
    if end > len(first):
        first += _request(remote, len(first), end)[0]
    return RawHeader(first[8:end], file_bytes, None)


def _request(remote: HubFile, start: int, end: int) -> tuple[bytes, int]:
    """Return the bytes from ``start`` up to ``end``, or the file's end, and the file's size."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    response = http_backoff(
        "GET",
        hf_hub_url(remote.repo_id, remote.name, revision=remote.commit),
        headers={**build_hf_headers(), "range": f"bytes={start}-{end - 1}"},
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    hf_raise_for_status(response)
    found = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers.get("content-range", ""))
    if found is None:
        raise OSError(
            f"{remote.name} was asked for bytes {start} to {end}, and came with content-range "
            f"{response.headers.get('content-range')!r}"
        )
    file_bytes = int(found[1])
    content = bytes(response.content)
    if len(content) != min(end, file_bytes) - start:
        raise OSError(f"{remote.name}: {len(content)} bytes came of {min(end, file_bytes) - start}")
    return content, file_bytes


@contextmanager
def _explained(what: str, nearest: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into a CheckpointError that begins with ``what``."""
    # HTTPError is what the client's transport raises, whichever library that is.
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0].removeprefix("Got: ").rstrip(".")
        status = getattr(getattr(error, "response", None), "status_code", None)
        is_refused = isinstance(error, HFValidationError) or status in (401, 403, 404)
        # Only of what the hub, or offline its cache, lacks may the name be at fault.
        first = (
            "Correct the path"
            if is_refused or constants.HF_HUB_OFFLINE
            else "Check the network and the hub's cache"
        )
        raise CheckpointError(
            f"{what} ({reason}). {nearest}{first}, or download the model first."
        ) from error
