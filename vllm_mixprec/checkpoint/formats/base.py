# SPDX-License-Identifier: Apache-2.0
"""What every format file speaks of: the scheme of a weight, a module, an entry of ``FORMATS``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_mixprec.checkpoint.header import TensorSpec

Tensors = Mapping[str, TensorSpec]
"""The tensors of one module: suffix ("weight", "qweight", ...) -> spec."""

PLAIN_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Unquantised format -> safetensors dtype."""

SCALE_DTYPES = ("F32", "BF16", "F16")

WEIGHTS = frozenset({"weight", "qweight", "weight_packed"})
"""Suffixes that hold a weight's numbers, in whatever form."""

WEIGHT_COMPANIONS = frozenset(
    {
        "weight_scale_inv",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "scales",
        "qzeros",
        "g_idx",
    }
)
"""Suffixes that mean nothing without a quantised weight."""

ACTIVATION_SCALES = frozenset(
    {"input_scale", "output_scale", "q_scale", "k_scale", "v_scale", "prob_scale"}
)
"""Suffixes that may stand beside any quantised weight; the weight's value does not need them."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a module's weight is stored. Modules of equal schemes can share one kernel call.

    Attributes:
        format: a key of ``FORMATS``.
        bits: of one weight.
        group_size: gptq, awq, ct_pack: weights along K that share a scale; a -1 in the config has
            become K.
        block: fp8_block, ct_fp8: weights of N and of K that share a scale; MX is (1, 32).
        symmetric: gptq, awq, ct_pack: the config promises the zero point ``2 ** (bits - 1)``
            everywhere.
        desc_act: gptq, ct_pack: ``g_idx`` is not simply ``k // group_size``, as the config has
            it; only a reader of the data can verify it.
        zero_offset: what is added to a stored zero point. gptq: 1 for the original layout, 0 for
            ``checkpoint_format`` "gptq_v2". awq, ct_pack: 0.
        granularity: ct_fp8 without a block: what shares a scale, "channel" (a row) or "tensor".
        scale_format: the fp8 formats: "float"; "e8m0", a byte ``b`` for ``2 ** (b - 127)``;
            "e8m0_packed", four such bytes to an int32 along K, the lowest first.
    """

    format: str
    bits: int
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    desc_act: bool = False
    zero_offset: int = 1
    granularity: str | None = None
    scale_format: str = "float"

    @property
    def is_quantized(self) -> bool:
        """Whether the weight has scales, and so needs a kernel of its own or dequantising."""
        return self.format not in PLAIN_DTYPES

    @property
    def label(self) -> str:
        """The scheme in a few words: "bf16", "fp8_block 128x128", "gptq int4 g64 asym"."""
        parts = [self.format]
        if self.block is not None:
            parts.append(f"{self.block[0]}x{self.block[1]}")
        if self.granularity is not None:
            parts.append(self.granularity)
        if self.group_size is not None:
            parts.append(f"int{self.bits} g{self.group_size}")
        if not self.symmetric:
            parts.append("asym")
        if self.desc_act:
            parts.append("act-order")
        if self.scale_format != "float":
            parts.append(self.scale_format)
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Module:
    """A module of a checkpoint with all the tensors that belong together.

    Attributes:
        name: "model.layers.0.self_attn.q_proj". A bare parameter belongs to its parent:
            ``mlp.gate.e_score_correction_bias`` to ``mlp.gate``.
        tensors: suffix ("weight", "weight_scale_inv", "qweight", ...) -> spec.
        scheme: how the weight is stored.
        shape: logical shape of the weight, whatever the packing: (N, K) = (out, in) of a linear
            layer. Of a module without a weight, the shape of its largest tensor.
        problems: scales missing or of the wrong count or dtype, shapes that do not fit; each
            begins with the tensor's name. Empty for a sound module.
        fused: what the files call the module that this one is a part of, such as
            "model.layers.0.self_attn.qkv_proj"; None for a module that is stored by itself.
    """

    name: str
    tensors: dict[str, TensorSpec]
    scheme: Scheme
    shape: tuple[int, ...]
    problems: tuple[str, ...]
    fused: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the module in the file."""
        return sum(spec.nbytes for spec in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Format:
    """One way of storing a weight.

    Attributes:
        name: its key in ``FORMATS``.
        suffixes: tensors that a module of this format may have; others are left over. Empty:
            any.
        shape: the logical shape of the weight.
        problems: what does not fit together, one line each.
    """

    name: str
    suffixes: frozenset[str]
    shape: Callable[[Tensors, Scheme], tuple[int, ...]]
    problems: Callable[[Tensors, Scheme], list[str]]


def main_tensor(tensors: Tensors) -> TensorSpec:
    """Return the weight, or the largest tensor of a module that has bare parameters only."""
    weight = tensors.get("weight")
    return max(tensors.values(), key=lambda spec: spec.nbytes) if weight is None else weight


def misfit(spec: TensorSpec, expected: str, why: str) -> str:
    """Word the problem of a tensor whose dtype or shape does not fit."""
    return (
        f"{spec.name}: {spec.dtype} {list(spec.shape)}, expected {expected} ({why}). "
        "Re-export the module, or choose another source."
    )


def missing(tensors: Tensors, suffix: str, owner: str) -> str:
    """Word the problem of a tensor that is absent beside ``owner``."""
    spec = tensors[owner]
    return (
        f"{spec.name.removesuffix(owner)}{suffix}: missing, though {owner} is "
        f"{spec.dtype} {list(spec.shape)}. Re-export the module, or choose another source."
    )


def left_over(spec: TensorSpec, why: str) -> str:
    """Word the problem of a tensor that nothing uses."""
    return f"{spec.name}: left over, {why}. Re-export the module, or choose another source."
