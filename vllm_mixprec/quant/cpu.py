# SPDX-License-Identifier: Apache-2.0
"""Layer methods for x86 CPUs, where stock vLLM has no FP8 and no int4 experts without AMX.

Every method keeps its weights in the checkpoint's precision: parameters are created in the
checkpoint's layout, so that vLLM's own weight loaders cut the tensor-parallel shards, and are
reordered once for the kernel after loading.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BlockQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.quant.cpu_ops import (
    ExpertKernel,
    Int4Layout,
    fp8_linear,
    int4_linear,
    mixed_experts,
    pack_int4,
    pack_plain,
    with_room,
)
from vllm_mixprec.quant.expert_parameters import (
    ExpertSizes,
    create_fp8_block,
    create_int4,
    create_plain,
    is_plain_silu,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

GPTQ_SYMMETRIC_ZERO = 0x77777777  # eight times zero point 8, stored as GPTQ v1 does: minus one


class _CpuLinearMethod(LinearMethodBase):
    """What the packed linear methods share: parameters in, one tensor list out."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def _finish(self, layer: Module, stored: tuple[str, ...], **packed: torch.Tensor) -> None:
        """Replace the ``stored`` parameters by the kernel's tensors, freeing the former."""
        for name in stored:
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
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _matmul(self, layer: Module, x: torch.Tensor) -> torch.Tensor:
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
        layer.register_parameter(
            "weight",
            ModelWeightParameter(
                data=torch.empty(rows, columns, dtype=torch.float8_e4m3fn),
                input_dim=1,
                output_dim=0,
                weight_loader=loader,
            ),
        )
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
        self._finish(
            layer,
            ("weight", "weight_scale_inv"),
            weight=pack_plain(layer.weight.data),
            weight_scale_inv=layer.weight_scale_inv.data.contiguous(),
        )

    def _matmul(self, layer: Module, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, layer.weight, layer.weight_scale_inv, list(self.scheme.block))


@register_weight_loader_v2_supported_method
class CpuInt4LinearMethod(_CpuLinearMethod):
    """GPTQ or AWQ int4 weights, symmetric or not; the kernel rounds activations to int8 a token."""

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
                data=torch.empty(rows // group_size, columns, dtype=torch.float32),
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

    def process_weights_after_loading(self, layer: Module) -> None:
        weight, scale, zero = _pack_int4(
            self.scheme, layer.qweight.data, layer.scales.data, layer.qzeros.data
        )
        self._finish(
            layer, ("qweight", "qzeros", "scales"), qweight=weight, qzeros=zero, scales=scale
        )

    def _matmul(self, layer: Module, x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, layer.qweight, layer.scales, layer.qzeros)


def _pack_int4(
    scheme: Scheme, weight: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block a weight for the kernel; a symmetric GPTQ v2 checkpoint's zero points are one constant.

    Returns the blocked weight, scale and zero point.
    """
    if scheme.format == "awq":
        return pack_int4(weight, scale, zeros, Int4Layout.AWQ)
    if scheme.zero_offset != 1:
        assert scheme.symmetric, "routing lays asymmetric GPTQ v2 weights out as AWQ"
        zeros = torch.full_like(zeros, GPTQ_SYMMETRIC_ZERO)
    return pack_int4(weight, scale, zeros, Int4Layout.GPTQ)


class CpuExpertsMethod(FusedMoEMethodBase):
    """Routed experts of one format through ``fused_experts_cpu``; a subclass for each format."""

    kernel: ExpertKernel

    def __init__(self, scheme: Scheme, layer: "RoutedExperts") -> None:
        super().__init__(layer.moe_config)
        self.scheme = scheme
        if self.moe.has_bias or not is_plain_silu(layer):
            raise UnsupportedError(
                f"{layer.layer_name}: experts with activation {layer.activation.value!r}"
                f"{'' if layer.swiglu_limit is None else f', clamped at {layer.swiglu_limit},'}"
                f"{' and biases' if self.moe.has_bias else ''} have no {scheme.label} kernel on "
                "this CPU; expected plain silu without biases. Route these experts to an "
                "unquantised source only"
            )
        if layer.apply_router_weight_on_input:
            raise UnsupportedError(
                f"{layer.layer_name}: the model weighs expert inputs, not outputs, which the "
                f"{scheme.label} kernel cannot. Route these experts to an unquantised source only"
            )

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int32

    @property
    def blocks(self) -> list[int]:
        return list(self.scheme.block or (0, 0))

    def get_fused_moe_quant_config(self, layer: "RoutedExperts") -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def tensors(self, layer: "RoutedExperts") -> list[torch.Tensor]:
        """The layer's packed tensors in the order that the op expects."""
        return [getattr(layer, name) for name in self.names]

    names: tuple[str, ...]  # parameter names, in the op's order

    def apply(
        self,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Module | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        return mixed_experts(
            x,
            topk_weights,
            topk_ids,
            getattr(layer, "expert_slots", None),
            self.tensors(layer),
            [int(self.kernel)],
            self.blocks,
        )

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        if layer.expert_map is not None:  # expert parallelism: -1 marks the other ranks' experts
            expert_map = layer.expert_map.to(torch.int32)
            group = torch.where(expert_map < 0, -1, 0).to(torch.int32)
            layer.register_buffer(
                "expert_slots", torch.stack([group, expert_map]), persistent=False
            )
        # w13 is replaced before w2 is packed: two copies of both would be the peak of loading.
        for part in ("w13", "w2"):
            names = [name for name in self.names if name.startswith(part)]
            packed = self.pack(*(getattr(layer, name).data for name in names))
            for name, tensor in zip(names, packed, strict=True):
                delattr(layer, name)
                layer.register_parameter(name, Parameter(tensor, requires_grad=False))

    def pack(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Reorder one weight, its scales and its zero points, as :attr:`names` orders them."""
        raise NotImplementedError


class CpuBf16ExpertsMethod(CpuExpertsMethod):
    """bf16 experts; about twice as fast as the "vec" kernel that stock vLLM takes without AMX."""

    kernel = ExpertKernel.BF16
    names = ("w13_weight", "w2_weight")

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = ExpertSizes(num_experts, hidden_size, intermediate_size_per_partition)
        create_plain(layer, sizes, params_dtype, extra_weight_attrs)

    def pack(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (pack_plain(weight),)


class CpuFp8ExpertsMethod(CpuExpertsMethod):
    """FP8 block experts, W8A16."""

    kernel = ExpertKernel.FP8_BLOCK
    names = ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv")

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = ExpertSizes(num_experts, hidden_size, intermediate_size_per_partition)
        create_fp8_block(layer, sizes, self.scheme, extra_weight_attrs)

    def pack(self, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return pack_plain(weight), scale.contiguous()


class CpuInt4ExpertsMethod(CpuExpertsMethod):
    """GPTQ or AWQ int4 experts, W4A8, symmetric or not."""

    kernel = ExpertKernel.INT4
    names = ("w13_qweight", "w2_qweight", "w13_scales", "w2_scales", "w13_qzeros", "w2_qzeros")

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = ExpertSizes(num_experts, hidden_size, intermediate_size_per_partition)
        create_int4(layer, sizes, self.scheme, torch.float32, extra_weight_attrs)
        for name, _, columns in sizes.weights():
            words, scales = getattr(layer, f"{name}_qweight"), getattr(layer, f"{name}_scales")
            words.data = with_room(words.data, columns // scales.shape[1])

    def pack(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return _pack_int4(self.scheme, weight, scale, zero)
