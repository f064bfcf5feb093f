# SPDX-License-Identifier: Apache-2.0
"""Everything here needs a CUDA device, and is skipped as a whole without one."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ENGINES = ("test_expert_maps", "test_engine", "test_counters", "test_memory", "test_marking")


def missing(module: str) -> str | None:
    """Say what a test module lacks on this machine, None if nothing."""
    if not torch.cuda.is_available():
        return "needs a CUDA device and a torch built for CUDA"
    if module in ENGINES:
        if find_spec("vllm") is None:
            return "needs vLLM for CUDA, which is not installed"
        from vllm.platforms import current_platform

        if not current_platform.is_cuda():
            return "needs vLLM for CUDA; this is another build"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.gpu)
            reason = missing(item.path.stem)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0)
