# SPDX-License-Identifier: Apache-2.0
"""Plans of any content: written and read back, spelt two ways, damaged."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan import Plan

PROFILE = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

source_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True)
lines = st.text(min_size=1, max_size=30).filter(
    lambda text: not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
)
matches = st.sampled_from(
    ["**", "lm_head", "model.layers.{0-3,7}.mlp.*", "a.{b,c}.weight", r"re:model\..*\d+", "re:ü\tx"]
)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    sources = draw(
        st.dictionaries(
            source_names,
            st.fixed_dictionaries({"path": lines}, optional={"revision": lines}),
            min_size=1,
            max_size=4,
        )
    )
    chosen = st.sampled_from(sorted(sources))
    rules = st.lists(st.fixed_dictionaries({"match": matches, "source": chosen}), max_size=4)
    return {"version": 1, "base": draw(chosen), "sources": sources, "rules": draw(rules)}


def content(plan: Plan) -> Any:
    return plan.model_dump()


@PROFILE
@given(plans())
def test_a_plan_written_is_the_plan_read(tmp_path: Path, data: dict[str, Any]) -> None:
    plan = Plan.from_dict(data)
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml(), encoding="utf-8")
    again = Plan.from_yaml(file)
    assert content(again) == content(plan) and again.sha256 == plan.sha256
    assert [rule.match for rule in again.rules] == [rule["match"] for rule in data["rules"]]


@PROFILE
@given(plans())
def test_a_mapping_is_its_rules(data: dict[str, Any]) -> None:
    mapping = {rule["match"]: rule["source"] for rule in data["rules"]}
    rules = [{"match": match, "source": source} for match, source in mapping.items()]
    others = {key: value for key, value in data.items() if key != "rules"}
    mapped = Plan.from_dict(others | {"weight_mapping": mapping})
    listed = Plan.from_dict(others | {"rules": rules})
    assert content(mapped) == content(listed) and mapped.sha256 == listed.sha256


@PROFILE
@given(plans(), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_damaged_plan_is_a_plan_or_a_plan_error(
    tmp_path: Path, data: dict[str, Any], flips: list[tuple[float, int]]
) -> None:
    raw = bytearray(yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "replace"))
    for place, bits in flips:
        raw[int(place * (len(raw) - 1))] ^= bits
    file = tmp_path / "plan.yaml"
    file.write_bytes(raw)
    try:
        plan = Plan.from_yaml(file)
    except PlanError as error:
        assert str(file) in str(error)
        str(error).encode("utf-8")
    else:
        assert plan.base in plan.sources


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["bf16", "\ud800", "re:(a+)+b", "{0-9", "widen"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["path", "match", "source", "bf16", "base", 1, None]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
keys = ["version", "base", "sources", "rules", "options", "weight_mapping", "mixed_precision"]


@PROFILE
@given(plans(), st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=3))
def test_any_value_is_a_plan_or_a_plan_error(data: dict[str, Any], odd: dict[str, Any]) -> None:
    try:
        plan = Plan.from_dict(data | odd)
    except PlanError as error:
        str(error).encode("utf-8")
    else:
        assert plan.version == 1 and plan.sha256
