# SPDX-License-Identifier: Apache-2.0
"""The fields of a saved snapshot, checked one by one: such a file is untrusted input."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from vllm_mixprec.errors import MixPrecError

FORMAT = "vllm-mixprec/expert-snapshot"
VERSION = 1
# Bounds on a file from elsewhere; the largest models have 100 layers of 512 experts.
MAX_FILE_BYTES = 64 * 2**20
MAX_LAYERS = 4096
_MAX_CELLS = 2**20
_MAX_LABEL_CHARACTERS = 1024
_MAX_INT64 = 2**63 - 1
_MAX_TIME_S = 253_402_300_800.0  # the year 10000, where datetime ends
REMEDY = "Save the snapshot again."


class SnapshotError(MixPrecError):
    """A snapshot is malformed, or two of them cannot be combined."""


def write_atomically(path: str | os.PathLike[str], text: str | bytes) -> None:
    """Write a file beside ``path`` and move it there once it is complete.

    Raises:
        SnapshotError: the file cannot be written; a file that was there is left as it was.
    """
    target = Path(os.path.realpath(path))
    building = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    data = text.encode() if isinstance(text, str) else text
    try:
        with _removed_on_failure(building), open(building, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(building, target)
    except OSError as error:
        raise SnapshotError(
            f"{os.fspath(path)}: cannot be written ({error.strerror or error}), expected a file "
            "in a directory that exists and is writable. Choose another."
        ) from None


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SnapshotError(
            f"{path}: cannot be read ({error.strerror or error}), expected a saved snapshot. "
            "Correct the path."
        ) from None
    return content


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def refuse(field: str, found: str, expected: str) -> NoReturn:
    raise SnapshotError(f"{field}: found {found}, expected {expected}. {REMEDY}")


def show(value: object) -> str:
    """Return a short repr of anything, so that a message stays one line."""
    if isinstance(value, (list, tuple, dict)):
        return f"{type(value).__name__} of {len(value)}"
    if type(value) is int and abs(value) > 10**30:  # repr of a huge int raises
        return "an integer beyond 10^30"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_label(field: str, label: object) -> None:
    # Unprintable characters could drive the terminal that shows a file from elsewhere.
    if not (
        isinstance(label, str) and 0 < len(label) <= _MAX_LABEL_CHARACTERS and label.isprintable()
    ):
        refuse(field, show(label), f"1 to {_MAX_LABEL_CHARACTERS} printable characters")


def check_layers(layers: object) -> None:
    if not isinstance(layers, tuple) or not layers:
        refuse("layers", show(layers), "a tuple of labels, one at least")
    for index, label in enumerate(layers):
        check_label(f"layers[{index}]", label)
    if len(set(layers)) != len(layers):
        twice = next(label for index, label in enumerate(layers) if label in layers[:index])
        refuse("layers", f"{twice!r} twice", "each label once")


def to_int(field: str, value: object, least: int) -> int:
    """Return an int of Python; a bool is none."""
    if (
        not isinstance(value, (int, np.integer))
        or isinstance(value, bool)
        or not least <= value <= _MAX_INT64
    ):
        refuse(field, show(value), f"an integer from {least} to 2^63 - 1")
    return int(value)


def to_seconds(field: str, value: object) -> float:
    """Return a float of Python; NaN, infinity and a bool are none."""
    if (
        not isinstance(value, (int, float, np.integer, np.floating))
        or isinstance(value, bool)
        or not 0 <= value < _MAX_TIME_S  # false for NaN
    ):
        refuse(field, show(value), f"seconds from 0 to {_MAX_TIME_S:.0f}")
    return float(value)


def check_counts(counts: object, layers: int) -> None:
    if not isinstance(counts, np.ndarray) or counts.dtype != np.int64 or counts.ndim != 2:
        refuse("counts", _shown_array(counts), "an int64 array [layers, experts]")
    if counts.shape[0] != layers or counts.shape[1] < 1:
        refuse("counts", f"{list(counts.shape)}", f"[{layers}, experts]: a row a layer")
    if (counts < 0).any():
        row, expert = np.argwhere(counts < 0)[0].tolist()
        refuse(f"counts[{row}, {expert}]", f"{counts[row, expert]}", "0 or more")
    # In float, because an int64 sum would wrap. 2^62 leaves the rounding room.
    if (counts.sum(axis=1, dtype=np.float64) > 2.0**62).any():
        refuse("counts", "a layer whose sum is above 2^62", "sums that fit in 64 bits")


def check_last_activation(times: object, shape: tuple[int, ...]) -> None:
    if not isinstance(times, np.ndarray) or times.dtype != np.float64 or times.shape != shape:
        refuse("last_activation_s", _shown_array(times), f"a float64 array {list(shape)}")
    known = times[~np.isnan(times)]
    if ((known < 0) | (known >= _MAX_TIME_S)).any():
        refuse("last_activation_s", "a time out of range", "unix seconds, or NaN for never")


def _shown_array(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else show(value)


def check_keys(fields: Mapping[str, Any], prefix: str, known: Collection[str]) -> None:
    for key in known:
        if key not in fields:
            refuse(f"{prefix}{key}", "nothing", "a value")
    for key in fields:
        if key not in known:
            refuse(f"{prefix}{show(key)}", "an unknown field", f"one of {', '.join(known)}")


def check_matrix(field: str, rows: object, layers: int, experts: int | None) -> tuple[int, int]:
    """Check that ``rows`` are ``layers`` lists of one length, and return both numbers."""
    if not isinstance(rows, list) or len(rows) != layers:
        refuse(field, show(rows), f"a list of {layers} rows, one a layer")
    if experts is None:
        experts = len(rows[0]) if isinstance(rows[0], list) else 0
        if not 1 <= experts <= _MAX_CELLS // layers:
            refuse(f"{field}[0]", show(rows[0]), f"a list of 1 to {_MAX_CELLS // layers}")
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != experts:
            refuse(f"{field}[{index}]", show(row), f"a list of {experts}, one an expert")
    return layers, experts


def parse_counts(rows: list[list[Any]]) -> NDArray[np.int64]:
    for index, row in enumerate(rows):
        for expert, count in enumerate(row):
            to_int(f"counts[{index}][{expert}]", count, 0)
    return np.array(rows, dtype=np.int64)


def parse_times(rows: list[list[Any]]) -> NDArray[np.float64]:
    for index, row in enumerate(rows):
        for expert, time_s in enumerate(row):
            if time_s is not None:
                to_seconds(f"last_activation_s[{index}][{expert}]", time_s)
    return np.array([[np.nan if time is None else time for time in row] for row in rows], float)
