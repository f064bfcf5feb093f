# SPDX-License-Identifier: Apache-2.0
"""Write the results of scripts/gpu_suite.sh into docs/gpu.md, between its two markers.

    python scripts/gpu_report.py [--results runs/gpu] [--out docs/gpu.md]

Only what the JSON files hold: a step that was not run, or not finished, is said to be so.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_results import ROOT

BEGIN = "<!-- results of scripts/gpu_suite.sh: begin -->"
END = "<!-- results of scripts/gpu_suite.sh: end -->"
STEPS = ("device", "tests", "kernels", "decode", "counters", "memory")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def device(data: dict[str, Any]) -> str:
    case, key = data["cases"]["device"], data["key"]
    smi = case["nvidia_smi"]
    low, high = case["copy_gb_s_range"]
    versions = ", ".join(f"{n} {v}" for n, v in key["versions"].items() if v)
    return (
        f"{key['device']}, compute capability {key['capability'] / 10}, "
        f"{case['multiprocessors']} multiprocessors, {case['memory_bytes'] / 2**30:.0f} GiB, "
        f"L2 {case['l2_bytes'] / 2**20:.0f} MiB, driver {smi.get('driver_version', 'unknown')}. "
        f"Python {case['python']}, CUDA {case['cuda']}, {versions}; commit "
        f"{case['commit'] or 'unknown'}, code {key['code']}.\n\n"
        f"Copies from device to device: {case['copy_gb_s']:.0f} GB/s ({low:.0f} to {high:.0f}), "
        "bytes read and written."
    )


def tests(data: dict[str, Any]) -> str:
    rows, failed = [], []
    for name, case in data["cases"].items():
        bad = case["failures"] + case["errors"]
        passed = case["tests"] - bad - case["skipped"]
        rows.append([name, str(passed), str(bad), str(case["skipped"])])
        failed += [f"- {name}: {line.splitlines()[0][:200]}" for line in case["failed"]]
    lines = table(["file", "passed", "failed", "skipped"], rows)
    return "\n\n".join([lines, "\n".join(failed)]).strip()


def kernels(data: dict[str, Any]) -> str:
    parts = []
    shapes = dict.fromkeys(name.split(" | ")[0] for name in data["cases"])
    for shape in shapes:
        rows = []
        for name, case in data["cases"].items():
            its_shape, mix, batch = name.split(" | ")
            if its_shape != shape:
                continue
            for path, values in case["paths"].items():
                if "median_us" not in values:
                    rows.append([mix, batch, path, values["problem"][:80], "", "", ""])
                    continue
                ratio = data.get("ratios", {}).get(name, {}).get(path)
                low, high = min(values["us"]), max(values["us"])
                rows.append(
                    [
                        mix,
                        batch,
                        path,
                        f"{values['median_us']:.1f} ({low:.1f} to {high:.1f})",
                        f"{case['bytes'] / 1e6:.1f}",
                        f"{values['of_copy']:.2f}",
                        "" if ratio is None else f"{ratio:.2f}",
                    ]
                )
        head = ["experts", "batch", "path", "us", "MB touched", "of copy", "expected over measured"]
        parts.append(f"{shape}:\n\n{table(head, rows)}")
    parts.append(
        '"Of copy": bytes touched over time, over the copies\' bandwidth. "Expected": the single '
        'formats\' "groups", stock kernels alone where vLLM is, weighed by their share of experts.'
    )
    better = json.dumps(data["better"], indent=1)
    parts.append(f"The better path, by layer, mix and batch:\n\n```json\n{better}\n```")
    parts.append(
        "Mixes that one launch serves faster at batch 1 to 64 on every layer: "
        f"`{json.dumps(data['one_launch'])}`, on compute capability "
        f"{data['key']['capability'] / 10}."
    )
    return "\n\n".join(parts)


def decode(data: dict[str, Any]) -> str:
    rows = []
    for name, case in data["cases"].items():
        batches = [key for key in case if key.isdecimal()]
        for batch in sorted(batches, key=int):
            ms = {what: statistics.median(values) for what, values in case[batch].items()}
            ratio = data.get("ratios", {}).get(name, {})
            cells = [f"{1e3 * int(batch) / ms['decode_ms']:.0f}", f"{ms['decode_ms']:.2f}"]
            cells += [f"{ms['prefill_ms']:.1f}"]
            cells += [
                f"{ratio[f'{what} {batch}']:.2f}" if f"{what} {batch}" in ratio else ""
                for what in ("decode", "prefill")
            ]
            rows.append([name, batch, *cells])
        if not case["ok"]:
            rows.append([name, "", "failed", "", "", "", ""])
    head = ["served", "batch", "decode, tokens/s", "ms a step", "prefill, ms"]
    return table([*head, "decode, expected over measured", "prefill, the same"], rows)


def counters(data: dict[str, Any]) -> str:
    rows = []
    for name, values in data["cases"].get("counters", {}).items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        rows.append([name, f"{middle:.4f}", f"{low:.4f} to {high:.4f}"])
    return table(["with counters over without", "median", "quartiles"], rows) + "\n\nAim: 0.995."


def memory(data: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{case['check_bytes'] / 1e9:.3f}",
            f"{case['memory']['loaded_bytes'] / 1e9:.3f}",
            f"{case['over_check']:.4f}",
        ]
        for name, case in data["cases"].items()
        if "over_check" in case
    ]
    return table(["served", "check, GB", "loaded, GB", "ratio"], rows) + "\n\nAim: within 2 %."


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "device": ("Device", device),
    "tests": ("Tests", tests),
    "kernels": ("Experts of one layer", kernels),
    "decode": ("Decode and prefill", decode),
    "counters": ("Expert statistics", counters),
    "memory": ("Memory", memory),
}


def write(results: Path, command: str) -> str:
    """The section between the markers."""
    parts = [f"From `{command.strip()}`."]
    codes = set()
    for step, (heading, describe) in SECTIONS.items():
        parts.append(f"### {heading}")
        file = results / f"{step}.json"
        if not file.exists():
            parts.append("Not run.")
            continue
        data = json.loads(file.read_text())
        codes.add(json.dumps([data["key"]["code"], data["key"]["device"]]))
        if not data["complete"]:
            parts.append("Not finished, or not passed:")
        try:
            parts.append(describe(data))
        except (KeyError, IndexError) as missing:
            parts.append(f"No table: {missing} is missing from {file.name}.")
        if data["key"]["quick"]:
            parts.append("With --quick.")
    if len(codes) > 1:
        parts.insert(1, "The steps are of several states of the code or devices.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--command", default="scripts/gpu_suite.sh")
    options = parser.parse_args()
    if not any((options.results / f"{step}.json").exists() for step in STEPS):
        raise SystemExit(f"{options.results} holds no step's JSON; {options.out} is left as it is")
    page = options.out.read_text()
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"{options.out}: expected the lines {BEGIN} and {END}; put them back")
    section = write(options.results, options.command)
    options.out.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}")
    print(f"Written to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
