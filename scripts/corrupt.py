# SPDX-License-Identifier: Apache-2.0
"""Damage checkpoints and plans in every way we could think of; count what then happens.

    python scripts/corrupt.py                 # some 750 checkpoints, 250 plans: five minutes
    python scripts/corrupt.py --start-all     # starts what check refuses, too
    python scripts/corrupt.py --engine        # a third of them, and whole engines: six minutes
    python scripts/corrupt.py --check-only    # no vLLM: what check refuses; two minutes
    python scripts/corrupt.py --quick         # so, and one or two cases of each kind: seconds

A sound model of three sources (BF16, FP8, GPTQ; tests/fixtures/random-moe) is copied, damaged (the
package ``corruption`` beside), and given to ``vllm-mixprec check`` in a process of its own, forked
for the case. What passes there is started, and of what is refused every 40th, or all: vLLM's own
``create_engine_config``, where the plug-in checks the plan, and ``get_model``, which builds vLLM's
model class and loads it through our loader and its kernels' repacking. That is an engine's start up
to where the key-value cache is made. Files that are to change while they are read are changed from
inside, before or amid the reads.

With ``--engine`` up to eight cases of each kind are checked; the first that passes is composed, and
``LLM(DIRECTORY)`` started on it and asked for tokens, also a process a case. There are more kinds
then, started all: damage done after compose, to the sources, the links, and what compose wrote.

Outcomes:
    refused           exit 1 with findings, or an error of ours; by check or, as told, at the start
    refused by vLLM   check passed, then stock vLLM or transformers raised (an odd config.json)
    harmless          every parameter equals the sound model's, bit for bit; of engines, every
                      token and log-probability
    reported          it is served with other values, and check's findings say something new
    another plan      a plan that is sound, but not the one it was
    untellable        it is served with other values, and no header can tell: only checksums could
Defects, of which there must be none:
    CRASH             another exception than ours from our code, or a signal
    HANG              over 20 s of processor time, or 60 s by the clock; of a start, 60 and 180
    ALLOC             over 256 MiB of resident memory more than before; over the sound model's at
                      the start
    WRONG             served with other values, not a word, and a header could have told
Exit code 1 with any of these.
"""

import argparse
import functools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corruption.cases import (
    DEFECTS,
    OUTCOMES,
    Case,
    judge_check,
    judge_start,
    link_sound,
    make_cases,
    make_composed_cases,
    write_sound,
    written,
)
from corruption.kinds import OTHER
from corruption.processes import run_forked
from corruption.starts import check_case, serve_case, start_case, warm_vllm

_SAMPLE = 40
_QUICK_CASES, _ENGINE_CASES, _ALL = 2, 8, 10**9  # a kind
_ENGINE_LIMIT_S = 60


def run_checks(cases: list[Case], work: Path) -> None:
    from vllm_mixprec import cli  # noqa: F401  imported once, for every fork

    sound = run_forked(functools.partial(check_case, work / "sound"))
    if sound.get("code") != 0:
        raise SystemExit(f"corrupt.py: check refuses the sound model: {sound}")
    for case in cases:
        with written(case, work) as folder:
            change = None
            if case.moment:
                if case.moment != "check":
                    continue
                assert case.damage is not None
                change = functools.partial(
                    case.damage.damage, random.Random(0), folder, case.number
                )
            judge_check(case, run_forked(functools.partial(check_case, folder, change)), sound)
            if case.moment and not case.outcome:  # it read what did not matter any more
                case.outcome = "harmless" if "itself" in case.kind else "WRONG"


def run_starts(cases: list[Case], work: Path, step: int) -> None:
    """Start what passed up to the loaded model, and every so many of what was refused."""
    sound = run_sound(start_case, [work / "sound"] * 2, work / "flipped")
    refused = [case for case in cases if case.outcome == "refused" and case.moment != "check"]
    sample = {id(case) for case in refused[::step]}
    for case in cases:
        if case.outcome == "" or id(case) in sample:
            with written(case, work) as folder:
                start = functools.partial(start_case, folder, case.damage, case.number)
                judge_start(case, run_forked(start), sound, folder)


def run_engines(cases: list[Case], work: Path) -> None:
    """Start whole engines on what passed: on the first case of a kind, and on each after compose.

    The outcome of other cases that passed stays open.
    """
    for folder in ("composed", "again"):
        link_sound(work, work / folder)
    sound = run_sound(serve_case, [work / "composed", work / "again"], work / OTHER)
    started: set[str] = set()
    for case in cases:
        if case.outcome == "" and (case.moment == "composed" or case.kind not in started):
            started.add(case.kind)
            with written(case, work) as folder:
                start = functools.partial(serve_case, folder, case.damage, case.number)
                judge_start(case, run_forked(start, _ENGINE_LIMIT_S), sound, folder)


def run_sound(
    start: Callable[[Path], dict[str, Any]], sound: list[Path], other: Path
) -> dict[str, Any]:
    """Return how the sound model starts: each time alike, and unlike the other one."""
    warm_vllm()
    results = [run_forked(functools.partial(start, at), _ENGINE_LIMIT_S) for at in (*sound, other)]
    served = [result.get("served") for result in results]
    if served[0] is None or served[0] != served[1]:
        raise SystemExit(f"corrupt.py: the sound model is not served alike twice: {results[:2]}")
    if served[2] in (None, served[0]):
        raise SystemExit(f"corrupt.py: another model does not show: {results[2]}")
    return results[0]


# Output.


def print_table(cases: list[Case]) -> None:
    columns = [
        o for o in (*OUTCOMES, *DEFECTS) if o in DEFECTS or any(c.outcome == o for c in cases)
    ]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        counts[case.kind][case.outcome] += 1
    print("| damage | cases | started | " + " | ".join(columns) + " |")
    print("|---" + "|---:" * (len(columns) + 2) + "|")
    rows = [(kind, [c for c in cases if c.kind == kind]) for kind in counts]
    for title, some in [
        *rows,
        ("all checkpoints", [c for c in cases if c.damage is not None]),
        ("all plans", [c for c in cases if c.damage is None]),
    ]:
        row = Counter(case.outcome for case in some)
        cells = [str(row[o]) if row[o] else "" if o not in DEFECTS else "0" for o in columns]
        print(f"| {title} | {len(some)} | {sum(c.started for c in some)} | {' | '.join(cells)} |")
    slowest, largest = (max(cases, key=k) for k in (lambda c: c.seconds, lambda c: c.growth_bytes))
    print(f"\nslowest: {slowest.seconds:.1f} s, {slowest.name}")
    print(f"largest growth in check: {largest.growth_bytes >> 20} MiB, {largest.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="a few cases a kind, check only")
    how.add_argument("--check-only", action="store_true", help="start nothing")
    how.add_argument("--start-all", action="store_true", help="start what check refuses, too")
    how.add_argument("--engine", action="store_true", help="start whole engines, a case a kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="REGEX", help="kinds of such names")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    begun = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="mixprec-corrupt-"))
    try:
        write_sound(work)
        most = _QUICK_CASES if arguments.quick else _ENGINE_CASES if arguments.engine else _ALL
        cases = make_cases(work, arguments.seed, most)
        if arguments.engine:
            cases += make_composed_cases(work, arguments.seed)
        cases = [case for case in cases if re.search(arguments.only, case.kind)]
        run_checks(cases, work)
        if arguments.engine:
            run_engines(cases, work)
        elif not (arguments.quick or arguments.check_only):
            run_starts(cases, work, 1 if arguments.start_all else _SAMPLE)
        cases = [case for case in cases if case.outcome]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    defects = [case for case in cases if case.outcome in DEFECTS]
    if arguments.json:
        described = [
            {k: v for k, v in vars(case).items() if k not in ("build", "damage", "reported")}
            for case in cases
        ]
        print(json.dumps({"cases": described, "defects": len(defects)}, indent=1))
    else:
        print_table(cases)
        for case in defects:
            print(f"\n{case.outcome}: {case.name}\n{case.detail}")
        print(f"\n{len(cases)} cases, {len(defects)} defects, {time.monotonic() - begun:.0f} s")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
