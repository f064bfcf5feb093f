# SPDX-License-Identifier: Apache-2.0
"""How the pairs of token and expert are dealt to the programs of the grouped kernel."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Aligned = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class TileConfig:
    """The tile of one program, powers of two.

    Attributes:
        block_m: token-expert pairs; the tokens must be aligned to it.
        block_n: weight rows; in the first GEMM half of them gate and half up.
        block_k: weights along K in one pass of the loop, half as many 16-bit ones, so that a pass
            is as many bytes in both. Not under 64.
        warps: of 32 threads.
        stages: passes in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, low in (("block_m", 16), ("block_n", 32), ("block_k", 64), ("warps", 1)):
            value = getattr(self, name)
            if value < low or value & (value - 1) or self.stages < 1:
                raise ValueError(
                    f"{self}: expected powers of two, {name} of {low} or more and a stage or more. "
                    "Start from choose_config"
                )


_CONFIGS = (
    (16, TileConfig(16, 64, 128, 4, 4)),
    (32, TileConfig(32, 64, 128, 4, 4)),
    (math.inf, TileConfig(64, 128, 64, 4, 3)),
)
"""The most tokens an expert -> tile."""

_NARROW = TileConfig(16, 32, 128, 4, 4)
_FEW_PROGRAMS = 2 * 132


def choose_config(rows: int, top_k: int, experts: int, intermediate_size: int) -> TileConfig:
    """Choose a tile by the mean number of tokens an expert gets.

    The table is a starting point, chosen from compiled code and not yet from timings;
    ``scripts/gpu_suite.sh`` measures the tiles on a GPU. With so few pairs that wide tiles would
    leave multiprocessors of a 132-SM GPU idle, tiles are narrow.

    Args:
        rows: tokens.
        top_k: experts a token.
        experts: of the layer, on all ranks: tokens spread over all of them.
        intermediate_size: N on this rank.
    """
    pairs = rows * top_k
    config = next(config for most, config in _CONFIGS if pairs <= most * experts)
    programs = min(pairs, experts) * -(-2 * intermediate_size // config.block_n)
    return _NARROW if config.block_m == 16 and programs < _FEW_PROGRAMS else config


def align_tokens(topk_ids: Tensor, block: int, experts: int) -> Aligned:
    """Sort token-expert pairs by expert and pad each expert's to a multiple of ``block``.

    The convention of vLLM's ``moe_align_block_size``; shapes depend on shapes alone, so nothing
    waits for the device and a CUDA graph can hold it. Pairs keep their order within an expert.
    vLLM's CUDA op may stand in its place where no id is negative: it reads out of bounds for -1.

    Args:
        topk_ids: integer [M, top_k]; ids outside ``[0, experts)`` are left out.
        block: pairs a tile.
        experts: of the table.

    Returns:
        int32 sorted_token_ids [most], places in the flat ``topk_ids``, padding ``M * top_k``;
        int32 expert_ids [ceil(most / block)], a tile each, -1 past the end; int32
        num_tokens_post_padded [1].
    """
    pairs = topk_ids.numel()
    most = min(pairs + experts * (block - 1), pairs * block)
    device = topk_ids.device
    flat = topk_ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    ones = torch.ones_like(flat)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=device).scatter_add_(0, flat, ones)
    padded = (counts + block - 1) // block * block
    ends, padded_ends = counts.cumsum(0), padded.cumsum(0)

    expert, order = flat.sort(stable=True)
    place = torch.arange(pairs, device=device) - (ends - counts)[expert]
    # Pairs without an expert go to one place past the end, which is cut off.
    place = torch.where(expert < experts, place + (padded_ends - padded)[expert], most)
    sorted_ids = torch.full((most + 1,), pairs, dtype=torch.int32, device=device)
    sorted_ids.scatter_(0, place, torch.where(expert < experts, order, pairs).int())

    starts = torch.arange(0, most, block, device=device)
    tile = torch.searchsorted(padded_ends[:experts], starts, right=True)
    expert_ids = torch.where(tile < experts, tile, -1).int()
    return sorted_ids[:most], expert_ids, padded_ends[experts - 1 : experts].int()
