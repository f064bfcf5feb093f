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
# A file's tests share models and engines, so a file stays with one worker. Engines of both share the
# two cores that the suite is made for; on a GPU they would share its memory.
workers=2
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then workers=0; fi
exec .venv/bin/pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
