# SPDX-License-Identifier: Apache-2.0
"""Damage checkpoints and plans in every way we could think of; count what then happens.

    python scripts/corrupt.py                 # some 700 checkpoints, 250 plans: ten minutes
    python scripts/corrupt.py --check-only    # no vLLM: what check refuses; two minutes
    python scripts/corrupt.py --quick         # so, and one or two cases of each kind: seconds

A sound model of three sources (BF16, FP8, GPTQ; tests/fixtures/random-moe) is copied, damaged
(scripts/corruptions.py, scripts/corrupt_plans.py), and given to ``vllm-mixprec check`` in a process
of its own, forked for the case. What passes there is started, and every 40th of what is refused:
vLLM's own ``create_engine_config``, where the plug-in checks the plan, and ``get_model``, which
builds vLLM's model class and loads it through our loader and its kernels' repacking. That is
an engine's start up to where the key-value cache is made; a whole engine a case would take hours.
Files that are to change while they are read are changed from inside, before or amid the reads.

Outcomes:
    refused           exit 1 with findings, or an error of ours; by check or, as told, at the start
    refused by vLLM   check passed, then stock vLLM or transformers raised (an odd config.json)
    harmless          every parameter equals the sound model's, bit for bit
    reported          it is served with other values, and check's findings say something new
    another plan      a plan that is sound, but not the one it was
    untellable        it is served with other values, and no header can tell: only checksums could
Defects, of which there must be none:
    CRASH             another exception than ours from our code, or a signal
    HANG              over 20 s of processor time, or 60 s by the clock
    ALLOC             over 256 MiB of resident memory more than before; over the sound model's at
                      the start
    WRONG             served with other values, not a word, and a header could have told
Exit code 1 with any of these.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corrupt_plans import PLAN, PLAN_KINDS
from corruptions import KINDS, OTHER, SHARDS, SOURCES, Kind, join, put, split

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "random-moe"
HANG_S = 20
ALLOC_BYTES = 256 << 20
ADDRESS_SPACE_BYTES = 8 << 30  # what a case may map on top, so that the machine survives it
DEFECTS = ("CRASH", "HANG", "ALLOC", "WRONG")
OUTCOMES = ("refused", "refused by vLLM", "harmless", "reported", "another plan", "untellable")
_LONG_AGO_S = 1_600_000_000
_QUICK_CASES, _SAMPLE = 2, 40


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


def make_cases(work: Path, seed: int, quick: bool) -> list[Case]:
    """List every case; the models themselves are written one at a time."""

    def checkpoint(kind: Kind, number: int, folder: Path) -> None:
        link_sound(work, folder)
        if not kind.moment:
            kind.damage(random.Random(f"{seed} {kind.name} {number}"), folder, number)

    def plan(edit: Any, name: str, number: int, folder: Path) -> None:
        link_sound(work, folder)
        text = edit(random.Random(f"{seed} {name} {number}"), number)
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        put(folder / "plan.yaml", raw)
        (folder / "loop").symlink_to("loop")

    def chosen(cases: int) -> range:
        return range(0, cases, max(1, -(-cases // _QUICK_CASES))) if quick else range(cases)

    cases = [
        Case(kind.name, number, functools.partial(checkpoint, kind, number), kind)
        for kind in KINDS
        for number in chosen(kind.cases)
    ]
    return cases + [
        Case(kind.name, number, functools.partial(plan, kind.edit, kind.name, number))
        for kind in PLAN_KINDS
        for number in chosen(kind.cases)
    ]


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
                other[start:end] = bytes(byte ^ 1 for byte in data[start:end])
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


# One case in a process of its own.


def run_forked(work: Callable[[], dict[str, Any]], limit_s: float = HANG_S) -> dict[str, Any]:
    """Run ``work`` in a fork; returns its result, seconds and growth_bytes, or what befell it."""
    receiver, sender = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _run_child(work, sender, limit_s)
    os.close(sender)
    received = b""
    while True:
        left = 3 * limit_s - (time.monotonic() - begun)
        if left <= 0 or not select.select([receiver], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(receiver)
            return {"befell": "HANG", "detail": "by the clock", "seconds": 3 * limit_s}
        more = os.read(receiver, 1 << 16)
        if not more:
            break
        received += more
    os.close(receiver)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - begun
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return {"befell": "HANG", "detail": f"over {limit_s} s", "seconds": seconds}
    if os.WIFSIGNALED(status) or not received:
        return {"befell": "CRASH", "detail": f"ended with status {status}", "seconds": seconds}
    return json.loads(received) | {"seconds": seconds}


def _run_child(work: Callable[[], dict[str, Any]], sender: int, limit_s: float) -> None:
    try:
        limit = max(1, int(limit_s))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        limit = _status_bytes("VmSize") + ADDRESS_SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now
        before = _status_bytes("VmRSS")
        with open(os.devnull, "w", encoding="utf-8") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        try:
            result = work()
        except BaseException as error:
            result = _describe(error)
        result["growth_bytes"] = _status_bytes("VmHWM") - before
        os.write(sender, json.dumps(result).encode())
    finally:
        os._exit(0)


def _status_bytes(key: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def _describe(error: BaseException) -> dict[str, Any]:
    """Tell an error of ours, and one that our code raised without meaning to, from vLLM's."""
    from vllm_mixprec.errors import MixPrecError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MixPrecError):
            return {"refused": f"{type(cause).__name__}: {cause}"[:500]}
        cause = cause.__cause__ or cause.__context__
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    detail = f"{''.join(traceback.format_exception(error))[-1500:]}"
    package = str(Path(__file__).parents[1] / "vllm_mixprec")
    patches = str(Path(__file__).parents[1] / "patches")
    # What a library raises in a call of ours is ours too; vLLM calls us, and calls transformers.
    ours = [i for i, name in enumerate(frames) if name.startswith((package, patches))]
    theirs = [i for i, name in enumerate(frames) if "/vllm/" in name or "/transformers/" in name]
    if isinstance(error, MemoryError):
        return {"befell": "ALLOC", "detail": detail}
    if ours and (not theirs or ours[-1] > theirs[-1]) or not theirs:
        return {"befell": "CRASH", "detail": detail}
    return {"refused_by_vllm": detail}


# ``check``.


def check_case(folder: Path, change: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run the command as a user does, once for people and once as JSON."""
    from vllm_mixprec import cli
    from vllm_mixprec.routing import sources

    if change is not None:
        real, waiting = sources._read_data, [change]

        def changing(spec: Any) -> bytes:
            while waiting:
                waiting.pop()()
            return real(spec)

        sources._read_data = changing
    arguments = ["check", str(folder / "plan.yaml"), "--platform", "cpu-avx512"]
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(printed):
        code = cli.main([*arguments, "--json"])
        if change is None and cli.main(arguments) != code:
            raise AssertionError("the exit codes with and without --json differ")
        printed.flush()
    text = printed.buffer.getvalue().decode()
    report, _ = json.JSONDecoder().raw_decode(text)
    findings = report.get("findings", [])
    return {
        "code": code,
        "findings": [[f["level"], f["code"], f.get("count", 1)] for f in findings],
        "detail": findings[0]["message"][:300] if findings else str(report.get("error", "")),
    }


# The start.


def warm_vllm() -> None:
    """Import what a start needs, once, and have vLLM look at the model's class."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    import torch
    import vllm.v1.worker.cpu_worker  # noqa: F401  what it does to torch.accelerator

    torch.set_num_threads(1)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model  # noqa: F401
    from vllm.model_executor.models import ModelRegistry, qwen3_moe  # noqa: F401
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    EngineArgs(str(FIXTURES / "bf16"), skip_tokenizer_init=True).create_model_config()


def engine_options(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder / "bf16"),
        "quantization": "mixprec",
        "hf_overrides": {"mixprec_plan": str(folder / "plan.yaml")},
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "enforce_eager": True,
    }


def start_case(folder: Path, damage: Kind | None = None) -> dict[str, Any]:
    """Configure vLLM and load the model; returns a digest over every parameter as loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    config = EngineArgs(**engine_options(folder)).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, backend="gloo")
        initialize_model_parallel(1, 1, backend="gloo")
        if damage is not None and damage.moment:
            _change_while_loading(damage, folder)
        loaded = _digest_what_is_loaded()
        get_model(vllm_config=config)
    return loaded


def _digest_what_is_loaded() -> dict[str, Any]:
    """Have our loader note a digest when it is done, before kernels repack the weights."""
    import torch

    from vllm_mixprec.loading.loader import MixPrecLoader

    noted: dict[str, Any] = {}
    real = MixPrecLoader.load_weights

    def load_weights(loader: Any, model: Any, model_config: Any) -> None:
        real(loader, model, model_config)
        digest, size = hashlib.sha256(), 0
        for name, parameter in sorted(model.named_parameters()):
            data = parameter.detach().contiguous().view(-1).view(torch.uint8)
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(data.numpy())
            size += data.numel()
        noted.update(digest=digest.hexdigest(), parameter_bytes=size)

    MixPrecLoader.load_weights = load_weights
    return noted


def _change_while_loading(damage: Kind, folder: Path) -> None:
    """Damage the files right before the loader opens the first, or after its third read."""
    from vllm_mixprec.checkpoint import stream

    change = functools.partial(damage.damage, random.Random(0), folder, 0)
    if damage.moment == "load":
        real_open, waiting = stream._open, [change]

        def changing_open(spec: Any) -> Any:
            while waiting:
                waiting.pop()()
            return real_open(spec)

        stream._open = changing_open
        return
    real_read, reads = os.preadv, iter(range(10**9))

    def changing_read(*arguments: Any) -> int:
        if next(reads) == 2:
            change()
        return real_read(*arguments)

    os.preadv = changing_read


# Judgement.


@contextlib.contextmanager
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
    """Note how the start ended; what check refused must be refused."""
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
    elif result["digest"] == sound["digest"]:
        case.outcome = "harmless"
    elif case.damage is None:
        case.outcome = "another plan" if _is_another_plan(folder) else "WRONG"
    elif case.reported:
        case.outcome, case.detail = "reported", str(case.reported)
    elif case.damage.untellable:
        case.outcome, case.detail = "untellable", case.damage.untellable
    else:
        case.outcome, case.detail = "WRONG", "served with other values and not a word"


def _is_another_plan(folder: Path) -> bool:
    from vllm_mixprec import Plan

    sound = Plan.from_yaml(folder.parent / "sound" / "plan.yaml")
    return Plan.from_yaml(folder / "plan.yaml").sha256 != sound.sha256


def run_checks(cases: list[Case], work: Path) -> None:
    from vllm_mixprec import cli  # noqa: F401  imported once, for every fork

    sound = run_forked(functools.partial(check_case, work / "sound"))
    if sound.get("code") != 0:
        raise SystemExit(f"corrupt.py: check refuses the sound model: {sound}")
    for case in cases:
        with written(case, work) as folder:
            change = None
            if case.damage is not None and case.damage.moment:
                if case.damage.moment != "check":
                    continue
                change = functools.partial(
                    case.damage.damage, random.Random(0), folder, case.number
                )
            judge_check(case, run_forked(functools.partial(check_case, folder, change)), sound)


def run_starts(cases: list[Case], work: Path) -> dict[str, Any]:
    """Start what passed, and a sample of what was refused; returns the sound model's start."""
    warm_vllm()
    sound = run_forked(functools.partial(start_case, work / "sound"))
    again = run_forked(functools.partial(start_case, work / "sound"))
    flipped = run_forked(functools.partial(start_case, work / "flipped"))
    if "digest" not in sound or sound["digest"] != again["digest"]:
        raise SystemExit(f"corrupt.py: the sound model does not load alike twice: {sound} {again}")
    if flipped.get("digest") in (None, sound["digest"]):
        raise SystemExit(f"corrupt.py: one bit flipped in a weight does not show: {flipped}")
    refused = [case for case in cases if case.outcome == "refused"]
    sample = {id(case) for case in refused[::_SAMPLE]}
    for case in cases:
        at_check = case.damage is not None and case.damage.moment == "check"
        if (case.outcome == "" and not at_check) or id(case) in sample and not at_check:
            with written(case, work) as folder:
                start = functools.partial(start_case, folder, case.damage)
                judge_start(case, run_forked(start), sound, folder)
        elif case.outcome == "":  # it changed under check, which read what did not matter any more
            case.outcome = "harmless" if "itself" in case.kind else "WRONG"
    return sound


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
    parser.add_argument("--quick", action="store_true", help="a few cases a kind, check only")
    parser.add_argument("--check-only", action="store_true", help="start nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="REGEX", help="kinds of such names")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    begun = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="mixprec-corrupt-"))
    try:
        write_sound(work)
        cases = make_cases(work, arguments.seed, arguments.quick)
        cases = [case for case in cases if re.search(arguments.only, case.kind)]
        run_checks(cases, work)
        if arguments.quick or arguments.check_only:
            cases = [case for case in cases if case.outcome]
        else:
            run_starts(cases, work)
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
