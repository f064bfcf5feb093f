# SPDX-License-Identifier: Apache-2.0
"""Plans over the fixtures' real checkpoints, and ways to damage copies of them."""

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Finding, Platform, Report

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
SOURCES = ("bf16", "fp8", "gptq", "gptq-asym")
ARCHITECTURES = Path(__file__).parents[1] / "fixtures" / "architectures"
OF_ARCHITECTURES = ("bf16", "fp8", "int4")
"""Sources of each folder in ARCHITECTURES, and of the demo model."""
CPU = Platform("cpu-avx512")

Tensor = tuple[str, list[int], bytes]


def copy_models(folder: Path) -> Path:
    """Copy every fixture into a folder, to damage at will."""
    for name in SOURCES:
        shutil.copytree(FIXTURES / name, folder / name)
    return folder


def make_plan(
    *rules: tuple[str, str],
    base: str = "bf16",
    folder: Path = FIXTURES,
    sources: Sequence[str] = SOURCES,
    **options: str,
) -> Plan:
    """Build a plan over the fixtures, or over another folder with such ``sources``."""
    return Plan.from_dict(
        {
            "version": 1,
            "base": base,
            "sources": {name: {"path": name} for name in sources},
            "rules": [{"match": match, "source": source} for match, source in rules],
            "options": options,
        },
        base_dir=folder,
    )


def edit_tensors(file: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite a safetensors file after ``edit`` changed its name -> (dtype, shape, data)."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    body = raw[8 + length :]
    tensors = {
        name: (spec["dtype"], spec["shape"], body[slice(*spec["data_offsets"])])
        for name, spec in header.items()
    }
    edit(tensors)
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        span = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(file.read_text())
    content |= changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def only(report: Report, code: str) -> Finding:
    """Return the one finding of a code, and fail when there are none or several."""
    found = [finding for finding in report.findings if finding.code == code]
    assert len(found) == 1, report.findings
    return found[0]
