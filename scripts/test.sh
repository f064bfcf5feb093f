#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up .venv, then run every check: lint, format, types, the fast tests, the tests with a vLLM engine.
# Arguments go to pytest, e.g. scripts/test.sh -x -k plan, or scripts/test.sh -m "not engine".
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup_env.sh dev

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}

.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
# One run, so that pytest's closing line counts everything; the engine tests, which take minutes, last.
exec .venv/bin/python -c '
import sys, pytest

class EngineTestsLast:
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: item.get_closest_marker("engine") is not None)

sys.exit(pytest.main(sys.argv[1:], plugins=[EngineTestsLast()]))' "$@"
