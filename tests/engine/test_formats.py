# SPDX-License-Identifier: Apache-2.0
"""Every format in one engine: a model with a layer for each, against transformers in float32.

The weights of the reference are those that the formats' own tools read back. Another engine has
sources of several schemes each: GPTQ's ``dynamic``, auto-round's ``extra_config``, groups of
compressed-tensors and FP8's ``ignored_layers``.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.formats.tools import CASES
from tests.engine import reference
from tests.engine.harness import EAGER, compose_plan, run_engines
from tests.quant.format_model import SEVERAL, modules_of, write_formats, write_several
from vllm_mixprec import Plan, check

pytestmark = pytest.mark.engine


# Mean absolute difference, nats a token, over a model of as many layers as there are formats.
BOUND = 0.03
DAMAGED = ("ct-int4-asym",)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (60,), generator=generator).tolist() for _ in range(4)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Serve all formats, then each damaged source; returns (results by name, expected)."""
    folder = tmp_path_factory.mktemp("formats")
    plan, weights = write_formats(folder)
    jobs = [{"name": "whole", "model": str(compose_plan(folder / "mixed", plan))}]
    for case in DAMAGED:
        file = folder / case / "model.safetensors"
        tensors = load_file(file)
        damaged = folder / f"damaged-{case}"
        damaged.mkdir()
        for name in tensors:
            if name.endswith(("scales", "weight_scale")):
                tensors[name] = tensors[name] / 2
        save_file(tensors, damaged / "model.safetensors")
        (damaged / "config.json").write_bytes((folder / case / "config.json").read_bytes())
        sources = plan["sources"] | {case: {"path": str(damaged)}}
        mixed = compose_plan(folder / f"mixed-{case}", plan | {"sources": sources})
        jobs.append({"name": case, "model": str(mixed)})
    several = folder / "several"
    plan, other_weights, _ = write_several(several)
    jobs.append({"name": "several", "model": str(compose_plan(several / "mixed", plan))})
    prompts = make_prompts()
    found = run_engines(folder, [job | {"prompts": prompts} for job in jobs], **EAGER)
    expected = dict.fromkeys(found, reference.log_probs(folder / "base", weights, prompts))
    expected["several"] = reference.log_probs(several / "base", other_weights, prompts)
    return found, expected


def difference(results, name: str) -> float:
    found, expected = results
    assert "error" not in found[name], found[name]["error"]
    return (torch.tensor(found[name]["log_probs"]) - expected[name]).abs().mean().item()


def test_log_probs_match_float32(results, record_property):
    found = difference(results, "whole")
    print(f"{len(CASES)} formats: {found:.4f} nats a token (at most {BOUND})")
    assert found <= BOUND
    for case in CASES:
        record_property("matrix", (case, "engine", "yes"))


def test_packed_where_the_table_says_so(results):
    (worker,) = results[0]["whole"]["workers"]
    assert set(worker["widened"]) == {
        module
        for layer, case in enumerate(CASES.values())
        for module in modules_of(layer)
        if (case.experts if ".experts." in module else case.cpu) is None
    }


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_source_is_noticed(results, case):
    """Negative control: one layer's scales are halved."""
    found = difference(results, case)
    print(f"{case} damaged: {found:.4f} nats a token, against at most {BOUND}")
    assert found > BOUND


def test_schemes_of_one_source_are_told_apart(tmp_path):
    plan, _, labels = write_several(tmp_path)
    report = check(Plan.from_dict(plan))
    assert report.table is not None, report.findings
    routes = report.table.routes
    assert {module: routes[module].stored.label for module in labels} == labels
    assert {routes[module].source for module in labels} == set(SEVERAL)


def test_several_schemes_of_one_source_match_float32(results):
    found = difference(results, "several")
    print(f"{len(SEVERAL)} sources of several schemes: {found:.4f} nats a token (at most {BOUND})")
    assert found <= BOUND
