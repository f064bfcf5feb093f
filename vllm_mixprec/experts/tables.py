# SPDX-License-Identifier: Apache-2.0
"""A snapshot as tables: pandas, CSV, and the few lines that a notebook shows."""

from __future__ import annotations

import csv
import html
import io
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np

from vllm_mixprec.errors import MixPrecError

if TYPE_CHECKING:
    import pandas as pd

    from vllm_mixprec.experts.snapshot import ExpertSnapshot

COLUMNS = ("layer", "expert", "count", "share", "last_activation")


def to_pandas(snapshot: ExpertSnapshot) -> pd.DataFrame:
    """Return one row an expert, as :meth:`ExpertSnapshot.to_pandas` says."""
    try:
        import pandas as pd  # here, because reading a snapshot must not need it
    except ImportError as error:
        raise MixPrecError(
            f"to_pandas: {error}; expected pandas. pip install 'vllm-mixprec[notebook]'"
        ) from None
    # Milliseconds, because nanoseconds in 64 bits end in the year 2262.
    times = np.full(snapshot.counts.size, "NaT", dtype="datetime64[ms]")
    if snapshot.last_activation_s is not None:
        known = ~np.isnan(snapshot.last_activation_s.ravel())
        milliseconds = np.rint(snapshot.last_activation_s.ravel()[known] * 1000)
        times[known] = milliseconds.astype(np.int64).astype("datetime64[ms]")
    return pd.DataFrame(
        {
            "layer": np.repeat(np.array(snapshot.layers, dtype=object), snapshot.num_experts),
            "expert": np.tile(np.arange(snapshot.num_experts), len(snapshot.layers)),
            "count": snapshot.counts.ravel(),
            "share": snapshot.shares.ravel(),
            "last_activation": pd.to_datetime(times, utc=True),
        }
    )


def to_csv(snapshot: ExpertSnapshot) -> str:
    """Return the rows of :func:`to_pandas` as CSV, times in ISO 8601, empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for load in snapshot.loads():
        when = "" if load.last_activation_s is None else format_utc(load.last_activation_s)
        writer.writerow((load.layer, load.expert, load.count, load.share, when))
    return stream.getvalue()


def to_html(snapshot: ExpertSnapshot) -> str:
    """Return a short table."""
    worst = "none yet"
    if snapshot.activations:
        row = int(np.nanargmax(snapshot.imbalance))
        worst = f"{snapshot.imbalance[row]:.2f} in layer {snapshot.layers[row]}"
    rows = {
        "model": snapshot.model,
        "layers x experts": f"{len(snapshot.layers)} x {snapshot.num_experts}, "
        f"{snapshot.experts_per_token} a token",
        "tokens, requests": f"{snapshot.tokens:,}, {snapshot.requests:,}",
        "window": f"{snapshot.seconds:.1f} s from {format_utc(snapshot.started_s)}",
        "experts active": f"{int(snapshot.active_experts.sum())} of {snapshot.counts.size}",
        "busiest over mean, at most": worst,
        "busiest, layer/expert": ", ".join(
            f"{load.layer}/{load.expert} ({load.share:.1%})"
            for load in snapshot.busiest(5)
            if load.count
        )
        or "none yet",
    }
    if snapshot.draft is not None:
        rows["draft"] = f"{len(snapshot.draft.layers)} layers, {snapshot.draft.tokens:,} tokens"
    cells = (
        f"<tr><th style='text-align:left'>{html.escape(key)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for key, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def format_utc(time_s: float) -> str:
    """Spell a unix time in ISO 8601, to the second, in UTC: ``2026-01-31T12:00:00Z``."""
    moment = datetime.fromtimestamp(time_s, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
