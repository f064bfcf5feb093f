# SPDX-License-Identifier: Apache-2.0
"""Dequantised weights against each format's plain definition, and against the BF16 originals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.formats.stored import Float32, define_fp8
from vllm_mixprec.checkpoint import Scheme, open_checkpoint
from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.errors import CheckpointError, UnsupportedError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
"""Written by transformers (bf16) and auto-round (the others), never by this package."""


def load(checkpoint: str) -> dict[str, dict[str, torch.Tensor]]:
    """Load all tensors with the safetensors library: module -> suffix -> tensor."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for shard in sorted((FIXTURES / checkpoint).glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            owner, _, suffix = name.rpartition(".")
            modules.setdefault(owner, {})[suffix] = tensor
    return modules


def quantized(checkpoint: str) -> list[tuple[str, Scheme, dict[str, torch.Tensor]]]:
    """List the quantised modules of a fixture."""
    tensors = load(checkpoint)
    found = open_checkpoint(FIXTURES / checkpoint).modules.values()
    return [(m.name, m.scheme, tensors[m.name]) for m in found if m.scheme.is_quantized]


def scales_of(tensors: dict[str, torch.Tensor]) -> Float32:
    return tensors["weight_scale_inv"].float().numpy()


def define_gptq(tensors: dict[str, torch.Tensor], bits: int, zero_offset: int = 1) -> Float32:
    """(code - zero) * scale, read bit by bit from the little-endian bytes of the packed words."""

    def unpack(words: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        raw = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)
        ones = np.unpackbits(raw, axis=-1, bitorder="little")
        ones = ones.reshape(len(words), -1, bits).astype(np.int64)
        return ones @ (1 << np.arange(bits))

    codes = unpack(tensors["qweight"].t())  # (N, K)
    zeros = unpack(tensors["qzeros"]) + zero_offset  # (K/g, N)
    scales = tensors["scales"].float().numpy()
    group = tensors["g_idx"].numpy()
    return (codes - zeros[group].T).astype(np.float32) * scales[group].T


@pytest.fixture(scope="module")
def original() -> dict[str, dict[str, torch.Tensor]]:
    return load("bf16")


def test_fp8_block_is_its_definition() -> None:
    for _, scheme, tensors in quantized("fp8"):
        expected = define_fp8(tensors["weight"], scales_of(tensors), (128, 128))
        assert np.array_equal(dequantize(scheme, tensors, torch.float32).numpy(), expected)


@pytest.mark.parametrize("checkpoint", ["gptq", "gptq-asym"])
def test_gptq_is_its_definition(checkpoint: str) -> None:
    for _, scheme, tensors in quantized(checkpoint):
        expected = define_gptq(tensors, bits=4)
        assert np.array_equal(dequantize(scheme, tensors, torch.float32).numpy(), expected)


def test_fp8_block_is_near_the_original(original: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, scheme, tensors in quantized("fp8"):
        weight = original[name]["weight"].float()
        error = (dequantize(scheme, tensors, torch.float32) - weight).abs()
        # Half a unit of 3 mantissa bits (2**-4), and the scale's own rounding to BF16 (2**-9);
        # below E4M3's normal range half a subnormal step, 2**-10 of a block whose maximum is 448.
        bound = weight.abs() * (2**-4 + 2**-8) + weight.abs().max() / 448 * 2**-9
        assert (error <= bound).all(), name


@pytest.mark.parametrize("checkpoint", ["gptq", "gptq-asym"])
def test_gptq_is_near_the_original(
    checkpoint: str, original: dict[str, dict[str, torch.Tensor]]
) -> None:
    for name, scheme, tensors in quantized(checkpoint):
        weight = original[name]["weight"].float()
        error = (dequantize(scheme, tensors, torch.float32) - weight).abs()
        scale = tensors["scales"].float()[tensors["g_idx"].long()].t().abs()
        # Rounding to nearest errs by half a step; a value at the clipped end of the range, or
        # one whose zero point was rounded, by up to one and a half.
        assert (error <= 1.5 * scale).all(), name
        assert (error <= 0.51 * scale).float().mean() > 0.95, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint", ["fp8", "gptq-asym"])
def test_result_is_rounded_once_from_float32(checkpoint: str, dtype: torch.dtype) -> None:
    for _, scheme, tensors in quantized(checkpoint)[:4]:
        full = dequantize(scheme, tensors, torch.float32)
        result = dequantize(scheme, tensors, dtype)
        assert result.dtype == dtype
        assert result.is_contiguous()
        assert torch.equal(result, full.to(dtype))


@pytest.mark.parametrize("chunk", [1, 300, 5000])
@pytest.mark.parametrize("checkpoint", ["fp8", "gptq", "gptq-asym"])
def test_chunks_do_not_show(checkpoint: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, scheme, tensors = quantized(checkpoint)[0]
    whole = dequantize(scheme, tensors, torch.float32)
    monkeypatch.setattr("vllm_mixprec.checkpoint.packing.CHUNK_WEIGHTS", chunk)
    assert torch.equal(dequantize(scheme, tensors, torch.float32), whole)


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 7), (300, 300)])
def test_last_blocks_may_be_partial(block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    n, k = 200, 280
    tensors = {
        "weight": torch.randn(n, k).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(-(-n // block[0]), -(-k // block[1])),
    }
    result = dequantize(Scheme("fp8_block", 8, block=block), tensors, torch.float32)
    assert np.array_equal(result.numpy(), define_fp8(tensors["weight"], scales_of(tensors), block))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("order", ["none", "trivial", "act-order"])
def test_gptq_of_any_bits_order_and_layout(bits: int, zero_offset: int, order: str) -> None:
    torch.manual_seed(1)
    n, k, group_size = 96, 160, 64  # the last group is partial
    groups = 3
    g_idx = torch.arange(k, dtype=torch.int32) // group_size
    if order == "act-order":
        g_idx = g_idx[torch.randperm(k)]
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31, (k * bits // 32, n)).to(torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (groups, n * bits // 32)).to(torch.int32),
        "scales": torch.rand(groups, n).to(torch.float16),
        "g_idx": g_idx,
    }
    expected = define_gptq(tensors, bits, zero_offset)
    if order == "none":
        del tensors["g_idx"]
    scheme = Scheme(
        "gptq",
        bits,
        group_size=group_size,
        symmetric=False,
        desc_act=order == "act-order",
        zero_offset=zero_offset,
    )
    assert np.array_equal(dequantize(scheme, tensors, torch.float32).numpy(), expected)


def test_plain_weight_is_cast_or_handed_through() -> None:
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    scheme = Scheme("bf16", 16)
    assert dequantize(scheme, {"weight": weight}, torch.bfloat16) is weight
    assert torch.equal(dequantize(scheme, {"weight": weight}, torch.float32), weight.float())


@pytest.mark.parametrize(
    ("checkpoint", "suffix"),
    [("fp8", "weight"), ("fp8", "weight_scale_inv"), ("gptq", "qzeros"), ("gptq", "scales")],
)
def test_missing_tensor_is_an_error(checkpoint: str, suffix: str) -> None:
    _, scheme, tensors = quantized(checkpoint)[0]
    del tensors[suffix]
    with pytest.raises(CheckpointError, match=f"{suffix}: missing, found "):
        dequantize(scheme, tensors, torch.float32)


@pytest.mark.parametrize(
    ("checkpoint", "suffix"),
    [("fp8", "weight_scale_inv"), ("gptq", "scales"), ("gptq", "qzeros"), ("gptq", "g_idx")],
)
def test_companion_of_the_wrong_shape_is_an_error_not_broadcast(
    checkpoint: str, suffix: str
) -> None:
    _, scheme, tensors = quantized(checkpoint)[0]
    tensors[suffix] = tensors[suffix][:1]
    if scheme.format == "gptq" and suffix != "g_idx" and scheme.group_size == 128:
        tensors[suffix] = tensors[suffix][..., :1]
    with pytest.raises(CheckpointError, match=rf"{suffix}: shape \[1.*, expected \["):
        dequantize(scheme, tensors, torch.float32)


@pytest.mark.parametrize("value", [-1, 2])
def test_g_idx_outside_of_the_groups_is_an_error(value: int) -> None:
    tensors = {
        "qweight": torch.zeros(16, 8, dtype=torch.int32),
        "qzeros": torch.zeros(2, 1, dtype=torch.int32),
        "scales": torch.ones(2, 8),
        "g_idx": torch.zeros(128, dtype=torch.int32),
    }
    tensors["g_idx"][5] = value
    with pytest.raises(CheckpointError, match=r"g_idx: values .*, expected 0 to 1\."):
        dequantize(Scheme("gptq", 4, group_size=64), tensors, torch.float32)


@pytest.mark.parametrize(
    ("scheme", "match"),
    [
        (Scheme("hqq", 4), 'format "hqq" cannot be dequantised, expected one of bf16'),
        (Scheme("gptq", 3, group_size=128), "gptq of 3 bits"),
        (Scheme("gptq", 4), "group_size None"),
        (Scheme("fp8_block", 8), "fp8_block with block None"),
    ],
)
def test_scheme_that_cannot_be_read_is_an_error(scheme: Scheme, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        dequantize(scheme, {"weight": torch.zeros(2, 2)}, torch.float32)
