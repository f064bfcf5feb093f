# SPDX-License-Identifier: Apache-2.0
"""The sound model, what is made of it, and how what then happens is judged."""

import functools
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corruption.composed import COMPOSED_KINDS, MIXED, PLAN_FILE
from corruption.files import FILE_KINDS
from corruption.headers import HEADER_KINDS
from corruption.kinds import OTHER, SHARDS, SOURCES, Kind, join, put, split
from corruption.plans import PLAN, PLAN_KINDS

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures" / "random-moe"
ALLOC_BYTES = 256 << 20
DEFECTS = ("CRASH", "HANG", "ALLOC", "WRONG")
OUTCOMES = ("refused", "refused by vLLM", "harmless", "reported", "another plan", "untellable")
_LONG_AGO_S = 1_600_000_000


@dataclass
class Case:
    """One damaged model: ``build`` writes it into a folder, ``kind`` says what may be expected."""

    kind: str
    number: int
    build: Callable[[Path], None]
    damage: Kind | None = None  # None: the plan is damaged
    outcome: str = ""
    detail: str = ""
    started: bool = False
    growth_bytes: int = 0
    seconds: float = 0.0
    reported: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind} #{self.number}"

    @property
    def moment(self) -> str:
        return "" if self.damage is None else self.damage.moment


def make_cases(work: Path, seed: int, most: int) -> list[Case]:
    """List the cases, at most so many a kind; the models themselves are written one at a time."""

    def plan(edit: Any, name: str, number: int, folder: Path) -> None:
        link_sound(work, folder)
        text = edit(random.Random(f"{seed} {name} {number}"), number)
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        put(folder / "plan.yaml", raw)
        (folder / "loop").symlink_to("loop")

    def chosen(cases: int) -> range:
        return range(0, cases, -(-cases // most))

    cases = _of_kinds((*HEADER_KINDS, *FILE_KINDS), work, seed, chosen)
    return cases + [
        Case(kind.name, number, functools.partial(plan, kind.edit, kind.name, number))
        for kind in PLAN_KINDS
        for number in chosen(kind.cases)
    ]


def make_composed_cases(work: Path, seed: int) -> list[Case]:
    """List the cases that are damaged after compose."""
    return _of_kinds(COMPOSED_KINDS, work, seed, range)


def _of_kinds(
    kinds: Iterable[Kind], work: Path, seed: int, chosen: Callable[[int], range]
) -> list[Case]:
    def checkpoint(kind: Kind, number: int, folder: Path) -> None:
        link_sound(work, folder)
        if not kind.moment:
            kind.damage(random.Random(f"{seed} {kind.name} {number}"), folder, number)

    return [
        Case(kind.name, number, functools.partial(checkpoint, kind, number), kind)
        for kind in kinds
        for number in chosen(kind.cases)
    ]


# Each with its last bit flipped, but for E4M3's largest, which would be NaN.
_OTHER_BYTES = bytes(byte if byte & 0x7F in (0x7E, 0x7F) else byte ^ 1 for byte in range(256))


def write_sound(work: Path) -> None:
    """Write the sound model, another one with the same headers, and one with a bit flipped."""
    for folder in (work / "sound", work / OTHER):
        for source in SOURCES:
            shutil.copytree(FIXTURES / source, folder / source)
        (folder / "plan.yaml").write_text(PLAN)
    for shard in SHARDS:
        header, data = split(work / OTHER / shard)
        other = bytearray(data)
        for name in header:
            if name.endswith("weight"):  # of indices and zero points the loader knows what is odd
                start, end = header[name]["data_offsets"]
                other[start:end] = data[start:end].translate(_OTHER_BYTES)
        join(work / OTHER / shard, header, bytes(other))
    for file in (work / "sound").rglob("*"):
        os.utime(file, (_LONG_AGO_S, _LONG_AGO_S))
    link_sound(work, work / "flipped")
    raw = bytearray((work / "flipped" / SHARDS[0]).read_bytes())
    raw[-2] ^= 1
    put(work / "flipped" / SHARDS[0], bytes(raw))


def link_sound(work: Path, folder: Path) -> None:
    """Make a folder of the sound model that shares its files, shards excepted."""
    sound = work / "sound"
    shutil.copytree(sound, folder, copy_function=os.link)
    for shard in SHARDS:
        (folder / shard).unlink()
        shutil.copy2(sound / shard, folder / shard)


@contextmanager
def written(case: Case, work: Path) -> Iterator[Path]:
    folder = work / "case"
    case.build(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def judge_check(case: Case, result: dict[str, Any], sound: dict[str, Any]) -> None:
    """Note what ``check`` said; the outcome stays open when it passed."""
    case.seconds = result["seconds"]
    case.growth_bytes = result.get("growth_bytes", 0)
    case.detail = result.get("detail", "")
    if "befell" in result:
        case.outcome = result["befell"]
    elif case.growth_bytes > ALLOC_BYTES:
        case.outcome = "ALLOC"
    elif "refused" in result:
        case.outcome, case.detail = "CRASH", f"left the command: {result['refused']}"
    elif result["code"] == 1:
        case.outcome = "refused"
    else:
        case.reported = [f for f in result["findings"] if f not in sound["findings"]]


def judge_start(case: Case, result: dict[str, Any], sound: dict[str, Any], folder: Path) -> None:
    """Note how a start ended; what check refused must be refused.

    Args:
        result, sound: of the case and of the sound model, which is in the folder ``sound`` beside.
    """
    was_refused = case.outcome == "refused"
    case.started = True
    case.seconds = max(case.seconds, result["seconds"])
    growth = result.get("growth_bytes", 0) - sound["growth_bytes"]
    if "befell" in result or growth > ALLOC_BYTES:
        case.outcome = result.get("befell", "ALLOC")
        case.detail = result.get("detail", f"{growth} bytes more than the sound model")
    elif "refused" in result:
        case.outcome, case.detail = "refused", result["refused"]
    elif "refused_by_vllm" in result:
        case.outcome, case.detail = "refused by vLLM", result["refused_by_vllm"]
    elif was_refused:
        case.outcome, case.detail = "WRONG", "check refused it, and it started"
    elif result["served"] == sound["served"]:
        case.outcome = "harmless"
    elif _is_another_plan(folder):
        case.outcome = "another plan"
    elif case.reported:
        case.outcome, case.detail = "reported", str(case.reported)
    elif case.damage is not None and case.damage.untellable:
        case.outcome, case.detail = "untellable", case.damage.untellable
    else:
        case.outcome, case.detail = "WRONG", "served with other values and not a word"


def _is_another_plan(folder: Path) -> bool:
    """Whether a folder's plan, or the one composed of it, is not the sound model's."""
    from vllm_mixprec import Plan

    file = PLAN_FILE if (folder / MIXED).is_dir() else "plan.yaml"
    sound = folder.parent / ("composed" if file == PLAN_FILE else "sound")
    return Plan.from_yaml(folder / file).sha256 != Plan.from_yaml(sound / file).sha256
