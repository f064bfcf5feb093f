# SPDX-License-Identifier: Apache-2.0
"""Unquantised modules, and scales that lie beside no quantised weight."""

import pytest

from tests.checkpoint.formats.stored import NAME, specs
from vllm_mixprec.checkpoint.formats import recognise


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


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "scales", "qzeros"])
def test_companion_of_an_unquantised_weight_is_left_over(suffix: str) -> None:
    tensors = specs(weight=("BF16", [128, 128]), **{suffix: ("F32", [1, 1])})
    (problem,) = recognise("m", tensors, None).problems
    assert problem.startswith(f"{NAME}.{suffix}: left over, the weight beside it is bf16")


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("weight_scale_inv", "F32"),
        ("weight_scale", "U8"),
        ("weight_scale", "F8_E8M0"),
        ("scales", "F16"),
        ("qzeros", "I32"),
        ("weight_shape", "I64"),
    ],
)
def test_scale_whose_weight_never_comes_is_a_problem(suffix: str, dtype: str) -> None:
    module = recognise("m", specs(**{suffix: (dtype, [2, 3])}), None)
    (problem,) = module.problems
    assert problem.startswith(f"{NAME}.{suffix}: the weight that it belongs to never comes")
    assert module.shape == (2, 3)


def test_scales_of_the_kv_cache_beside_an_unquantised_weight_are_fine() -> None:
    tensors = specs(weight=("BF16", [128, 128]), k_scale=("F32", []), v_scale=("F32", []))
    assert recognise("m", tensors, None).problems == ()
    attention = recognise("self_attn", specs(k_scale=("F32", []), v_scale=("F32", [])), None)
    assert (attention.scheme.label, attention.problems) == ("fp32", ())
