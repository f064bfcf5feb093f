# SPDX-License-Identifier: Apache-2.0
"""Int4 on a CPU with AVX512F but no AVX512_BF16: linears packed, experts widened, FP8 widened.

The library is the one that vLLM has for such CPUs, which lacks most of our kernels' operators; the
model is compiled, as a server's is.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import expected, prompts
from tests.engine.harness import EAGER, compose_plan, run_engines
from tests.engine.mixes import SOURCES, WEIGHTS_ONLY, Mix, attention, expert, layer
from vllm_mixprec.quant import cpu_probe

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(cpu_probe.probe_int4_w16("gptq") is not None, reason="needs AVX512F"),
]


def _choose(name: str) -> str:
    if attention(name):
        return "gptq-asym" if layer(name) == 0 else "gptq"
    return {0: "gptq", 1: "gptq", 2: "fp8"}.get(expert(name), "bf16")


MIX = Mix(
    "cpu-other",
    "random",
    (
        ("model.layers.0.self_attn.*_proj", "gptq-asym"),
        ("**.self_attn.*_proj", "gptq"),
        ("**.experts.{0,1}", "gptq"),
        ("**.experts.2", "fp8"),
    ),
    _choose,
    WEIGHTS_ONLY,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu-other")
    plan = MIX.plan()
    damaged = folder / "damaged"
    shutil.copytree(SOURCES["random"]["gptq-asym"], damaged)
    shard = next(damaged.glob("*.safetensors"))
    tensors = load_file(shard)
    zeros = "model.layers.0.self_attn.q_proj.qzeros"
    tensors[zeros] = tensors[zeros] ^ 0x11111111  # every zero point is one off
    save_file(tensors, shard)
    wrong = plan | {"sources": plan["sources"] | {"gptq-asym": {"path": str(damaged)}}}
    models = {"whole": compose_plan(folder / "mixed", plan)}
    models["damaged"] = compose_plan(folder / "wrong", wrong)
    jobs = [
        {"name": name, "model": str(model), "prompts": prompts(MIX.model)}
        for name, model in models.items()
    ]
    jobs[1]["options"] = EAGER
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MIXPREC_PLATFORM", "cpu-other")
        return run_engines(folder, jobs, runner="tests.engine.older_cpu")


def difference(results, name: str) -> float:
    assert "error" not in results[name], results[name]["error"]
    return (torch.tensor(results[name]["log_probs"]) - expected(MIX)).abs().mean().item()


def test_log_probs_match_float32(results):
    found = difference(results, "whole")
    print(f"{found:.4f} nats a token (at most {MIX.bound})")
    assert results["whole"]["compiled"]
    assert found <= MIX.bound


def test_library_is_that_of_such_cpus(results):
    assert results["whole"]["libraries"] == ["_C_AVX512.abi3.so"]


def test_linears_are_packed_and_experts_widened(results):
    (worker,) = results["whole"]["workers"]
    widened = set(worker["widened"])
    quantised = {m for m in worker["modules"] if _choose(f"{m}.weight") != "bf16"}
    assert widened == {module for module in quantised if ".experts." in module}
    packed = [name for name in worker["parameters"] if name.endswith("qweight")]
    layers = json.loads((SOURCES["random"]["bf16"] / "config.json").read_text())
    assert len(packed) == 2 * layers["num_hidden_layers"]  # qkv_proj and o_proj


def test_a_damaged_source_is_noticed(results):
    """Negative control: one layer's zero points of q_proj."""
    found = difference(results, "damaged")
    print(f"damaged: {found:.4f} nats a token, against at most {MIX.bound}")
    assert found > MIX.bound
