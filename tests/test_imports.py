# SPDX-License-Identifier: Apache-2.0
"""The core runs without vLLM, and without torch until weights are dequantised."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "transformers", "numpy")


@pytest.mark.parametrize(
    "module",
    [
        "vllm_mixprec",
        "vllm_mixprec.errors",
        "vllm_mixprec.checkpoint",
        "vllm_mixprec.plan",
        "vllm_mixprec.routing",
        "vllm_mixprec.composition",
    ],
)
def test_core_imports_neither_torch_nor_vllm(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()).isdisjoint(HEAVY)


def test_detecting_the_platform_imports_no_torch() -> None:
    code = (
        "import sys; from vllm_mixprec.routing import detect_platform; "
        "detect_platform(); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
