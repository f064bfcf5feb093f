# SPDX-License-Identifier: Apache-2.0
"""Every format from its tool: told, dequantised as the tool does, and laid out without a change.

``scripts/format_matrix.py`` writes docs/formats.md from what passed here, in tests/quant/
test_formats.py and in tests/engine/test_formats.py.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from vllm.scalar_type import scalar_types

from tests.checkpoint.formats.stored import Tensors, write
from tests.checkpoint.formats.tools import CASES, Stored, gptq, make_weight
from vllm_mixprec.checkpoint import Module
from vllm_mixprec.checkpoint.dequantize import dequantize, relayout
from vllm_mixprec.checkpoint.formats import FORMATS, Scheme
from vllm_mixprec.errors import CheckpointError, UnsupportedError
from vllm_mixprec.routing import Platform, missing_kernel
from vllm_mixprec.routing.kernels import kernels_for

every_case = pytest.mark.parametrize("case", CASES)
N, K = 128, 256


@cache
def stored(case: str) -> Stored:
    return CASES[case].store(make_weight(N, K, seed=11))


@pytest.fixture
def module(case: str, tmp_path: Path) -> tuple[Module, Tensors]:
    made = stored(case)
    return write(tmp_path, made.tensors, made.config)


def label(text: str | None) -> str | None:
    return text and text.format(k=K)


@every_case
def test_recognised(case: str, module: tuple[Module, Tensors], record_property) -> None:
    found, _ = module
    assert (found.scheme.label, found.shape, found.problems) == (
        label(CASES[case].label),
        (N, K),
        (),
    )
    record_property("matrix", (case, "recognised", "yes"))


@every_case
def test_dequantised_as_the_tool_does(
    case: str, module: tuple[Module, Tensors], record_property
) -> None:
    found, tensors = module
    expected = stored(case).weight
    dequantised = dequantize(found.scheme, tensors, expected.dtype)
    assert torch.equal(dequantised, expected)
    # Negative control: the comparison sees one bit of one scale.
    name = next(s for s in ("scales", "weight_scale_inv", "weight_scale") if s in tensors)
    wrong = tensors[name].clone()
    wrong.flatten().view(torch.uint8)[0] ^= 8
    assert not torch.equal(
        dequantize(found.scheme, tensors | {name: wrong}, expected.dtype), expected
    )
    record_property("matrix", (case, "dequantised", "yes"))


@every_case
def test_every_layout_holds_the_same_numbers(case: str, module: tuple[Module, Tensors]) -> None:
    found, tensors = module
    expected = dequantize(found.scheme, tensors, torch.float32)
    for layout in FORMATS[found.scheme.format].layouts(found.scheme):
        laid_out = relayout(found.scheme, layout, tensors)
        assert torch.equal(dequantize(layout, laid_out, torch.float32), expected), layout.label
        assert all(tensor.is_contiguous() for tensor in laid_out.values())
        known = FORMATS[layout.format]
        assert known.held_bytes is not None
        sizes = known.held_bytes(layout, (N, K))
        assert {suffix: sizes[suffix] // tensor.nbytes for suffix, tensor in laid_out.items()} == {
            suffix: 2 if tensor.dtype in (torch.float16, torch.bfloat16) else 1
            for suffix, tensor in laid_out.items()
        }


@pytest.mark.parametrize("kind", ["linear", "experts"])
@pytest.mark.parametrize("platform", ["cpu-avx512", "cpu-other", "cuda-90"])
@every_case
def test_layout_that_a_kernel_takes(
    case: str, platform: str, kind, module: tuple[Module, Tensors], record_property
) -> None:
    """On a GPU this is all that is tested here: the choice, and that the numbers are the same."""
    scheme = module[0].scheme
    made = Platform(platform)
    layouts = (scheme, *FORMATS[scheme.format].layouts(scheme))
    served = (
        layout.label
        for place in range(2)  # every layout for a format's best kernel, then for the next
        for layout in layouts
        for kernel in kernels_for(made, layout.format, kind)[place : place + 1]
        if missing_kernel(made, layout, kind, (N, K), among=(kernel,)) is None
    )
    entry, is_expert = CASES[case], kind == "experts"
    expected = {
        "cpu-avx512": entry.experts if is_expert else entry.cpu,
        "cpu-other": None if is_expert else entry.other,
        "cuda-90": entry.cuda,
    }[platform]
    assert next(served, None) == label(expected)
    if platform == "cuda-90":
        served_as = f"packed: {expected}" if expected else "widened"
        record_property("matrix", (case, "cuda", served_as))
    if (platform, kind, expected) == ("cpu-other", "linear", None):
        record_property("matrix", (case, "AVX512F linear", "widened"))


GPTQ = Scheme("gptq", 4, group_size=32)


def test_layout_of_other_numbers_is_refused() -> None:
    awq = Scheme("awq", 4, group_size=32, symmetric=False, zero_offset=0)
    with pytest.raises(UnsupportedError, match="int4 g32 cannot be laid out as awq int4 g32 asym"):
        relayout(GPTQ, awq, stored("gptq-g32").tensors)


def test_finer_groups_of_a_partial_last_group() -> None:
    made = gptq(scalar_types.uint4, 96)(make_weight(32, 288, seed=1))
    tensors = {
        suffix: tensor[:-8] if suffix == "qweight" else tensor[: 224 if suffix == "g_idx" else 3]
        for suffix, tensor in made.tensors.items()
    }
    scheme = Scheme("gptq", 4, group_size=96, symmetric=False)
    layout = Scheme("gptq", 4, group_size=32, symmetric=False)
    finer = relayout(scheme, layout, tensors)
    assert finer["scales"].shape == (7, 32)
    assert torch.equal(
        dequantize(layout, finer, torch.float32), dequantize(scheme, tensors, torch.float32)
    )


def test_zero_points_that_vary_are_no_symmetric_layout() -> None:
    """Where the config promises one zero point, other layouts have no place for the truth."""
    tensors = dict(stored("awq-sym").tensors)
    tensors["qzeros"] = tensors["qzeros"] ^ 1
    scheme = Scheme("awq", 4, group_size=64, zero_offset=0)
    with pytest.raises(CheckpointError, match="zero points: they vary .* expected 8 everywhere"):
        relayout(scheme, Scheme("gptq", 4, group_size=64), tensors)


def test_rows_out_of_order_are_no_ordered_layout() -> None:
    """As the loader says of a config that hides an activation order."""
    tensors = stored("gptq-act-order").tensors
    finer = Scheme("gptq", 4, group_size=64)
    coarse = {s: t[::2] if s in ("qzeros", "scales") else t for s, t in tensors.items()}
    coarse["g_idx"] = tensors["g_idx"] // 2
    with pytest.raises(CheckpointError, match="g_idx: rows are not grouped in order"):
        relayout(finer, GPTQ, coarse)
