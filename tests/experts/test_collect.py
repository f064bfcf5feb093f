# SPDX-License-Identifier: Apache-2.0
"""How the answers of stages and ranks are put together; tests/engine asks running workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.loading.serving import needs_cpu
from vllm_mixprec.errors import StatsUnavailableError
from vllm_mixprec.experts.collect import _require_counters, counters_enabled, merge
from vllm_mixprec.experts.setting import VARIABLE
from vllm_mixprec.plugin import register

FIXTURES = Path(__file__).parent.parent / "fixtures"
MOE = FIXTURES / "random-moe" / "bf16"
NAN = float("nan")


def answer(
    layers: dict[str, list[int]],
    *,
    pp_rank: int = 0,
    drafts: tuple[str, ...] = (),
    tokens: tuple[int, int] = (4, 0),
    times: dict[str, list[float]] | None = None,
    top_k: int = 2,
) -> dict[str, Any]:
    """What a worker says: label of each of its layers -> counts."""
    experts = max((len(counts) for counts in layers.values()), default=0)
    last = [(times or {}).get(label, [NAN] * experts) for label in layers]
    return {
        "pp_rank": pp_rank,
        "layers": json.dumps(
            [
                {
                    "layer": label,
                    "draft": label in drafts,
                    "experts": experts,
                    "experts_per_token": top_k,
                }
                for label in layers
            ]
        ).encode(),
        "experts": experts,
        "counts": np.array(list(layers.values()), np.int64).tobytes(),
        "tokens": list(tokens),
        "requests": 3,
        "started_s": 1000.0,
        "seconds": 9.0,
        "last_activation_s": np.array(last, np.float64).tobytes(),
    }


def test_one_worker_is_taken_as_it_is() -> None:
    times = {"1": [1001.0, NAN, 1002.0]}
    snapshot = merge([answer({"1": [5, 0, 3], "2": [4, 4, 0]}, times=times)], "some-model")
    assert snapshot.model == "some-model"
    assert snapshot.layers == ("1", "2")
    assert snapshot.counts.dtype == np.int64
    assert snapshot.counts.tolist() == [[5, 0, 3], [4, 4, 0]]
    assert (snapshot.tokens, snapshot.requests, snapshot.experts_per_token) == (4, 3, 2)
    assert (snapshot.started_s, snapshot.seconds) == (1000.0, 9.0)
    assert snapshot.last_activation_s is not None
    np.testing.assert_array_equal(snapshot.last_activation_s, [[1001, NAN, 1002], [NAN] * 3])
    assert snapshot.draft is None


def test_counts_without_times_are_taken_so() -> None:
    """A poll for the metrics asks for no times."""
    parts = [answer({"0": [3, 5]}), answer({"1": [4, 4]}, pp_rank=1)]
    for part in parts:
        part["last_activation_s"] = None
    snapshot = merge(parts, "m")
    assert snapshot.counts.tolist() == [[3, 5], [4, 4]]
    assert snapshot.last_activation_s is None


def test_stages_are_stacked_in_their_order_and_tokens_taken_once() -> None:
    last = answer({"2": [1, 7], "3": [2, 6]}, pp_rank=1, times={"2": [1003.0, NAN]})
    first = answer({"0": [3, 5], "1": [4, 4]}, pp_rank=0, times={"0": [NAN, 1001.0]})
    snapshot = merge([last, first], "m")
    assert snapshot.layers == ("0", "1", "2", "3")
    assert snapshot.counts.tolist() == [[3, 5], [4, 4], [1, 7], [2, 6]]
    assert (snapshot.tokens, snapshot.requests) == (4, 3)
    assert snapshot.last_activation_s is not None
    np.testing.assert_array_equal(
        snapshot.last_activation_s, [[NAN, 1001], [NAN, NAN], [1003, NAN], [NAN, NAN]]
    )


def test_silent_tensor_parallel_ranks_add_nothing() -> None:
    stages = [answer({"0": [3, 5]}), None, answer({"1": [4, 4]}, pp_rank=1), None]
    snapshot = merge(stages, "m")
    assert snapshot.counts.tolist() == [[3, 5], [4, 4]]
    assert snapshot.tokens == 4


def test_sequence_parallel_ranks_add_up() -> None:
    ranks = [
        answer({"0": [3, 1], "1": [2, 2]}, tokens=(2, 0), times={"0": [1001.0, 1007.0]}),
        answer({"0": [0, 2], "1": [1, 1]}, tokens=(1, 0), times={"0": [1004.0, NAN]}),
    ]
    snapshot = merge(ranks, "m")
    assert snapshot.layers == ("0", "1")
    assert snapshot.counts.tolist() == [[3, 3], [3, 3]]
    assert (snapshot.tokens, snapshot.requests) == (3, 3)
    assert snapshot.last_activation_s is not None
    np.testing.assert_array_equal(snapshot.last_activation_s, [[1004, 1007], [NAN, NAN]])


def test_sequence_parallel_ranks_of_two_stages() -> None:
    ranks = [
        answer({layer: [share, 0]}, pp_rank=stage, tokens=(share, 0), top_k=1)
        for stage, layer in enumerate(("0", "1"))
        for share in (2, 1)
    ]
    snapshot = merge(ranks, "m")
    assert snapshot.counts.tolist() == [[3, 0], [3, 0]]
    assert snapshot.tokens == 3


def test_draft_stands_apart() -> None:
    first = answer({"0": [3, 5]}, tokens=(4, 0))
    last = answer({"1": [4, 4], "2": [6, 0]}, pp_rank=1, drafts=("2",), tokens=(4, 3))
    snapshot = merge([first, last], "m")
    assert snapshot.layers == ("0", "1")
    assert (snapshot.tokens, snapshot.counts.tolist()) == (4, [[3, 5], [4, 4]])
    draft = snapshot.draft
    assert draft is not None and draft.draft is None
    assert (draft.layers, draft.tokens) == (("2",), 3)
    assert draft.counts.tolist() == [[6, 0]]
    assert draft.seconds == snapshot.seconds


def test_stage_without_experts_is_left_out() -> None:
    """A first stage of dense layers sees the tokens but no router."""
    dense = answer({}, tokens=(0, 0))
    snapshot = merge([dense, answer({"3": [4, 4]}, pp_rank=1)], "m")
    assert snapshot.layers == ("3",)
    assert (snapshot.tokens, snapshot.counts.tolist()) == (4, [[4, 4]])


def test_stages_of_different_widths_are_padded() -> None:
    wide = answer({"1": [1, 2, 3, 2]}, pp_rank=1, times={"1": [1001.0] * 4})
    narrow = answer({"0": [3, 5]}, times={"0": [1002.0] * 2})
    snapshot = merge([wide, narrow], "m")
    assert snapshot.counts.tolist() == [[3, 5, 0, 0], [1, 2, 3, 2]]
    assert snapshot.last_activation_s is not None
    np.testing.assert_array_equal(snapshot.last_activation_s, [[1002, 1002, NAN, NAN], [1001] * 4])


def test_every_layer_sums_to_tokens_times_top_k() -> None:
    """Over two stages of three sequence-parallel ranks, random counts."""
    generator = np.random.default_rng(0)
    tokens, answers = 0, []
    for shard in generator.integers(0, 50, 3).tolist():
        tokens += shard
        for stage in range(2):
            layers = {
                str(2 * stage + layer): np.bincount(
                    generator.integers(0, 8, shard * 2), minlength=8
                ).tolist()
                for layer in range(2)
            }
            answers.append(answer(layers, pp_rank=stage, tokens=(shard, 0)))
    snapshot = merge(answers, "m")
    assert snapshot.tokens == tokens
    assert (snapshot.counts.sum(axis=1) == tokens * 2).all()
    assert len(snapshot.layers) == 4


@pytest.mark.parametrize("answers", [[], [None, None], [answer({}), None]])
def test_no_layer_at_all_is_an_error(answers: list[dict[str, Any] | None]) -> None:
    with pytest.raises(StatsUnavailableError, match="no layer of the model reports"):
        merge(answers, "m")


def test_a_draft_alone_is_an_error() -> None:
    with pytest.raises(StatsUnavailableError, match="no layer of the target model reports"):
        merge([answer({"0": [1, 1]}, drafts=("0",))], "m")


def engine_config(model: Path) -> VllmConfig:
    register()
    return EngineArgs(str(model), skip_tokenizer_init=True, max_model_len=64).create_engine_config()


@needs_cpu
def test_moe_model_counts_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    counting = engine_config(MOE)
    assert counters_enabled(counting)
    _require_counters(counting)
    monkeypatch.setenv(VARIABLE, "off")
    silent = engine_config(MOE)
    assert not counters_enabled(silent)
    with pytest.raises(StatsUnavailableError, match=f"Start it without {VARIABLE}=off"):
        _require_counters(silent)
    # A compiled graph without counters must not be taken for one with them.
    assert silent.compute_hash() != counting.compute_hash()


@needs_cpu
def test_dense_model_says_that_it_has_no_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    from transformers import Qwen3Config

    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=64,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    dense = engine_config(tmp_path)
    assert not counters_enabled(dense)
    with pytest.raises(StatsUnavailableError, match="has no experts; expected an MoE model"):
        _require_counters(dense)
