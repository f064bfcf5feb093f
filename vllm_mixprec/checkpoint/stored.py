# SPDX-License-Identifier: Apache-2.0
"""A tensor in a file, of which only the rows are read that somebody uses."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from vllm_mixprec.checkpoint.buffers import READ_BYTES
from vllm_mixprec.checkpoint.files import reopen
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import CheckpointError

DTYPES = {
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
_THREADS = 4


class StoredTensor(torch.Tensor):  # type: ignore[misc]
    """Stands for a tensor in a file, or for some of its rows, to code that expects a tensor.

    vLLM's weight loaders take whole tensors and narrow them to what their tensor-parallel rank
    holds. Narrowing this along its first dimension reads nothing; copying it into a parameter reads
    what is left, a few megabytes at a time; any other operation reads it all first. So what a
    loader does with it is never wrong, only slower than it was foreseen.

    Args:
        rows: which of the tensor's rows it stands for; None for all.
        ahead: rows that have been read already, and their values.
    """

    spec: TensorSpec
    rows: range
    ahead: tuple[range, torch.Tensor] | None

    @staticmethod
    def __new__(
        cls,
        spec: TensorSpec,
        rows: range | None = None,
        ahead: tuple[range, torch.Tensor] | None = None,
    ) -> "StoredTensor":
        rows = range(spec.shape[0]) if rows is None else rows
        shape = (len(rows), *spec.shape[1:])
        made: StoredTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=DTYPES[spec.dtype]
        )
        made.spec, made.rows, made.ahead = spec, rows, ahead
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.slice.Tensor:
            given = dict(zip(("stored", "dim", "start", "stop", "step"), args, strict=False))
            stored, dim, step = args[0], given.get("dim", 0), given.get("step", 1)
            start, stop = given.get("start"), given.get("stop")
            if dim in (0, -stored.dim()) and step == 1:
                return cls(stored.spec, stored.rows[start:stop], stored.ahead)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].spec, args[0].rows, args[0].ahead)
        if func is torch.ops.aten.copy_.default and isinstance(args[1], cls):
            target, stored = args[:2]
            if target.shape == stored.shape and not isinstance(target, cls):
                for place, values in stored.pieces():
                    target[place.start : place.stop].copy_(values)
                return target
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs))
        return func(*args, **kwargs)

    def read(self) -> torch.Tensor:
        """Return the values, which are kept."""
        ahead = self._from_ahead()
        if ahead is not None:
            return ahead
        values = torch.empty(self.shape, dtype=self.dtype)
        for place, piece in self.pieces():
            values[place.start : place.stop] = piece
        self.ahead = (self.rows, values)
        return values

    def pieces(self) -> Iterator[tuple[range, torch.Tensor]]:
        """Yield (rows of this tensor, their values), no more than a few megabytes at a time.

        Raises:
            CheckpointError: the file vanished, or ended before the tensor did.
        """
        ahead = self._from_ahead()
        if ahead is not None:
            yield range(len(self.rows)), ahead
            return
        if not self.numel():
            return
        size = max(READ_BYTES // self._row_bytes, 1)
        places = [
            range(first, min(first + size, len(self.rows)))
            for first in range(0, len(self.rows), size)
        ]
        with (
            open(reopen(self.spec.file, self.spec.stamp), "rb", buffering=0) as file,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            for first in range(0, len(places), _THREADS):
                batch = places[first : first + _THREADS]
                read = [pool.submit(self._read, file.fileno(), place) for place in batch]
                for place, future in zip(batch, read, strict=True):
                    yield place, future.result()

    @property
    def _row_bytes(self) -> int:
        return self.spec.nbytes // self.spec.shape[0]

    def _from_ahead(self) -> torch.Tensor | None:
        if self.ahead is None:
            return None
        rows, values = self.ahead
        if self.rows.start < rows.start or self.rows.stop > rows.stop:
            return None
        return values[self.rows.start - rows.start : self.rows.stop - rows.start]

    def _read(self, descriptor: int, place: range) -> torch.Tensor:
        rows = self.rows[place.start : place.stop]
        values = torch.empty(len(rows) * self._row_bytes, dtype=torch.uint8)
        read_into(values, descriptor, self.spec.start + rows.start * self._row_bytes, self.spec)
        return values.view(self.dtype).view(len(rows), *self.shape[1:])


def read_into(buffer: torch.Tensor, descriptor: int, offset: int, spec: TensorSpec) -> None:
    """Fill a uint8 buffer with the bytes of a file from ``offset`` on, those of ``spec`` last.

    Raises:
        CheckpointError: the file ends before.
    """
    view = memoryview(buffer.numpy())
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{spec.file}: ends at byte {offset + done}, expected {offset + len(view)} for "
                f"{spec.name}; it was cut short after its header was read. Copy it again"
            )
        done += count
