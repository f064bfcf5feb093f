# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernels in layers of several formats: each leaves alone what its expert map says -1 to.

One test a row of ``_mapped_backend`` in vllm_mixprec/quant/experts.py, and the layers as a whole.
"""

import pytest
import torch

from tests.gpu.weights import ROWS as FP8_ROWS
from tests.gpu.weights import Experts, Shape, relative_error, route

SHAPE = Shape(experts=16, hidden=512, inner=256, top_k=4)

# bfloat16 roundings; FP8 from 8.9 on: the activations of both GEMMs are rounded to E4M3 too, half
# a unit in 2^-3 uniformly, a deviation of 2^-4 / 3 ** 0.5 each.
BOUNDS = {"bf16": 2**-7, "int4": 2**-7, "fp8": 2**-7, "fp8 native": 0.06}
# vLLM's backend -> the formats, and the compute capability that is served by it.
ROWS = {
    "triton, bf16": ("bf16", None, "triton"),
    "triton, fp8": ("fp8", 89, "triton"),
    "marlin, fp8": ("fp8", 80, "marlin"),
    "triton, fp8 rows": (FP8_ROWS, 89, "triton"),
    "marlin, fp8 rows": (FP8_ROWS, 80, "marlin"),
    "marlin, int4": ("int4", None, "marlin"),
}


@pytest.fixture(scope="module")
def rank(tmp_path_factory, device):
    from tests.gpu.stock import one_rank

    with one_rank(tmp_path_factory.mktemp("rank"), device) as config:
        yield config


@pytest.fixture(scope="module")
def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def bound(format: str, capability: int) -> float:
    if format not in ("fp8", FP8_ROWS):
        return BOUNDS[format]
    return BOUNDS["fp8 native" if capability >= 89 else "fp8"]


@pytest.mark.parametrize("row", ROWS)
def test_a_kernel_skips_the_experts_that_are_not_its_own(row, rank, capability, device):
    from tests.gpu.stock import build, run
    from vllm_mixprec.quant.experts import _mapped_backend
    from vllm_mixprec.routing.platform import Platform

    format, pretended, backend = ROWS[row]
    if pretended == 89 and capability < 89:
        pytest.skip("Triton computes in FP8 from compute capability 8.9 on")
    platform = Platform(f"cuda-{80 if pretended == 80 else capability}")
    other = "int4" if format == "bf16" else "bf16"
    experts = Experts(SHAPE, (format, other), "cuda")
    layer = build(experts, platform, device, f"maps.{row}")
    child = layer.group0
    assert child.moe_config.moe_backend == backend
    assert _mapped_backend(child.quant_config.scheme, platform) == backend
    own = range(0, SHAPE.experts, 2)
    for rows in (1, 33):
        x, weights, ids = route(rows, SHAPE, "cuda", seed=rows)
        ids[:, 0] = ids[:, 0] // 2 * 2  # each row has one of its own
        found = run(child, x, weights, ids)
        expected = experts.reference(x, weights, ids, present=own)
        assert relative_error(found, expected) < bound(format, platform.compute_capability)
        # Rows that only others serve.
        assert not run(child, x, weights, ids // 2 * 2 + 1).any()


@pytest.mark.parametrize("kernel", ["groups", "one-launch"])
@pytest.mark.parametrize(
    "mix",
    [("fp8", "int4"), ("bf16", "int4"), ("bf16", "fp8", "int4"), (FP8_ROWS, "bf16", "int4")],
    ids="+".join,
)
def test_a_layer_of_several_formats_is_float32s(mix, kernel, rank, capability, device):
    from tests.gpu.stock import build, run
    from vllm_mixprec.routing.platform import Platform

    platform = Platform(f"cuda-{capability}")
    experts = Experts(SHAPE, mix, "cuda")
    layer = build(experts, platform, device, f"mixed.{kernel}.{'.'.join(mix)}", kernel)
    assert (layer.quant_method.one_launch is not None) == (kernel == "one-launch")
    most = BOUNDS["bf16"] if kernel == "one-launch" else max(bound(f, capability) for f in mix)
    for rows in (1, 33, 300):
        x, weights, ids = route(rows, SHAPE, "cuda", seed=rows)
        found = run(layer, x, weights, ids)
        assert relative_error(found, experts.reference(x, weights, ids)) < most
        # The control: experts of the same formats, each in its neighbour's place.
        shifted = (ids + len(mix)) % (SHAPE.experts // len(mix) * len(mix))
        assert relative_error(found, experts.reference(x, weights, shifted)) > 2 * most
