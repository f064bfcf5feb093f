# SPDX-License-Identifier: Apache-2.0
"""Random experts in the forms that checkpoints store, made on the device, and what they mean.

For the tests of tests/gpu and for scripts/bench_experts.py. Codes and scales are drawn, not
quantised: gigabytes take a second, and what a weight means in float32 is exact.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_mixprec.quant.grouped_weights import (
    ExpertTable,
    Fp8Weight,
    PlainWeight,
    Weight,
    pack_int4,
)

BLOCK = (128, 128)
GROUP = 128
FORMATS = ("bf16", "fp8", "int4")
ROWS = "fp8 rows"
"""One more: FP8 with a scale a row."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Stored = Mapping[str, Tensor]
"""Suffix of a checkpoint's tensor -> tensor, of one projection of one expert."""


@dataclass(frozen=True)
class Shape:
    """One MoE layer on one rank: ``inner`` is what the rank holds of an expert's width."""

    experts: int
    hidden: int
    inner: int
    top_k: int

    def weights(self) -> int:
        """How many weights one expert has."""
        return 3 * self.hidden * self.inner


def expert_bytes(shape: Shape, format: str) -> float:
    """What a kernel must read of one expert: weights, scales, no symmetric zero points."""
    bits = {"bf16": 16, "fp8": 8 + 32 / (BLOCK[0] * BLOCK[1]), "int4": 4 + 16 / GROUP}
    return shape.weights() * bits[format] / 8


def draw(format: str, rows: int, cols: int, generator: torch.Generator) -> Stored:
    """One projection [rows, cols], its weights about ``cols ** -0.5`` wide."""
    device, std = generator.device, cols**-0.5
    if format == "bf16":
        weight = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
        return {"weight": weight.normal_(0, std, generator=generator)}
    if format in ("fp8", ROWS):
        codes = torch.empty(rows, cols, device=device).normal_(0, 100, generator=generator)
        grid = (-(-rows // BLOCK[0]), -(-cols // BLOCK[1])) if format == "fp8" else (rows, 1)
        scales = torch.empty(grid, device=device).uniform_(0.5, 1.5, generator=generator)
        return {
            "weight": codes.clamp_(-448, 448).to(torch.float8_e4m3fn),
            "weight_scale_inv" if format == "fp8" else "weight_scale": scales * (std / 100),
        }
    if format != "int4":
        raise ValueError(f"format {format!r}, expected one of {(*FORMATS, ROWS)}")
    words = torch.randint(
        -(2**31), 2**31, (cols // 8, rows), generator=generator, device=device
    ).to(torch.int32)
    groups = cols // GROUP
    scales = torch.empty(groups, rows, device=device).uniform_(0.5, 1.5, generator=generator)
    return {
        "qweight": words,
        "scales": (scales * (std / 4.6)).to(torch.bfloat16),  # 4.6: deviation of a 4-bit code
        "qzeros": torch.full(
            (groups, rows // 8), 0x77777777, dtype=torch.int32, device=device
        ),  # 8, as GPTQ v1 stores it
    }


def widen(stored: Stored) -> Tensor:
    """float32 [rows, cols] of one projection, told by its tensors alone."""
    if "qweight" in stored:
        words = stored["qweight"]
        codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], 1)
        codes = codes.reshape(-1, words.shape[1]).float() - 8
        return (codes * stored["scales"].float().repeat_interleave(GROUP, 0)).T
    weight = stored["weight"].float()
    if "weight_scale" in stored:
        return weight * stored["weight_scale"]
    scales = stored.get("weight_scale_inv")
    if scales is None:
        return weight
    scales = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return weight * scales[: weight.shape[0], : weight.shape[1]]


def pack(parts: Iterable[Stored]) -> Weight:
    """What the grouped kernel takes: projections on top of each other, gate before up."""
    stored = list(parts)
    if "qweight" in stored[0]:
        both = {
            name: torch.cat([part[name] for part in stored], 1) for name in ("qweight", "scales")
        }
        return pack_int4(both["qweight"], both["scales"])
    weight = torch.cat([part["weight"] for part in stored])
    if "weight_scale" in stored[0]:
        scales = torch.cat([part["weight_scale"] for part in stored])
        return Fp8Weight(weight, scales, (1, weight.shape[1]), parts=len(stored))
    if "weight_scale_inv" not in stored[0]:
        return PlainWeight(weight)
    scales = torch.cat([part["weight_scale_inv"] for part in stored])
    return Fp8Weight(weight, scales, BLOCK, parts=len(stored))


class Experts:
    """The experts of one layer, expert e in ``formats[e % len(formats)]``.

    Attributes:
        formats: of each expert.
        stored: expert -> projection -> tensors.
    """

    def __init__(self, shape: Shape, formats: tuple[str, ...], device: str, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.shape = shape
        self.formats = tuple(formats[e % len(formats)] for e in range(shape.experts))
        sizes = dict.fromkeys(PROJECTIONS, (shape.inner, shape.hidden))
        sizes["down_proj"] = (shape.hidden, shape.inner)
        self.stored = [
            {name: draw(format, *sizes[name], generator) for name in PROJECTIONS}
            for format in self.formats
        ]

    def table(self, present: Iterable[int] | None = None) -> ExpertTable:
        """Build the grouped kernel's table; experts that are not ``present`` are absent."""
        here = set(range(self.shape.experts) if present is None else present)
        w13: list[Weight | None] = []
        w2: list[Weight | None] = []
        for expert, parts in enumerate(self.stored):
            held = expert in here
            w13.append(pack([parts["gate_proj"], parts["up_proj"]]) if held else None)
            w2.append(pack([parts["down_proj"]]) if held else None)
        return ExpertTable(w13, w2, torch.bfloat16)

    def groups(self) -> dict[str, tuple[int, ...]]:
        """Format -> its experts."""
        return {
            format: tuple(e for e, f in enumerate(self.formats) if f == format)
            for format in dict.fromkeys(self.formats)
        }

    def reference(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        present: Iterable[int] | None = None,
    ) -> Tensor:
        """float32 [M, hidden]: what the layer computes, expert by expert, nothing rounded."""
        here = set(range(self.shape.experts) if present is None else present)
        x, out = x.float(), torch.zeros_like(x, dtype=torch.float32)
        for expert in sorted(set(topk_ids.flatten().tolist()) & here):
            token, place = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up, down = (widen(self.stored[expert][name]) for name in PROJECTIONS)
            rows = torch.nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T) @ down.T
            out.index_add_(0, token, rows * topk_weights[token, place, None].float())
        return out


def route(rows: int, shape: Shape, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [rows, hidden] bfloat16, router weights float32 and ids int32 [rows, top_k].

    Every token's experts are distinct and uniform, the worst case for the bytes read.
    """
    generator = torch.Generator(device).manual_seed(seed + 1)
    x = torch.empty(rows, shape.hidden, dtype=torch.bfloat16, device=device)
    scores = torch.rand(rows, shape.experts, generator=generator, device=device)
    best = scores.topk(shape.top_k)
    return x.normal_(generator=generator), best.values.softmax(-1), best.indices.int()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Deviation over the expected values' own, over all of a batch."""
    return ((found.float() - expected).norm() / expected.norm()).item()


def on(device: torch.device, tensor: Tensor) -> Tensor:
    """Move a tensor with its strides, which ``to`` keeps only of dense ones."""
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return moved.copy_(tensor) if tensor.numel() else moved
