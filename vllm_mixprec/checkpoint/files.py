# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint's files, and tells whether one is still the file whose header was read."""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vllm_mixprec.errors import CheckpointError

# What stands in a clone for a file that Git LFS did not bring (docs/spec.md of git-lfs).
_POINTER = b"version https://git-lfs.github.com/spec/v1"
_POINTER_BYTES = 1024  # a pointer is smaller


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Tells one state of one file from another, without reading it.

    A write within the clock tick of the file system (some milliseconds) can leave it as it was, and
    so does one after which the time of the last write is set back.
    """

    device: int
    inode: int
    size_bytes: int
    modified_ns: int


def open_file(file: Path) -> tuple[int, FileStamp]:
    """Open a regular file, never waiting for one that is a pipe; returns (descriptor, stamp).

    Raises:
        OSError: it cannot be opened, or is a directory, pipe or device.
        CheckpointError: a Git LFS pointer lies in its place.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        stamp = _stamp(descriptor)
        _refuse_pointer(file, descriptor, stamp.size_bytes)
        return descriptor, stamp
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_pointer(file: Path, descriptor: int, size_bytes: int) -> None:
    """Say what such a file is: to those who parse it, it would only be damaged."""
    if size_bytes < _POINTER_BYTES and os.pread(descriptor, len(_POINTER), 0) == _POINTER:
        raise CheckpointError(
            f"{file}: a Git LFS pointer, {size_bytes} bytes, expected the file itself. Run "
            f"`git lfs pull` in {file.parent}, or download the model with the hub's own tool."
        )


def reopen(file: Path, stamp: FileStamp | None) -> int:
    """Open a file again for its data; returns the descriptor.

    Raises:
        CheckpointError: it is gone, or not as it was when ``stamp`` was taken.
    """
    try:
        descriptor, _ = open_file(file)
    except OSError as error:
        more = "" if stamp is None else " any more"  # without one it was never here
        raise CheckpointError(
            f"{file}: cannot be opened{more}: {error.strerror}; expected the file whose header was "
            "read. Put it there, and leave checkpoints alone while a server starts"
        ) from error
    try:
        require_unchanged(file, descriptor, stamp)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def require_unchanged(file: Path, descriptor: int, stamp: FileStamp | None) -> None:
    """Make sure that an open file is as it was when its header was read.

    Raises:
        CheckpointError: it was replaced, written to or cut short since.
    """
    found = _stamp(descriptor)
    if stamp is None or found == stamp:
        return
    if found.size_bytes < stamp.size_bytes:
        what = f"was cut short to {found.size_bytes} bytes, expected {stamp.size_bytes},"
    elif (found.device, found.inode) != (stamp.device, stamp.inode):
        what = "was replaced by another file"
    else:
        what = "was written to"
    raise CheckpointError(
        f"{file}: {what} after its header was read, so its tensors may be another model's. Leave "
        "checkpoints alone while they are loaded, and start again"
    )


def stamp_of(file: Path) -> FileStamp | None:
    """Return the stamp of the file that a path leads to, None where there is none."""
    try:
        return _stamp(file)
    except OSError:
        return None


def _stamp(file: int | Path) -> FileStamp:
    found = os.stat(file)
    return FileStamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
