# SPDX-License-Identifier: Apache-2.0
"""scripts/corrupt.py: it finds no defect, and it would find one."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import corrupt  # noqa: E402


def test_some_damage_of_every_kind_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "corrupt.py", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    report = json.loads(run.stdout)
    assert report["defects"] == 0 and len(report["cases"]) >= 50
    assert all(case["outcome"] == "refused" for case in report["cases"])


def test_a_crash_a_hang_and_an_allocation_are_told() -> None:
    def crash() -> dict:
        from vllm_mixprec.checkpoint.bounded_json import parse_json

        return parse_json(None)

    def allocate() -> dict:
        return {"bytes": len(b"x" * (corrupt.ALLOC_BYTES + (16 << 20)))}

    assert corrupt.run_forked(crash)["befell"] == "CRASH"
    assert corrupt.run_forked(functools.partial(time.sleep, 9), limit_s=0.5)["befell"] == "HANG"
    assert corrupt.run_forked(allocate)["growth_bytes"] > corrupt.ALLOC_BYTES


def test_one_case_too_much_memory_is_a_defect() -> None:
    case = corrupt.Case("kind", 0, lambda folder: None)
    result = {"code": 1, "findings": [], "growth_bytes": corrupt.ALLOC_BYTES + 1, "seconds": 1.0}
    corrupt.judge_check(case, result, {"findings": []})
    assert case.outcome == "ALLOC"


def test_other_values_without_a_word_are_wrong() -> None:
    def judged(kind: corrupt.Kind, reported: list) -> str:
        case = corrupt.Case(kind.name, 0, lambda folder: None, kind, reported=reported)
        sound = {"digest": "sound", "growth_bytes": 0}
        served = {"digest": "other", "growth_bytes": 0, "seconds": 1.0}
        corrupt.judge_start(case, served, sound, Path())
        return case.outcome

    kind = corrupt.Kind("kind", 1, lambda rng, folder, number: None)
    untellable = corrupt.Kind("kind", 1, lambda rng, folder, number: None, untellable="why")
    assert judged(kind, []) == "WRONG"
    assert judged(kind, [["note", "cast", 1]]) == "reported"
    assert judged(untellable, []) == "untellable"
