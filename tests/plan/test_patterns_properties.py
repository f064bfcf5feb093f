# SPDX-License-Identifier: Apache-2.0
"""The pattern language against a matcher that tries everything, and expressions against time."""

import re
import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mixprec.errors import PlanError
from vllm_mixprec.expressions import MAX_WAYS, compile_expression
from vllm_mixprec.plan.patterns import compile_pattern

PROFILE = settings(max_examples=400, deadline=None, derandomize=True)
SLOW_S = 10.0  # a second on a machine of its own

WORDS = ("a", "b", "ab", "mlp", "0", "1", "7", "12", "x_proj")
pieces = st.sampled_from([*WORDS, ".", ".", ".", "*", "**", "{a,b}", "{0-7,12}", "{mlp.*,a}"])
patterns = st.lists(pieces, min_size=1, max_size=7).map("".join)
names = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(".".join)


def alternatives(body: str) -> list[str]:
    found = []
    for one in body.split(","):
        numbers = re.fullmatch(r"(\d+)-(\d+)", one)
        found += map(str, range(int(numbers[1]), int(numbers[2]) + 1)) if numbers else [one]
    return found


def spell_out(pattern: str) -> list[str]:
    """Write one pattern for each choice in its braces."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [alternatives(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def matches(pattern: str, name: str) -> bool:
    """Match stars by trying every length; no regular expression is involved."""
    if not pattern:
        return name == ""
    if pattern.startswith("**"):
        return any(matches(pattern[2:], name[i:]) for i in range(len(name) + 1))
    if pattern.startswith("*"):
        component = name.split(".")[0]
        return any(matches(pattern[1:], name[i:]) for i in range(len(component) + 1))
    return name[:1] == pattern[0] and matches(pattern[1:], name[1:])


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module or one that it is below of."""
    above = [name[: dot.start()] for dot in re.finditer(r"\.", name) if dot.end() < len(name)]
    plain = pattern.removesuffix(".weight")
    return any(matches(one, module) for one in spell_out(plain) for module in [name, *above])


@PROFILE
@given(patterns, names)
def test_a_pattern_matches_what_trying_everything_finds(pattern: str, name: str) -> None:
    try:
        compiled = compile_pattern(pattern)
    except PlanError as error:
        assert "***" in pattern, error
        return
    assert compiled(name) is covers(pattern, name)


@PROFILE
@given(names, st.data())
def test_a_pattern_made_of_a_name_matches_it(name: str, data: st.DataObject) -> None:
    """The other way round, since two random ones seldom match."""
    parts = name.split(".")
    pattern = ".".join(data.draw(st.sampled_from([part, "*", f"{{{part},z}}"])) for part in parts)
    assert compile_pattern(pattern)(name) and compile_pattern(f"{pattern}.weight")(name)
    assert covers(pattern, name)
    assert not compile_pattern(pattern)(f"q.{name}") or pattern.startswith("*")


@PROFILE
@given(st.text(max_size=30), names)
def test_any_text_is_a_pattern_or_a_plan_error(text: str, name: str) -> None:
    for match in (text, f"re:{text}"):
        try:
            compile_pattern(match)(name)
        except PlanError as error:
            str(error).encode("utf-8")


atoms = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\.", r"\w", "$", "^", "(?=a)"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: f"(?:{'|'.join(some)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,3}", "{2,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@PROFILE
@given(expressions, st.text("ab.", max_size=6), st.sampled_from(["a", "ab", "a."]))
def test_an_accepted_expression_means_the_same_and_ends_soon(
    text: str, name: str, repeated: str
) -> None:
    try:
        expression = compile_expression(text)
    except ValueError:
        re.compile(text)  # refused for its repeats: all of these are sound expressions
        return
    if len(name) <= expression.longest:
        assert bool(expression.fullmatch(name)) is bool(re.fullmatch(text, name))
        assert bool(expression.match(name)) is bool(re.match(text, name))
    hostile = (repeated * 60)[: min(expression.longest, 60)] + "!"
    begun = time.process_time()
    if len(hostile) <= expression.longest:
        expression.fullmatch(hostile)
    assert time.process_time() - begun < SLOW_S


@pytest.mark.parametrize(
    "text",
    ["(a+)+b", "(.*)*x", "(?:a|a)*b", "(?:a?){30}b", "(.*a){20}b", "(x+x+)+y", "(" * 1000],
)
def test_an_expression_that_searches_for_years_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="cannot be a regular expression"):
        compile_pattern(f"re:{text}")


@pytest.mark.parametrize(
    "text",
    [
        r"model\.layers\.\d+\.mlp\.shared_experts\..*",
        r".*\.layers\..*\.experts\..*\.(gate|up|down)_proj",
        r"(?:[^.]+\.)*experts\.(?:[0-9]|1[0-7])\.[^.]+",
        r"^(?!.*lm_head).*$",
        r"model\.layers\.(?:[02468]|1[02468])\.self_attn\.(?:q|k|v|o)_proj",
    ],
)
def test_expressions_that_plans_use_are_accepted_for_names_of_any_model(text: str) -> None:
    assert compile_expression(text).longest >= 200


def test_a_name_too_long_for_many_repeats_is_an_error_and_not_a_search() -> None:
    pattern = compile_pattern("**a**a**a**a**a**a**b")
    with pytest.raises(PlanError, match=f"in more than {MAX_WAYS} ways.* Write fewer repeats"):
        pattern("a" * 200)
    assert pattern("aaaaaab")
