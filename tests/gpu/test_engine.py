# SPDX-License-Identifier: Apache-2.0
"""Mixed models in real engines on a GPU, compiled and in CUDA graphs, against float32.

Each mix is served group by group and in one launch. Prompts are one batch that a graph pads, the
tokens after them are decoded; both are compared, with transformers' on dequantised weights.
"""

import pytest
import torch

from tests.engine.damage import DAMAGES, write_damaged
from tests.engine.mixes import MIXES, SOURCES, Mix
from tests.gpu.runner import NEW_TOKENS
from tests.gpu.serving import CAPTURED, KERNEL_VARIABLE, OPTIONS, compose_mix, run_module

pytestmark = pytest.mark.engine

BY_NAME = {mix.name: mix for mix in MIXES}
KERNELS = ("groups", "one-launch")
# Mean absolute difference, nats a token. bfloat16 costs 0.008 on the random model. From compute
# capability 8.9 on stock FP8 kernels round activations to E4M3 by groups of 128, which, emulated
# in float32, costs 0.025 on "two-groups" and 0.008 to 0.014 on the others.
BOUNDS = {mix.name: 0.025 for mix in MIXES} | {"bf16": 0.02, "two-groups": 0.04}
SEVERAL = ("two-groups", "four-groups", "experts-three-ways")
"""Mixes with layers of several formats."""


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed")
    return {mix.name: str(compose_mix(folder / mix.name, mix)) for mix in MIXES}


@pytest.fixture(scope="module", params=KERNELS)
def engines(request, composed, tmp_path_factory):
    """Run every mix with one kind of kernel; returns (kernel, results by mix)."""
    from tests.engine.conftest import prompts

    mixes = MIXES if request.param == "groups" else [BY_NAME[name] for name in SEVERAL]
    jobs = [
        {"name": mix.name, "model": composed[mix.name], "prompts": prompts(mix.model)}
        | {"environment": {KERNEL_VARIABLE: request.param}}
        for mix in mixes
    ]
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run_module("tests.gpu.runner", folder, {"engine": OPTIONS, "jobs": jobs})


def differences(result: dict, mix: Mix) -> tuple[float, float]:
    """Mean absolute nats a token of the prompts, and of the tokens that were decoded."""
    from tests.engine import reference  # imports vLLM
    from tests.engine.conftest import expected, prompts, reference_weights

    assert "error" not in result, result["error"]
    prefill = (torch.tensor(result["log_probs"]) - expected(mix)).abs().mean().item()
    found = torch.tensor([entry["log_probs"] for entry in result["decoded"]]).flatten()
    sequences = [
        prompt + entry["tokens"]
        for prompt, entry in zip(prompts(mix.model), result["decoded"], strict=True)
    ]
    config, weights = SOURCES[mix.model]["bf16"], reference_weights(mix)
    every = reference.log_probs(config, weights, sequences)
    wanted = torch.cat(
        [part[-NEW_TOKENS:] for part in every.split([len(s) - 1 for s in sequences])]
    )
    return prefill, (found - wanted).abs().mean().item()


def test_log_probs_match_float32(engines):
    kernel, results = engines
    far = {}
    for name, result in results.items():
        found = differences(result, BY_NAME[name])
        print(f"{kernel:11} {name:20} {found[0]:.4f} prompts, {found[1]:.4f} decoded")
        if not max(found) <= BOUNDS[name]:
            far[name] = found
    assert far == {}


def test_graphs_and_compilation_are_on(engines):
    _, results = engines
    for name, result in results.items():
        facts = result["facts"]
        assert facts["compilation_mode"] == 3, name
        assert "FULL" in facts["cudagraph_mode"] or "PIECEWISE" in facts["cudagraph_mode"], name
        assert facts["capture_sizes"] == CAPTURED, name


def test_layers_of_several_formats_are_run_as_asked(engines):
    kernel, results = engines
    for name in SEVERAL:
        methods = results[name]["facts"]["methods"].values()
        mixed = [one_launch for method, one_launch in methods if method == "MixedExpertsMethod"]
        assert mixed and set(mixed) == {kernel == "one-launch"}, (name, methods)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Serve a mix over copies of a source in which one thing is wrong each."""
    from tests.engine.conftest import prompts

    folder = tmp_path_factory.mktemp("damaged")
    mix = BY_NAME["two-groups"]
    jobs = []
    for name, source in write_damaged(folder).items():
        mixed = compose_mix(folder / name / "mixed", mix, fp8=source)
        jobs.append({"name": name, "model": str(mixed), "prompts": prompts(mix.model)})
    options = OPTIONS | {"enforce_eager": True}
    return run_module("tests.gpu.runner", folder, {"engine": options, "jobs": jobs})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_noticed(damaged, damage):
    """Negative control: the engine serves it, and the comparison above fails."""
    assert "error" not in damaged[damage], damaged[damage]["error"]
    found, _ = differences(damaged[damage], BY_NAME["two-groups"])
    assert found > BOUNDS["two-groups"]
