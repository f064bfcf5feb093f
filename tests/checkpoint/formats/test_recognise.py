# SPDX-License-Identifier: Apache-2.0
"""Real checkpoints are recognised, and formats that are not read are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.formats.stored import GPTQ, gptq_specs, specs
from vllm_mixprec.checkpoint.formats import FORMATS, Module, Scheme, recognise
from vllm_mixprec.checkpoint.header import TensorSpec, read_header
from vllm_mixprec.errors import UnsupportedError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "random-moe"
CT = {"quant_method": "compressed-tensors", "config_groups": {}}
MXFP4 = {"quant_method": "mxfp4"}


def recognise_fixture(checkpoint: str, module: str) -> Module:
    tensors = {
        name.rpartition(".")[2]: spec
        for shard in sorted((FIXTURES / checkpoint).glob("*.safetensors"))
        for name, spec in read_header(shard).items()
        if name.rpartition(".")[0] == module
    }
    config = json.loads((FIXTURES / checkpoint / "config.json").read_text())
    return recognise(module, tensors, config.get("quantization_config"))


@pytest.mark.parametrize(
    ("checkpoint", "scheme", "label"),
    [
        ("bf16", Scheme("bf16", 16), "bf16"),
        ("fp8", Scheme("fp8_block", 8, block=(128, 128)), "fp8_block 128x128"),
        ("gptq", Scheme("gptq", 4, group_size=128), "gptq int4 g128"),
        ("gptq-asym", Scheme("gptq", 4, group_size=64, symmetric=False), "gptq int4 g64 asym"),
    ],
)
def test_real_checkpoints_are_recognised(checkpoint: str, scheme: Scheme, label: str) -> None:
    for expert, shape in [("down_proj", (256, 128)), ("up_proj", (128, 256))]:
        module = recognise_fixture(checkpoint, f"model.layers.1.mlp.experts.7.{expert}")
        assert (module.scheme, module.shape, module.problems) == (scheme, shape, ())
    assert scheme.label == label
    assert scheme.is_quantized is (checkpoint != "bf16")


@pytest.mark.parametrize("checkpoint", ["fp8", "gptq", "gptq-asym"])
@pytest.mark.parametrize("module", ["lm_head", "model.norm", "model.layers.0.mlp.gate"])
def test_unquantised_modules_of_a_quantised_model_are_plain(checkpoint: str, module: str) -> None:
    recognised = recognise_fixture(checkpoint, module)
    assert recognised.scheme == Scheme("bf16", 16)
    assert recognised.problems == ()


@pytest.mark.parametrize(
    ("tensors", "config", "match"),
    [
        (
            specs(weight_packed=("U8", [2, 8, 8]), weight_scale=("U8", [2, 8, 1])),
            CT,
            r"FP4 of 3 dimensions is not supported yet \(tensors: weight_packed U8",
        ),
        (specs(weight_packed=("I32", [8, 8])), None, 'weight_packed of quant_method "None"'),
        (specs(weight_packed=("I32", [2, 8, 8])), CT, r"ct_pack packed as I32 \[2, 8, 8\]"),
        (gptq_specs(256, 96, 128), CT, 'quant_method "compressed-tensors" is not supported'),
        (gptq_specs(256, 96, 128), None, "packed integers without a quantization_config"),
        (gptq_specs(256, 96, 128), {**GPTQ, "bits": 3}, "GPTQ of 3 bits"),
        (
            gptq_specs(256, 96, 128),
            {**GPTQ, "checkpoint_format": "marlin"},
            'quant_method "gptq" with checkpoint_format "marlin"',
        ),
        (
            gptq_specs(256, 96, 128),
            {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:fp8"},
            'packing_format "auto_round:fp8"',
        ),
        (
            gptq_specs(256, 96, 128),
            {**GPTQ, "quant_method": "auto-round", "data_type": "fp8", "group_size": [128, 128]},
            'quant_method "auto-round" with data_type "fp8"',
        ),
        (specs(qweight=("U8", [8, 8])), GPTQ, r"GPTQ packed as U8 \[8, 8\]"),
        (specs(qweight=("I32", [4, 8, 8])), GPTQ, r"GPTQ packed as I32 \[4, 8, 8\]"),
        (specs(weight=("F8_E4M3", [2, 8, 8])), None, "FP8 of 3 dimensions"),
        (specs(weight=("F8_E5M2", [8, 8])), None, "a weight stored as F8_E5M2"),
        (specs(weight=("I8", [8, 8])), CT, 'stored as I8 of quant_method "compressed-tensors"'),
        (specs(weight=("I8", [8, 8]), SCB=("F32", [8])), None, "bitsandbytes int8"),
        (specs(absmax=("F32", [8])), None, "bitsandbytes is not supported"),
        (
            specs(gate_up_proj_blocks=("U8", [8, 4]), gate_up_proj_scales=("U8", [8, 4])),
            MXFP4,
            "MXFP4 of gpt-oss, all experts of a layer in one tensor, is not supported",
        ),
        (specs(weight=("U8", [8, 4])), MXFP4, 'U8 of quant_method "mxfp4"'),
    ],
)
def test_unknown_format_is_named_with_what_gave_it_away(
    tensors: dict[str, TensorSpec], config: dict[str, Any] | None, match: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"x.safetensors: module a.b: .*{match}"):
        recognise("a.b", tensors, config)


def test_every_format_is_listed_under_its_own_name() -> None:
    assert {name: known.name for name, known in FORMATS.items()} == {name: name for name in FORMATS}
