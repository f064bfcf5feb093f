# SPDX-License-Identifier: Apache-2.0
"""Turns snapshots into the JSON that the routes answer with."""

import json
import math
import re
from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import Any

from vllm_mixprec.experts.describe import describe, summarize
from vllm_mixprec.experts.snapshot import ExpertSnapshot, format_utc
from vllm_mixprec.serving.requests import Detail


def merge_engines(engines: Mapping[int, ExpertSnapshot]) -> ExpertSnapshot:
    """Add up what data-parallel engines counted."""
    return reduce(add, (engines[engine] for engine in sorted(engines)))


def describe_stats(
    engines: Mapping[int, ExpertSnapshot], *, top_k: int, detail: Detail, uptime_s: float
) -> dict[str, Any]:
    """Describe a window as JSON types: in all, by layer, by expert, and by engine."""
    merged = merge_engines(engines)
    report = describe(merged, top_k)
    for part, snapshot in ((report, merged), (report["draft"], merged.draft)):
        if snapshot is None:
            continue
        part["summary"]["uptime_s"] = round(uptime_s, 3)
        for row, layer in enumerate(part["layers"]):
            layer |= _describe_experts(snapshot, row, detail)
    totals = ("activations", "tokens", "requests", "window")
    report["engines"] = []
    for engine, snapshot in sorted(engines.items()):
        summary = summarize(snapshot)
        report["engines"].append({"engine": engine} | {name: summary[name] for name in totals})
    return report


def _describe_experts(snapshot: ExpertSnapshot, row: int, detail: Detail) -> dict[str, Any]:
    """Describe the experts of one layer, to be put beside what is said of the layer."""
    if detail == "none":
        return {}
    counts = snapshot.counts[row].tolist()
    times: list[float | None] = [None] * len(counts)
    if snapshot.last_activation_s is not None:
        known = snapshot.last_activation_s[row].tolist()
        times = [time if math.isfinite(time) else None for time in known]
    if detail == "counts":
        seconds = [None if time is None else round(time) for time in times]
        return {"counts": counts, "last_activation_s": seconds}
    total = max(sum(counts), 1)
    return {
        "detail": [
            {
                "expert": expert,
                "count": count,
                "share": round(count / total, 6),
                "last_activation": None if time is None else format_utc(time),
            }
            for expert, (count, time) in enumerate(zip(counts, times, strict=True))
        ]
    }


def encode(content: Any) -> bytes:
    """Encode JSON types, a layer at a time.

    ``json.dumps`` holds the interpreter's lock from begin to end, so one call for the megabyte of
    60 layers x 256 experts would keep the event loop from sending tokens for its 20 ms.
    """
    return _encode(content).encode()


def _encode(content: Any) -> str:
    if isinstance(content, dict):
        fields = (f"{json.dumps(key)}:{_encode(value)}" for key, value in content.items())
        return "{" + ",".join(fields) + "}"
    if isinstance(content, list) and content and isinstance(content[0], dict | list):
        return "[" + ",".join(_dump(item) for item in content) + "]"
    return _dump(content)


def _dump(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def name_export(snapshot: ExpertSnapshot, suffix: str) -> str:
    """Return a file name for a download: the model, and when the window ended."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", snapshot.model).strip("-.")[-80:] or "model"
    moment = format_utc(snapshot.ended_s).replace(":", "")
    return f"expert-stats-{model}-{moment}.{suffix}"
