# SPDX-License-Identifier: Apache-2.0
"""A layer of four formats, loaded by the package's loader, run by the grouped kernel.

As vLLM builds it for a GPU, but for the device: in Triton's interpreter, and so in a process of its
own, which is this file run as a script.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_mixprec.checkpoint import Scheme
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.quant.one_launch import VARIABLE, use_one_launch
from vllm_mixprec.routing.platform import Platform

ROOT = Path(__file__).parents[2]
SOURCES = {name: ROOT / "tests" / "fixtures" / "random-moe" / name for name in ("fp8", "gptq")}
BASE = ROOT / "tests" / "fixtures" / "random-moe" / "bf16"
EXPERTS = "model.layers.1.mlp.experts"
RULES = {f"{EXPERTS}.{{0-2}}": "fp8", f"{EXPERTS}.{{3-5}}": "gptq", f"{EXPERTS}.6": "rows"}
HOPPER = Platform("cuda-90")
BF16 = Scheme("bf16", 16)
FP8 = Scheme("fp8_block", 8, block=(128, 128))
INT4 = Scheme("gptq", 4, group_size=128)


def source_of(expert: int) -> str:
    return "fp8" if expert < 3 else "gptq" if expert < 6 else "rows" if expert == 6 else "bf16"


def write_rows(folder: Path) -> dict[str, torch.Tensor]:
    """Write expert 6 as compressed-tensors' FP8 with a scale a row; returns its weights."""
    from safetensors.torch import load_file, save_file

    from tests.checkpoint.formats.tools import FLOAT, FP8, compressed

    store, weights, tensors, config = compressed(FLOAT, FP8 | {"strategy": "channel"}), {}, {}, {}
    base = {k: v for file in BASE.glob("*.safetensors") for k, v in load_file(file).items()}
    for name, weight in base.items():
        if name.startswith(f"{EXPERTS}.6."):
            stored = store(weight.float())
            weights[name] = stored.weight.float()
            module = name.removesuffix("weight")
            tensors |= {f"{module}{suffix}": part for suffix, part in stored.tensors.items()}
            config = {"quantization_config": stored.config}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    plain = json.loads((BASE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | config, default=str))
    return weights


def main(folder: Path) -> None:
    """Serve the plan in this process, run one batch through layer 1, and write what came out."""
    from tests.loading.serving import serve
    from vllm_mixprec.quant import methods

    methods._vllm_platform = lambda: HOPPER  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 256, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(9)]).int()
    weights = torch.rand(9, 3, generator=generator)
    rows = write_rows(folder / "rows")
    sources = SOURCES | {"rows": folder / "rows"}
    with serve(folder, BASE, sources, RULES, has_draft=False) as serving:
        built = serving.build()
        serving.loader.load_weights(built.model, built.model_config)
        layer = built.model.model.layers[1].mlp.experts.routed_experts
        method = layer.quant_method
        for child in (getattr(layer, name) for name in layer.group_names):
            child.quant_method.process_weights_after_loading(child)
        out = layer.forward_modular(x, weights, ids)
        stored = {
            name: [str(parameter.dtype), list(parameter.shape)]
            for name, parameter in layer.named_parameters()
        }
        table = method.one_launch._table
        again = layer.forward_modular(x, weights, ids)
        assert method.one_launch._table is table, "the table was built twice"
    found = {"x": x, "ids": ids, "weights": weights, "out": out, "again": again, "rows": rows}
    torch.save(found, folder / "out")
    (folder / "stored.json").write_text(json.dumps(stored))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("one-launch")
    environment = {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        VARIABLE: "one-launch",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return torch.load(folder / "out"), json.loads((folder / "stored.json").read_text())


def expected(found: dict, source_of=source_of) -> torch.Tensor:
    """Compute the layer in float32 on independently dequantised weights."""
    from tests.engine.reference import dequantised

    sources = {"bf16": dequantised(BASE)} | {k: dequantised(v) for k, v in SOURCES.items()}
    sources["rows"] = sources["bf16"] | found["rows"]
    out = torch.zeros(9, 256)
    for row in range(9):
        for choice in range(3):
            expert = int(found["ids"][row, choice])
            weights = sources[source_of(expert)]
            gate, up, down = (
                weights[f"{EXPERTS}.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            x = found["x"][row].float()
            inner = torch.nn.functional.silu(gate @ x) * (up @ x)
            out[row] += found["weights"][row, choice] * (down @ inner)
    return out


def error(found: dict, reference: torch.Tensor) -> float:
    return ((found["out"].float() - reference).norm() / reference.norm()).item()


def test_output_is_that_of_the_dequantised_weights(ran):
    found, _ = ran
    # What is between the GEMMs, what they give and its sum are bfloat16, to which the interpreter
    # truncates: 2^-8 of a value on average, always towards zero.
    assert error(found, expected(found)) < 3 * 2**-8
    assert torch.equal(found["out"], found["again"])


def test_weights_of_another_source_would_be_noticed(ran):
    found, _ = ran
    assert error(found, expected(found, lambda expert: "bf16")) > 2**-6
    assert error(found, expected(found, lambda expert: source_of(7 - expert))) > 2**-6


def test_weights_stay_in_the_checkpoints_precision(ran):
    _, stored = ran
    assert {name: dtype for name, (dtype, _) in stored.items()} == {
        "group0.w13_weight": "torch.float8_e4m3fn",
        "group0.w2_weight": "torch.float8_e4m3fn",
        "group0.w13_weight_scale_inv": "torch.float32",
        "group0.w2_weight_scale_inv": "torch.float32",
        "group1.w13_codes": "torch.uint8",
        "group1.w2_codes": "torch.uint8",
        "group1.w13_scales": "torch.float16",
        "group1.w2_scales": "torch.float16",
        "group2.w13_weight": "torch.float8_e4m3fn",
        "group2.w2_weight": "torch.float8_e4m3fn",
        "group2.w13_weight_scale": "torch.float32",
        "group2.w2_weight_scale": "torch.float32",
        "group3.w13_weight": "torch.bfloat16",
        "group3.w2_weight": "torch.bfloat16",
    }
    shapes = {name: shape for name, (_, shape) in stored.items()}
    assert shapes["group1.w13_codes"] == [3, 8, 256, 16]  # 4 bits a weight of 3 x 256 x 256


# Which way a layer is run.


def layer(**changes: object) -> SimpleNamespace:
    moe = {
        "has_bias": False,
        "in_dtype": torch.bfloat16,
        "hidden_dim": 2048,
        "intermediate_size_per_partition": 768,
    }
    plain = {
        "activation": SimpleNamespace(value="silu"),
        "swiglu_limit": None,
        "swiglu_alpha": None,
        "swiglu_beta": None,
        "apply_router_weight_on_input": False,
    }
    for name, value in changes.items():
        (moe if name in moe else plain)[name] = value
    return SimpleNamespace(moe_config=SimpleNamespace(**moe), **plain)


def test_layers_are_run_by_groups_unless_asked_for(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert use_one_launch([FP8, INT4], HOPPER, layer()) == (False, None)
    monkeypatch.setenv(VARIABLE, "one-launch")
    assert use_one_launch([FP8, INT4], HOPPER, layer()) == (True, None)
    assert use_one_launch([FP8, INT4], Platform("cpu-avx512"), layer()) == (False, None)
    monkeypatch.setenv(VARIABLE, "groups")
    assert use_one_launch([FP8, INT4], HOPPER, layer()) == (False, None)


@pytest.mark.parametrize(
    ("schemes", "platform", "changes", "said"),
    [
        ([FP8, INT4], Platform("cuda-75"), {}, "compute capability 7.5, below 8.0"),
        ([FP8, replace(INT4, bits=8)], HOPPER, {}, "it takes 4 bits"),
        ([FP8, replace(INT4, format="awq")], HOPPER, {}, "a scale a block or a row, and GPTQ int4"),
        ([FP8, INT4], HOPPER, {"has_bias": True}, "biases"),
        ([FP8, INT4], HOPPER, {"swiglu_limit": 7.0}, "a clamp"),
        ([FP8, INT4], HOPPER, {"apply_router_weight_on_input": True}, "inputs"),
        ([FP8, INT4], HOPPER, {"in_dtype": torch.float32}, "torch.float32"),
        ([BF16, INT4], HOPPER, {"intermediate_size_per_partition": 48}, "multiples of 32"),
        ([FP8, BF16], HOPPER, {"intermediate_size_per_partition": 192}, "within a block"),
    ],
)
def test_what_the_kernel_cannot_run_is_said(schemes, platform, changes, said, monkeypatch):
    monkeypatch.setenv(VARIABLE, "one-launch")
    one_launch, problem = use_one_launch(schemes, platform, layer(**changes))
    assert not one_launch
    assert said in problem


def test_another_setting_is_an_error(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UnsupportedError, match="=fast; expected auto, groups or one-launch"):
        use_one_launch([FP8, INT4], HOPPER, layer())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
