# SPDX-License-Identifier: Apache-2.0
"""The rows of a route table: where one module comes from and how it is served."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vllm_mixprec.checkpoint.formats import FORMATS, PLAIN_DTYPES, Scheme
from vllm_mixprec.checkpoint.formats.base import Looks
from vllm_mixprec.checkpoint.header import TensorSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is spread; rank = (dp_rank * pp size + pp_rank) * tp size + tp_rank.

    Data-parallel replicas share one set of routed experts, which is cut over the tensor-parallel
    ranks of all of them; the rest each has whole. Under ``expert_parallel`` ranks hold whole
    experts, not slices. With ``draft`` the model's own MTP layers are loaded as the draft model, on
    the last stage.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel: bool = False
    draft: bool = False
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the routed experts of a stage, in slices or whole."""
        return self.tensor_parallel_size * self.data_parallel_size


class Route(NamedTuple):
    """One module of the model.

    Attributes:
        module: name in the base's spelling.
        source: the plan's name of the checkpoint that it comes from.
        stored: how that checkpoint holds it.
        served: how vLLM computes with it: ``stored``, another layout of the same numbers, or the
            base's dtype when widened or cast.
        reason: why it is widened; None when it is not.
        tensors: suffix -> spec in the source's files; a spec's name is the source's own.
        shape: logical shape of the weight, (N, K) for a linear.
        looks: the source's module's, while all its tensors are here; as ``Module`` has it.
        kernel: name in ``KERNELS`` of what serves it packed; None when it is not served packed.
    """

    module: str
    source: str
    stored: Scheme
    served: Scheme
    reason: str | None
    tensors: Mapping[str, TensorSpec]
    shape: tuple[int, ...]
    looks: Looks | None = None
    kernel: str | None = None

    @property
    def widened(self) -> bool:
        """Whether a packed weight is dequantised at load."""
        return self.stored.is_quantized and not self.served.is_quantized

    @property
    def relaid(self) -> bool:
        """Whether a packed weight is laid out anew at load, for the kernel of another format."""
        return self.served.is_quantized and self.served != self.stored

    @property
    def stored_bytes(self) -> int:
        """Bytes of its tensors in the source's files."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def served_bytes(self) -> int:
        """Bytes that its tensors take in memory, over all ranks, each counted once."""
        return sum(size_bytes for _, size_bytes in self.served_tensors())

    def served_tensors(self) -> list[tuple[str, int]]:
        """Return (suffix, bytes in memory) of each tensor as served."""
        if self.relaid:
            held_bytes = FORMATS[self.served.format].held_bytes
            assert held_bytes is not None, f"{self.served.label} is no layout of another format"
            kept = [(s, spec.nbytes) for s, spec in self.tensors.items() if s == "bias"]
            return [*held_bytes(self.served, self.shape).items(), *kept]
        if self.served.is_quantized:
            return [(suffix, spec.nbytes) for suffix, spec in self.tensors.items()]
        itemsize = self.served.bits // 8
        if self.widened:
            return [("weight", math.prod(self.shape) * itemsize)] + [
                (suffix, math.prod(spec.shape) * itemsize)
                for suffix, spec in self.tensors.items()
                if suffix == "bias"
            ]
        stored_dtype = PLAIN_DTYPES[self.stored.format]
        return [
            (
                suffix,
                math.prod(spec.shape) * itemsize if spec.dtype == stored_dtype else spec.nbytes,
            )
            for suffix, spec in self.tensors.items()
        ]


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts of one layer that one kernel call serves; ``experts`` are logical ids, sorted."""

    scheme: Scheme
    experts: tuple[int, ...]
