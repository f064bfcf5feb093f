# SPDX-License-Identifier: Apache-2.0
"""FP4 that does not fit together is a problem; what its values are is in test_matrix.py."""

import pytest
import torch

from tests.checkpoint.formats.stored import NAME, specs
from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.checkpoint.formats import Scheme, recognise
from vllm_mixprec.errors import CheckpointError

NVFP4 = {
    "weight_packed": ("U8", [96, 128]),
    "weight_scale": ("F8_E4M3", [96, 16]),
    "weight_global_scale": ("F32", [1]),
}
MXFP4 = {"weight_packed": ("U8", [96, 128]), "weight_scale": ("U8", [96, 8])}


def compressed(*, bits: int = 4, kind: str = "float") -> dict[str, object]:
    weights = {"num_bits": bits, "type": kind, "strategy": "group", "group_size": 32}
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize(("tensors", "label"), [(NVFP4, "nvfp4 1x16"), (MXFP4, "mxfp4 1x32 e8m0")])
def test_headers_tell_it(tensors: dict[str, tuple[str, list[int]]], label: str) -> None:
    module = recognise("m", specs(**tensors), compressed())
    assert (module.scheme.label, module.shape, module.problems) == (label, (96, 256), ())


@pytest.mark.parametrize(
    ("tensors", "suffix", "spec", "expected"),
    [
        (NVFP4, "weight_scale", ("U8", [96, 16]), "expected F8_E4M3 [96, 16]"),
        (NVFP4, "weight_scale", ("F8_E4M3", [96, 8]), "expected F8_E4M3 [96, 16] (N=96, K=256"),
        (NVFP4, "weight_global_scale", ("F32", [96]), "F32 [96], expected F32 [] or [1]"),
        (NVFP4, "weight_global_scale", ("F16", [1]), "F16 [1], expected F32 [] or [1]"),
        (MXFP4, "weight_scale", ("F32", [96, 8]), "expected U8 or F8_E8M0 [96, 8]"),
        (MXFP4, "weight_scale", ("U8", [96, 16]), "expected U8 or F8_E8M0 [96, 8]"),
    ],
)
def test_scale_that_does_not_fit_is_a_problem(
    tensors: dict[str, tuple[str, list[int]]], suffix: str, spec: object, expected: str
) -> None:
    (problem,) = recognise("m", specs(**(tensors | {suffix: spec})), compressed()).problems
    assert problem.startswith(f"{NAME}.{suffix}: ")
    assert expected in problem


def test_columns_are_whole_groups() -> None:
    tensors = {"weight_packed": ("U8", [96, 20]), "weight_scale": ("U8", [96, 2])}
    (problem,) = recognise("m", specs(**tensors), compressed()).problems
    assert "expected K a multiple of 32 (K=40, whole groups)" in problem


def test_scale_that_is_missing_is_a_problem() -> None:
    tensors = {suffix: spec for suffix, spec in NVFP4.items() if suffix != "weight_scale"}
    (problem,) = recognise("m", specs(**tensors), compressed()).problems
    assert problem.startswith(f"{NAME}.weight_scale: missing, though weight_packed is U8")


def test_config_of_integers_contradicts() -> None:
    (problem,) = recognise("m", specs(**MXFP4), compressed(kind="int")).problems
    assert "expected a weight of type int with 4 bits" in problem


def test_scale_of_another_shape_is_an_error_not_broadcast() -> None:
    tensors = {
        "weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
        "weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    with pytest.raises(CheckpointError, match=r"weight_scale: shape \[4, 1\], expected \[4, 2\]"):
        dequantize(Scheme("nvfp4", 4, block=(1, 16)), tensors, torch.float32)
