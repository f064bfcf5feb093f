# SPDX-License-Identifier: Apache-2.0
"""scripts/corrupt.py: it finds no defect, and it would find one."""

import functools
import json
import mmap
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from corruption import cases, kinds, plans, processes  # noqa: E402


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


def crash(value: None = None) -> dict:
    from vllm_mixprec.checkpoint.bounded_json import parse_json

    return parse_json(b"[")


def crash_in_a_config() -> dict:
    """As the start's hook is called, whose ValueError is pydantic's then."""
    return TypeAdapter(Annotated[None, AfterValidator(crash)]).validate_python(None)


def test_a_crash_a_hang_and_an_allocation_are_told() -> None:
    def allocate() -> dict:
        # Of the system: malloc may have so much left in this process, of tests before.
        with mmap.mmap(-1, cases.ALLOC_BYTES + (16 << 20)) as memory:
            return {"bytes": memory.write(bytes(len(memory)))}

    assert processes.run_forked(crash)["befell"] == "CRASH"
    assert processes.run_forked(crash_in_a_config)["befell"] == "CRASH"
    assert processes.run_forked(functools.partial(time.sleep, 9), limit_s=0.5)["befell"] == "HANG"
    assert processes.run_forked(allocate)["growth_bytes"] > cases.ALLOC_BYTES


def test_one_case_too_much_memory_is_a_defect() -> None:
    case = cases.Case("kind", 0, lambda folder: None)
    result = {"code": 1, "findings": [], "growth_bytes": cases.ALLOC_BYTES + 1, "seconds": 1.0}
    cases.judge_check(case, result, {"findings": []})
    assert case.outcome == "ALLOC"


def test_other_values_without_a_word_are_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    for at in (tmp_path / "sound", folder):
        at.mkdir()
        (at / "plan.yaml").write_text(plans.PLAN)

    def judged(kind: kinds.Kind | None, reported: list, served: str = "other") -> str:
        case = cases.Case("kind", 0, lambda folder: None, kind, reported=reported)
        sound = {"served": "sound", "growth_bytes": 0}
        cases.judge_start(
            case, {"served": served, "growth_bytes": 0, "seconds": 1.0}, sound, folder
        )
        return case.outcome

    kind = kinds.Kind("kind", 1, lambda rng, folder, number: None)
    untellable = kinds.Kind("kind", 1, lambda rng, folder, number: None, untellable="why")
    assert judged(kind, []) == "WRONG"
    assert judged(kind, [], "sound") == "harmless"
    assert judged(kind, [["note", "cast", 1]]) == "reported"
    assert judged(untellable, []) == "untellable"
    assert judged(None, []) == "WRONG"
    (folder / "plan.yaml").write_text(plans.PLAN.replace("{0-2}", "{0-1}"))
    assert judged(None, []) == "another plan"
