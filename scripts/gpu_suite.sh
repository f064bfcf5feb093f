#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU: tests, measurements, and docs/gpu.md from what they found.
# Usage: scripts/gpu_suite.sh [--quick] [--again] [--only STEP]... [--list]
#                             [--site DIR | --bare] [--results DIR] [--decode-gb N]
#   --quick      smaller models, fewer batch sizes
#   --again      repeat steps whose results are of this device, code and versions
#   --only STEP  that step alone; may be given several times
#   --list       name the steps
#   --site DIR   a bundle that join.sh has unpacked; nothing is installed then
#   --bare       install nothing: without vLLM, tests and kernels do what needs torch and Triton alone
#   --results D  where the steps' JSON files are kept; default runs/gpu
#   --decode-gb  size in BF16 of the synthetic model of decode and memory; default 8
# Exit code 0: every step passed. A step that fails does not stop the next; one that was cut goes on
# where it stopped when the script is run again.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."

# name, seconds it may take, what it does
STEPS="device 180 driver, versions, copy bandwidth
tests 2400 tests/gpu
kernels 2400 experts of one layer: one launch, groups, stock kernels
decode 3000 engines: decode and prefill of mixed models
counters 1800 decode with expert statistics over without
memory 1200 torch's memory after loading against check
report 60 docs/gpu.md"

only=() pass=() results=runs/gpu site='' bare=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '3,16s/^# //p' "$0"; exit 0 ;;
    --list) echo "$STEPS"; exit 0 ;;
    --quick | --again) pass+=("$1"); shift ;;
    --bare) bare=1; shift ;;
    --decode-gb) pass+=("$1" "${2:?--decode-gb needs a number}"); shift 2 ;;
    --only) only+=("${2:?--only needs a step}"); shift 2 ;;
    --site) site=$(cd "$from" && cd "${2:?--site needs a folder}" && pwd); shift 2 ;;
    --results)
      case ${2:?--results needs a folder} in /*) results=$2 ;; *) results=$from/$2 ;; esac
      shift 2 ;;
    *) sed -n '3,16s/^# //p' "$0" >&2; exit 2 ;;
  esac
done
for step in ${only[@]+"${only[@]}"}; do
  grep -q "^$step " <<<"$STEPS" || { echo "scripts/gpu_suite.sh: no step $step; see --list" >&2; exit 2; }
done
say() { if [ -t 2 ]; then printf '\033[1m==> %s\033[0m\n' "$*" >&2; else echo "==> $*" >&2; fi; }

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || [ -n "${PYTHON:-}" ] || python=python3
if [ -n "$site" ]; then
  export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
elif [ -z "$bare" ] && ! "$python" -c 'import pytest, torch, vllm, vllm_mixprec; assert torch.version.cuda' 2>/dev/null; then
  scripts/setup_env.sh
  python=.venv/bin/python
  "$python" -c 'import pytest' 2>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check pytest
fi

# An installed package knows where its patches are; a checkout that stands before one on the path
# does not (package_dir in setup.py).
mkdir -p "$results"
if ! "$python" -c 'import vllm_mixprec.patches' 2>/dev/null; then
  mkdir -p runs/gpu/path
  cat >runs/gpu/path/sitecustomize.py <<PY
import sys
from importlib.util import spec_from_file_location


class Patches:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = "$PWD/patches"
        if name == "vllm_mixprec.patches":
            return spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder]
            )


sys.meta_path.append(Patches)
PY
  export PYTHONPATH=$PWD/runs/gpu/path:$PWD${PYTHONPATH:+:$PYTHONPATH}
fi

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}
export PYTHONUNBUFFERED=1
begun=$SECONDS
lines=()
status=0
while read -r name limit_s what; do
  if [ ${#only[@]} -gt 0 ] && [[ " ${only[*]} " != *" $name "* ]]; then continue; fi
  say "$name: $what (at most $limit_s s)"
  step_begun=$SECONDS
  if [ "$name" = report ]; then
    command=("$python" scripts/gpu_report.py --results "$results" --command "scripts/gpu_suite.sh ${pass[*]-}")
  else
    command=("$python" scripts/gpu_steps.py "$name" --results "$results" ${pass[@]+"${pass[@]}"})
  fi
  code=0
  # Its whole process group: engines have workers.
  timeout --kill-after=30 "$limit_s" "${command[@]}" </dev/null 2>&1 | tee -a "$results/$name.log" || code=$?
  case $code in
    0) outcome=passed ;;
    124 | 137) outcome="cut after $limit_s s; run again to go on" ;;
    *) outcome="FAILED (exit $code), see $results/$name.log" ;;
  esac
  [ "$code" = 0 ] || status=1
  lines+=("$(printf '%-9s %5d s  %s' "$name" $((SECONDS - step_begun)) "$outcome")")
done <<<"$STEPS"
say "$((SECONDS - begun)) s in all"
printf '%s\n' "${lines[@]}"
exit $status
