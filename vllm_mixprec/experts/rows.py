# SPDX-License-Identifier: Apache-2.0
"""Which rows of a MoE layer's batch are this rank's own tokens."""

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """``tokens`` consecutive rows of the routed batch, from ``row`` on, are tokens ``token`` on."""

    row: int
    token: int
    tokens: int


def own_rows(
    rows: int,
    tokens: int,
    *,
    dp_tokens: Sequence[int] | None = None,
    dp_rank: int = 0,
    sp_rank: int = 0,
    sp_size: int = 1,
) -> Span | None:
    """Find this rank's share of the rows that a router sees.

    The layouts are those of vLLM's ``MoERunner`` (its ``RoutedExpertsCapturer`` lists them):
    this rank's tokens alone; those of all data-parallel ranks, concatenated; and, under sequence
    parallelism, a shard of ``ceil(tokens / sp_size)`` a rank or all ranks' shards. With sequence
    parallelism each rank owns its shard alone, so that the ranks' counts add up to the tokens.

    Args:
        rows: of the router's batch.
        tokens: of this data-parallel rank, padding included.
        dp_tokens: of every data-parallel rank; None without data and sequence parallelism.
        dp_rank: this data-parallel rank.
        sp_rank: this rank within its sequence-parallel group.
        sp_size: ranks that share a data-parallel rank's tokens; 1 without sequence parallelism.

    Returns:
        The span, maybe of 0 tokens; None for a layout that is not one of these.
    """
    if dp_tokens is None:
        # A shard of one token would pass for the whole batch, on every rank.
        return Span(0, 0, tokens) if rows == tokens and sp_size == 1 else None
    if sp_size > 1:
        shards = [-(-n // sp_size) for n in dp_tokens]
        shard = shards[dp_rank]
        first = sp_rank * shard
        span = Span(0, first, max(0, min(shard, tokens - first)))
        if rows == shard:
            return span
        if rows == sum(shards) * sp_size:
            return span._replace(row=sum(shards[:dp_rank]) * sp_size + first)
        return None
    if rows == sum(dp_tokens):
        return Span(sum(dp_tokens[:dp_rank]), 0, tokens)
    return Span(0, 0, tokens) if rows == tokens else None
