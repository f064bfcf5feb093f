# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel against NumPy, in Triton's interpreter, which needs no GPU.

The interpreter is chosen when Triton is imported, and vLLM must not see it: the kernel runs in a
process of its own, which is this file run as a script, once for all cases.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

BLOCK = 256
"""The kernel's; the cases lie around it."""


@dataclass(frozen=True)
class Case:
    """``ids`` [rows, top_k] of a layer with ``size`` >= ``experts`` counts; ``real`` [>= rows]."""

    name: str
    ids: Tensor
    real: Tensor
    experts: int
    size: int

    def expected(self) -> np.ndarray:
        rows = self.ids.numpy().astype(np.int64)[self.real[: len(self.ids)].numpy()]
        inside = rows[(rows >= 0) & (rows < self.experts)]
        counts = np.arange(self.size)
        counts[: self.experts] += np.bincount(inside, minlength=self.experts)
        return counts

    def inputs(self) -> dict[str, Any]:
        # torch.save keeps strides; the counts do not start at zero, so that it shows who adds.
        return {
            "topk_ids": self.ids,
            "real": self.real,
            "counts": torch.arange(self.size),
            "experts": self.experts,
        }


def case(
    name: str,
    rows: int,
    top_k: int,
    experts: int = 8,
    dtype: torch.dtype = torch.int32,
    low: int = 0,
    high: int | None = None,
    spare: int = 5,
    real: float = 0.7,
) -> Case:
    """Random ids in [low, high) of ``rows`` rows, the share ``real`` of which are real."""
    generator = torch.Generator().manual_seed(rows * 100 + top_k)
    ids = torch.randint(low, high or experts, (rows, top_k), generator=generator).to(dtype)
    mask = torch.rand(rows + spare, generator=generator) < real
    return Case(name, ids, mask, experts, size=2 * experts + 3)


def cases() -> Iterator[Case]:
    for top_k in range(1, 9):
        for rows in (1, 3, 31, BLOCK // top_k, BLOCK // top_k + 1, 300):
            yield case(f"{rows}x{top_k}", rows, top_k)
    yield case("empty", 0, 4)
    yield case("prime experts", 97, 5, experts=61)
    yield case("one expert", 40, 2, experts=1)
    yield case("more experts than pairs", 3, 2, experts=512)
    yield case("nothing is real", 50, 4, real=0)
    yield case("everything is real", 50, 4, real=1, spare=0)
    for dtype in (torch.int16, torch.int32, torch.int64, torch.uint32):
        yield case(f"{dtype}", 70, 3, dtype=dtype)
        yield case(f"outside, {dtype}", 70, 3, dtype=dtype, low=-3, high=12)
    yield case("all are -1", 20, 4, low=-1, high=0)
    yield case("ids of another layer", 20, 4, low=8, high=16)

    wide = case("", 60, 8)
    yield Case("every second column", wide.ids[:, ::2], wide.real, 8, 24)
    yield Case("left columns", wide.ids[:, :3], wide.real, 8, 24)
    yield Case("every second row", wide.ids[::2], wide.real, 8, 24)
    yield Case("transposed", wide.ids.t().contiguous().t(), wide.real, 8, 24)
    yield Case("from the middle", wide.ids[10:30], wide.real[10:], 8, 8)


CASES = tuple(cases())


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Run the kernel on every case; name of the case -> counts."""
    pytest.importorskip("triton")
    folder: Path = tmp_path_factory.mktemp("kernel")
    torch.save([case.inputs() for case in CASES], folder / "cases.pt")
    run = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    results = torch.load(folder / "counts.pt")
    return {case.name: counts.numpy() for case, counts in zip(CASES, results, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_counts_as_numpy_does(case: Case, counted: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(counted[case.name], case.expected())


def test_cases_have_something_to_count_and_something_to_skip() -> None:
    """The control: a kernel that counted nothing, or every row, would be caught."""
    changed = [(case.expected() != np.arange(case.size)).any() for case in CASES]
    assert sum(changed) > 50
    skips = [not case.real[: len(case.ids)].all() for case in CASES]
    assert sum(skips) > 40


def main(folder: Path) -> None:
    from vllm_mixprec.experts.kernel import count_experts

    inputs = torch.load(folder / "cases.pt")
    for arguments in inputs:
        count_experts(**arguments)
    torch.save([arguments["counts"] for arguments in inputs], folder / "counts.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
