# SPDX-License-Identifier: Apache-2.0
"""FP8 weights with one scale a block, a row or a tensor.

``weight`` (N, K) F8_E4M3; ``weight_scale_inv`` or ``weight_scale``, multiplied in either spelling:

- block of (bn, bk) weights: (ceil(N/bn), ceil(K/bk)). DeepSeek-V3, inference/kernel.py,
  ``weight_dequant``; compressed-tensors' "block" strategy; MX (OCP Microscaling Formats 1.0) with
  blocks of 1x32.
- channel: (N, 1) or (N,).
- tensor: [] or [1].

Scales are floats; or E8M0 bytes, ``2 ** (byte - 127)``, stored as U8 or F8_E8M0; or four such
bytes to an I32, the lowest first along K, as DeepGEMM packs them
(``get_mn_major_tma_aligned_packed_ue8m0_tensor``), whose rows may have been repeated to N.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_mixprec.checkpoint.formats.base import (
    ACTIVATION_SCALES,
    SCALE_DTYPES,
    Format,
    Scheme,
    Tensors,
    left_over,
    misfit,
    missing,
)
from vllm_mixprec.checkpoint.formats.config import QuantizationConfig
from vllm_mixprec.checkpoint.formats.ct_config import WeightArgs
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from vllm_mixprec.checkpoint.packing import StoredWeight

DEFAULT_BLOCK = (128, 128)
"""What DeepSeek-V3 introduced, and every checkpoint uses whose config says nothing."""

SCALE_SUFFIXES = ("weight_scale_inv", "weight_scale")
E8M0_DTYPES = ("U8", "F8_E8M0")

CHANNEL = Scheme("fp8_channel", bits=8)
"""What kernels for a scale a row take, whatever tool stored it."""

Granularity = tuple[int, int] | str
"""What shares a scale: a block, or "channel", or "tensor"."""


def recognise_fp8(tensors: Tensors, config: QuantizationConfig, name: str) -> Scheme | None:
    """Recognise FP8, asking the config for the block and the header for everything else."""
    weight = tensors.get("weight")
    if weight is None or weight.dtype != "F8_E4M3":
        return None
    if len(weight.shape) != 2:
        raise UnsupportedError(f"FP8 of {len(weight.shape)} dimensions")
    is_ct = config.compressed is not None
    asked: Granularity | None = config.block
    if config.compressed is not None:
        args = config.compressed.weights_of(name)
        asked = _asked_by(args) if args is not None and args.kind == "float" else None
    scale = fp8_scale(tensors)
    if scale is None:
        return _scheme(is_ct, asked, weight.shape, None, "F32")
    return _scheme(is_ct, asked, weight.shape, scale.shape, scale.dtype)


def fp8_scale(tensors: Tensors) -> TensorSpec | None:
    """Return the weight's scale, in either spelling."""
    scale = tensors.get("weight_scale_inv")
    return tensors.get("weight_scale") if scale is None else scale


def fp8(name: str) -> Format:
    """Make the entry of one FP8 format."""
    suffixes = frozenset({"weight", "bias", *SCALE_SUFFIXES}) | ACTIVATION_SCALES
    return Format(
        name,
        suffixes,
        recognise_fp8,
        _shape,
        _problems,
        _read,
        _layouts,
        _held_bytes,
    )


def _asked_by(args: WeightArgs) -> Granularity:
    if args.strategy == "block" and args.block is not None:
        return args.block
    if args.strategy == "group" and args.group_size is not None:
        return 1, args.group_size
    if args.strategy in ("channel", "tensor"):
        return args.strategy
    raise UnsupportedError(f'compressed-tensors FP8 of strategy "{args.strategy}"')


@lru_cache
def _scheme(
    is_ct: bool,
    asked: Granularity | None,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...] | None,
    scale_dtype: str,
) -> Scheme:
    packed = scale_dtype == "I32"
    granularity = asked or _tell_granularity(shape, scale_shape, packed)
    if packed and isinstance(granularity, tuple) and scale_shape is not None:
        n, (bn, bk) = shape[0], granularity
        if scale_shape[:1] == (n,) and -(-n // bn) != n:
            granularity = 1, bk  # DeepGEMM has repeated the rows
    scale_format = "e8m0_packed" if packed else "e8m0" if scale_dtype in E8M0_DTYPES else "float"
    if isinstance(granularity, tuple):
        name = "ct_fp8" if is_ct else "fp8_block"
        return Scheme(name, bits=8, block=granularity, scale_format=scale_format)
    if is_ct:
        return Scheme("ct_fp8", bits=8, granularity=granularity, scale_format=scale_format)
    return Scheme(f"fp8_{granularity}", bits=8, scale_format=scale_format)


def _tell_granularity(
    shape: tuple[int, ...], scale_shape: tuple[int, ...] | None, packed: bool
) -> Granularity:
    """Tell from shapes what shares a scale; the default block where they do not tell.

    A block is guessed only of a size that tools make: one row or 16n, and 16n columns. Scales of
    (1, N) are none: they may as well be one a row.
    """
    n, k = shape
    if scale_shape is None:
        return DEFAULT_BLOCK
    if scale_shape in ((), (1,)):
        return "tensor"
    if packed or scale_shape == _grid(shape, DEFAULT_BLOCK):
        return DEFAULT_BLOCK
    if scale_shape in ((n,), (n, 1)):
        return "channel"
    if scale_shape == (1, 1):
        return "tensor"
    if len(scale_shape) == 2 and 0 not in scale_shape:
        rows, columns = scale_shape
        block = n // rows, k // columns
        is_whole = n % rows == 0 and k % columns == 0
        is_usual = (block[0] == 1 or block[0] % 16 == 0) and block[1] % 16 == 0
        if is_whole and is_usual and scale_shape != (1, n):
            return block
    return DEFAULT_BLOCK


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Count the blocks along N and K; of the last ones only a part may exist."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _shape(tensors: Tensors, scheme: Scheme) -> tuple[int, ...]:
    return tensors["weight"].shape


def _problems(tensors: Tensors, scheme: Scheme) -> list[str]:
    weight, scale = tensors["weight"], fp8_scale(tensors)
    if scale is None:
        suffix = "weight_scale_inv" if scheme.format == "fp8_block" else "weight_scale"
        return [missing(tensors, suffix, "weight")]
    n, k = weight.shape
    problems = []
    shapes: tuple[tuple[int, ...], ...]
    if scheme.block is not None:
        rows, columns = _grid(weight.shape, scheme.block)
        shapes = ((rows, -(-columns // 4) if scheme.scale_format == "e8m0_packed" else columns),)
        why = f"block {scheme.block[0]}x{scheme.block[1]}"
    elif scheme.format == "fp8_channel" or scheme.granularity == "channel":
        shapes, why = ((n, 1), (n,)), "a scale a channel"
    else:
        shapes, why = ((), (1,), (1, 1)), "a scale a tensor"
    if scale.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes[:2])
        problems.append(misfit(scale, expected, f"N={n}, K={k}, {why}"))
    dtypes = (*SCALE_DTYPES, *E8M0_DTYPES, *(("I32",) if scheme.block is not None else ()))
    if scale.dtype not in dtypes:
        problems.append(misfit(scale, " or ".join(dtypes), "dtype of a scale"))
    if "weight_scale" in tensors and scale is not tensors["weight_scale"]:
        why = "weight_scale_inv is beside it, and one of the two is used"
        problems.append(left_over(tensors["weight_scale"], why))
    return problems


def _read(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> StoredWeight:
    """DeepSeek-V3, inference/kernel.py, ``weight_dequant``: weight times the block's scale."""
    from vllm_mixprec.checkpoint import packing

    weight = packing.stored(tensors, "weight")
    if weight.dim() != 2 or (scheme.block is None and scheme.format == "fp8_block"):
        raise UnsupportedError(
            f"{scheme.format} with block {scheme.block} and a weight of shape "
            f"{list(weight.shape)}, expected two sizes and (N, K). Choose another source."
        )
    n, k = weight.shape
    block = scheme.block or (1 if _is_channel(scheme) else max(1, n), max(1, k))
    return packing.Scaled(
        shape=(n, k),
        weight=weight,
        decode=lambda rows: rows.float(),
        scale=_stored_scale(scheme, tensors, _grid((n, k), block)),
        block=block,
    )


def _is_channel(scheme: Scheme) -> bool:
    return scheme.format == "fp8_channel" or scheme.granularity == "channel"


def _stored_scale(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], grid: tuple[int, int]
) -> torch.Tensor:
    """Return the scales in float32, one a block."""
    import torch

    from vllm_mixprec.checkpoint import packing

    suffix = next((suffix for suffix in SCALE_SUFFIXES if suffix in tensors), SCALE_SUFFIXES[0])
    if scheme.scale_format == "e8m0_packed":
        words = packing.stored(tensors, suffix, (grid[0], -(-grid[1] // 4)))
        return packing.exponents(words.contiguous().view(torch.uint8)[:, : grid[1]])
    scale = packing.stored(tensors, suffix)
    if scheme.block is None and scale.numel() == grid[0] * grid[1]:
        scale = scale.reshape(grid)
    scale = packing.stored({suffix: scale}, suffix, grid)
    if scheme.scale_format == "e8m0":
        return packing.exponents(scale.view(torch.uint8))
    return scale.float()


def _layouts(scheme: Scheme) -> tuple[Scheme, ...]:
    """List layouts with float scales that hold the same scales.

    They are blocks of whole 32 rows and 128 columns, the smaller of which repeat a larger one's
    scale, and a scale a row; a scale a tensor is both.
    """
    made = [] if scheme.block is not None else [CHANNEL]
    if not _is_channel(scheme):
        rows, columns = scheme.block or (128, 128)
        sizes = [size for size in dict.fromkeys((128, rows, 32)) if rows % size == size % 32 == 0]
        blocks = [(size, 128) for size in sizes if columns % 128 == 0]
        made = [*(Scheme("fp8_block", bits=8, block=block) for block in blocks), *made]
    return tuple(layout for layout in made if layout != scheme)


def _held_bytes(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, int]:
    n, k = shape
    if scheme == CHANNEL:
        return {"weight": n * k, "weight_scale": 4 * n}
    assert scheme.block is not None, f"{scheme.label} is no layout of another format"
    rows, columns = _grid(shape, scheme.block)
    return {"weight": n * k, "weight_scale_inv": 4 * rows * columns}
