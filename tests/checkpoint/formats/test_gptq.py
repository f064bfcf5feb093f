# SPDX-License-Identifier: Apache-2.0
"""GPTQ modules are told from headers and quantization_config, and misfits are named."""

from typing import Any

import pytest
import torch

from tests.checkpoint.formats.stored import GPTQ, NAME, gptq_specs, specs
from vllm_mixprec.checkpoint.formats import recognise
from vllm_mixprec.errors import UnsupportedError

AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}


def test_gptq_module_counts_all_its_bytes() -> None:
    module = recognise("m", gptq_specs(256, 128, 128), GPTQ)
    assert module.nbytes == 256 * 128 // 2 + 2 * 128 // 2 + 2 * 128 * 2 + 256 * 4


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
        ({"format": "gptq_v2"}, 0),
        ({"format": "gptq_v2", "checkpoint_format": None}, 0),
        ({"format": "gptq_v2", "checkpoint_format": "gptq_v2"}, 0),
        ({"quant_method": "auto-round"}, 1),
        ({"quant_method": "auto-round", "backend": "gptq:marlin"}, 1),
        (AUTO_ROUND, 1),
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


@pytest.mark.parametrize(
    "own",
    [
        {"format": "gptq_p"},
        {"format": "gptq_v2", "checkpoint_format": "gptq"},
        # What auto-round called packing_format before.
        {"quant_method": "auto-round", "backend": "auto_round:exllamav2"},
    ],
)
def test_other_or_contradictory_layouts_are_refused(own: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match='quant_method ".*" with .* is not supported'):
        recognise("m", gptq_specs(256, 96, 128), GPTQ | own)


@pytest.mark.parametrize(
    "dynamic",
    [
        {"-:.*down": None, ".*down_proj": {"sym": False}},
        {"-:.*down": 3, ".*down_proj": {"sym": False}},
        {".*down": False, ".*down_proj": {"sym": False}},
        {".*down": {}, ".*down_proj": {"sym": False}},
        {"+:.*down": {}, ".*down_proj": {"sym": False}},
        {".*down_proj": {"sym": False}, "-:.*down": None},
        {"-:.*up": None, ".*down_proj": {"sym": False}},
        {"-:.*": {}},
    ],
)
def test_first_match_of_dynamic_counts_as_in_vllm(dynamic: dict[str, Any]) -> None:
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override

    module = recognise("a.down_proj", gptq_specs(256, 96, 128), {**GPTQ, "dynamic": dynamic})
    config = AutoGPTQConfig(4, 128, False, True, False, dynamic, {})
    # False, an excluded module, has no settings of its own.
    own = get_dynamic_override(config, "a.down_proj") or {}
    assert module.scheme.symmetric is own.get("sym", True)


def test_dynamic_override_of_symmetry_holds_though_shapes_fit() -> None:
    config = {**GPTQ, "dynamic": {r"+:.*\.down_proj$": {"sym": False}}}
    assert not recognise("a.down_proj", gptq_specs(256, 96, 128), config).scheme.symmetric
    assert recognise("a.up_proj", gptq_specs(256, 96, 128), config).scheme.symmetric


def test_extra_config_overrides_by_exact_name() -> None:
    config = {**GPTQ, "extra_config": {"a.b": {"bits": 8, "group_size": 128}}}
    assert recognise("a.b", gptq_specs(256, 96, 128, bits=8), config).scheme.bits == 8
    assert recognise("a.bb", gptq_specs(256, 96, 128), config).scheme.bits == 4


def test_extra_config_overrides_by_regular_expression() -> None:
    config = {**GPTQ, "extra_config": {r".*mlp\.gate.*": {"bits": 8}, "a.b": {"group_size": 64}}}
    assert recognise("x.mlp.gate_proj", gptq_specs(256, 96, 128, 8), config).scheme.bits == 8
    assert recognise("x.mlp.up_proj", gptq_specs(256, 96, 128), config).scheme.bits == 4


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"])
@pytest.mark.parametrize(
    "keys",
    [
        ["layers.0.mlp.down_proj"],
        ["down_proj"],
        ["own_proj"],
        ["mlp"],
        ["layers.0.mlp"],
        ["*.mtp", "(", "down_proj"],
        ["*.mtp", "(", r"\.gate_proj$"],
        ["(?i)MLP.GATE"],
        ["(?i).*Mlp.*"],
        ["(?i)(?s)^MODEL.*proj$"],
        # The name, then the first end of it, then the first expression.
        ["+.*", "+down_proj", "model.layers.0.mlp.down_proj"],
        ["+mlp.down_proj", "down_proj"],
        ["down_proj", "+mlp.down_proj"],
        ["+.*proj", "down_proj"],
        ["+gate_.*", ".*"],
    ],
)
def test_keys_of_extra_config_match_as_in_vllm(keys: list[str], name: str) -> None:
    """A key makes what it matches asymmetric; with a plus before it, it leaves all as it is."""
    from vllm.model_executor.layers.quantization.inc import INCConfig

    extra = {key.removeprefix("+"): {} if key[0] == "+" else {"sym": False} for key in keys}
    parsed = {**GPTQ, **AUTO_ROUND, "extra_config": extra}
    module = recognise(name, gptq_specs(256, 96, 128), parsed)
    config = INCConfig(4, 128, extra_config=extra)
    assert module.scheme.symmetric is config.get_layer_config(torch.nn.Linear(1, 1), name)[2]
