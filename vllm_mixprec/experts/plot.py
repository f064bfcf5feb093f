# SPDX-License-Identifier: Apache-2.0
"""Draws a snapshot: a heatmap of layers x experts, and how uneven each layer is.

Figures are made without pyplot, so that they need no display and leave its state alone.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_mixprec.experts.snapshot import (
    PLOT_SUFFIXES,
    ExpertSnapshot,
    SnapshotError,
    format_utc,
    write_atomically,
)

__all__ = ["draw", "save_figure"]

# viridis grows evenly in lightness, so colour-blind readers and grey prints keep the order; the
# light grey lies outside of it.
_COLOURS = "viridis"
_NEVER = "#e4e4e4"
_LINE, _MEAN, _UNIFORM = "#0072b2", "#d55e00", "#333333"  # Okabe and Ito's palette

_WIDTH_INCHES = 11.0
_ROW_INCHES = 0.13
_HEATMAP_INCHES = (2.2, 12.0)
_CURVE_INCHES = 3.2
_MOST_LABELS = 24
_DPI = 150
_WIDE_RANGE = 50  # busiest over idlest, from which a linear scale hides the idle experts


class _ExpertFigure(Figure):
    """A figure that a notebook shows though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        return _render(self, "png")


def draw(snapshot: ExpertSnapshot) -> Figure:
    """Return the figure of one snapshot; its draft's layers are ``draw(snapshot.draft)``."""
    rows_inches = len(snapshot.layers) * _ROW_INCHES
    heatmap_inches = float(np.clip(rows_inches, *_HEATMAP_INCHES))
    figure = _ExpertFigure(
        figsize=(_WIDTH_INCHES, heatmap_inches + _CURVE_INCHES + 1.0),
        dpi=_DPI,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    heatmap, curve = figure.subplots(2, 1, height_ratios=[heatmap_inches, _CURVE_INCHES])
    figure.suptitle(_title(snapshot), parse_math=False)
    _draw_heatmap(figure, heatmap, snapshot)
    _draw_sorted_load(curve, snapshot)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the file's suffix.

    Raises:
        SnapshotError: an unknown suffix, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in PLOT_SUFFIXES:
        raise SnapshotError(
            f"{os.fspath(path)}: suffix {suffix!r}, expected {', '.join(PLOT_SUFFIXES)}. "
            "Choose another name."
        )
    write_atomically(path, _render(figure, suffix.removeprefix(".")))


def _render(figure: Figure, file_format: str) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=file_format, dpi=_DPI)
    return stream.getvalue()


def _title(snapshot: ExpertSnapshot) -> str:
    return (
        f"{snapshot.model}: {snapshot.tokens:,} tokens, {snapshot.experts_per_token} of "
        f"{snapshot.num_experts} experts each\n"
        f"{format_utc(snapshot.started_s)} to {format_utc(snapshot.ended_s)}"
    )


def _draw_heatmap(figure: Figure, axes: Axes, snapshot: ExpertSnapshot) -> None:
    counts = snapshot.counts
    chosen = counts[counts > 0]
    busiest = int(counts.max())
    wide = chosen.size > 0 and busiest > _WIDE_RANGE * int(chosen.min())
    norm = LogNorm(int(chosen.min()), busiest) if wide else Normalize(0, max(busiest, 1))
    image = axes.imshow(
        np.where(counts > 0, counts, np.nan),
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps[_COLOURS].with_extremes(bad=_NEVER),
        norm=norm,
    )
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=_MOST_LABELS, integer=True, steps=[1, 2, 4, 8]))
    step = -(-len(snapshot.layers) // _MOST_LABELS)
    shown = range(0, len(snapshot.layers), step)
    axes.set_yticks(list(shown), [snapshot.layers[row] for row in shown], parse_math=False)
    label = "activations (log)" if wide else "activations"
    if chosen.size < counts.size:
        label += "; grey: none"
    figure.colorbar(image, ax=axes, label=label, pad=0.01)
    if not chosen.size:
        axes.text(0.5, 0.5, "no activations in this window", ha="center", transform=axes.transAxes)


def _draw_sorted_load(axes: Axes, snapshot: ExpertSnapshot) -> None:
    experts = snapshot.num_experts
    ranks = np.arange(1, experts + 1)
    working = snapshot.layer_totals > 0
    over_mean = -np.sort(-snapshot.shares[working] * experts, axis=1)
    for index, layer in enumerate(over_mean):
        label = "one layer" if index == 0 else None
        axes.plot(ranks, layer, color=_LINE, linewidth=0.7, alpha=0.5, label=label)
    if len(over_mean):
        axes.plot(ranks, over_mean.mean(axis=0), color=_MEAN, linewidth=2.5, label="mean of layers")
    axes.axhline(1.0, color=_UNIFORM, linewidth=1.2, linestyle="--", label="all experts alike")
    axes.set_xlim(1, max(experts, 2))
    axes.set_ylim(0, 1.05 * max(float(over_mean.max(initial=0.0)), 1.2))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=_MOST_LABELS, integer=True))
    axes.set_xlabel("experts of a layer, busiest first")
    axes.set_ylabel("load over the layer's mean")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
