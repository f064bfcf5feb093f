# SPDX-License-Identifier: Apache-2.0
"""Takes the sources' files as they are by now, for a reload."""

from collections.abc import Iterable
from pathlib import Path

from vllm_mixprec.checkpoint import TensorSpec, read_header
from vllm_mixprec.checkpoint.files import stamp_of
from vllm_mixprec.checkpoint.torch_file import read_torch_header
from vllm_mixprec.errors import CheckpointError


def as_files_are(specs: Iterable[TensorSpec]) -> dict[TensorSpec, TensorSpec]:
    """Map each spec to the same one in a file that may have been written to since.

    Headers of the files that changed are read again: values may be others, layouts may not.

    Raises:
        CheckpointError: a file is gone or damaged, or holds other tensors by now.
    """
    by_file: dict[Path, list[TensorSpec]] = {}
    for spec in specs:
        by_file.setdefault(spec.file, []).append(spec)
    return {
        spec: now
        for file, wanted in by_file.items()
        for spec, now in zip(wanted, _as_file_is(file, wanted), strict=True)
    }


def _as_file_is(file: Path, specs: list[TensorSpec]) -> list[TensorSpec]:
    stamp = stamp_of(file)
    if all(spec.stamp == stamp for spec in specs):
        return specs
    found = (read_torch_header if file.suffix == ".bin" else read_header)(file)
    stored = {(spec.start, spec.end, spec.dtype) for spec in found.values()}
    for spec in specs:
        now = found.get(spec.name)
        is_same = now is not None and now._replace(stamp=None) == spec._replace(stamp=None)
        # A part of a fused tensor lies within one that the file has under another name.
        is_part = any(
            start <= spec.start and spec.end <= end and dtype == spec.dtype
            for start, end, dtype in (stored if now is None else ())
        )
        if not (is_same or is_part):
            raise CheckpointError(
                f"{file}: {spec.name} is not {spec.dtype} {list(spec.shape)} at bytes "
                f"{spec.start} to {spec.end} any more; expected the header that the server "
                "started with. Put the file back, or restart the server"
            )
    now_stamp = next(iter(found.values())).stamp
    return [spec._replace(stamp=now_stamp) for spec in specs]
