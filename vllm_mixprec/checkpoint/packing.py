# SPDX-License-Identifier: Apache-2.0
"""Tensor arithmetic that the formats share: codes out of words and back, and rows in parts.

This module imports torch; the formats' files import it only where tensors come in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_mixprec.checkpoint.formats.base import Scheme
from vllm_mixprec.errors import CheckpointError, UnsupportedError

CHUNK_WEIGHTS = 1 << 22
"""Weights that are dequantised at a time: 16 MiB in float32, whatever the layer's size."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of an AWQ word's eight columns among its nibbles, from the lowest."""

Tensors = Mapping[str, torch.Tensor]
"""The tensors of one module: suffix -> tensor as stored."""


def stored(tensors: Tensors, suffix: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return a module's tensor, of ``shape`` if that is given.

    Raises:
        CheckpointError: it is missing, or of another shape.
    """
    tensor = tensors.get(suffix)
    if tensor is None:
        raise CheckpointError(
            f"{suffix}: missing, found {', '.join(tensors) or 'nothing'}. Re-export the module, "
            "or choose another source."
        )
    if shape is not None and tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{suffix}: shape {list(tensor.shape)}, expected {list(shape)}. Re-export the module, "
            "or choose another source."
        )
    return tensor


def sizes(scheme: Scheme, known_bits: tuple[int, ...]) -> tuple[int, int]:
    """Return bits and group size of an integer format.

    Raises:
        UnsupportedError: the bits are none of ``known_bits``, or there is no group size.
    """
    if scheme.bits not in known_bits or scheme.group_size is None:
        raise UnsupportedError(
            f"{scheme.format} of {scheme.bits} bits and group_size {scheme.group_size}, expected "
            f"{' or '.join(map(str, known_bits))} bits and a size. Choose another source."
        )
    return scheme.bits, scheme.group_size


def unpack(words: torch.Tensor, bits: int, order: Sequence[int] = ()) -> torch.Tensor:
    """Unpack int32 words along the last dimension, by default the lowest bits first."""
    places = torch.tensor(order or range(32 // bits), dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> places * bits) & ((1 << bits) - 1)
    return codes.flatten(-2)


def pack(codes: torch.Tensor, bits: int, order: Sequence[int] = ()) -> torch.Tensor:
    """Pack codes of 4 or 8 bits along the last dimension into words; undoes :func:`unpack`."""
    each = 32 // bits
    columns = [order.index(place) for place in range(each)] if order else range(each)
    parts = codes.to(torch.uint8).unflatten(-1, (-1, each))  # bytes: a quarter of the traffic
    if bits == 4:
        halves = (torch.stack([parts[..., c] for c in columns[half::2]], -1) for half in (0, 1))
        low, high = halves
        parts = low | high << 4
    return parts.contiguous().view(torch.int32).squeeze(-1)


def in_parts(
    shape: tuple[int, int],
    part_of: Callable[[slice], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Fill a tensor (N, K) from float32 rows; each slice of N starts at a multiple of 32."""
    n, k = shape
    out = torch.empty(n, k, dtype=dtype, device=device)
    rows = 32 * max(1, CHUNK_WEIGHTS // max(1, 32 * k))
    for low in range(0, n, rows):
        part = slice(low, min(low + rows, n))
        out[part] = part_of(part)
    return out


def row_groups(
    tensors: Tensors, suffix: str, k: int, group_size: int, groups: int, device: torch.device
) -> torch.Tensor:
    """Return the group of each of the K rows, int64 (K,).

    Raises:
        CheckpointError: ``g_idx`` names a group that there is not.
    """
    if suffix not in tensors:
        return torch.arange(k, device=device) // group_size
    g_idx = stored(tensors, suffix, (k,)).long()
    if suffix == "weight_g_idx" and bool((g_idx == -1).any()):
        return torch.arange(k, device=device) // group_size  # compressed-tensors' "never set"
    low, high = (int(g_idx.min()), int(g_idx.max())) if k else (0, 0)
    if not 0 <= low <= high < max(1, groups):
        raise CheckpointError(
            f"{suffix}: values {low} to {high}, expected 0 to {groups - 1}. "
            "Re-export the module, or choose another source."
        )
    return g_idx


def exponents(stored_bytes: torch.Tensor) -> torch.Tensor:
    """Decode E8M0: a byte ``b`` is ``2 ** (b - 127)``, and 255 not a number."""
    return stored_bytes.view(torch.float8_e8m0fnu).float()


class StoredWeight(Protocol):
    """A weight (N, K) behind the tensors of its module."""

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (N, K), computed in float32 and rounded once to ``dtype``."""

    def lay_out(self, scheme: Scheme, served: Scheme) -> dict[str, torch.Tensor]:
        """Return a module's tensors in another of its format's layouts.

        Raises:
            CheckpointError: the data is not what the config promised of it.
        """


@dataclass(frozen=True)
class Plain:
    """A weight as it is."""

    weight: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Cast the weight; of ``dtype`` already, it is the tensor itself."""
        return self.weight.to(dtype)

    def lay_out(self, scheme: Scheme, served: Scheme) -> dict[str, torch.Tensor]:
        """Return the weight."""
        return {"weight": self.weight}


@dataclass(frozen=True)
class Scaled:
    """Small floats with a scale for each block.

    Attributes:
        shape: (N, K).
        weight: as stored, its first dimension N.
        decode: rows of ``weight`` -> their values float32 (rows, K).
        scale: float32 (ceil(N / rows), ceil(K / columns)).
        block: rows and columns that share a scale; of the last blocks a part may exist.
    """

    shape: tuple[int, int]
    weight: torch.Tensor
    decode: Callable[[torch.Tensor], torch.Tensor]
    scale: torch.Tensor
    block: tuple[int, int]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return value x scale (N, K)."""

        def part_of(part: slice) -> torch.Tensor:
            rows = torch.arange(part.start, part.stop, device=self.scale.device)
            part_scale = self.scale[rows // self.block[0]]
            if self.scale.shape[1] != 1:
                part_scale = part_scale.repeat_interleave(self.block[1], dim=1)[:, : self.shape[1]]
            return self.decode(self.weight[part]) * part_scale

        return in_parts(self.shape, part_of, dtype, self.weight.device)

    def lay_out(self, scheme: Scheme, served: Scheme) -> dict[str, torch.Tensor]:
        """Return the tensors of an FP8 module, whose blocks may be parts of these.

        One without a block has a scale a row.
        """
        n, k = self.shape
        rows, columns = served.block or (1, max(1, k))
        row = torch.arange(0, n, rows, device=self.scale.device) // self.block[0]
        column = torch.arange(0, k, columns, device=self.scale.device) // self.block[1]
        suffix = "weight_scale" if served.block is None else "weight_scale_inv"
        return {"weight": self.weight, suffix: self.scale[row][:, column].contiguous()}


@dataclass(frozen=True)
class Integers:
    """A weight of integers in groups along K, out of whatever layout it is stored in.

    Attributes:
        shape: (N, K).
        codes_of: a slice of N that starts at a multiple of 32 -> codes int32 (K, rows), from 0.
        words: name of the layout, gptq or awq, in which they are stored -> its ``qweight``.
        zeros: true zero points int32 (groups, N).
        scales: (groups, N), as stored.
        group: of each of the K rows, int64 (K,).
    """

    shape: tuple[int, int]
    codes_of: Callable[[slice], torch.Tensor]
    words: tuple[str, torch.Tensor]
    zeros: torch.Tensor
    scales: torch.Tensor
    group: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return (code - zero point) x scale (N, K), in float32 and rounded once."""

        def part_of(part: slice) -> torch.Tensor:
            centred = self.codes_of(part) - self.zeros[:, part][self.group]
            return (centred.float() * self.scales[:, part].float()[self.group]).t()

        return in_parts(self.shape, part_of, dtype, self.scales.device)

    def lay_out(self, scheme: Scheme, served: Scheme) -> dict[str, torch.Tensor]:
        """Return the tensors of a GPTQ or AWQ module of ``served``; groups may become finer.

        Raises:
            CheckpointError: rows are not grouped in order, or zero points vary where the config
                promised one.
        """
        n, k = self.shape
        assert scheme.group_size is not None and served.group_size is not None
        in_order = torch.arange(k, device=self.group.device) // scheme.group_size
        if not torch.equal(self.group, in_order):
            raise CheckpointError(
                "g_idx: rows are not grouped in order though the checkpoint's config.json promises "
                f"it; expected row k in group k // {scheme.group_size}. Correct the config, or "
                "choose another source."
            )
        middle = 1 << (scheme.bits - 1)
        if scheme.symmetric and bool((self.zeros != middle).any()):
            raise CheckpointError(
                "zero points: they vary though the checkpoint's config.json says symmetric; "
                f"expected {middle} everywhere. Correct the config, or choose another source."
            )
        times, groups = scheme.group_size // served.group_size, -(-k // served.group_size)
        zeros = self.zeros.repeat_interleave(times, 0)[:groups] - served.zero_offset
        scales = self.scales.repeat_interleave(times, 0)[:groups]
        order = AWQ_ORDER if served.format == "awq" else ()
        return {
            "qweight": self._words(served),
            "qzeros": pack(zeros, served.bits, order),
            "scales": scales.contiguous(),
        }

    def _words(self, served: Scheme) -> torch.Tensor:
        """Pack the codes: along K for GPTQ, along N in AutoAWQ's order for AWQ."""
        layout, stored_words = self.words
        if layout == served.format:
            return stored_words.contiguous()
        n, k = self.shape
        each = 32 // served.bits
        is_awq = served.format == "awq"
        shape = (k, n // each) if is_awq else (k // each, n)
        words = torch.empty(shape, dtype=torch.int32, device=self.scales.device)
        rows = 32 * max(1, CHUNK_WEIGHTS // max(1, 32 * k))
        for low in range(0, n, rows):
            high = min(low + rows, n)
            codes = self.codes_of(slice(low, high))
            if is_awq:
                words[:, low // each : high // each] = pack(codes, served.bits, AWQ_ORDER)
            else:
                words[:, low:high] = pack(codes.t(), served.bits).t()
        return words
