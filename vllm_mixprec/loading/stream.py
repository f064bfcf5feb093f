# SPDX-License-Identifier: Apache-2.0
"""Read chosen tensors out of a checkpoint's files: no other byte, in file order, reading ahead."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import CheckpointError

# Small neighbours share one read. Larger reads gain nothing on NVMe or page cache and cost memory.
_READ_BYTES = 8 << 20
_AHEAD_BYTES = 64 << 20
_THREADS = 4

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def read_tensors(specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Yield each tensor once, in the order of files and offsets.

    Tensors are CPU views of fresh buffers, which live as long as a view of them does; at most
    64 MiB (or one larger tensor) is read ahead. ``pread`` rather than ``mmap``, so that a file cut
    short under our hands is an error and not a SIGBUS.

    Raises:
        CheckpointError: a file vanished, or ended before a tensor did.
    """
    chunks = _chunk(sorted(specs, key=lambda spec: (str(spec.file), spec.start)))
    waiting: deque[tuple[int, Future[list[tuple[TensorSpec, torch.Tensor]]]]] = deque()
    ahead_bytes = 0
    files: dict[Path, int] = {}
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="mixprec-read")
    try:
        for chunk in chunks:
            file = chunk[0].file
            if file not in files:
                files[file] = _open(file)
            nbytes = chunk[-1].end - chunk[0].start
            while waiting and ahead_bytes + nbytes > _AHEAD_BYTES:
                taken, future = waiting.popleft()
                ahead_bytes -= taken
                yield from future.result()
            waiting.append((nbytes, pool.submit(_read_chunk, files[file], chunk)))
            ahead_bytes += nbytes
        while waiting:
            yield from waiting.popleft()[1].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in files.values():
            os.close(descriptor)


def _chunk(specs: list[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Join tensors that touch each other, up to one read's size."""
    chunk: list[TensorSpec] = []
    for spec in specs:
        if chunk and (
            spec.file != chunk[0].file
            or spec.start != chunk[-1].end
            or spec.end - chunk[0].start > _READ_BYTES
        ):
            yield chunk
            chunk = []
        chunk.append(spec)
    if chunk:
        yield chunk


def _open(file: Path) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be opened any more: {error.strerror}; its header was read a moment "
            "ago. Do not move or replace checkpoints while a server starts"
        ) from error
    # The kernel's own read-ahead would fetch the neighbours that no rule routes here.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def _read_chunk(descriptor: int, chunk: list[TensorSpec]) -> list[tuple[TensorSpec, torch.Tensor]]:
    begin, end = chunk[0].start, chunk[-1].end
    buffer = torch.empty(end - begin, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], begin + done)
        if count == 0:
            raise CheckpointError(
                f"{chunk[0].file}: ends at byte {begin + done}, expected {end} for "
                f"{chunk[-1].name}; it was cut short after its header was read. Copy it again"
            )
        done += count
    return [(spec, _typed(buffer[spec.start - begin : spec.end - begin], spec)) for spec in chunk]


def _typed(raw: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    dtype = _DTYPES[spec.dtype]
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()  # safetensors does not promise alignment, torch's view needs it
    return raw.view(dtype).view(spec.shape)
