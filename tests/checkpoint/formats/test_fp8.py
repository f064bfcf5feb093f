# SPDX-License-Identifier: Apache-2.0
"""FP8 of every granularity: told from headers, and dequantised bit by bit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from tests.checkpoint.formats.compressed import compress
from tests.checkpoint.formats.stored import NAME, Tensors, define_fp8, specs, write
from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.checkpoint.formats import Scheme, recognise

N, K = 200, 288
"""Neither is a multiple of 128; both are of 8."""


def quantize(shape: tuple[int, int], block: tuple[int, int], scale_fmt: str) -> tuple[Any, Any]:
    """Quantise with transformers; return the tensors and what transformers makes of them."""
    torch.manual_seed(0)
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    quantizer = SimpleNamespace(quantization_config=config)
    stored = Fp8Quantize(quantizer).convert({"x.weight": torch.randn(shape)})
    tensors = {name.removeprefix("x."): tensor for name, tensor in stored.items()}
    read = Fp8Dequantize(quantizer)._dequantize_one(
        tensors["weight"], tensors["weight_scale_inv"], torch.float32
    )
    return tensors, read


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F16", "U8", "F8_E8M0"])
@pytest.mark.parametrize(
    ("block", "scales"), [([64, 32], [4, 9]), ([128, 128], [2, 3]), ([1, 32], [200, 9])]
)
def test_block_is_read_from_the_config(
    suffix: str, scale_dtype: str, block: list[int], scales: list[int]
) -> None:
    tensors = specs(weight=("F8_E4M3", [N, K]), **{suffix: (scale_dtype, scales)})
    module = recognise("m", tensors, {"quant_method": "fp8", "weight_block_size": block})
    scale_format = "e8m0" if scale_dtype in ("U8", "F8_E8M0") else "float"
    assert module.scheme == Scheme(
        "fp8_block", 8, block=(block[0], block[1]), scale_format=scale_format
    )
    assert (module.shape, module.problems) == ((N, K), ())


@pytest.mark.parametrize(
    ("scale", "label"),
    [
        ([2, 3], "fp8_block 128x128"),
        ([200, 9], "fp8_block 1x32"),
        ([200, 18], "fp8_block 1x16"),
        ([200, 1], "fp8_channel"),
        ([200], "fp8_channel"),
        ([], "fp8_tensor"),
        ([1], "fp8_tensor"),
        ([1, 1], "fp8_tensor"),
    ],
)
@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
def test_shapes_tell_the_granularity_where_the_config_does_not(
    suffix: str, scale: list[int], label: str
) -> None:
    tensors = specs(weight=("F8_E4M3", [N, K]), **{suffix: ("F32", scale)})
    module = recognise("m", tensors, {"quant_method": "fp8"})
    assert (module.scheme.label, module.problems) == (label, ())


@pytest.mark.parametrize(
    ("block", "scales", "found"),
    [
        ([128, 128], [2, 1], (128, 128)),
        ([128, 128], [200, 1], (1, 128)),
        ([64, 32], [4, 3], (64, 32)),
        ([1, 32], [200, 3], (1, 32)),
        (None, [2, 1], (128, 128)),
    ],
)
def test_packed_exponents_count_words(
    block: list[int] | None, scales: list[int], found: tuple[int, int]
) -> None:
    tensors = specs(weight=("F8_E4M3", [N, K]), weight_scale_inv=("I32", scales))
    module = recognise("m", tensors, {"quant_method": "fp8", "weight_block_size": block})
    assert module.scheme == Scheme("fp8_block", 8, block=found, scale_format="e8m0_packed")
    assert module.problems == ()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (("F32", [3, 2]), f"[3, 2], expected [2, 3] (N={N}, K={K}, block 128x128)"),
        (("F32", [6]), "[6], expected [2, 3]"),
        (("F32", []), "[], expected [2, 3]"),
        (("F32", [2, 3, 1]), "[2, 3, 1], expected [2, 3]"),
        (("U8", [200, 9]), "U8 [200, 9], expected [2, 3]"),
        (("I32", [2, 3]), "I32 [2, 3], expected [2, 1]"),
        (("I64", [2, 3]), "I64 [2, 3], expected F32 or BF16 or F16 or U8 or F8_E8M0 or I32"),
    ],
)
def test_scale_that_does_not_fit_the_configs_block_is_a_problem(
    scale: tuple[str, list[int]], expected: str
) -> None:
    tensors = specs(weight=("F8_E4M3", [N, K]), weight_scale_inv=scale)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (problem,) = recognise("m", tensors, config).problems
    assert problem.startswith(f"{NAME}.weight_scale_inv: ")
    assert expected in problem


@pytest.mark.parametrize(
    "scale", [[3, 2], [7, 3], [6], [2, 0], [K], [K, 1], [25, 36], [25, 3], [200, 36]]
)
def test_scale_of_no_shape_that_tells_a_block_is_a_problem(scale: list[int]) -> None:
    tensors = specs(weight=("F8_E4M3", [N, K]), weight_scale=("F32", scale))
    (problem,) = recognise("m", tensors, None).problems
    assert f"{scale}, expected [2, 3]" in problem


@pytest.mark.parametrize("columns", [512, 4096])
def test_scales_of_rows_that_lie_in_one_row_are_a_problem(columns: int) -> None:
    """They would fit a block of 256 x 2 or x 16."""
    tensors = specs(weight=("F8_E4M3", [256, columns]), weight_scale=("F32", [1, 256]))
    (problem,) = recognise("m", tensors, {"quant_method": "fp8"}).problems
    assert f"[1, 256], expected [2, {columns // 128}]" in problem


def test_integer_scales_of_a_channel_are_a_problem() -> None:
    tensors = specs(weight=("F8_E4M3", [N, K]), weight_scale=("I64", [N, 1]))
    (problem,) = recognise("m", tensors, None).problems
    assert "I64 [200, 1], expected F32 or BF16 or F16 or U8 or F8_E8M0 (dtype" in problem


def test_missing_scale_is_a_problem_never_scale_one() -> None:
    module = recognise("m", specs(weight=("F8_E4M3", [N, K])), None)
    assert module.scheme.format == "fp8_block"
    (problem,) = module.problems
    assert problem.startswith(f"{NAME}.weight_scale_inv: missing")


def test_second_spelling_of_the_scale_is_left_over() -> None:
    scale = ("F32", [2, 3])
    tensors = specs(weight=("F8_E4M3", [N, K]), weight_scale=scale, weight_scale_inv=scale)
    (problem,) = recognise("m", tensors, None).problems
    assert problem.startswith(f"{NAME}.weight_scale: left over, weight_scale_inv is beside it")


@pytest.mark.parametrize("suffix", ["input_scale", "output_scale", "k_scale", "v_scale", "q_scale"])
@pytest.mark.parametrize("scale", [[2, 3], [N, 1], []])
def test_activation_scales_are_companions(suffix: str, scale: list[int]) -> None:
    tensors = specs(
        weight=("F8_E4M3", [N, K]), weight_scale=("F32", scale), **{suffix: ("F32", [])}
    )
    assert recognise("m", tensors, None).problems == ()


def test_tensor_that_fp8_does_not_know_is_left_over() -> None:
    tensors = specs(weight=("F8_E4M3", [N, K]), weight_scale=("F32", []), qzeros=("I32", [1]))
    (problem,) = recognise("m", tensors, None).problems
    assert problem.startswith(f"{NAME}.qzeros: left over, fp8_tensor does not use it")


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 32)])
def test_blocks_of_transformers_are_read_as_transformers_reads_them(
    tmp_path: Path, block: tuple[int, int], scale_fmt: str
) -> None:
    tensors, expected = quantize((256, 384), block, scale_fmt)
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    module, loaded = write(tmp_path, tensors, config)
    scale_format = "e8m0" if scale_fmt == "ue8m0" else "float"
    assert module.scheme == Scheme("fp8_block", 8, block=block, scale_format=scale_format)
    assert module.problems == ()
    assert torch.equal(dequantize(module.scheme, loaded, torch.float32), expected)
    bf16 = dequantize(module.scheme, loaded, torch.bfloat16)
    assert torch.equal(bf16, expected.to(torch.bfloat16))


def test_exponents_as_bytes_are_those_of_the_exponent_dtype(tmp_path: Path) -> None:
    tensors, expected = quantize((256, 384), (1, 32), "ue8m0")
    tensors["weight_scale"] = tensors.pop("weight_scale_inv").view(torch.uint8)
    module, loaded = write(tmp_path, tensors, {"quant_method": "mxfp8"})
    assert module.scheme == Scheme("fp8_block", 8, block=(1, 32), scale_format="e8m0")
    assert torch.equal(dequantize(module.scheme, loaded, torch.float32), expected)


def test_every_exponent_is_its_power_of_two() -> None:
    tensors = {
        "weight": torch.ones(256, 32).to(torch.float8_e4m3fn),
        "weight_scale": torch.arange(256).to(torch.uint8)[:, None],
    }
    scheme = Scheme("fp8_block", 8, block=(1, 32), scale_format="e8m0")
    first = dequantize(scheme, tensors, torch.float32)[:, 0].numpy()
    assert np.array_equal(first[:255], np.ldexp(np.float32(1), np.arange(-127, 128)))
    assert np.isnan(first[255])  # OCP Microscaling Formats 1.0: E8M0 has no infinity, one NaN


def pack_exponents(scale: torch.Tensor) -> torch.Tensor:
    """Pack as DeepGEMM defines it (tests/test_layout.py): exponent bits of four floats a word."""
    exponents = scale.numpy().view(np.int32) >> 23
    padded = np.pad(exponents, ((0, 0), (0, -exponents.shape[1] % 4)))
    words = padded.reshape(len(padded), -1, 4) @ (1 << np.array([0, 8, 16, 24], dtype=np.int64))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("is_expanded", [False, True])
@pytest.mark.parametrize("columns", [384, 512, 640])
def test_packed_exponents_are_the_unpacked_ones(
    tmp_path: Path, columns: int, is_expanded: bool
) -> None:
    tensors, expected = quantize((256, columns), (128, 128), "ue8m0")
    scale = tensors["weight_scale_inv"].float()
    if is_expanded:
        scale = scale.repeat_interleave(128, dim=0)
    tensors["weight_scale_inv"] = pack_exponents(scale)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    module, loaded = write(tmp_path, tensors, config)
    assert (module.scheme.scale_format, module.problems) == ("e8m0_packed", ())
    assert torch.equal(dequantize(module.scheme, loaded, torch.float32), expected)


def of_granularity(scale_shape: tuple[int, ...]) -> tuple[Tensors, tuple[int, int]]:
    """Let compressed-tensors quantise to one scale a row or a tensor; return its block too."""
    is_channel = scale_shape[:1] == (N,)
    strategy = "channel" if is_channel else "tensor"
    args = {"num_bits": 8, "type": "float", "strategy": strategy}
    tensors, _, _ = compress("float-quantized", (N, K), args)
    tensors["weight_scale"] = tensors["weight_scale"].reshape(scale_shape)
    return tensors, (1 if is_channel else N, K)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize(
    ("scale_shape", "name"),
    [
        ((N, 1), "fp8_channel"),
        ((N,), "fp8_channel"),
        ((), "fp8_tensor"),
        ((1,), "fp8_tensor"),
        ((1, 1), "fp8_tensor"),
    ],
)
def test_channel_and_tensor_are_their_definition(
    tmp_path: Path, scale_shape: tuple[int, ...], name: str, suffix: str
) -> None:
    tensors, block = of_granularity(scale_shape)
    tensors[suffix] = tensors.pop("weight_scale")
    tensors["input_scale"] = torch.tensor(0.25)
    module, loaded = write(tmp_path, tensors, {"quant_method": "fp8"})
    assert (module.scheme, module.problems) == (Scheme(name, 8), ())
    grid = tensors[suffix].reshape(-1, 1).numpy()
    expected = define_fp8(tensors["weight"], grid, block)
    assert np.array_equal(dequantize(module.scheme, loaded, torch.float32).numpy(), expected)


def test_parts_of_a_layer_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for scale_shape, name in (((N, 1), "fp8_channel"), ((), "fp8_tensor")):
        tensors, _ = of_granularity(scale_shape)
        whole = dequantize(Scheme(name, 8), tensors, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr("vllm_mixprec.checkpoint.packing.CHUNK_WEIGHTS", 1)
            assert torch.equal(dequantize(Scheme(name, 8), tensors, torch.float32), whole)
