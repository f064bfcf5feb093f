# SPDX-License-Identifier: Apache-2.0
"""Weights back from their stored form, or the same codes and scales in another layout."""

import torch

from vllm_mixprec.checkpoint.formats import FORMATS, Format, Scheme
from vllm_mixprec.checkpoint.packing import Tensors
from vllm_mixprec.errors import UnsupportedError


def dequantize(scheme: Scheme, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """Return a module's weight as a plain tensor.

    Computed in float32 and rounded once to ``dtype``, so that it is exact with respect to the
    stored codes and scales.

    Args:
        scheme: how the module is stored.
        tensors: suffix -> tensor, as loaded from the file, all on one device; shapes and dtypes
            are in the docstring of the format's file in ``checkpoint.formats``. ``g_idx`` or
            ``weight_g_idx``, when the file has it, is what decides the group of a row.
        dtype: of the result.

    Returns:
        A new tensor (N, K) on the same device, contiguous; of an unquantised weight of the same
        dtype the tensor itself.

    Raises:
        CheckpointError: a tensor is missing, or its shape or the values of ``g_idx`` do not fit.
        UnsupportedError: the scheme is not one that this version reads.
    """
    return _known(scheme).read(scheme, tensors).dequantize(dtype)


def relayout(scheme: Scheme, served: Scheme, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return a module's tensors in the layout of another scheme, not one value changed.

    Args:
        scheme: how the module is stored.
        served: one of its format's ``layouts(scheme)``.
        tensors: as in :func:`dequantize`.

    Returns:
        Suffix -> tensor, as a checkpoint of ``served`` stores them.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or zero points or groups are not
            those that the config promised.
        UnsupportedError: there is no such layout of these tensors.
    """
    known = _known(scheme)
    layouts = known.layouts(scheme)
    if served not in layouts:
        raise UnsupportedError(
            f"{scheme.label} cannot be laid out as {served.label}, expected one of "
            f"{', '.join(layout.label for layout in layouts) or 'none'}. Report this plan."
        )
    return known.read(scheme, tensors).lay_out(scheme, served)


def _known(scheme: Scheme) -> Format:
    try:
        return FORMATS[scheme.format]
    except KeyError:
        raise UnsupportedError(
            f'format "{scheme.format}" cannot be dequantised, expected one of '
            f"{', '.join(FORMATS)}. Choose another source."
        ) from None
