# SPDX-License-Identifier: Apache-2.0
"""The CPU's FP8 linear kernel with a scale a row, on what no block or batch fills, and zeros."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

from tests.quant.test_cpu_ops import relative_error
from vllm_mixprec.checkpoint import Scheme
from vllm_mixprec.quant import cpu_linear, cpu_ops, int4_blocks
from vllm_mixprec.quant.int4_blocks import Int4Layout
from vllm_mixprec.routing.platform import detect_platform

pytestmark = pytest.mark.skipif(
    detect_platform().name != "cpu-avx512", reason="needs AVX512_BF16 and AVX512_VNNI"
)

BOUND = 0.012  # as in test_formats
CHANNEL = Scheme("fp8_channel", 8)


def quantised(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (n, k), scales (n, 1) that differ by up to 2^12, and the weight they are."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    weight *= 2.0 ** torch.randint(-6, 7, (n, 1), generator=generator)
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale


def served(codes: torch.Tensor, scale: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return what applies a weight that was loaded so."""
    method, layer = cpu_linear.CpuFp8ChannelLinearMethod(CHANNEL), Module()
    layer.weight = Parameter(codes.clone(), requires_grad=False)
    layer.weight_scale = Parameter(scale.clone(), requires_grad=False)
    method.process_weights_after_loading(layer)
    return lambda x, bias=None: method.apply(layer, x, bias)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("n", "k"), [(32, 32), (160, 96), (64, 256), (256, 416)])
def test_every_row_has_its_scale(n: int, k: int, tokens: int) -> None:
    codes, scale, weight = quantised(n, k)
    apply = served(codes, scale)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    bias = torch.randn(n).bfloat16()
    for row in range(n):  # a row at a time, that large ones hide no small ones
        found, expected = apply(x)[:, row], x.float() @ weight[row]
        assert (found.float() - expected).abs().max() < 0.01 * (weight[row].norm() * k**0.5)
    expected = x.float() @ weight.T
    assert relative_error(apply(x), expected) < BOUND
    assert relative_error(apply(x, bias), expected + bias.float()) < BOUND
    assert relative_error(apply(x), x.float() @ weight.roll(1, 0).T) > 10 * BOUND
    assert relative_error(served(codes, scale / 2)(x), expected) > 10 * BOUND


def test_latent_attention_is_given_the_weights_of_its_projection() -> None:
    """With AMX it would take packed FP8 that has a block for what a checkpoint holds."""
    block, generator = (128, 128), torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator) / 8
    scale = weight.view(2, 128, 1, 128).abs().amax((1, 3)) / 448
    codes = (weight / scale.repeat_interleave(128, 0)).to(torch.float8_e4m3fn)
    layer = Module()
    layer.quant_method = cpu_linear.CpuFp8LinearMethod(Scheme("fp8_block", 8, block=block))
    layer.weight = Parameter(codes.clone(), requires_grad=False)
    layer.weight_scale_inv = Parameter(scale.clone(), requires_grad=False)
    layer.weight_block_size, layer.input_size_per_partition = list(block), 128
    layer._cpu_skip_gemm_dispatch = True
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight_block_size is None
    found = get_and_maybe_dequant_weights(layer, torch.bfloat16)
    assert relative_error(found, codes.float() * scale.repeat_interleave(128, 0)) < BOUND


def test_scaling_what_comes_out_loses_no_more_than_a_widened_weight() -> None:
    """Both round twice: the kernel's sums and the product, or the weight and the sums."""
    codes, scale, weight = quantised(256, 512)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.float() @ weight.T
    widened = torch.nn.functional.linear(x, weight.bfloat16())
    assert relative_error(served(codes, scale)(x), expected) < 1.1 * relative_error(
        widened, expected
    )


def test_empty_batches_give_nothing() -> None:
    """vLLM's kernels divide by the number of rows, which ends the process."""
    codes, scale, _ = quantised(64, 128)
    apply = served(codes, scale)
    assert apply(torch.empty(0, 128).bfloat16()).shape == (0, 64)
    assert apply(torch.empty(2, 0, 128).bfloat16()).shape == (2, 0, 64)
    x = torch.empty(0, 128).bfloat16()
    blocks = torch.ones(1, 1)
    assert cpu_ops.fp8_linear(x, cpu_ops.pack_plain(codes), blocks, [64, 128]).shape == (0, 64)
    zeros, scales = torch.zeros(1, 8, dtype=torch.int32), torch.ones(1, 64)
    words = torch.zeros(16, 64, dtype=torch.int32)
    packed = int4_blocks.pack_int4(words, scales, zeros, Int4Layout.GPTQ)
    assert cpu_ops.int4_linear(x, *packed).shape == (0, 64)


def test_the_layer_compiles_with_dynamic_tokens() -> None:
    codes, scale, _ = quantised(64, 128)
    apply = served(codes, scale)
    bias = torch.randn(64).bfloat16()
    compiled = torch.compile(
        lambda x: apply(x * 1, bias), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (3, 5):
        x = torch.randn(tokens, 128).bfloat16()
        assert torch.equal(compiled(x), apply(x, bias))


@pytest.mark.parametrize("block", [None, (32, 128), (128, 128)])
def test_zeros_are_zeros_whatever_their_scale(block: tuple[int, int] | None) -> None:
    """The kernel reads a code of zero as 2^-7, which the scale of nothing but zeros can make large.

    Some tools write a scale of 1 there.
    """
    n, k = 160, 256  # of the last block of 128 rows only a part exists
    codes = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    tile = block or (1, k)
    scale = torch.full((-(-n // tile[0]), k // tile[1]), 0.01)
    dead = -1, 0  # a row, or a block, in the last place
    rows = slice(n - (n % tile[0] or tile[0]), n)
    codes[rows, : tile[1]] = 0
    codes[rows, : tile[1]].view(torch.uint8)[:, 3] = 0x80  # minus zero
    codes[0, :9] = 0  # zeros beside numbers: the tile keeps its scale
    scale[dead] = 1.0
    wide = scale.repeat_interleave(tile[0], 0)[:n].repeat_interleave(tile[1], 1)
    x = (torch.rand(3, k, generator=torch.Generator().manual_seed(1)) + 1).bfloat16()
    expected = x.float() @ (codes.float() * wide).T

    def run(scale: torch.Tensor) -> torch.Tensor:
        packed = cpu_ops.pack_plain(codes.clone())
        if block is None:
            unit = cpu_ops.unit_scale(k)
            return cpu_ops.fp8_channel_linear(x, packed, unit, scale.view(-1))
        return cpu_ops.fp8_linear(x, packed, scale, list(block))

    # Negative control: what the kernel makes of them by itself.
    assert relative_error(run(scale)[:, rows], expected[:, rows]) > 10 * BOUND
    cleared = cpu_ops.clear_zero_tiles(codes, scale.clone(), tile)
    assert (cleared == 0).nonzero().tolist() == [[scale.shape[0] - 1, 0]]
    assert (run(cleared)[:, rows].float() - expected[:, rows]).abs().max() <= BOUND * (
        expected[:, rows].abs().max() + 1e-6
    )
    if block is None:
        assert not run(cleared)[:, rows].any()
