# SPDX-License-Identifier: Apache-2.0
"""Every real token has one owner, in each layout that vLLM hands to a router.

The batches are built row by row as vLLM builds them: ``sequence_parallel_chunk_impl``
(model_executor/models/utils.py) pads and cuts, the expert-parallel group's dispatch concatenates
over data-parallel ranks and, within each, over tensor-parallel ranks.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_mixprec.experts.rows import Span, own_rows

Token = tuple[int, int]
"""Data-parallel rank, position in that rank's batch."""
Batch = list[Token | None]
"""What a router sees; None is a row that sequence parallelism added."""


@dataclass(frozen=True)
class Rank:
    """One rank's batch, and what it knows."""

    batch: Batch
    dp_rank: int
    sp_rank: int
    sp_size: int


def tokens_of(dp_rank: int, count: int) -> Batch:
    return [(dp_rank, position) for position in range(count)]


def cut(batch: Batch, sp_size: int) -> list[Batch]:
    """Pad to a multiple of ``sp_size``, then cut into as many shards."""
    padded = batch + [None] * (-len(batch) % sp_size)
    size = len(padded) // sp_size
    return [padded[rank * size : (rank + 1) * size] for rank in range(sp_size)]


def local(dp_tokens: list[int], sp_size: int) -> list[Rank]:
    """Each rank routes its own tokens: kernels that exchange them afterwards."""
    return [
        Rank(shard, dp_rank, sp_rank, sp_size)
        for dp_rank, count in enumerate(dp_tokens)
        for sp_rank, shard in enumerate(cut(tokens_of(dp_rank, count), sp_size))
    ]


def gathered(dp_tokens: list[int], sp_size: int) -> list[Rank]:
    """Each rank routes everybody's tokens: naive dispatch."""
    ranks = local(dp_tokens, sp_size)
    everything = [row for rank in ranks for row in rank.batch]
    return [Rank(everything, rank.dp_rank, rank.sp_rank, rank.sp_size) for rank in ranks]


def owners(ranks: list[Rank], dp_tokens: list[int]) -> Counter[Token | None]:
    """Count how often each row of the batches is claimed, and check what it is claimed to be."""
    claimed: Counter[Token | None] = Counter()
    for rank in ranks:
        span = own_rows(
            len(rank.batch),
            dp_tokens[rank.dp_rank],
            dp_tokens=dp_tokens,
            dp_rank=rank.dp_rank,
            sp_rank=rank.sp_rank,
            sp_size=rank.sp_size,
        )
        assert span is not None
        rows = rank.batch[span.row : span.row + span.tokens]
        assert rows == [(rank.dp_rank, span.token + i) for i in range(span.tokens)]
        claimed.update(rows)
    return claimed


batches = st.lists(st.integers(0, 40), min_size=1, max_size=5)
sp_sizes = st.integers(1, 9)


@pytest.mark.parametrize("layout", [local, gathered])
@given(dp_tokens=batches, sp_size=sp_sizes)
@example(dp_tokens=[1], sp_size=2)
@example(dp_tokens=[1, 1], sp_size=1)
@example(dp_tokens=[1, 1], sp_size=2)
@example(dp_tokens=[3, 0, 5], sp_size=1)
@example(dp_tokens=[1, 4], sp_size=8)
@example(dp_tokens=[0, 6], sp_size=2)
def test_every_token_is_owned_once(layout, dp_tokens: list[int], sp_size: int) -> None:
    claimed = owners(layout(dp_tokens, sp_size), dp_tokens)
    tokens = [token for rank, count in enumerate(dp_tokens) for token in tokens_of(rank, count)]
    assert claimed == Counter(tokens)


def test_a_layout_mistaken_for_another_is_noticed() -> None:
    """The control: batches in another order than vLLM's do not pass :func:`owners`."""
    ranks = gathered([3, 5], 2)
    backwards = [Rank(r.batch[::-1], r.dp_rank, r.sp_rank, r.sp_size) for r in ranks]
    with pytest.raises(AssertionError):
        owners(backwards, [3, 5])


@given(tokens=st.integers(0, 64))
def test_without_parallel_ranks_all_rows_are_own(tokens: int) -> None:
    assert own_rows(tokens, tokens) == Span(0, 0, tokens)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
def test_shard_of_unknown_batches_is_not_counted(tokens: int) -> None:
    """Under sequence parallelism vLLM tells the batch sizes; else one token looks like a shard."""
    for sp_rank in range(2):
        assert own_rows(-(-tokens // 2), tokens, sp_rank=sp_rank, sp_size=2) is None


@given(dp_tokens=batches, sp_size=sp_sizes, rows=st.integers(0, 400), data=st.data())
def test_other_row_counts_are_not_guessed(
    dp_tokens: list[int], sp_size: int, rows: int, data: st.DataObject
) -> None:
    dp_rank = data.draw(st.integers(0, len(dp_tokens) - 1))
    sp_rank = data.draw(st.integers(0, sp_size - 1))
    known = {
        len(rank.batch)
        for layout in (local, gathered)
        for rank in layout(dp_tokens, sp_size)
        if (rank.dp_rank, rank.sp_rank) == (dp_rank, sp_rank)
    }
    span = own_rows(
        rows,
        dp_tokens[dp_rank],
        dp_tokens=dp_tokens,
        dp_rank=dp_rank,
        sp_rank=sp_rank,
        sp_size=sp_size,
    )
    assert (span is not None) == (rows in known)
    if span is not None:
        assert 0 <= span.row and span.row + span.tokens <= rows
        assert 0 <= span.token
        assert span.tokens == 0 or span.token + span.tokens <= dp_tokens[dp_rank]
