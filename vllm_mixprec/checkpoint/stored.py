# SPDX-License-Identifier: Apache-2.0
"""A tensor in a file, of which only the rows are read that somebody uses."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from vllm_mixprec.checkpoint.buffers import READ_BYTES
from vllm_mixprec.checkpoint.filling import Filling
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.ranges import OpenFile, RangeReader
from vllm_mixprec.checkpoint.threads import READERS, start_readers

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


class StoredTensor(torch.Tensor):  # type: ignore[misc]
    """Stands for a tensor in a file, or for some of its rows, to code that expects a tensor.

    vLLM's weight loaders take whole tensors and narrow them to what their tensor-parallel rank
    holds. Narrowing this along its first dimension, or to all of it, reads nothing; copying it into
    a parameter reads what is left, straight into the parameter's memory, or a few megabytes at a
    time where that is on another device, of another dtype or in pieces; any other operation reads
    it all first. So what a loader does with it is never wrong, only slower than it was foreseen.

    Args:
        rows: which of the tensor's rows it stands for; None for all.
        ahead: rows that have been read already, and their values.
        reader: of the others; None for one that goes through the page cache.
        filling: what reads them, as long as its file is open, into memory where that can be read
            into.
        is_late: whether memory that this is copied to is only filled when ``filling`` is done.
    """

    spec: TensorSpec
    rows: range
    ahead: tuple[range, torch.Tensor] | None
    reader: RangeReader | None
    filling: Filling | None
    is_late: bool

    @staticmethod
    def __new__(
        cls,
        spec: TensorSpec,
        rows: range | None = None,
        ahead: tuple[range, torch.Tensor] | None = None,
        reader: RangeReader | None = None,
        filling: Filling | None = None,
        is_late: bool = False,
    ) -> "StoredTensor":
        rows = range(spec.shape[0]) if rows is None else rows
        shape = (len(rows), *spec.shape[1:])
        made: StoredTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=DTYPES[spec.dtype]
        )
        made.spec, made.rows, made.ahead, made.reader = spec, rows, ahead, reader
        made.filling, made.is_late = filling, is_late
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
                return stored._of(stored.rows[start:stop], stored.is_late)
            if range(stored.shape[dim])[start:stop:step] == range(stored.shape[dim]):
                return stored._of(stored.rows, stored.is_late)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]._of(args[0].rows, args[0].is_late)
        if func is torch.ops.aten.copy_.default and isinstance(args[1], cls):
            target, stored = args[:2]
            if target.shape == stored.shape and not isinstance(target, cls):
                stored._copy_to(target)
                return target
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs))
        return func(*args, **kwargs)

    def late(self) -> "StoredTensor":
        """Return the same for one who copies it and leaves alone what it is copied to.

        Its ``filling`` tells when that is there.
        """
        return self._of(self.rows, is_late=True)

    def _of(self, rows: range, is_late: bool) -> "StoredTensor":
        return StoredTensor(self.spec, rows, self.ahead, self.reader, self.filling, is_late)

    def read(self) -> torch.Tensor:
        """Return the values, which are kept."""
        ahead = self._from_ahead()
        if ahead is not None:
            return ahead
        values = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self._of(self.rows, is_late=False)._copy_to(values)
        self.ahead = (self.rows, values)
        return values

    def _copy_to(self, target: torch.Tensor) -> None:
        """Fill a tensor of this shape.

        Raises:
            CheckpointError: the file vanished, or ended before the tensor did.
        """
        ahead = self._from_ahead()
        if ahead is not None:
            target.copy_(ahead)
            return
        if not self.numel() or target.is_meta:  # vLLM's reload counts what a loader copies
            return
        filling = self.filling
        if filling is not None and filling.file.is_open and _is_readable_into(target, self.dtype):
            fill = filling.fill_later if self.is_late else filling.fill
            fill(target, self.start, self.spec)
            return
        size = max(READ_BYTES // self._row_bytes, 1)
        places = [
            range(first, min(first + size, len(self.rows)))
            for first in range(0, len(self.rows), size)
        ]
        straight = target.is_cpu and target.is_contiguous() and target.dtype == self.dtype
        reader = RangeReader() if self.reader is None else self.reader
        with (
            closing(OpenFile(self.spec.file, self.spec.stamp, reader.may_pass)) as file,
            start_readers() as pool,
        ):

            def read(place: range) -> torch.Tensor | None:
                first = self.start + place.start * self._row_bytes
                if straight:
                    part = target[place.start : place.stop].detach().view(-1).view(torch.uint8)
                    reader.fill(part, file, first, self.spec)
                    return None
                end = first + len(place) * self._row_bytes
                is_past = reader.is_past(file, first, end)
                raw, _ = reader.lend(file, first, end, self.spec, is_past)
                return as_dtype(raw, self.dtype).view(len(place), *self.shape[1:])

            # Few at a time: what was read waits in memory to be copied.
            for first in range(0, len(places), READERS):
                batch = places[first : first + READERS]
                for place, piece in zip(batch, pool.map(read, batch), strict=True):
                    if piece is not None:
                        target[place.start : place.stop].copy_(piece)
            file.require_unchanged()

    @property
    def start(self) -> int:
        """Offset in the file of its first byte."""
        return self.spec.start + self.rows.start * self._row_bytes

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


def _is_readable_into(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether it is memory of the CPU, in one piece or of a matrix whose rows are, of a dtype."""
    has_rows = target.dim() == 2 and target.stride(1) == 1
    is_memory: bool = target.is_cpu and (target.is_contiguous() or has_rows)
    return is_memory and target.dtype == dtype


def as_dtype(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View bytes as numbers; those at an odd place, which safetensors allows, are copied first."""
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)
