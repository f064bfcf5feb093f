# SPDX-License-Identifier: Apache-2.0
"""Rules are tried on parents where those decide; the answer is that of every name by itself."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mixprec.plan.patterns import gather_siblings, numbered_braces
from vllm_mixprec.plan.plan import Plan
from vllm_mixprec.routing.assign import _report_reach, match_rules
from vllm_mixprec.routing.findings import FindingLog

COMPONENTS = ["model", "layers", "0", "1", "12", "mlp", "experts", "a", "q_proj", "", "x y", "a\nb"]
PARTS = "model layers * ** {0-3} {0-1,12} mlp experts {a,b} a q_* 1".split()
PARTS += "{a.b,mlp} {a*,b} {0-12}_x x{1,2} {model.layers,a}".split()


def spell(parent: str, leaves: list[str]) -> list[str]:
    return [parent, *(f"{parent}.{leaf}" for leaf in leaves)]


parents = st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=5).map(".".join)
families = st.tuples(parents, st.lists(st.sampled_from(COMPONENTS), max_size=3))
names = st.lists(families, min_size=1, max_size=12).map(
    lambda found: list(dict.fromkeys(name for family in found for name in spell(*family)))
)
globs = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
matches = st.one_of(globs, globs.map("{}.weight".format), st.just(r"re:model\..*"))


def plan_of(*rules: str) -> Plan:
    return Plan.from_dict(
        {
            "version": 1,
            "base": "x",
            "sources": {"x": {"path": "."}},
            "rules": [{"match": match, "source": "x"} for match in rules],
        }
    )


@settings(deadline=None)
@given(names, st.lists(matches, min_size=1, max_size=4))
def test_rules_match_names_as_each_by_itself(names: list[str], rules: list[str]) -> None:
    plan, siblings = plan_of(*rules), gather_siblings(names)
    assert [name for some in siblings for name in some.names] == names
    assert list(match_rules(plan, siblings)) == [
        sum(1 << index for index, rule in enumerate(plan.rules) if rule.matches(name))
        for name in names
    ]


@settings(deadline=None)
@given(names, globs)
def test_reach_of_braces_is_that_of_every_name(names: list[str], match: str) -> None:
    expected = []
    for brace, largest, opened in numbered_braces(match):
        found = [(int(m[1]), name[: m.end(1)]) for name in names if (m := opened.match(name))]
        last, example = max(found, key=lambda one: one[0], default=(-1, ""))
        if 0 <= last < largest:
            expected.append((f"{brace} counts to {largest}", f"matches is {example}. Write"))
    log = FindingLog()
    _report_reach(plan_of(match), 0, gather_siblings(names), max(map(len, names)), log)
    messages = [finding.message for finding in log.findings()]
    assert len(messages) == len(set(expected))
    for (brace, example), message in zip(dict.fromkeys(expected), messages, strict=True):
        assert brace in message and example in message
