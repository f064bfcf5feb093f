# SPDX-License-Identifier: Apache-2.0
"""Formats are told from headers and quantization_config, and misfits are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mixprec.checkpoint.formats import FORMATS, Module, QuantizationConfig, Scheme, recognise
from vllm_mixprec.checkpoint.header import DTYPE_BITS, TensorSpec, read_header
from vllm_mixprec.errors import CheckpointError, UnsupportedError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
NAME = "model.layers.0.self_attn.q_proj"


def specs(**tensors: tuple[str, list[int]]) -> dict[str, TensorSpec]:
    """Make the specs of module ``NAME``: suffix=(dtype, shape)."""
    made = {}
    for suffix, (dtype, shape) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        nbytes = count * DTYPE_BITS[dtype] // 8
        file = Path("x.safetensors")
        made[suffix] = TensorSpec(f"{NAME}.{suffix}", dtype, tuple(shape), file, 0, nbytes)
    return made


def gptq_specs(k: int, n: int, group_size: int, bits: int = 4) -> dict[str, TensorSpec]:
    groups = -(-k // group_size)
    return specs(
        qweight=("I32", [k * bits // 32, n]),
        qzeros=("I32", [groups, n * bits // 32]),
        scales=("F16", [groups, n]),
        g_idx=("I32", [k]),
    )


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


def test_gptq_module_counts_all_its_bytes() -> None:
    module = recognise("m", gptq_specs(256, 128, 128), GPTQ)
    assert module.nbytes == 256 * 128 // 2 + 2 * 128 // 2 + 2 * 128 * 2 + 256 * 4


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bf16"), ("F16", "fp16"), ("F32", "fp32")])
def test_plain_dtypes(dtype: str, name: str) -> None:
    module = recognise("m", specs(weight=(dtype, [3, 5]), bias=(dtype, [3])), None)
    assert (module.scheme.format, module.shape) == (name, (3, 5))
    assert not module.scheme.is_quantized


def test_bare_parameter_beside_a_weight_does_not_decide() -> None:
    gate = specs(e_score_correction_bias=("F32", [8]), weight=("BF16", [8, 256]))
    module = recognise("mlp.gate", gate, None)
    assert (module.scheme.label, module.shape) == ("bf16", (8, 256))


def test_module_without_a_weight_has_its_largest_tensors_shape() -> None:
    module = recognise("m", specs(A_log=("F32", [8]), dt_bias=("F32", [64])), None)
    assert (module.scheme.label, module.shape) == ("fp32", (64,))


def test_companion_of_an_unquantised_weight_is_left_over() -> None:
    tensors = specs(weight=("BF16", [128, 128]), weight_scale_inv=("F32", [1, 1]))
    (problem,) = recognise("m", tensors, None).problems
    assert problem.startswith(f"{NAME}.weight_scale_inv: left over, the weight beside it is bf16")


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("block", "scales"), [([64, 32], [4, 9]), ([128, 128], [2, 3])])
def test_fp8_block_is_read_from_the_config(
    scale_dtype: str, block: list[int], scales: list[int]
) -> None:
    tensors = specs(weight=("F8_E4M3", [200, 280]), weight_scale_inv=(scale_dtype, scales))
    config = {"quant_method": "fp8", "weight_block_size": block}
    module = recognise("m", tensors, config)
    assert module.scheme == Scheme("fp8_block", 8, block=(block[0], block[1]))
    assert (module.shape, module.problems) == ((200, 280), ())


def test_fp8_block_is_128_without_a_config() -> None:
    tensors = specs(weight=("F8_E4M3", [256, 384]), weight_scale_inv=("F32", [2, 3]))
    module = recognise("m", tensors, None)
    assert (module.scheme.block, module.problems) == ((128, 128), ())


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (("F32", [3, 2]), r"[3, 2], expected [2, 3] (N=256, K=384, block 128x128)"),
        (("F32", [6]), r"[6], expected [2, 3]"),
        (("F32", []), r"[], expected [2, 3]"),
        (("F8_E8M0", [2, 3]), r"F8_E8M0 [2, 3], expected F32 or BF16 or F16"),
    ],
)
def test_fp8_scale_that_does_not_fit_is_a_problem(
    scale: tuple[str, list[int]], expected: str
) -> None:
    tensors = specs(weight=("F8_E4M3", [256, 384]), weight_scale_inv=scale)
    (problem,) = recognise("m", tensors, None).problems
    assert problem.startswith(f"{NAME}.weight_scale_inv: ")
    assert expected in problem


def test_fp8_without_a_scale_is_a_problem_never_scale_one() -> None:
    module = recognise("m", specs(weight=("F8_E4M3", [256, 384])), None)
    assert module.scheme.format == "fp8_block"
    (problem,) = module.problems
    assert problem.startswith(f"{NAME}.weight_scale_inv: missing")


def test_static_activation_scale_beside_fp8_blocks_is_left_over() -> None:
    tensors = specs(
        weight=("F8_E4M3", [128, 128]), weight_scale_inv=("F32", [1, 1]), input_scale=("F32", [])
    )
    (problem,) = recognise("m", tensors, None).problems
    assert problem.startswith(f"{NAME}.input_scale: left over")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_gptq_shape_is_logical_whatever_the_packing(bits: int, group_size: int) -> None:
    tensors = gptq_specs(256, 96, 256 if group_size == -1 else group_size, bits)
    module = recognise("m", tensors, {**GPTQ, "bits": bits, "group_size": group_size})
    assert (module.shape, module.problems) == ((96, 256), ())
    assert module.scheme.group_size == (256 if group_size == -1 else group_size)


def test_gptq_last_group_may_be_partial() -> None:
    assert recognise("m", gptq_specs(192, 64, 128), GPTQ).problems == ()


def test_gptq_bias_belongs_to_the_module_and_g_idx_is_optional() -> None:
    tensors = gptq_specs(256, 96, 128) | specs(bias=("F16", [96]))
    del tensors["g_idx"]
    assert recognise("m", tensors, GPTQ).problems == ()


def test_act_order_shows_in_the_scheme_and_needs_g_idx() -> None:
    tensors = gptq_specs(256, 96, 128)
    act_order = {**GPTQ, "desc_act": True, "sym": False}
    module = recognise("m", tensors, act_order)
    assert module.scheme.desc_act
    assert module.scheme.label == "gptq int4 g128 asym act-order"
    del tensors["g_idx"]
    (problem,) = recognise("m", tensors, act_order).problems
    assert problem.startswith(f"{NAME}.g_idx: missing")


def test_act_order_of_a_single_group_is_no_order() -> None:
    config = {**GPTQ, "desc_act": True, "group_size": -1}
    assert not recognise("m", gptq_specs(256, 96, 256), config).scheme.desc_act


@pytest.mark.parametrize(
    ("config", "offset"),
    [
        ({}, 1),
        ({"checkpoint_format": "gptq"}, 1),
        ({"checkpoint_format": "gptq_v2"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, 0),
    ],
)
def test_stored_zero_points_are_off_by_one_in_the_first_layout(
    config: dict[str, str], offset: int
) -> None:
    assert recognise("m", gptq_specs(256, 96, 128), GPTQ | config).scheme.zero_offset == offset


@pytest.mark.parametrize(
    ("suffix", "spec", "expected"),
    [
        ("scales", ("F16", [12, 96]), "F16 [12, 96], expected F32 or BF16 or F16 [2, 96] (K=256"),
        ("scales", ("I32", [2, 96]), "I32 [2, 96], expected F32 or BF16 or F16"),
        ("qzeros", ("I32", [2, 96]), "expected I32 [2, 12] (K=256, N=96, 4 bits, group_size=128)"),
        ("g_idx", ("I32", [255]), "expected I32 [256]"),
        ("g_idx", ("I64", [256]), "I64 [256], expected I32 [256]"),
    ],
)
def test_gptq_companion_that_does_not_fit_is_a_problem(
    suffix: str, spec: tuple[str, list[int]], expected: str
) -> None:
    tensors = gptq_specs(256, 96, 128) | specs(**{suffix: spec})
    (problem,) = recognise("m", tensors, GPTQ).problems
    assert problem.startswith(f"{NAME}.{suffix}: ")
    assert expected in problem


@pytest.mark.parametrize("suffix", ["scales", "qzeros"])
def test_gptq_companion_that_is_missing_is_a_problem(suffix: str) -> None:
    tensors = gptq_specs(256, 96, 128)
    del tensors[suffix]
    (problem,) = recognise("m", tensors, GPTQ).problems
    assert problem.startswith(f"{NAME}.{suffix}: missing, though qweight is I32 [32, 96]")


def test_config_that_contradicts_the_headers_is_a_problem() -> None:
    problems = recognise("m", gptq_specs(256, 96, 128, bits=8), GPTQ).problems
    assert any("expected I32 [4, 12] (K=512, N=96, 4 bits" in problem for problem in problems)


def test_zero_points_that_do_not_fill_words_are_a_problem() -> None:
    problems = recognise("m", gptq_specs(256, 100, 128), GPTQ).problems
    assert any("expected N a multiple of 8" in problem for problem in problems)


def test_dynamic_overrides_bits_and_group_size_where_it_matches() -> None:
    config = {
        **GPTQ,
        "dynamic": {
            r"-:.*\.gate$": {},
            r"+:.*\.down_proj$": {"bits": 8, "group_size": 32},
            r".*\.up_proj$": {"group_size": 64},
        },
    }
    down = recognise("a.down_proj", gptq_specs(256, 96, 32, bits=8), config)
    up = recognise("a.up_proj", gptq_specs(256, 96, 64), config)
    other = recognise("a.q_proj", gptq_specs(256, 96, 128), config)
    assert [m.scheme.label for m in (down, up, other)] == [
        "gptq int8 g32",
        "gptq int4 g64",
        "gptq int4 g128",
    ]
    assert down.problems == up.problems == other.problems == ()


def test_dynamic_override_of_symmetry_holds_though_shapes_fit() -> None:
    config = {**GPTQ, "dynamic": {r"+:.*\.down_proj$": {"sym": False}}}
    assert not recognise("a.down_proj", gptq_specs(256, 96, 128), config).scheme.symmetric
    assert recognise("a.up_proj", gptq_specs(256, 96, 128), config).scheme.symmetric


def test_extra_config_overrides_by_exact_name() -> None:
    config = {**GPTQ, "extra_config": {"a.b": {"bits": 8, "group_size": 128}}}
    assert recognise("a.b", gptq_specs(256, 96, 128, bits=8), config).scheme.bits == 8
    assert recognise("a.bb", gptq_specs(256, 96, 128), config).scheme.bits == 4


@pytest.mark.parametrize(
    ("tensors", "config", "match"),
    [
        (
            specs(weight_packed=("I32", [8, 8]), weight_scale=("BF16", [8, 1])),
            {"quant_method": "compressed-tensors"},
            r"pack-quantized \(ct_pack\) is not supported yet \(tensors: weight_packed I32",
        ),
        (gptq_specs(256, 96, 128), {"quant_method": "awq"}, 'quant_method "awq" is not supported'),
        (gptq_specs(256, 96, 128), None, "packed integers without a quantization_config"),
        (gptq_specs(256, 96, 128), {**GPTQ, "bits": 3}, "GPTQ of 3 bits"),
        (gptq_specs(256, 96, 128), {**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format"),
        (
            gptq_specs(256, 96, 128),
            {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
            "packing_format",
        ),
        (specs(qweight=("U8", [8, 8])), GPTQ, r"GPTQ packed as U8 \[8, 8\]"),
        (specs(qweight=("I32", [4, 8, 8])), GPTQ, r"GPTQ packed as I32 \[4, 8, 8\]"),
        (
            specs(weight=("F8_E4M3", [8, 8]), weight_scale=("F32", [8, 1])),
            None,
            r"FP8 with weight_scale \(fp8_tensor, fp8_channel, ct_fp8\)",
        ),
        (specs(weight=("F8_E4M3", [2, 8, 8])), None, "FP8 of 3 dimensions"),
        (specs(weight=("F8_E5M2", [8, 8])), None, "a weight stored as F8_E5M2"),
        (specs(weight=("I8", [8, 8]), SCB=("F32", [8])), None, "bitsandbytes int8"),
        (specs(absmax=("F32", [8])), None, "bitsandbytes is not supported"),
        (specs(weight=("U8", [8, 4]), weight_scale_2=("F32", [])), None, "ModelOpt NVFP4"),
        (specs(gate_up_proj_blocks=("U8", [8, 4])), None, "a weight stored as U8"),
    ],
)
def test_unknown_format_is_named_with_what_gave_it_away(
    tensors: dict[str, TensorSpec], config: dict[str, Any] | None, match: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"x.safetensors: module a.b: .*{match}"):
        recognise("a.b", tensors, config)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("gptq", " is 'gptq', expected an object"),
        ({**GPTQ, "dynamic": [1]}, r"dynamic is \[1\], expected an object of objects"),
        ({**GPTQ, "extra_config": {"a": 8}}, "extra_config is .*, expected an object of objects"),
        ({"quant_method": 3}, "quant_method is 3, expected of type str"),
        ({**GPTQ, "bits": "4"}, "bits is '4', expected of type int"),
        ({**GPTQ, "sym": "yes"}, "sym is 'yes', expected of type bool"),
        ({**GPTQ, "bits": None}, "bits and group_size is .None, 128., expected two integers"),
        ({**GPTQ, "group_size": 0}, "group_size is 0, expected -1 or a positive"),
        ({**GPTQ, "dynamic": {"+:(": {"bits": 8}}}, "dynamic is '.*', expected a regular expr"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "expected two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "expected two positive integers"),
    ],
)
def test_malformed_quantization_config_is_refused(config: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config.*{match}"):
        recognise("m", gptq_specs(256, 96, 128), config)


def test_parsed_config_may_be_passed_for_many_modules() -> None:
    config = QuantizationConfig.parse(GPTQ)
    tensors = gptq_specs(256, 96, 128)
    assert recognise("m", tensors, config) == recognise("m", tensors, GPTQ)


def test_every_format_is_listed_under_its_own_name() -> None:
    assert {name: known.name for name, known in FORMATS.items()} == {name: name for name in FORMATS}
