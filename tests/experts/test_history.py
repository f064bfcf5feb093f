# SPDX-License-Identifier: Apache-2.0
"""What a worker remembers of its counts, polled at invented times."""

import numpy as np
import pytest

from vllm_mixprec.experts.history import HORIZON_S, STEP_S, History, Totals

START_S = 1_000_000.0


def totals(after_s: float, *counts: int, requests: int = 0) -> Totals:
    """One layer's totals, read ``after_s`` after the start."""
    tokens = sum(counts) // 2
    return Totals(START_S + after_s, np.array([counts], np.int64), (tokens, 0), requests)


def steady(history: History, until_s: float, every_s: float) -> None:
    """Poll a layer of one expert that is activated once a second."""
    for number in range(1, round(until_s / every_s) + 1):
        history.add(totals(number * every_s, int(number * every_s)))


def test_begins_with_nothing_at_its_start() -> None:
    history = History(START_S, 2, 3)
    for first in (history.start, history.window, history.since(START_S + 99)):
        assert first.time_s == START_S
        assert first.counts.shape == (2, 3) and not first.counts.any()
        assert (first.tokens, first.requests) == ((0, 0), 0)
    assert np.isnan(history.last_activation_s).all()


def test_reset_moves_the_window_and_not_the_start() -> None:
    history = History(START_S, 1, 2)
    history.add(totals(5, 4, 0))
    history.reset(totals(7, 6, 2, requests=3))
    history.add(totals(9, 8, 4))
    assert history.window.time_s == START_S + 7
    np.testing.assert_array_equal(history.window.counts, [[6, 2]])
    assert (history.window.tokens, history.window.requests) == ((4, 0), 3)
    assert history.start.time_s == START_S and not history.start.counts.any()


def test_second_reset_begins_at_the_second() -> None:
    history = History(START_S, 1, 2)
    history.reset(totals(7, 6, 2))
    history.reset(totals(8, 6, 4))
    assert history.window.time_s == START_S + 8


def test_reset_does_not_forget_recent_activity() -> None:
    history = History(START_S, 1, 1)
    steady(history, 120, every_s=1)
    history.reset(totals(120, 120))
    assert history.since(START_S + 60).counts.tolist() == [[60]]


def test_last_activation_is_when_a_count_was_first_seen_to_grow() -> None:
    history = History(START_S, 1, 3)
    history.add(totals(1, 2, 0, 0))
    history.add(totals(2, 2, 5, 0))
    history.add(totals(3, 2, 5, 0))
    times = history.last_activation_s - START_S
    np.testing.assert_array_equal(times, [[1, 2, np.nan]])
    history.add(totals(4, 3, 5, 0))
    np.testing.assert_array_equal(history.last_activation_s - START_S, [[4, 2, np.nan]])


def test_reset_is_a_reading_too() -> None:
    history = History(START_S, 1, 2)
    history.reset(totals(6, 2, 0))
    history.add(totals(9, 2, 0))
    np.testing.assert_array_equal(history.last_activation_s - START_S, [[6, np.nan]])


@pytest.mark.parametrize("every_s", [0.5, 1, 4, 15])
@pytest.mark.parametrize("minutes", [0.1, 1, 30, 59, 60])
def test_minutes_are_covered_and_little_more(every_s: float, minutes: float) -> None:
    history = History(START_S, 1, 1)
    steady(history, until_s=2 * HORIZON_S, every_s=every_s)
    asked_s = START_S + 2 * HORIZON_S - 60 * minutes
    first = history.since(asked_s)
    # Polls that do not divide the step are remembered at the next poll after it.
    assert asked_s - STEP_S - every_s < first.time_s <= asked_s
    assert first.counts.tolist() == [[first.time_s - START_S]]


def test_minutes_beyond_the_start_begin_at_the_start() -> None:
    history = History(START_S, 1, 1)
    steady(history, until_s=90, every_s=1)
    assert history.since(START_S - 3000) is history.start


def test_minutes_beyond_the_horizon_begin_at_the_oldest() -> None:
    history = History(START_S, 1, 1)
    steady(history, until_s=3 * HORIZON_S, every_s=1)
    oldest = history.since(START_S).time_s
    assert 2 * HORIZON_S - 2 * STEP_S <= oldest - START_S <= 2 * HORIZON_S


def test_memory_is_bounded() -> None:
    """Readings far apart reach further back, readings close together take no more room."""
    history = History(START_S, 1, 1)
    steady(history, until_s=10 * HORIZON_S, every_s=1)
    kept = {history.since(START_S + second).time_s for second in range(int(10 * HORIZON_S))}
    assert HORIZON_S / STEP_S <= len(kept) <= HORIZON_S / STEP_S + 2


def test_pause_between_readings_is_told_by_the_time_of_the_first() -> None:
    """Nobody asked for ten minutes: the last reading before is what there is."""
    history = History(START_S, 1, 1)
    steady(history, until_s=30, every_s=15)
    history.add(totals(630, 42))
    assert history.since(START_S + 629).time_s == START_S + 30


def test_clock_that_jumps_back_loses_nothing() -> None:
    """Several front ends ask, each with its own clock."""
    history = History(START_S, 1, 1)
    history.add(totals(30, 10))
    history.add(totals(20, 12))
    history.add(totals(50, 15))
    assert history.since(START_S + 40).counts.tolist() == [[10]]
    assert history.since(START_S + 50).counts.tolist() == [[15]]
    assert history.last_activation_s.tolist() == [[START_S + 50]]


def test_stage_without_experts_can_be_polled() -> None:
    history = History(START_S, 0, 0)
    for second in (1, 2, 3):
        history.add(Totals(START_S + second, np.zeros((0, 0), np.int64), (0, 0), second))
    history.reset(Totals(START_S + 4, np.zeros((0, 0), np.int64), (0, 0), 4))
    assert history.window.requests == 4
