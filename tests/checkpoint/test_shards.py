# SPDX-License-Identifier: Apache-2.0
"""Headers kept in one file: they stand for shards as long as these are what they were."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.routing.models import edit_tensors
from vllm_mixprec.checkpoint import open_checkpoint
from vllm_mixprec.checkpoint.header import RawHeader, read_raw
from vllm_mixprec.checkpoint.shards import HEADERS_FILE, keep_headers, kept_headers
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]

_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_audit)  # cannot be taken off again; it does nothing but in opened_by


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A checkpoint of three shards whose headers are kept."""
    folder = tmp_path / "bf16"
    shutil.copytree(FIXTURES / "bf16", folder)
    keep_headers(folder, {shard: read_raw(folder / shard) for shard in SHARDS})
    return folder


def opened_by(path: Path) -> set[str]:
    """Open a checkpoint, and return the names of the files that this opened."""
    global _opened
    _opened = []
    try:
        open_checkpoint(path)
        return {Path(name).name for name in _opened if name.startswith(str(path))}
    finally:
        _opened = None


def test_shards_whose_headers_are_kept_are_not_opened(kept: Path) -> None:
    assert opened_by(kept) == {"config.json", "model.safetensors.index.json", HEADERS_FILE}
    found, expected = open_checkpoint(kept), open_checkpoint(FIXTURES / "bf16")
    assert found.modules.keys() == expected.modules.keys()
    for name, spec in found.tensors.items():
        other = expected.tensors[name]
        assert (spec.file.name, spec.start, spec.end) == (other.file.name, other.start, other.end)


def test_shard_replaced_since_is_read_anew(kept: Path) -> None:
    def swap(tensors: dict[str, Any]) -> None:
        names = list(tensors)
        for name in names[::-1]:
            tensors[name] = tensors.pop(name)

    before = open_checkpoint(kept).tensors
    assert not open_checkpoint(kept).notes
    edit_tensors(kept / SHARDS[1], swap)
    state = (kept / SHARDS[1]).stat()
    os.utime(kept / SHARDS[1], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert SHARDS[1] in opened_by(kept)
    [note] = open_checkpoint(kept).notes
    assert note.startswith(f"{kept}: {SHARDS[1]}: copied or written to since")
    after = open_checkpoint(kept).tensors
    assert any(before[name].start != spec.start for name, spec in after.items())


def test_shard_that_is_gone_is_reported(kept: Path) -> None:
    (kept / SHARDS[2]).unlink()
    [problem] = open_checkpoint(kept).problems
    assert problem.startswith(f"{kept / SHARDS[2]}: missing")


def test_header_of_a_shard_that_was_never_here_stands_for_it(kept: Path) -> None:
    headers = kept_headers(kept)
    header = headers[SHARDS[2]]
    keep_headers(kept, headers | {SHARDS[2]: RawHeader(header.text, header.file_bytes, None)})
    (kept / SHARDS[2]).unlink()
    found = open_checkpoint(kept)
    assert found.problems == ()
    spec = next(spec for spec in found.tensors.values() if spec.file.name == SHARDS[2])
    with pytest.raises(CheckpointError, match=rf"{SHARDS[2]}: cannot be opened: No such file"):
        list(read_tensors([spec]))


def test_header_that_was_changed_is_an_error(kept: Path) -> None:
    """Be it to one as sound: here the names of two tensors of one shape are exchanged."""
    file, raw = kept / HEADERS_FILE, (kept / HEADERS_FILE).read_bytes()
    one, other = b"experts.6.gate_proj", b"experts.7.gate_proj"
    file.write_bytes(raw.replace(one, b"#").replace(other, one).replace(b"#", other))
    with pytest.raises(CheckpointError, match=rf"the header of {SHARDS[0]} was changed"):
        open_checkpoint(kept)


@pytest.mark.parametrize("keep_bytes", [10, 300])
def test_damaged_file_is_an_error(kept: Path, keep_bytes: int) -> None:
    os.truncate(kept / HEADERS_FILE, keep_bytes)
    with pytest.raises(CheckpointError, match=f"{HEADERS_FILE}: cannot be read"):
        open_checkpoint(kept)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"header_bytes": 1 << 62}, f"header_bytes of {SHARDS[0]} is 46"),
        ({"header_bytes": 1 << 70}, f"header_bytes of {SHARDS[0]} is 11"),
        ({"header_bytes": -1}, f"header_bytes of {SHARDS[0]} is -1"),
        ({"header_bytes": True}, f"header_bytes of {SHARDS[0]} is True"),
        ({"file_bytes": "HUGE"}, "infinity"),
        ({"mtime_ns": "HUGE"}, "infinity"),
        ({"shard": 3}, "shard is 3"),
        ({"shard": None}, "shard is None"),
        ({"shard": "a\0.safetensors"}, "shard is 'a"),
    ],
)
def test_line_that_lies_is_an_error(kept: Path, changes: dict[str, Any], match: str) -> None:
    line, _, rest = (kept / HEADERS_FILE).read_bytes().partition(b"\n")
    line = json.dumps(json.loads(line) | changes).replace('"HUGE"', "1e400").encode()
    (kept / HEADERS_FILE).write_bytes(line + b"\n" + rest)
    with pytest.raises(CheckpointError, match=f"{HEADERS_FILE}: cannot be read .*{match}"):
        open_checkpoint(kept)


@pytest.mark.parametrize("content", [b"[" * 100_000, bytes(1 << 20), b"[]\n", b"\xff\n"])
def test_file_of_anything_else_is_an_error(kept: Path, content: bytes) -> None:
    (kept / HEADERS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{HEADERS_FILE}: cannot be read"):
        open_checkpoint(kept)


def test_pipe_is_an_error(kept: Path) -> None:
    (kept / HEADERS_FILE).unlink()
    os.mkfifo(kept / HEADERS_FILE)
    descriptor = os.open(kept / HEADERS_FILE, os.O_RDWR)  # so that who opens it need not wait
    try:
        os.write(descriptor, b"\n")
        with pytest.raises(CheckpointError, match="cannot be read .*not a regular file"):
            open_checkpoint(kept)
    finally:
        os.close(descriptor)
