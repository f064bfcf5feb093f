# SPDX-License-Identifier: Apache-2.0
"""Prompt log-probabilities of the real engine, in every layout, against transformers in float32.

All layouts of two ranks run in one pair of processes (:func:`tests.engine.harness.run_ranks`);
"tp2-ep-mp" has worker processes of vLLM's own. docs/layouts.md is the table of it.
"""

from functools import cache

import pytest
import torch

from tests.engine.conftest import expected, prompts, reference_weights
from tests.engine.damage import DAMAGES, write_damaged
from tests.engine.harness import EAGER, compose_plan, run_engines, run_ranks
from tests.engine.mixes import MIXES, ODD_GROUPS, expert, layer

pytestmark = pytest.mark.engine

BY_NAME = {mix.name: mix for mix in (*MIXES, ODD_GROUPS)}
ALL = [mix.name for mix in MIXES]
GROUPS = ["two-groups", "four-groups", "odd-groups", "experts-three-ways"]
EP = {"enable_expert_parallel": True}
TP2, PP2, DP2 = ({f"{kind}_parallel_size": 2} for kind in ("tensor", "pipeline", "data"))
# Batches of 128 tokens: the second replica, with three prompts, has steps in which the first idles.
SHORT_STEPS = {"max_num_batched_tokens": 128}

# Layout of two ranks -> options, mixes.
TWO_RANKS: dict[str, tuple[dict, list[str]]] = {
    "dp2": (DP2 | SHORT_STEPS | EAGER, ["bf16", *GROUPS]),
    "dp2-ep": (DP2 | EP | SHORT_STEPS | EAGER, ["bf16", *GROUPS]),
    "dp2-ep-compiled": (DP2 | EP | SHORT_STEPS, ["four-groups"]),
    "tp2-ep": (TP2 | EP | EAGER, GROUPS),
    "pp2-uneven": (PP2 | EAGER, ["experts-three-ways", "layers-apart"]),
    "tp2": (TP2 | EAGER, ALL),
    "pp2": (PP2 | EAGER, ALL),
}
# An engine starts in a third of the time when it is not compiled.
CASES = {
    "compiled": ["bf16", "four-groups", "experts-three-ways"],
    "eager": [*ALL, "odd-groups"],
    "tp2-ep-mp": ["four-groups"],
} | {layout: mixes for layout, (_, mixes) in TWO_RANKS.items()}
every_layout = pytest.mark.parametrize("layout", CASES)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, dict]:
    """Compose every mix once; returns jobs for the engines' runner by mix."""
    folder = tmp_path_factory.mktemp("composed")
    return {
        name: {
            "name": name,
            "model": str(compose_plan(folder / name, mix.plan())),
            "prompts": prompts(mix.model),
        }
        for name, mix in BY_NAME.items()
    }


@pytest.fixture(scope="module")
def results(jobs, tmp_path_factory):
    """Return a function that runs a layout when it is first asked for: results by mix."""

    @cache
    def two_ranks() -> dict:
        work = []
        for layout, (options, mixes) in TWO_RANKS.items():
            uneven = {"VLLM_PP_LAYER_PARTITION": "1,2"} if layout == "pp2-uneven" else {}
            more = {"options": options, "environment": uneven}
            work += [jobs[name] | more | {"name": f"{layout} {name}"} for name in mixes]
        return run_ranks(tmp_path_factory.mktemp("two-ranks"), work)

    @cache
    def run(layout: str) -> dict:
        if layout in TWO_RANKS:
            return {name: two_ranks()[f"{layout} {name}"] for name in CASES[layout]}
        options = {"compiled": {}, "eager": EAGER}.get(layout)
        if options is None:
            options = TP2 | EP | EAGER | {"workers": 2, "distributed_executor_backend": "mp"}
        folder = tmp_path_factory.mktemp(layout)
        return run_engines(folder, [jobs[name] for name in CASES[layout]], **options)

    return run


def log_probs(result: dict) -> torch.Tensor:
    assert "error" not in result, result["error"]
    return torch.tensor(result["log_probs"])


def difference(result: dict, against: torch.Tensor) -> float:
    """Mean absolute difference in nats a token between an engine and a reference."""
    return (log_probs(result) - against).abs().mean().item()


@every_layout
def test_log_probs_match_float32(results, layout):
    found = {}
    for name in CASES[layout]:
        result, mix = results(layout)[name], BY_NAME[name]
        found[name] = difference(result, expected(mix))
        print(f"{layout:16} {name:20} {found[name]:.4f} nats a token (at most {mix.bound})")
        assert result["compiled"] == layout.endswith("compiled")
    assert {n: v for n, v in found.items() if not v <= BY_NAME[n].bound} == {}


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_log_probs_are_those_of_one_process(results, layout):
    for name in CASES[layout]:
        one = log_probs(results("eager")[name])
        found = (log_probs(results(layout)[name]) - one).abs()
        print(f"{layout:16} {name:20} mean {found.mean():.4f}, most {found.max():.4f}")
        # Not the most: a token whose router is near a tie may go to another expert.
        assert found.mean() <= BY_NAME[name].bound


def test_another_mix_is_noticed(results):
    """Negative control: each mix's bound tells it from the others of its model."""
    for name in GROUPS[:3]:
        for other in set(GROUPS[:3]) - {name}:
            found = difference(results("eager")[name], expected(BY_NAME[other]))
            print(f"{name} against {other}: {found:.4f} nats a token")
            assert found > BY_NAME[name].bound


def parts(result: dict) -> list[set[str]]:
    """Modules that each rank holds, by the base's names."""
    return [set(worker["modules"]) for worker in result["workers"]]


@every_layout
def test_ranks_hold_their_part_and_no_more(results, layout):
    for name in CASES[layout]:
        result = results(layout)[name]
        every = {tensor.rpartition(".")[0] for tensor in reference_weights(BY_NAME[name])}
        held = parts(result)
        assert set().union(*held) == every
        if len(held) == 1:
            continue
        shared = held[0] & held[1]
        if "pp2" in layout:
            assert not shared
            assert "model.embed_tokens" in held[0] and "lm_head" in held[1]
            last = result["workers"][1]["parameters"]
            assert not any("embed_tokens" in parameter for parameter in last)
        elif "-ep" in layout:
            assert shared == {module for module in every if expert(f"{module}.") < 0}
        else:
            assert shared == every


def test_stages_are_as_uneven_as_asked(results):
    layers = [
        {layer(f"{module}.") for module in held} - {-1}
        for held in parts(results("pp2-uneven")["layers-apart"])
    ]
    assert layers == [{0}, {1, 2}]


def formats(worker: dict) -> set[str]:
    """Formats of the groups that a worker's first layer has."""
    groups: dict[str, set[str]] = {}
    for name in worker["parameters"]:
        group, _, parameter = name.rpartition(".")
        if ".layers.0." in name and ".group" in group:
            groups.setdefault(group, set()).add(parameter)
    return {
        "int4" if "w13_qweight" in held else "fp8" if "w13_weight_scale_inv" in held else "bf16"
        for held in groups.values()
    }


@pytest.mark.parametrize("layout", ["tp2-ep", "dp2-ep"])
def test_a_rank_without_experts_of_a_format_has_no_group_for_it(results, layout):
    workers = results(layout)["odd-groups"]["workers"]
    assert [formats(worker) for worker in workers] == [{"fp8", "int4"}, {"fp8", "bf16"}]
    (alone,) = results("eager")["odd-groups"]["workers"]
    assert formats(alone) == {"fp8", "int4", "bf16"}


def widened(result: dict) -> set[str]:
    return {name for worker in result["workers"] for name in worker["widened"]}


# Tensor parallelism cuts attention and experts, data parallelism experts, both unless whole experts
# go to the ranks.
@pytest.mark.parametrize("layout", [name for name in CASES if "tp2" not in name and name != "dp2"])
def test_fused_parts_apart_are_widened_and_nothing_else(results, layout):
    for name in CASES[layout]:
        found = widened(results(layout)[name])
        if name != "fused-apart":
            assert found == set()
            continue
        assert all(".self_attn." in module or ".experts." in module for module in found)
        assert "model.layers.0.self_attn.k_proj" in found
        assert "model.layers.2.mlp.experts.4.up_proj" in found


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_experts_are_widened_where_a_cut_demands_it(results, layout):
    # Random model: intermediate 128 over two ranks cuts blocks of 128, not groups of 64.
    found = widened(results(layout)["four-groups"])
    assert "model.layers.0.mlp.experts.4.gate_proj" in found
    assert "model.layers.0.mlp.experts.2.down_proj" not in found
    # Demo model: 256 over two ranks cuts no expert's block.
    found = widened(results(layout)["experts-three-ways"])
    assert not any(".experts." in module for module in found)
    if layout == "dp2":
        assert found == set()  # each replica has the attention whole


@pytest.mark.parametrize("layout", ["tp2-ep", "tp2-ep-mp"])
def test_whole_experts_are_not_widened(results, layout):
    for name in CASES[layout]:
        assert not any(".experts." in module for module in widened(results(layout)[name]))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Serve a mix over copies of a source in which one thing is wrong each."""
    folder = tmp_path_factory.mktemp("damaged")
    mix = BY_NAME["two-groups"]
    work = []
    for name, source in write_damaged(folder).items():
        plan = mix.plan()
        plan["sources"]["fp8"]["path"] = str(source)
        mixed = compose_plan(folder / name / "mixed", plan)
        work.append({"name": name, "model": str(mixed), "prompts": prompts(mix.model)})
    return run_engines(folder, work, **EAGER)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_noticed(damaged, damage):
    """Negative control: the engine serves it, and the comparison above fails."""
    mix = BY_NAME["two-groups"]
    found = difference(damaged[damage], expected(mix))
    print(f"{damage}: {found:.4f} nats a token, against at most {mix.bound}")
    assert found > mix.bound
