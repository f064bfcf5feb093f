# SPDX-License-Identifier: Apache-2.0
"""The counters of real engines on a GPU, in CUDA graphs, to the last one."""

from pathlib import Path

import numpy as np
import pytest

from tests.engine.mixes import MIXES, SOURCES
from tests.experts.exactness import TRAFFIC, check_preempted, check_sums
from tests.gpu.serving import KERNEL_VARIABLE, OPTIONS, compose_mix, run_module

pytestmark = pytest.mark.engine

# The scenarios of tests.experts.counting reckon with blocks of 128 tokens.
COUNTED = {key: value for key, value in OPTIONS.items() if key != "kv_cache_memory_bytes"} | {
    "enable_prefix_caching": True,
    "block_size": 128,
    "num_gpu_blocks_override": 64,
}
# Layout -> model, options, kernel, scenarios.
LAYOUTS: dict[str, tuple[str, dict, str, list[str]]] = {
    "graphs": ("random", {}, "groups", TRAFFIC),
    "mixed, groups": ("experts-three-ways", {}, "groups", TRAFFIC),
    "mixed, one launch": ("experts-three-ways", {}, "one-launch", TRAFFIC),
    "chunked": ("random", {"max_num_batched_tokens": 16, "max_num_seqs": 8}, "groups", ["plain"]),
    "preempting": (
        "random",
        {"num_gpu_blocks_override": 6, "disable_log_stats": False},
        "groups",
        ["preempted"],
    ),
}
CASES = [
    (layout, scenario) for layout, (*_, scenarios) in LAYOUTS.items() for scenario in scenarios
]


PROMPTS = [[(7 * start + 3 * place) % 60 + 1 for place in range(9 + start)] for start in range(5)]


def model_path(name: str, folder: Path) -> Path:
    """Compose the mix of that name, or find the stock model."""
    mixes = {mix.name: mix for mix in MIXES}
    if name not in mixes:
        return SOURCES[name]["bf16"]
    return compose_mix(folder / "composed", mixes[name])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run a layout's engine when it is first asked for."""
    ran: dict[str, dict] = {}

    def run(layout: str) -> dict:
        if layout not in ran:
            model, options, kernel, scenarios = LAYOUTS[layout]
            folder = tmp_path_factory.mktemp("counting")
            job = {"name": layout, "model": str(model_path(model, folder)), "options": options}
            job |= {"scenarios": scenarios, "environment": {KERNEL_VARIABLE: kernel}}
            work = {"engine": COUNTED, "jobs": [job]}
            ran.update(run_module("tests.experts.counting", folder, work))
        assert "error" not in ran[layout], ran[layout]["error"]
        return ran[layout]

    return run


@pytest.mark.parametrize(("layout", "scenario"), CASES)
def test_every_layer_counts_every_token_that_was_scheduled(results, layout, scenario):
    check_sums(results(layout)[scenario], scenario)


@pytest.mark.parametrize("layout", ["graphs", "mixed, one launch"])
def test_each_expert_is_counted_as_vllm_returns_it(layout, tmp_path):
    """Against --enable-return-routed-experts, which captures the ids at the same place."""
    model, _, kernel, _ = LAYOUTS[layout]
    job = {"name": "routed", "model": str(model_path(model, tmp_path)), "prompts": PROMPTS}
    job |= {"routed": True, "environment": {KERNEL_VARIABLE: kernel}}
    options = COUNTED | {"enable_return_routed_experts": True}
    work = {"engine": options, "jobs": [job]}
    result = run_module("tests.gpu.runner", tmp_path, work)["routed"]
    assert "error" not in result, result["error"]
    assert np.array(result["returned"]).sum() > 0
    np.testing.assert_array_equal(result["counted"], result["returned"])


def test_a_preempted_request_is_counted_for_what_it_computes_anew(results):
    check_preempted(results("preempting"))
