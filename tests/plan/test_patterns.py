# SPDX-License-Identifier: Apache-2.0
"""The pattern language of rules."""

import copy
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan.patterns import compile_pattern

EXPERT = "model.layers.3.mlp.experts.7.down_proj"


@pytest.mark.parametrize(
    ("match", "name"),
    [
        ("lm_head", "lm_head"),
        (EXPERT, EXPERT),
        (f"{EXPERT}.weight", EXPERT),
        ("model.layers.*.mlp.experts.{0-7,12}", EXPERT),
        ("model.layers.*.mlp.experts.{0-7,12}", "model.layers.3.mlp.experts.12.up_proj"),
        ("model.layers.*.mlp.experts.{0-7,12}.*_proj", EXPERT),
        ("model.layers.*.mlp.experts.{0-7,12}.*_proj.weight", EXPERT),
        ("model.layers.{0-3}.self_attn.*_proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.{0-3}.self_attn.{q,k,v}_proj", "model.layers.3.self_attn.v_proj"),
        ("model.layers.{1, 3}.mlp", EXPERT),
        ("model.layers.1*.mlp.gate", "model.layers.12.mlp.gate"),
        ("model.layers.1*.mlp.gate", "model.layers.1.mlp.gate"),
        ("**", EXPERT),
        ("**.down_proj", EXPERT),
        ("model.**.experts", EXPERT),
        ("model.layers.3.**", EXPERT),
        ("model.layers.3", EXPERT),
        ("**.{mlp.gate,self_attn.*}", "model.layers.0.self_attn.q_norm"),
        ("{model,language_model}.norm", "language_model.norm"),
        ("model.layers.*.{self_attn,mlp}.*", "model.layers.0.mlp.gate"),
        (r"re:model\.layers\.\d+\.mlp\.experts\..*", EXPERT),
        (r"re:.*\.(down|up)_proj", EXPERT),
        (r"re:.*\.down_proj\.weight", EXPERT),
    ],
)
def test_pattern_matches(match: str, name: str) -> None:
    assert compile_pattern(match)(name)


@pytest.mark.parametrize(
    ("match", "name"),
    [
        ("lm_head", "lm_head2"),
        ("lm_head", "model.lm_head"),
        ("model.layers.*.mlp.experts.{0-7,12}", "model.layers.3.mlp.experts.8.up_proj"),
        ("model.layers.*.mlp.experts.{0-7,12}", "model.layers.3.mlp.experts.70.up_proj"),
        ("model.layers.*.mlp.experts.{0-7,12}", "model.layers.3.mlp.experts.112.up_proj"),
        ("model.layers.*.mlp.experts.{0-7,12}", "model.layers.3.mlp.experts"),
        ("model.layers.*.down_proj", EXPERT),
        ("model.*", "model"),
        ("model.layers.3", "model.layers.33.mlp.gate"),
        ("model.layers.{0-3}.self_attn.*_proj", "model.layers.4.self_attn.q_proj"),
        ("model.layers.{0-3}.self_attn.*_proj", "model.layers.0.self_attn.q_norm"),
        ("*_proj", EXPERT),
        ("model.layersX3.mlp", "model.layers.3.mlp"),
        ("model.layers", "modelxlayers"),
        (r"re:.*\.down", EXPERT),
        (r"re:model\.layers\.3\.mlp", EXPERT),
        (r"re:down_proj", EXPERT),
    ],
)
def test_pattern_does_not_match(match: str, name: str) -> None:
    assert not compile_pattern(match)(name)


@given(st.integers(0, 1200), st.integers(0, 1200), st.integers(0, 1300))
def test_range_matches_exactly_its_numbers(one: int, other: int, number: int) -> None:
    low, high = sorted((one, other))
    matches = compile_pattern(f"experts.{{{low}-{high}}}.up")
    for candidate in (number, low, high, low - 1, high + 1):
        assert matches(f"experts.{candidate}.up") is (low <= candidate <= high)
    assert not matches("experts.00.up")
    assert not matches(f"experts.0{number}.up")


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1))
def test_wide_range_stays_a_small_expression(one: int, other: int) -> None:
    low, high = sorted((one, other))
    pattern = compile_pattern(f"{{{low}-{high}}}")
    assert pattern(str(low)) and pattern(str(high)) and pattern(str((low + high) // 2))
    assert not pattern(str(high + 1))
    # At most two steps a digit on the way up and two on the way down.
    assert pattern.expression.regex.pattern.count("|") <= 40


@pytest.mark.parametrize(
    ("match", "error"),
    [
        ("", 'match is "", expected a module name'),
        (".weight", 'match is ".weight", expected a module name'),
        ("model.***.gate", r"found \*\*\*, expected \* or \*\*"),
        ("experts.{0-7", "a brace without its partner"),
        ("experts.0-7}", "a brace without its partner"),
        ("experts.{0-7,{9,12}}", "braces inside braces"),
        ("experts.{0-7,}", "an empty alternative in {0-7,}"),
        ("experts.{}", "an empty alternative in {}"),
        ("experts.{7-0}", "range 7-0 runs backwards, expected 0-7"),
        ("experts.[0-7]", "found '\\[', which no module name has"),
        ("experts.?", "found '\\?', which no module name has"),
        ("model layers", "found ' ', which no module name has"),
        ("q_proj|k_proj", "found '|', which no module name has; .* begin with re:"),
        ("re:(", "cannot be a regular expression .missing \\), unterminated"),
    ],
)
def test_malformed_pattern_is_refused(match: str, error: str) -> None:
    with pytest.raises(PlanError, match=error):
        compile_pattern(match)


def test_message_quotes_the_whole_pattern() -> None:
    match = "model.{a,b?}.c"
    with pytest.raises(PlanError, match=re.escape(f'match "{match}": found')):
        compile_pattern(match)


def test_pattern_can_be_copied_and_pickled() -> None:
    pattern = compile_pattern("model.layers.{0-3}.**")
    assert pickle.loads(pickle.dumps(pattern)) == copy.deepcopy(pattern) == pattern
