#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh clone to a mixed-precision model that answers: installs what is missing into .venv, then
# runs scripts/demo.py (its options are passed on; --help lists them).
# Exit code 0: everything worked. The logs are in runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup_env.sh

# Replaced, not called: a signal sent to this script reaches the demo, which stops the server it
# started on every way out.
exec .venv/bin/python scripts/demo.py "$@"
