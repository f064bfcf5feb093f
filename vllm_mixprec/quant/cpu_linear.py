# SPDX-License-Identifier: Apache-2.0
"""Linear methods for x86 CPUs; parameters as in :mod:`.cpu`."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BlockQuantScaleParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.quant.cpu_int4_w16 import int4_w16_linear, pack_int4_w16
from vllm_mixprec.quant.cpu_ops import (
    clear_zero_tiles,
    fp8_channel_linear,
    fp8_linear,
    int4_linear,
    pack_plain,
    unit_scale,
)
from vllm_mixprec.quant.int4_blocks import Int4Layout, pack_int4

GPTQ_SYMMETRIC_ZERO = 0x77777777  # eight times zero point 8, stored as GPTQ v1 does: minus one


class _CpuLinearMethod(LinearMethodBase):
    """What the packed linear methods share: parameters in, one tensor list out."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def _finish(self, layer: Module, stored: tuple[str, ...], **packed: torch.Tensor) -> None:
        """Replace the ``stored`` parameters by the kernel's tensors, freeing the former."""
        for name in set(stored) - packed.keys():
            delattr(layer, name)
        for name, tensor in packed.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))

    def apply(
        self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = self._matmul(layer, rows)
        if bias is not None:
            out = out + bias
        return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])

    def _matmul(self, layer: Module, x: torch.Tensor) -> torch.Tensor:
        """Return (M, N) for ``x`` (M, K), in its dtype or float32."""
        raise NotImplementedError


@register_weight_loader_v2_supported_method
class CpuFp8LinearMethod(_CpuLinearMethod):
    """FP8 block weights (N, K) E4M3 with float32 scales (N / block_n, K / block_k); W8A16."""

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        assert self.scheme.block is not None
        block_n, block_k = self.scheme.block
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        loader = extra_weight_attrs["weight_loader"]
        layer.weight_block_size = [block_n, block_k]  # vLLM's fused loaders cut scales by it
        _create_fp8_codes(layer, rows, columns, loader)
        layer.register_parameter(
            "weight_scale_inv",
            BlockQuantScaleParameter(
                data=torch.empty(-(-rows // block_n), -(-columns // block_k), dtype=torch.float32),
                input_dim=1,
                output_dim=0,
                weight_loader=loader,
            ),
        )

    def process_weights_after_loading(self, layer: Module) -> None:
        weight, scale = layer.weight.data, layer.weight_scale_inv.data.contiguous()
        scale = clear_zero_tiles(weight, scale, self.scheme.block)
        stored = ("weight", "weight_scale_inv")
        self._finish(layer, stored, weight=pack_plain(weight), weight_scale_inv=scale)
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):
            # MLA's kv_b_proj, whose weights attention multiplies by itself. With AMX it takes FP8
            # for a checkpoint's and quantises it anew, unless there is no block: then it has
            # apply() dequantise them.
            layer.weight_block_size = None

    def _matmul(self, layer: Module, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, layer.weight, layer.weight_scale_inv, list(self.scheme.block))


@register_weight_loader_v2_supported_method
class CpuFp8ChannelLinearMethod(_CpuLinearMethod):
    """FP8 weights (N, K) E4M3 with a float32 scale a row (N, 1); W8A16."""

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        loader = extra_weight_attrs["weight_loader"]
        _create_fp8_codes(layer, rows, columns, loader)
        layer.register_parameter(
            "weight_scale",
            ChannelQuantScaleParameter(
                data=torch.empty(rows, 1, dtype=torch.float32), output_dim=0, weight_loader=loader
            ),
        )

    def process_weights_after_loading(self, layer: Module) -> None:
        weight, columns = layer.weight.data, layer.weight.shape[1]
        scale = clear_zero_tiles(weight, layer.weight_scale.data, (1, columns))
        self._finish(
            layer,
            ("weight", "weight_scale"),
            weight=pack_plain(weight),
            weight_scale=scale.view(-1),
            unit_scale=unit_scale(columns),
        )

    def _matmul(self, layer: Module, x: torch.Tensor) -> torch.Tensor:
        return fp8_channel_linear(x, layer.weight, layer.unit_scale, layer.weight_scale)


def _create_fp8_codes(layer: Module, rows: int, columns: int, loader: Callable[..., None]) -> None:
    weight = ModelWeightParameter(
        data=torch.empty(rows, columns, dtype=torch.float8_e4m3fn),
        input_dim=1,
        output_dim=0,
        weight_loader=loader,
    )
    layer.register_parameter("weight", weight)


class _CpuInt4LinearMethod(_CpuLinearMethod):
    """GPTQ or AWQ int4 weights, symmetric or not, with the parameters of their checkpoints."""

    def _scale_dtype(self, params_dtype: torch.dtype) -> torch.dtype:
        raise NotImplementedError

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        group_size = self.scheme.group_size
        assert group_size is not None
        rows, columns = input_size_per_partition, sum(output_partition_sizes)
        is_awq = self.scheme.format == "awq"
        loader = extra_weight_attrs["weight_loader"]
        layer.register_parameter(
            "qweight",
            PackedvLLMParameter(
                data=torch.empty(
                    (rows, columns // 8) if is_awq else (rows // 8, columns), dtype=torch.int32
                ),
                input_dim=0,
                output_dim=1,
                packed_dim=1 if is_awq else 0,
                packed_factor=8,
                weight_loader=loader,
            ),
        )
        layer.register_parameter(
            "scales",
            GroupQuantScaleParameter(
                data=torch.empty(
                    rows // group_size, columns, dtype=self._scale_dtype(params_dtype)
                ),
                input_dim=0,
                output_dim=1,
                weight_loader=loader,
            ),
        )
        layer.register_parameter(
            "qzeros",
            PackedvLLMParameter(
                data=torch.empty(rows // group_size, columns // 8, dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=1,
                packed_factor=8,
                weight_loader=loader,
            ),
        )


@register_weight_loader_v2_supported_method
class CpuInt4LinearMethod(_CpuInt4LinearMethod):
    """Int4 weights with float32 scales; the kernel rounds activations to int8 a token."""

    def _scale_dtype(self, params_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def process_weights_after_loading(self, layer: Module) -> None:
        zeros, layout = int4_layout(self.scheme, layer.qzeros.data)
        weight, scale, zero = pack_int4(layer.qweight.data, layer.scales.data, zeros, layout)
        self._finish(
            layer, ("qweight", "qzeros", "scales"), qweight=weight, qzeros=zero, scales=scale
        )

    def _matmul(self, layer: Module, x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, layer.qweight, layer.scales, layer.qzeros)


@register_weight_loader_v2_supported_method
class CpuInt4W16LinearMethod(_CpuInt4LinearMethod):
    """Int4 weights with scales in the dtype that the model computes in, bfloat16 or float16."""

    def _scale_dtype(self, params_dtype: torch.dtype) -> torch.dtype:
        return params_dtype  # of what the kernel is given, as vLLM's own methods for it hold them

    def process_weights_after_loading(self, layer: Module) -> None:
        weight, zeros = pack_int4_w16(self.scheme, layer.qweight.data, layer.qzeros.data)
        packed = {"qweight": weight, "scales": layer.scales.data}
        if zeros is not None:
            packed["qzeros"] = zeros
        self._finish(layer, ("qweight", "qzeros", "scales"), **packed)

    def _matmul(self, layer: Module, x: torch.Tensor) -> torch.Tensor:
        zeros = getattr(layer, "qzeros", None)
        return int4_w16_linear(self.scheme, x, layer.qweight, layer.scales, zeros)


def int4_layout(scheme: Scheme, zeros: torch.Tensor) -> tuple[torch.Tensor, Int4Layout]:
    """Return the zero points to block a weight with, and the layout of both.

    A symmetric GPTQ v2 checkpoint's zero points are one constant.
    """
    if scheme.format == "awq":
        return zeros, Int4Layout.AWQ
    if scheme.zero_offset != 1:
        assert scheme.symmetric, "routing lays asymmetric GPTQ v2 weights out as AWQ"
        zeros = torch.full_like(zeros, GPTQ_SYMMETRIC_ZERO)
    return zeros, Int4Layout.GPTQ
