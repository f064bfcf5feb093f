# SPDX-License-Identifier: Apache-2.0
"""Expert methods for x86 CPUs, where stock vLLM has no FP8 and no int4 experts without AMX.

Every method keeps its weights in the checkpoint's precision: parameters are created in the
checkpoint's layout, so that vLLM's own weight loaders cut the tensor-parallel shards, and are
reordered once for the kernel after loading.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.quant.cpu_linear import int4_layout
from vllm_mixprec.quant.cpu_ops import (
    ExpertKernel,
    clear_zero_tiles,
    mixed_experts,
    pack_plain,
    pack_weight,
)
from vllm_mixprec.quant.expert_parameters import (
    ExpertSizes,
    create_fp8_block,
    create_fp8_channel,
    create_int4,
    create_plain,
    is_plain_silu,
)
from vllm_mixprec.quant.int4_blocks import (
    block_in_place,
    blocked_in_place,
    has_room,
    pack_int4,
    with_room,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts


_PARTS = ("w13", "w2")
_PACKED = "mixprec_packed"  # attribute of a layer: the slots of the experts that are packed


class CpuExpertsMethod(FusedMoEMethodBase):
    """Routed experts of one format through vLLM's kernels; a subclass for each format."""

    kernel: ExpertKernel

    def __init__(self, scheme: Scheme, layer: "RoutedExperts") -> None:
        super().__init__(layer.moe_config)
        self.scheme = scheme
        # The last guard: routing widens, or refuses, what config.json and tensors tell of.
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
        for part in _PARTS:
            names = [name for name in self.names if name.startswith(part)]
            packed = self.pack(*(getattr(layer, name).data for name in names))
            for name, tensor in zip(names, packed, strict=True):
                delattr(layer, name)
                layer.register_parameter(name, Parameter(tensor, requires_grad=False))

    def pack(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one weight, its scales and its zero points, as :attr:`names` orders them.

        In the kernel's layout, for all experts of a layer.
        """
        raise NotImplementedError


class CpuInPlaceExpertsMethod(CpuExpertsMethod):
    """Experts that are packed each by itself and where it is: as soon as they are loaded."""

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        packed = layer.__dict__.pop(_PACKED, frozenset())
        slots = range(len(getattr(layer, self.names[0])))
        self.pack_slots(layer, [slot for slot in slots if slot not in packed])
        del layer.__dict__[_PACKED]
        super().process_weights_after_loading(layer)

    def pack_slots(self, layer: "RoutedExperts", slots: list[int]) -> None:
        """Pack some experts of a layer, for good: the rest is left to vLLM's call."""
        for part in _PARTS:
            tensors = [getattr(layer, name).data for name in self.names if name.startswith(part)]
            for slot in slots if self.can_in_place(*tensors) else ():
                self.pack_in_place(*(tensor[slot : slot + 1] for tensor in tensors))
        layer.__dict__.setdefault(_PACKED, set()).update(slots)

    def can_in_place(self, *tensors: torch.Tensor) -> bool:
        """Whether a weight of all experts can be packed where it is; else :meth:`pack` does all."""
        return True

    def pack_in_place(self, *tensors: torch.Tensor) -> None:
        """Reorder one weight of some experts, and mend its scales, as :attr:`names` orders them."""
        raise NotImplementedError

    def pack(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors


class CpuBf16ExpertsMethod(CpuInPlaceExpertsMethod):
    """bf16 experts; about twice as fast as the "vec" kernel that stock vLLM takes without AMX.

    With AMX the kernel is stock's.
    """

    names = ("w13_weight", "w2_weight")

    def __init__(
        self,
        scheme: Scheme,
        layer: "RoutedExperts",
        kernel: ExpertKernel = ExpertKernel.BF16,
    ) -> None:
        super().__init__(scheme, layer)
        self.kernel = kernel

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

    def pack_in_place(self, weight: torch.Tensor) -> None:
        pack_weight(self.kernel, weight)


class CpuFp8ExpertsMethod(CpuInPlaceExpertsMethod):
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

    def pack_in_place(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        assert self.scheme.block is not None
        clear_zero_tiles(weight, scale, self.scheme.block)
        pack_plain(weight)


class CpuFp8ChannelExpertsMethod(CpuInPlaceExpertsMethod):
    """FP8 experts with a scale a row, W8A16."""

    kernel = ExpertKernel.FP8_CHANNEL
    names = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")

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
        create_fp8_channel(layer, sizes, extra_weight_attrs)

    def pack_in_place(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        clear_zero_tiles(weight, scale, (1, weight.shape[2]))
        pack_plain(weight)

    def pack(self, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return weight, scale.squeeze(2)


class CpuInt4ExpertsMethod(CpuInPlaceExpertsMethod):
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

    def can_in_place(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> bool:
        # Parameters that vLLM makes anew for a reload have no room.
        return has_room(weight, scale, int4_layout(self.scheme, zero)[1])

    def pack_in_place(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> None:
        block_in_place(weight, scale, *int4_layout(self.scheme, zero))

    def pack(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        packed = blocked_in_place if self.can_in_place(weight, scale, zero) else pack_int4
        return packed(weight, scale, *int4_layout(self.scheme, zero))
