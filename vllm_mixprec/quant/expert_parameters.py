# SPDX-License-Identifier: Apache-2.0
"""Parameters of routed experts in the checkpoint's layout, so that vLLM's own loaders cut them."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported
from vllm.model_executor.utils import set_weight_attrs

from vllm_mixprec.checkpoint.formats import Scheme

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts


class ExpertSizes(NamedTuple):
    """Experts on this rank, hidden size, and what this rank holds of an expert's inner size."""

    experts: int
    hidden: int
    inner: int

    def weights(self) -> tuple[tuple[str, int, int], ...]:
        """(name, N, K) of both logical weights of an expert."""
        return ("w13", 2 * self.inner, self.hidden), ("w2", self.hidden, self.inner)


def create_plain(
    layer: Module, sizes: ExpertSizes, dtype: torch.dtype, attributes: dict[str, Any]
) -> None:
    """Add ``w13_weight`` and ``w2_weight`` [experts, N, K]."""
    for name, rows, columns in sizes.weights():
        _create(layer, f"{name}_weight", (sizes.experts, rows, columns), dtype, attributes)


def create_fp8_block(
    layer: Module, sizes: ExpertSizes, scheme: Scheme, attributes: dict[str, Any]
) -> None:
    """Add E4M3 weights, and ``*_weight_scale_inv`` float32 [experts, N / block_n, K / block_k]."""
    assert scheme.block is not None
    block_n, block_k = scheme.block
    scales = attributes | {"quant_method": FusedMoeWeightScaleSupported.BLOCK.value}
    for name, rows, columns in sizes.weights():
        shape = (sizes.experts, rows, columns)
        _create(layer, f"{name}_weight", shape, torch.float8_e4m3fn, attributes)
        shape = (sizes.experts, -(-rows // block_n), -(-columns // block_k))
        _create(layer, f"{name}_weight_scale_inv", shape, torch.float32, scales)


def create_fp8_channel(layer: Module, sizes: ExpertSizes, attributes: dict[str, Any]) -> None:
    """Add E4M3 weights, and ``*_weight_scale`` float32 [experts, N, 1]."""
    scales = attributes | {"quant_method": FusedMoeWeightScaleSupported.CHANNEL.value}
    for name, rows, columns in sizes.weights():
        shape = (sizes.experts, rows, columns)
        _create(layer, f"{name}_weight", shape, torch.float8_e4m3fn, attributes)
        _create(layer, f"{name}_weight_scale", (sizes.experts, rows, 1), torch.float32, scales)


def create_int4(
    layer: Module,
    sizes: ExpertSizes,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    attributes: dict[str, Any],
) -> None:
    """Add ``*_qweight`` int32 [experts, K / 8, N], or as AWQ packs it [experts, K, N / 8],
    ``*_scales`` [experts, K / group size, N] and ``*_qzeros`` int32 [experts, K / group size,
    N / 8], of 4 bits.
    """
    group_size = scheme.group_size
    assert group_size is not None
    attributes = attributes | {
        "quant_method": FusedMoeWeightScaleSupported.GROUP.value,
        "is_transposed": True,
    }
    for name, columns, rows in sizes.weights():
        groups = 1 if group_size < 0 else rows // group_size  # -1: one group spans all of K
        words = (rows, columns // 8) if scheme.format == "awq" else (rows // 8, columns)
        _create(layer, f"{name}_qweight", (sizes.experts, *words), torch.int32, attributes)
        shape = (sizes.experts, groups, columns)
        _create(layer, f"{name}_scales", shape, scale_dtype, attributes)
        shape = (sizes.experts, groups, columns // 8)
        _create(layer, f"{name}_qzeros", shape, torch.int32, attributes)


def _create(
    layer: Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]
) -> None:
    parameter = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, attributes)


def is_plain_silu(layer: "RoutedExperts") -> bool:
    """Whether experts compute ``silu(gate) * up`` and no more, which is all that the kernels do."""
    return (
        layer.activation.value == "silu"
        and layer.swiglu_limit in (None, 0)
        and layer.swiglu_alpha in (None, 1)
        and layer.swiglu_beta in (None, 0)
    )
