# SPDX-License-Identifier: Apache-2.0
"""The counts of real engines, to the last one.

Held against what transformers' routers choose in float32 for the same sequences, and against the
tokens that vLLM's scheduler handed out. The engine computes in float32 there, so that no near-tie
falls the other way. vLLM's own returned routed experts need its V2 model runner, which asks for
Triton and so for a GPU.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch

from tests.engine import reference
from tests.engine.architectures import ARCHITECTURES, BY_NAME
from tests.engine.harness import ENGINE, ENVIRONMENT, compose_plan
from tests.engine.mixes import MIXES, ROOT, SOURCES
from tests.experts.exactness import TRAFFIC, check_preempted, check_sums

pytestmark = pytest.mark.engine

RANDOM = SOURCES["random"]["bf16"]
ONE_PROCESS = {"distributed_executor_backend": "uni"}
EAGER = {"enforce_eager": True}
FLOAT32 = {"dtype": "float32"}
MTP = "glm4_moe/experts"

# Layout -> model, options, scenarios. Where a layer mixes formats or a worker has half a core, bf16
# arithmetic decides near-ties otherwise than float32: there the sums are exact, the shares are not.
LAYOUTS: dict[str, tuple[str, dict, list[str]]] = {
    "eager": ("random", ONE_PROCESS | EAGER | FLOAT32, TRAFFIC),
    "compiled": ("random", ONE_PROCESS | FLOAT32, TRAFFIC),
    "chunked": (
        "random",
        ONE_PROCESS | EAGER | FLOAT32 | {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        ["plain"],
    ),
    "preempting": (
        "random",
        ONE_PROCESS | EAGER | FLOAT32 | {"num_gpu_blocks_override": 6, "disable_log_stats": False},
        ["preempted"],
    ),
    "mixed": ("four-groups", ONE_PROCESS, TRAFFIC),
    "drafting": (
        MTP,
        ONE_PROCESS
        | EAGER
        | ARCHITECTURES[BY_NAME[MTP].model].options
        | {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
        | {"max_model_len": 256},
        ["plain"],
    ),
    "two stages": ("random", {"pipeline_parallel_size": 2} | FLOAT32, TRAFFIC),
    "two shards": ("random", {"tensor_parallel_size": 2} | EAGER | FLOAT32, TRAFFIC),
    "experts apart": (
        "four-groups",
        {"tensor_parallel_size": 2, "enable_expert_parallel": True} | EAGER,
        ["plain"],
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run a layout's engine when it is first asked for; those of one process share theirs."""
    alone = tuple(
        name for name, (_, options, _) in LAYOUTS.items() if ONE_PROCESS.items() <= options.items()
    )

    @cache
    def run(layouts: tuple[str, ...]) -> tuple[dict, str]:
        folder = tmp_path_factory.mktemp(layouts[0].replace(" ", "-"))
        mixes = {mix.name: mix for mix in MIXES} | BY_NAME
        jobs = []
        for layout in layouts:
            model, options, scenarios = LAYOUTS[layout]
            path = RANDOM
            if model in mixes:
                path = compose_plan(folder / layout.replace(" ", "-"), mixes[model].plan())
            job = {"name": layout, "model": str(path), "options": options}
            jobs.append(job | {"scenarios": scenarios})
        (folder / "jobs.json").write_text(json.dumps({"engine": ENGINE, "jobs": jobs}))
        two = {} if layouts == alone else {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.experts.counting", folder / "jobs.json", folder / "out"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | two,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # the workers' tracebacks are in vLLM's log, on stdout
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, first_problem(done.stdout)
        return json.loads((folder / "out").read_text()), done.stdout

    def result(layout: str) -> dict:
        found, log = run(alone if layout in alone else (layout,))
        assert "error" not in found[layout], f"{found[layout]['error']}\n{first_problem(log)}"
        return found[layout]

    return result


def first_problem(log: str) -> str:
    """Return a log from the first error on: what an engine ends with often only follows from it."""
    found = re.search(r"^(.* ERROR |Traceback)", log, re.MULTILINE)
    return log[found.start() if found else -6000 :][:8000]


def chosen(sequences: list[list[int]], top_k: int) -> np.ndarray:
    """Return int64 [layers, experts]: the choices of transformers' routers in float32."""
    model = reference.load(RANDOM, reference.dequantised(RANDOM))
    counts = 0
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([sequence]), output_router_logits=True).router_logits
        counts = counts + np.array(
            [
                np.bincount(layer.topk(top_k).indices.flatten(), minlength=layer.shape[1])
                for layer in logits
            ]
        )
    return counts


CASES = [
    (layout, scenario) for layout, (_, _, scenarios) in LAYOUTS.items() for scenario in scenarios
]


@pytest.mark.parametrize(("layout", "scenario"), CASES)
def test_every_layer_counts_every_token_that_was_scheduled(results, layout, scenario):
    check_sums(results(layout)[scenario], scenario)


@pytest.mark.parametrize(
    "layout",
    [name for name, layout in LAYOUTS.items() if layout[0] == "random" and "plain" in layout[2]],
)
def test_each_expert_is_counted_as_transformers_chooses(results, layout):
    result = results(layout)["plain"]
    assert result["layers"] == ["0", "1"]
    assert (np.array(result["counts"]) == chosen(result["sequences"], result["top_k"])).all()


def test_a_preempted_request_is_counted_for_what_it_computes_anew(results):
    check_preempted(results("preempting"))
    assert results("preempting")["preempted"]["requests"] == 4


def test_each_request_is_counted_once(results):
    counted = {name: results("eager")[name]["requests"] for name in TRAFFIC}
    assert counted == {
        "nothing": 0,
        "plain": 4,
        "cached_prefix": 2,
        "sampled_in_parallel": 6,
        "aborted": 3,
    }


def test_a_draft_is_counted_apart(results):
    result = results("drafting")["plain"]
    draft = result["draft"]
    config = json.loads((SOURCES[BY_NAME[MTP].model]["bf16"] / "config.json").read_text())
    assert draft["layers"] == [str(config["num_hidden_layers"])]
    assert draft["layers"][0] not in result["layers"]
    # The draft sees what the target saw, and its own first token of each pair.
    assert draft["tokens"] > result["tokens"] - 4 * 3
    sums = np.array(draft["counts"]).sum(axis=1)
    assert sums.tolist() == [draft["tokens"] * draft["top_k"]]


def test_without_a_draft_there_is_none(results):
    assert results("eager")["plain"]["draft"] is None
