# SPDX-License-Identifier: Apache-2.0
"""Snapshots: their numbers, adding, subtracting, and reading files that nobody vouches for."""

import csv
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from vllm_mixprec.errors import MixPrecError
from vllm_mixprec.experts import ExpertSnapshot, SnapshotError

NOW_S = 1_770_000_000.0
NEVER = float("nan")


def make(counts: Any = ((3, 1, 0, 0), (1, 1, 1, 1)), **fields: Any) -> ExpertSnapshot:
    """Two layers of four experts, two tokens with two experts each, unless told otherwise."""
    array = np.array(counts, dtype=np.int64)
    known = {
        "model": "m",
        "layers": tuple(str(row) for row in range(len(array))),
        "experts_per_token": 2,
        "tokens": int(array[0].sum()) // 2,
        "requests": 1,
        "started_s": NOW_S,
        "seconds": 10.0,
    }
    return ExpertSnapshot(counts=array, **(known | fields))


TIMES = np.array([[NOW_S, NOW_S + 9.25, NEVER, NEVER], [NOW_S, NOW_S, NOW_S, NOW_S]])

_TIMES_S = st.floats(0, 4e9)


@st.composite
def snapshots(draw: st.DrawFn, shape: tuple[int, int], draft: bool = True) -> ExpertSnapshot:
    top = 2**53 + 11 if draw(st.booleans()) else 5  # beyond what a float counts, or many zeros
    counts = draw(nps.arrays(np.int64, shape, elements=st.integers(0, top)))
    times = st.floats(0, 4e9) | st.just(NEVER)
    return ExpertSnapshot(
        model="org/model é",
        layers=tuple(f"l{row}" for row in range(shape[0])),
        experts_per_token=3,
        counts=counts,
        tokens=draw(st.integers(0, 2**60)),
        requests=draw(st.integers(0, 2**60)),
        started_s=draw(_TIMES_S),
        seconds=draw(st.floats(0, 1e8)),
        last_activation_s=draw(st.none() | nps.arrays(np.float64, shape, elements=times)),
        draft=draw(st.none() | snapshots((1, 2), draft=False)) if draft else None,
    )


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5))
ONE = SHAPES.flatmap(snapshots)
TWO = SHAPES.flatmap(lambda shape: st.tuples(snapshots(shape), snapshots(shape)))
THREE = SHAPES.flatmap(lambda shape: st.tuples(*(snapshots(shape) for _ in range(3))))


def assert_same(left: ExpertSnapshot, right: ExpertSnapshot, time_tolerance_s: float = 0) -> None:
    mine, theirs = left.to_dict(), right.to_dict()
    while mine is not None and theirs is not None:
        for key in ("started_s", "seconds"):
            assert mine.pop(key) == pytest.approx(theirs.pop(key), abs=time_tolerance_s)
        left_draft, right_draft = mine.pop("draft"), theirs.pop("draft")
        assert mine == theirs
        mine, theirs = left_draft, right_draft
    assert mine is theirs is None


# Doubles near 4e9 are 5e-7 apart, and ends are computed as begin plus length.
SPAN_TOLERANCE_S = 1e-5


def test_importing_it_imports_neither_torch_nor_vllm_nor_what_draws() -> None:
    code = "import sys, vllm_mixprec.experts.snapshot; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "vllm", "pandas", "matplotlib"}.isdisjoint(run.stdout.split())


# Numbers


def test_numbers_of_a_known_case() -> None:
    snapshot = make(((3, 1, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0)))
    assert snapshot.num_experts == 4
    assert snapshot.activations == 8
    assert snapshot.layer_totals.tolist() == [4, 4, 0]
    assert snapshot.shares.tolist() == [[0.75, 0.25, 0, 0], [0.25] * 4, [0] * 4]
    # (3 + 1)^2 / (4 * (9 + 1)); four alike; nothing to say about none
    np.testing.assert_allclose(snapshot.jain_fairness, [0.4, 1.0, NEVER])
    np.testing.assert_allclose(snapshot.imbalance, [3.0, 1.0, NEVER])
    assert snapshot.active_experts.tolist() == [2, 4, 0]
    assert snapshot.ended_s == NOW_S + 10


@given(ONE)
def test_fairness_and_imbalance_stay_in_their_bounds(snapshot: ExpertSnapshot) -> None:
    experts, worked = snapshot.num_experts, snapshot.layer_totals > 0
    fairness, imbalance = snapshot.jain_fairness, snapshot.imbalance
    assert np.isnan(fairness[~worked]).all() and np.isnan(imbalance[~worked]).all()
    rounding = 1e-9
    assert ((1 / experts - rounding <= fairness) & (fairness <= 1 + rounding))[worked].all()
    assert ((1 - rounding <= imbalance) & (imbalance <= experts + rounding))[worked].all()
    np.testing.assert_allclose(snapshot.shares.sum(axis=1)[worked], 1.0)


def test_large_counts_do_not_wrap() -> None:
    snapshot = make(((2**61, 2**60), (2**60, 2**61)))
    assert snapshot.activations == 2 * (2**61 + 2**60)
    np.testing.assert_allclose(snapshot.imbalance, [4 / 3, 4 / 3])
    np.testing.assert_allclose(snapshot.jain_fairness, [0.9, 0.9])
    with pytest.raises(SnapshotError, match="counts: .*expected sums that fit in 64 bits"):
        make(((2**62, 2**62),), tokens=1)
    with pytest.raises(SnapshotError, match="counts: .*expected sums that fit in 64 bits"):
        snapshot + snapshot
    one = make(((2**62,),), tokens=1)
    with pytest.raises(SnapshotError, match=r"counts.*found -9223372036854775808, expected 0"):
        one + one


def test_busiest_and_idlest_name_experts_in_order() -> None:
    snapshot = make(last_activation_s=TIMES)
    assert [(load.layer, load.expert, load.count) for load in snapshot.busiest(3)] == [
        ("0", 0, 3),
        ("0", 1, 1),
        ("1", 0, 1),
    ]
    first, second, third = snapshot.idlest(3)
    assert [(load.layer, load.expert, load.count) for load in (first, second, third)] == [
        ("0", 2, 0),
        ("0", 3, 0),
        ("0", 1, 1),
    ]
    assert first.last_activation_s is None
    assert (third.share, third.last_activation_s) == (0.25, NOW_S + 9.25)
    assert snapshot.busiest(0) == []
    assert len(snapshot.busiest(100)) == 8
    with pytest.raises(ValueError, match="k is -1, expected 0 or more"):
        snapshot.busiest(-1)


# The constructor


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "", "model: found '', expected 1 to 1024 printable characters"),
        ("model", "a\x1b[2Jb", "model: found .*expected 1 to 1024 printable"),
        ("layers", ("0",), r"counts: found \[2, 4\], expected \[1, experts\]"),
        ("layers", ("0", "0"), "layers: found '0' twice, expected each label once"),
        ("layers", ["0", "1"], "layers: found list of 2, expected a tuple"),
        ("experts_per_token", 0, "experts_per_token: found 0, expected an integer from 1"),
        ("tokens", -1, "tokens: found -1, expected an integer from 0"),
        ("tokens", True, "tokens: found True, expected an integer"),
        ("tokens", 2**63, "tokens: found 9223372036854775808, expected an integer from 0"),
        ("requests", 1.0, "requests: found 1.0, expected an integer"),
        ("seconds", NEVER, "seconds: found nan, expected seconds from 0"),
        ("seconds", float("inf"), "seconds: found inf, expected seconds from 0"),
        ("started_s", -1.0, "started_s: found -1.0, expected seconds from 0"),
        ("counts", np.zeros((2, 4), np.int32), r"counts: found int32 \[2, 4\], expected an int64"),
        ("counts", np.zeros(8, np.int64), r"counts: found int64 \[8\], expected an int64 array \["),
        ("counts", np.zeros((2, 0), np.int64), r"counts: found \[2, 0\]"),
        ("counts", [[1]], "counts: found list of 1, expected an int64 array"),
        ("counts", np.array([[1, 1], [1, -1]]), r"counts\[1, 1\]: found -1, expected 0 or more"),
        ("last_activation_s", TIMES[:1], r"last_activation_s: found float64 \[1, 4\], expected"),
        ("last_activation_s", -TIMES, "last_activation_s: found a time out of range"),
        ("draft", make(draft=make()), "draft: found a draft of a draft"),
    ],
)
def test_constructor_refuses_what_is_malformed(field: str, value: Any, message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        replace(make(), **{field: value})


def test_numpy_scalars_become_numbers_of_python() -> None:
    snapshot = make(tokens=np.int64(2), seconds=np.float32(2.5), started_s=7)
    assert type(snapshot.tokens) is int
    assert (type(snapshot.seconds), type(snapshot.started_s)) == (float, float)


def test_arrays_are_copied_and_read_only() -> None:
    counts = np.ones((1, 2), np.int64)
    snapshot = ExpertSnapshot("m", ("0",), 2, counts, 1, 0, NOW_S, 1.0)
    counts[:] = 7
    assert snapshot.counts.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="read-only"):
        snapshot.counts[0, 0] = 5


def test_pickle_keeps_it() -> None:
    snapshot = make(last_activation_s=TIMES, draft=make(layers=("d0", "d1")))
    assert_same(pickle.loads(pickle.dumps(snapshot)), snapshot)


# Adding


def test_sum_of_two_machines() -> None:
    other_times = np.array([[NOW_S + 1, NEVER, NOW_S + 2, NEVER]] * 2)
    left = make(last_activation_s=TIMES, tokens=2, requests=3)
    right = make(
        ((0, 0, 4, 0), (1, 1, 1, 1)),
        last_activation_s=other_times,
        tokens=2,
        requests=4,
        started_s=NOW_S - 5,
        seconds=8.0,
    )
    both = left + right
    assert both.counts.tolist() == [[3, 1, 4, 0], [2, 2, 2, 2]]
    assert (both.tokens, both.requests) == (4, 7)
    assert (both.started_s, both.seconds) == (NOW_S - 5, 15.0)
    assert both.last_activation_s is not None
    np.testing.assert_array_equal(
        both.last_activation_s[0], [NOW_S + 1, NOW_S + 9.25, NOW_S + 2, NEVER]
    )


@given(TWO)
def test_adding_does_not_depend_on_the_order(pair: tuple[ExpertSnapshot, ExpertSnapshot]) -> None:
    left, right = pair
    assert_same(left + right, right + left)


@given(THREE)
def test_adding_does_not_depend_on_the_grouping(
    three: tuple[ExpertSnapshot, ExpertSnapshot, ExpertSnapshot],
) -> None:
    a, b, c = three
    assert_same((a + b) + c, a + (b + c), SPAN_TOLERANCE_S)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(model="n"), "cannot merge snapshots: model 'm' and 'n'; expected the same"),
        (make(((1, 1),)), r"layers '2 \(0 to 1\)' and '1 \(0 to 0\)'"),
        (make(layers=("0", "7")), r"layers '2 \(0 to 1\)' and '2 \(0 to 7\)'"),
        (make(((1, 1), (1, 1))), "experts per layer 4 and 2"),
        (make(experts_per_token=4), "experts per token 2 and 4"),
    ],
)
def test_other_models_are_not_added(other: ExpertSnapshot, message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        make() + other
    with pytest.raises(SnapshotError, match=message.replace("merge", "subtract")):
        make() - other


def test_numbers_are_not_added() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        make() + 1  # type: ignore[operator]


# Subtracting


@given(TWO, st.floats(0, 1e6))
def test_difference_is_what_came_after(
    pair: tuple[ExpertSnapshot, ExpertSnapshot], wait_s: float
) -> None:
    before, more = pair
    if before.draft is None or more.draft is None:
        before, more = replace(before, draft=None), replace(more, draft=None)
    after = extend(before, more, wait_s)
    delta = after - before
    assert delta.counts.tolist() == more.counts.tolist()
    assert (delta.tokens, delta.requests) == (more.tokens, more.requests)
    assert delta.started_s == before.ended_s
    assert delta.seconds == pytest.approx(wait_s, abs=SPAN_TOLERANCE_S)
    assert_same(before + delta, after, SPAN_TOLERANCE_S)


def extend(before: ExpertSnapshot, more: ExpertSnapshot, wait_s: float) -> ExpertSnapshot:
    """What ``before``'s engine reports ``wait_s`` later, having done ``more``."""
    return replace(
        before + more,
        started_s=before.started_s,
        seconds=before.seconds + wait_s,
        draft=None
        if before.draft is None or more.draft is None
        else extend(before.draft, more.draft, wait_s),
    )


def test_a_swapped_pair_is_refused() -> None:
    before, after = make(), make(((3, 2, 1, 0), (2, 2, 1, 1)), seconds=20.0)
    assert (after - before).counts.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    with pytest.raises(SnapshotError, match="counts more than the other.*Swap them.*restarted"):
        before - after


def test_an_idle_pair_is_swapped_by_its_times() -> None:
    before, after = make(), make(seconds=20.0)
    assert (after - before).activations == 0
    with pytest.raises(SnapshotError, match="Swap them"):
        before - after


def test_one_count_that_went_down_is_refused() -> None:
    with pytest.raises(SnapshotError, match="if they are in order, the engine restarted"):
        make(((9, 0, 9, 9), (9, 9, 9, 9)), seconds=20.0, tokens=99) - make()


def test_windows_of_different_begin_are_refused_though_all_counts_grew() -> None:
    later = make(np.full((2, 4), 9), started_s=NOW_S + 100, tokens=99)
    with pytest.raises(SnapshotError, match="restarted or its statistics were reset in between"):
        later - make()


def test_a_draft_on_one_side_only_is_not_subtracted() -> None:
    with pytest.raises(SnapshotError, match="one has a draft model and the other none"):
        make(draft=make()) - make()


# Files


@given(ONE)
def test_json_keeps_everything(snapshot: ExpertSnapshot) -> None:
    again = ExpertSnapshot.from_json(json.dumps(snapshot.to_dict()))
    assert_same(again, snapshot)


def test_saved_file_is_read_back_exactly(tmp_path: Path) -> None:
    snapshot = make(
        ((2**53 + 1, 0, 0, 0), (2**61 + 1, 1, 1, 1)), last_activation_s=TIMES, draft=make()
    )
    file = tmp_path / "s.json"
    file.write_text("old")
    snapshot.save(file)
    assert_same(ExpertSnapshot.load(file), snapshot)
    assert ExpertSnapshot.load(str(file)).counts[0, 0] == 2**53 + 1
    assert os.listdir(tmp_path) == ["s.json"]
    # Strict JSON: any reader takes it, NaN is not in it.
    parsed = json.loads(file.read_bytes(), parse_constant=pytest.fail)
    assert (parsed["format"], parsed["version"]) == ("vllm-mixprec/expert-snapshot", 1)
    assert parsed["last_activation_s"][0] == [NOW_S, NOW_S + 9.25, None, None]


def test_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(SnapshotError, match="taken: cannot be written .*Choose another"):
        make().save(tmp_path / "taken")
    with pytest.raises(SnapshotError, match="cannot be written .No such file"):
        make().save(tmp_path / "absent" / "s.json")
    assert os.listdir(tmp_path) == ["taken"]


def test_save_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    make().save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert_same(ExpertSnapshot.load(tmp_path / "real.json"), make())


def edited(**changes: Any) -> dict[str, Any]:
    return make(last_activation_s=TIMES, draft=make()).to_dict() | changes


def without(key: str) -> dict[str, Any]:
    content = edited()
    del content[key]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "format: found list of 1, expected 'vllm-mixprec/expert-snapshot'"),
        ({}, "format: found None, expected 'vllm-mixprec/expert-snapshot'"),
        (edited(format="x"), "format: found 'x', expected"),
        (edited(version=2), "version: found 2, expected 1. Use the release"),
        (edited(version=True), "version: found True, expected 1"),
        (without("counts"), "counts: found nothing, expected a value"),
        (without("draft"), "draft: found nothing, expected a value"),
        (edited(extra=1), "'extra': found an unknown field, expected one of model"),
        (edited(model=7), "model: found 7, expected 1 to 1024 printable characters"),
        (edited(layers="01"), "layers: found '01', expected a list of 1 to 4096 labels"),
        (edited(layers=[]), "layers: found list of 0"),
        (edited(layers=["0", 1]), r"layers\[1\]: found 1, expected 1 to 1024 printable"),
        (edited(layers=[str(n) for n in range(5000)]), "layers: found list of 5000"),
        (edited(counts=[[1, 1, 1, 1]]), "counts: found list of 1, expected a list of 2 rows"),
        (edited(counts=[[1, 1], [1]]), r"counts\[1\]: found list of 1, expected a list of 2"),
        (edited(counts=[[], []]), r"counts\[0\]: found list of 0, expected a list of 1 to"),
        (edited(counts=[[0] * 600_000] * 2), r"counts\[0\]: found list of 600000"),
        (edited(counts=[[1, 1, 1, 1], [1, 1, 1, 1.0]]), r"counts\[1\]\[3\]: found 1.0, expected"),
        (edited(counts=[[1, 1, 1, 1], [1, 1, 1, "1"]]), r"counts\[1\]\[3\]: found '1'"),
        (edited(counts=[[1, 1, 1, 1], [1, 1, 1, True]]), r"counts\[1\]\[3\]: found True"),
        (edited(counts=[[1, 1, 1, 2**63]] * 2), r"counts\[0\]\[3\]: found 9223372036854775808"),
        (edited(tokens=None), "tokens: found None, expected an integer"),
        (edited(tokens=10**5000), "not JSON .*digits"),
        (edited(seconds="1"), "seconds: found '1', expected seconds"),
        (edited(started_s=1e300), r"started_s: found 1e\+300, expected seconds"),
        (edited(last_activation_s=[[0.0]]), "last_activation_s: found list of 1"),
        (
            edited(last_activation_s=[[0, 0, 0, 0], [0, 0, 0, "x"]]),
            r"last_activation_s\[1\]\[3\]: found 'x', expected seconds",
        ),
        (edited(draft=[]), "draft: found list of 0, expected an object, or null"),
        (edited(draft={}), r"draft.model: found nothing"),
        (edited(draft=edited()), "draft.'format': found an unknown field"),
        (edited(draft=make(draft=make())._fields()), "draft.draft: found dict of .*expected null"),
        (edited(draft=make()._fields() | {"tokens": -1}), "draft.tokens: found -1"),
    ],
)
def test_malformed_file_is_refused_with_its_name(
    tmp_path: Path, content: Any, message: str
) -> None:
    file = tmp_path / "s.json"
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # so that the test can write what the reader must refuse
    try:
        file.write_text(json.dumps(content))
    finally:
        sys.set_int_max_str_digits(limit)
    with pytest.raises(SnapshotError, match=f"s.json: {message}") as caught:
        ExpertSnapshot.load(file)
    text = str(caught.value)
    assert isinstance(caught.value, MixPrecError)
    assert "\n" not in text and len(text) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"format": ', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, r"not JSON \(nested too deeply\)"),
        (json.dumps(edited()).replace("10.0", "NaN").encode(), "NaN is no number in JSON"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "s.json"
    file.write_bytes(content)
    with pytest.raises(SnapshotError, match=f"s.json: .*{message}.*Save the snapshot again"):
        ExpertSnapshot.load(file)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="absent: cannot be read .No such file.*Correct the"):
        ExpertSnapshot.load(tmp_path / "absent")
    with pytest.raises(SnapshotError, match="cannot be read .Is a directory"):
        ExpertSnapshot.load(tmp_path)
    huge = tmp_path / "huge.json"
    with open(huge, "wb") as stream:
        stream.truncate(10**12)  # sparse
    with pytest.raises(SnapshotError, match="huge.json: size: found over 67108864 bytes"):
        ExpertSnapshot.load(huge)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_no_input_raises_anything_else(content: bytes | str) -> None:
    with pytest.raises(SnapshotError, match="not JSON|format"):
        ExpertSnapshot.from_json(content)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(make().to_dict())), _JSON)
def test_no_value_of_a_field_raises_anything_else(field: str, value: Any) -> None:
    try:
        snapshot = ExpertSnapshot.from_dict(edited(**{field: value}))
    except SnapshotError:
        return
    # What is taken is a snapshot in full.
    assert_same(ExpertSnapshot.from_dict(snapshot.to_dict()), snapshot)


# Tables


def test_pandas_has_a_row_an_expert() -> None:
    frame = make(last_activation_s=TIMES).to_pandas()
    assert list(frame) == ["layer", "expert", "count", "share", "last_activation"]
    assert len(frame) == 8
    assert frame["count"].tolist() == [3, 1, 0, 0, 1, 1, 1, 1]
    assert frame.groupby("layer")["share"].sum().tolist() == [1.0, 1.0]
    assert (frame.loc[1, "layer"], frame.loc[1, "expert"]) == ("0", 1)
    assert frame.loc[1, "last_activation"] == pd.Timestamp(NOW_S + 9.25, unit="s", tz="UTC")
    assert frame["last_activation"].isna().tolist() == [False, False, True, True] + [False] * 4


def test_pandas_has_the_same_types_without_times_and_far_ahead() -> None:
    frame, timed = make().to_pandas(), make(last_activation_s=TIMES).to_pandas()
    assert frame["last_activation"].isna().all()
    assert frame.dtypes.tolist() == timed.dtypes.tolist()
    far = make(last_activation_s=np.full((2, 4), 2e11)).to_pandas()  # the year 8307
    assert far["last_activation"].dt.year.unique().tolist() == [8307]


def test_missing_pandas_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MixPrecError, match=r"expected pandas. pip install 'vllm-mixprec\[note"):
        make().to_pandas()


def test_csv_needs_no_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    snapshot = make(last_activation_s=TIMES, layers=("0", 'a,"b"'))
    text = snapshot.to_csv(tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0]) == ["layer", "expert", "count", "share", "last_activation"]
    assert len(rows) == 8
    assert rows[1]["last_activation"] == "2026-02-02T02:40:09Z"
    assert [row["last_activation"] for row in rows[2:4]] == ["", ""]
    assert (rows[4]["layer"], rows[4]["count"], rows[4]["share"]) == ('a,"b"', "1", "0.25")


def test_csv_and_pandas_agree(tmp_path: Path) -> None:
    snapshot = make(last_activation_s=np.rint(TIMES))
    snapshot.to_csv(tmp_path / "s.csv")
    read = pd.read_csv(tmp_path / "s.csv", dtype={"layer": str}, parse_dates=["last_activation"])
    read["last_activation"] = read["last_activation"].dt.as_unit("ms")  # read as microseconds
    pd.testing.assert_frame_equal(read, snapshot.to_pandas(), check_dtype=False)


def test_repr_is_one_line_and_html_is_escaped() -> None:
    snapshot = make(model="<b>&", draft=make())
    assert repr(snapshot) == (
        "<ExpertSnapshot <b>&: 2 layers x 4 experts, 2 tokens in 10.0 s, with a draft>"
    )
    page = snapshot._repr_html_()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page
    assert "3.00 in layer 0" in page
    assert "none yet" in make(np.zeros((2, 4)))._repr_html_()
