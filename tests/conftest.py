# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

import os

import pytest


def pytest_runtest_setup() -> None:
    """Take back what vLLM leaves in the environment, before the test's fixtures are made.

    A config of DeepSeek V3.2 sets this variable (config/vllm.py, 0.32), and whoever inherits it,
    such as an engine of another model, silently compiles nothing.
    """
    os.environ.pop("VLLM_USE_BREAKABLE_CUDAGRAPH", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests with an engine, which take minutes, last."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)
