#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pack vLLM, this package and its needs for a GPU machine without network; --help lists the options.
# Usage: scripts/gpu_bundle.sh OUT      writes OUT/part-00 ..., OUT/MANIFEST and OUT/join.sh
#        scripts/gpu_bundle.sh --list   only says what would go, with sizes
# On the other machine: bash join.sh DEST, then scripts/gpu_suite.sh --site DEST.
# Needs Linux, pip 22 or later, the `packaging` package and 4 GB of free disk.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
"$python" -c 'import packaging, pip' 2>/dev/null || {
  echo "scripts/gpu_bundle.sh: $python lacks pip or packaging. Run scripts/setup_env.sh, or set PYTHON" >&2
  exit 1
}
"$python" scripts/gpu_bundle.py "$@"

# Written into whichever folder got a MANIFEST by this call.
for out in "$@"; do
  [ -f "$out/MANIFEST" ] || continue
  cat >"$out/join.sh" <<'JOIN'
#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Check the parts of a bundle, unpack them to DEST and try the imports.
# Usage: bash join.sh DEST [--parts DIR]    DIR: where the parts and MANIFEST are; default: beside this file
# Parts may come one by one: what is missing is named (exit 3). A finished step is not repeated.
set -euo pipefail

usage() { sed -n '3,5s/^# //p' "$0"; }
parts=$(cd "$(dirname "$0")" && pwd)
dest=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --parts) parts=${2:?--parts needs a folder}; shift 2 ;;
    -*) usage >&2; exit 2 ;;
    *) dest=${1%/}; shift ;;
  esac
done
[ -n "$dest" ] || { usage >&2; exit 2; }
manifest=$parts/MANIFEST
[ -f "$manifest" ] || { echo "join.sh: no MANIFEST in $parts" >&2; exit 3; }
python=${PYTHON:-python3}
whole=$(awk '$1 == "whole" {print $3}' "$manifest")

if [ "$(cat "$dest/.bundle-sha256" 2>/dev/null || true)" = "$whole" ]; then
  echo "unpacked already: $dest"
else
  missing=()
  files=()
  while read -r name size sum; do
    file=$parts/$name
    files+=("$file")
    if [ ! -f "$file" ]; then
      missing+=("$name")
    elif [ "$(stat -c %s "$file")" != "$size" ]; then
      missing+=("$name (has $(stat -c %s "$file") of $size bytes)")
    elif [ "$(sha256sum "$file" | cut -d' ' -f1)" != "$sum" ]; then
      missing+=("$name (another sha256 than in MANIFEST)")
    else
      echo "ok: $name"
    fi
  done < <(grep '^part-' "$manifest")
  if [ ${#missing[@]} -gt 0 ]; then
    printf 'missing: %s\n' "${missing[@]}" >&2
    exit 3
  fi
  [ "$(cat "${files[@]}" | sha256sum | cut -d' ' -f1)" = "$whole" ] ||
    { echo "join.sh: the joined parts have another sha256 than MANIFEST's whole" >&2; exit 1; }
  if [ -e "$dest" ] && [ ! -f "$dest/.bundle-sha256" ] && [ -n "$(ls -A "$dest")" ]; then
    echo "join.sh: $dest holds something else; name a new folder" >&2
    exit 1
  fi
  rm -rf "$dest.unpacking"
  mkdir -p "$dest.unpacking"
  # Python's own xz: the machine may have neither tar's nor the command.
  cat "${files[@]}" | "$python" -c '
import sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz") as archive:
    archive.extractall(sys.argv[1], filter="data")' "$dest.unpacking"
  echo "$whole" >"$dest.unpacking/.bundle-sha256"
  rm -rf "$dest"
  mv "$dest.unpacking" "$dest"
  echo "unpacked: $dest"
fi

wanted=$(awk '$1 == "python" {print $2}' "$manifest")
"$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$wanted')" ||
  echo "note: the bundle is for Python $wanted, this is $("$python" --version)" >&2
cd "$dest" # not a checkout, whose package would come first
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" -W ignore - <<'PY'
import contextlib, importlib, io, logging, sys

logging.disable()
failed = 0
for name in (
    "torch triton pydantic msgspec zmq transformers vllm vllm._C_stable_libtorch "
    "vllm._moe_C_stable_libtorch vllm.model_executor.layers.fused_moe vllm.v1.worker.gpu_model_runner "
    "vllm.v1.attention.backends.triton_attn vllm.entrypoints.llm vllm_mixprec vllm_mixprec.quant.experts"
).split():
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            module = importlib.import_module(name)
        print(f"import ok: {name} {getattr(module, '__version__', '')}".rstrip(), flush=True)
    except Exception as error:
        print(f"import FAILED: {name}: {type(error).__name__}: {error}", flush=True)
        failed = 1
sys.exit(failed)
PY
JOIN
  chmod +x "$out/join.sh"
  echo "$out: carry all of it, then: bash join.sh DEST"
done
