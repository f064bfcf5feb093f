# SPDX-License-Identifier: Apache-2.0
"""What every format file speaks of: the scheme of a weight, a module, an entry of ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_mixprec.checkpoint.header import TensorSpec

if TYPE_CHECKING:
    import torch

    from vllm_mixprec.checkpoint.formats.config import QuantizationConfig
    from vllm_mixprec.checkpoint.packing import StoredWeight

Tensors = Mapping[str, TensorSpec]
"""The tensors of one module: suffix ("weight", "qweight", ...) -> spec."""

Looks = tuple[str | tuple[str, tuple[int, ...]], ...]
"""Of a module's tensors first every suffix, then every dtype with its shape."""

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
        "weight_global_scale",
        "weight_scale_2",
        "weight_shape",
        "weight_g_idx",
        "scales",
        "qzeros",
        "g_idx",
    }
)
"""Suffixes that mean nothing without a quantised weight."""

ACTIVATION_SCALES = frozenset(
    {
        "input_scale",
        "input_global_scale",
        "output_scale",
        "q_scale",
        "k_scale",
        "v_scale",
        "prob_scale",
    }
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
        block: fp8_block, ct_fp8, nvfp4, mxfp4: weights of N and of K that share a scale; MX is
            (1, 32).
        symmetric: gptq, awq, ct_pack: the config promises the zero point ``2 ** (bits - 1)``
            everywhere.
        desc_act: gptq, ct_pack: ``g_idx`` is not simply ``k // group_size``, as the config has
            it; only a reader of the data can verify it.
        zero_offset: what is added to a stored zero point. gptq: 1 for the original layout, 0 for
            ``checkpoint_format`` "gptq_v2". awq, ct_pack: 0.
        granularity: ct_fp8 without a block: what shares a scale, "channel" (a row) or "tensor".
        scale_format: the fp8 and fp4 formats: "float"; "e8m0", a byte ``b`` for ``2 ** (b - 127)``;
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
        looks: the suffixes, dtypes and shapes of the tensors, one object for all modules of a
            checkpoint that have the same, and no other module's. What is found out of one of those
            holds of all. None where the tensors alone do not decide how a module is stored, and
            once ``replace`` has made another module of it.
    """

    name: str
    tensors: dict[str, TensorSpec]
    scheme: Scheme
    shape: tuple[int, ...]
    problems: tuple[str, ...]
    fused: str | None = None
    looks: Looks | None = field(default=None, init=False, repr=False, compare=False)

    def set_looks(self, looks: Looks) -> None:
        """Say which modules of the checkpoint this one is alike; for who makes it."""
        object.__setattr__(self, "looks", looks)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the module in the file."""
        return sum(spec.nbytes for spec in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Format:
    """One way of storing a weight: everything that the package knows of it.

    Attributes:
        name: its key in ``FORMATS``.
        suffixes: tensors that a module of this format may have; others are left over. Empty:
            any.
        recognise: the scheme of a module's tensors (with the config and the module's name), None
            when they are of another family; formats of one family share it. Raises
            UnsupportedError for a variant that cannot be read.
        shape: the logical shape of the weight.
        problems: what does not fit together, one line each.
        read: the weight behind a module's tensors (suffix -> tensor as loaded), which can be
            dequantised; raises as ``checkpoint.dequantize.dequantize`` does. It is what imports
            torch, and does so when it is called.
        layouts: schemes of other layouts that hold the same numbers, not one changed, best first.
        held_bytes: suffix -> bytes in memory of a weight (N, K) that is served so; of formats
            that are another's layout. Scales count as float32.
    """

    name: str
    suffixes: frozenset[str]
    recognise: Callable[[Tensors, QuantizationConfig, str], Scheme | None]
    shape: Callable[[Tensors, Scheme], tuple[int, ...]]
    problems: Callable[[Tensors, Scheme], list[str]]
    read: Callable[[Scheme, Mapping[str, torch.Tensor]], StoredWeight]
    layouts: Callable[[Scheme], tuple[Scheme, ...]] = lambda scheme: ()
    held_bytes: Callable[[Scheme, tuple[int, ...]], dict[str, int]] | None = None


KERNEL_GROUPS = (128, 64, 32)
"""Group sizes that packed kernels take; a larger group is as many of these with one scale."""


def integer_layouts(scheme: Scheme) -> tuple[Scheme, ...]:
    """List the GPTQ and AWQ layouts of integers in groups, whole groups first.

    Symmetric weights are GPTQ v1's; zero points that vary are AWQ's, which holds 0 to 15, unless
    they are GPTQ v1's own 1 to 16. Weights in act-order have no other layout.
    """
    if scheme.desc_act or scheme.group_size is None:
        return ()
    whole = scheme.group_size
    groups = (whole, *(size for size in KERNEL_GROUPS if size < whole and whole % size == 0))
    if scheme.symmetric or (scheme.format == "gptq" and scheme.zero_offset == 1):
        name, zero_offset = "gptq", 1
    elif scheme.bits == 4:
        name, zero_offset = "awq", 0
    else:
        return ()
    made = (
        Scheme(
            name,
            bits=scheme.bits,
            group_size=size,
            symmetric=scheme.symmetric,
            zero_offset=zero_offset,
        )
        for size in groups
    )
    return tuple(layout for layout in made if layout != scheme)


def integer_bytes(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, int]:
    """Count the bytes of a GPTQ or AWQ module of (N, K), its scales in float32."""
    n, k = shape
    groups = -(-k // (scheme.group_size or k or 1))
    return {
        "qweight": n * k * scheme.bits // 8,
        "qzeros": groups * n * scheme.bits // 8,
        "scales": groups * n * 4,
    }


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
