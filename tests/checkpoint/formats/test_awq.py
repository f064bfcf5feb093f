# SPDX-License-Identifier: Apache-2.0
"""AWQ as auto-round exports it: told from headers, dequantised as auto-round's own reader does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.formats.stored import NAME, specs
from vllm_mixprec.checkpoint import TensorSpec, open_checkpoint
from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.checkpoint.formats import Scheme, recognise
from vllm_mixprec.errors import UnsupportedError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "formats"
"""Written by scripts/make_format_fixtures.py."""

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def awq_specs(k: int, n: int, group_size: int) -> dict[str, TensorSpec]:
    groups = -(-k // group_size)
    return specs(
        qweight=("I32", [k, n // 8]),
        qzeros=("I32", [groups, n // 8]),
        scales=("F16", [groups, n]),
    )


@pytest.mark.parametrize(
    ("checkpoint", "labels"),
    [
        ("awq", {"awq int4 g32 asym"}),
        ("auto-round-awq", {"awq int4 g32", "awq int4 g64"}),
    ],
)
def test_exports_of_auto_round_are_recognised(checkpoint: str, labels: set[str]) -> None:
    modules = open_checkpoint(FIXTURES / checkpoint).modules
    assert {module.scheme.label for module in modules.values()} == labels
    assert [m.problems for m in modules.values() if m.problems] == []
    down = modules["model.layers.0.mlp.down_proj"]
    assert down.shape == (64, 128)
    assert down.nbytes == 64 * 128 // 2 + (4 if checkpoint == "awq" else 2) * (64 // 2 + 64 * 2)


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("checkpoint", ["awq", "auto-round-awq"])
def test_weights_are_those_that_auto_round_reads(
    checkpoint: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_mixprec.checkpoint.packing.CHUNK_WEIGHTS", chunk)
    modules = open_checkpoint(FIXTURES / checkpoint).modules
    stored = load_file(FIXTURES / checkpoint / "model.safetensors")
    for name, expected in load_file(FIXTURES / checkpoint / "expected.safetensors").items():
        module = modules[name]
        tensors = {suffix: stored[spec.name] for suffix, spec in module.tensors.items()}
        # Its float16 product of an exact integer and a float16 scale is rounded once, like ours.
        assert torch.equal(dequantize(module.scheme, tensors, torch.float16), expected)


@pytest.mark.parametrize(
    ("own", "scheme"),
    [
        ({}, Scheme("awq", 4, group_size=128, symmetric=False, zero_offset=0)),
        ({"zero_point": False}, Scheme("awq", 4, group_size=128, zero_offset=0)),
        ({"version": "GEMM"}, Scheme("awq", 4, group_size=128, symmetric=False, zero_offset=0)),
        ({"version": None}, Scheme("awq", 4, group_size=128, symmetric=False, zero_offset=0)),
        ({"format": "gemm"}, Scheme("awq", 4, group_size=128, symmetric=False, zero_offset=0)),
        (
            {"quant_method": "awq_marlin"},
            Scheme("awq", 4, group_size=128, symmetric=False, zero_offset=0),
        ),
    ],
)
def test_scheme_is_read_from_the_config(own: dict[str, Any], scheme: Scheme) -> None:
    module = recognise("m", awq_specs(256, 96, 128), AWQ | own)
    assert (module.scheme, module.shape, module.problems) == (scheme, (96, 256), ())


def test_autoawqs_own_names_and_defaults_are_read() -> None:
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}
    assert recognise("m", awq_specs(256, 96, 64), config).scheme.label == "awq int4 g64 asym"


def test_group_of_minus_one_is_all_of_k() -> None:
    module = recognise("m", awq_specs(256, 96, 256), {**AWQ, "group_size": -1})
    assert (module.scheme.group_size, module.problems) == (256, ())


@pytest.mark.parametrize(
    ("suffix", "spec", "expected"),
    [
        ("scales", ("F16", [4, 96]), "expected F32 or BF16 or F16 [2, 96] (K=256, N=96, 4 bits"),
        ("scales", ("I32", [2, 96]), "I32 [2, 96], expected F32"),
        ("qzeros", ("I32", [2, 96]), "expected I32 [2, 12]"),
        ("qzeros", ("F16", [2, 12]), "F16 [2, 12], expected I32 [2, 12]"),
    ],
)
def test_companion_that_does_not_fit_is_a_problem(
    suffix: str, spec: tuple[str, list[int]], expected: str
) -> None:
    tensors = awq_specs(256, 96, 128) | specs(**{suffix: spec})
    (problem,) = recognise("m", tensors, AWQ).problems
    assert problem.startswith(f"{NAME}.{suffix}: ")
    assert expected in problem


@pytest.mark.parametrize("suffix", ["scales", "qzeros"])
def test_companion_that_is_missing_is_a_problem(suffix: str) -> None:
    tensors = awq_specs(256, 96, 128)
    del tensors[suffix]
    (problem,) = recognise("m", tensors, AWQ).problems
    assert problem.startswith(f"{NAME}.{suffix}: missing, though qweight is I32 [256, 12]")


def test_order_of_rows_is_left_over() -> None:
    tensors = awq_specs(256, 96, 128) | specs(g_idx=("I32", [256]))
    (problem,) = recognise("m", tensors, AWQ).problems
    assert problem.startswith(f"{NAME}.g_idx: left over, awq does not use it")


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"version": "gemv"}, 'quant_method "awq" with version "gemv" is not supported'),
        ({"version": "marlin"}, 'quant_method "awq" with version "marlin" is not supported'),
        ({"version": None, "format": "gemv"}, '"awq" with format "gemv" is not supported'),
        (
            {"version": None, "checkpoint_format": "gemv"},
            '"awq" with checkpoint_format "gemv" is not supported',
        ),
        ({"format": "gemv"}, '"awq" with version "gemm" and format "gemv" is not supported'),
        ({"bits": 8}, "AWQ of 8 bits is not supported"),
    ],
)
def test_other_layouts_are_named_and_refused(own: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=f"module a.b: .*{match}"):
        recognise("a.b", awq_specs(256, 96, 128), AWQ | own)


def test_awq_packed_as_bytes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"AWQ packed as U8 \[8, 8\] is not supported"):
        recognise("m", specs(qweight=("U8", [8, 8])), AWQ)
