# SPDX-License-Identifier: Apache-2.0
"""ExpertSnapshot: how often each routed expert was chosen in a window of time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from vllm_mixprec.errors import MixPrecError
from vllm_mixprec.experts import tables
from vllm_mixprec.experts.snapshot_file import (
    FORMAT,
    MAX_FILE_BYTES,
    MAX_LAYERS,
    REMEDY,
    VERSION,
    SnapshotError,
    check_counts,
    check_keys,
    check_label,
    check_last_activation,
    check_layers,
    check_matrix,
    parse_counts,
    parse_times,
    read_file,
    refuse,
    refuse_constant,
    show,
    to_int,
    to_seconds,
    write_atomically,
)
from vllm_mixprec.experts.tables import COLUMNS, format_utc

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "COLUMNS",
    "FORMAT",
    "MAX_FILE_BYTES",
    "PLOT_SUFFIXES",
    "VERSION",
    "ExpertLoad",
    "ExpertSnapshot",
    "SnapshotError",
    "format_utc",
    "write_atomically",
]

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

# How far the begin of one window may wander between two polls; a reset moves it further.
_WINDOW_TOLERANCE_S = 1.0


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One expert's part of its layer's work.

    ``share`` is of the layer's activations, 0 to 1. ``last_activation_s`` is a unix time, None
    when the expert never ran or when times are not known.
    """

    layer: str
    expert: int
    count: int
    share: float
    last_activation_s: float | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ExpertSnapshot:
    """How often each routed expert was chosen between ``started_s`` and ``seconds`` later.

    Ids are the model's logical ones. For every layer the counts sum to ``tokens`` x
    ``experts_per_token``. The arrays are copied and made read-only.

    Raises:
        SnapshotError: a field has the wrong type, shape or range; the message names it.
    """

    model: str
    """Name under which the model is served."""
    layers: tuple[str, ...]
    """Label of each MoE layer, ``"0"``, ``"1"``; of a draft whose ids collide, ``"draft.0"``."""
    experts_per_token: int
    counts: NDArray[np.int64]
    """[layers, experts] activations."""
    tokens: int
    """Tokens that were routed: rows of real tokens forwarded."""
    requests: int
    """Engine requests that began to run in the window; each parallel sample is one."""
    started_s: float
    """Unix time at which the window begins."""
    seconds: float
    """Length of the window."""
    last_activation_s: NDArray[np.float64] | None = None
    """[layers, experts] unix time to about a second, NaN = never in the engine's life."""
    draft: ExpertSnapshot | None = None
    """MoE layers of a speculative draft (MTP), counted apart."""

    def __post_init__(self) -> None:
        check_label("model", self.model)
        check_layers(self.layers)
        for field, least in (("experts_per_token", 1), ("tokens", 0), ("requests", 0)):
            object.__setattr__(self, field, to_int(field, getattr(self, field), least))
        for field in ("started_s", "seconds"):
            object.__setattr__(self, field, to_seconds(field, getattr(self, field)))
        check_counts(self.counts, len(self.layers))
        object.__setattr__(self, "counts", _frozen(self.counts))
        if self.last_activation_s is not None:
            check_last_activation(self.last_activation_s, self.counts.shape)
            object.__setattr__(self, "last_activation_s", _frozen(self.last_activation_s))
        if self.draft is not None and self.draft.draft is not None:
            refuse("draft", "a draft of a draft", "one level")

    # Numbers

    @property
    def num_experts(self) -> int:
        """Routed experts of each layer."""
        return len(self.counts[0])

    @property
    def ended_s(self) -> float:
        """Unix time at which the window ends."""
        return self.started_s + self.seconds

    @property
    def activations(self) -> int:
        """All activations of all layers, without the draft's."""
        return sum(self.layer_totals.tolist())

    @property
    def layer_totals(self) -> NDArray[np.int64]:
        """[layers] activations of each layer."""
        return cast("NDArray[np.int64]", self.counts.sum(axis=1, dtype=np.int64))

    @property
    def shares(self) -> NDArray[np.float64]:
        """[layers, experts] part of the layer's activations; 0 in a layer without any."""
        totals = np.maximum(self.layer_totals, 1)[:, None]
        return cast("NDArray[np.float64]", self.counts / totals)

    @property
    def jain_fairness(self) -> NDArray[np.float64]:
        """[layers] Jain's index, 1 = all experts alike, 1/experts = one does it all.

        NaN for a layer without activations. Jain, Chiu, Hawe, "A Quantitative Measure of
        Fairness", DEC-TR-301, 1984.
        """
        shares = self.shares  # of the sum, so that no square leaves the range
        squares = self.num_experts * np.square(shares).sum(axis=1)
        return _divide(np.square(shares.sum(axis=1)), squares)

    @property
    def imbalance(self) -> NDArray[np.float64]:
        """[layers] busiest expert over the mean, at least 1; NaN without activations."""
        return _divide(self.counts.max(axis=1) * float(self.num_experts), self.layer_totals)

    @property
    def active_experts(self) -> NDArray[np.int64]:
        """[layers] experts with at least one activation in the window."""
        return cast("NDArray[np.int64]", np.count_nonzero(self.counts, axis=1))

    def busiest(self, k: int = 10) -> list[ExpertLoad]:
        """Return the ``k`` experts with the most activations, ties in the model's order."""
        return self._loads(np.argsort(-self.counts, axis=None, kind="stable"), k)

    def idlest(self, k: int = 10) -> list[ExpertLoad]:
        """Return the ``k`` experts with the fewest activations, ties in the model's order."""
        return self._loads(np.argsort(self.counts, axis=None, kind="stable"), k)

    def loads(self) -> list[ExpertLoad]:
        """Return every expert in the model's order."""
        return self._loads(np.arange(self.counts.size), self.counts.size)

    def _loads(self, order: NDArray[np.intp], k: int) -> list[ExpertLoad]:
        if k < 0:
            raise ValueError(f"k is {k}, expected 0 or more")
        chosen = order[:k]
        rows, experts = np.unravel_index(chosen, self.counts.shape)
        counts = self.counts.ravel()[chosen].tolist()
        shares = self.shares.ravel()[chosen].tolist()
        times: list[float | None] = [None] * len(counts)
        if self.last_activation_s is not None:
            times = _nan_to_none(self.last_activation_s.ravel()[chosen].tolist())
        return [
            ExpertLoad(self.layers[row], expert, count, share, time)
            for row, expert, count, share, time in zip(
                rows.tolist(), experts.tolist(), counts, shares, times, strict=True
            )
        ]

    # Combining

    def __sub__(self, earlier: ExpertSnapshot) -> ExpertSnapshot:
        """Return what happened after ``earlier``, a snapshot of the same window.

        Raises:
            SnapshotError: another model; ``earlier`` is the later one; or the engine restarted
                or was reset in between.
        """
        if not isinstance(earlier, ExpertSnapshot):
            return NotImplemented
        self._require_same_model(earlier, "subtract")
        if (self.draft is None) != (earlier.draft is None):
            raise SnapshotError(
                "cannot subtract snapshots: one has a draft model and the other none; expected "
                "two of one engine. Take both from the same engine."
            )
        self._require_later_than(earlier)
        return replace(
            self,
            counts=self.counts - earlier.counts,
            tokens=self.tokens - earlier.tokens,
            requests=self.requests - earlier.requests,
            started_s=earlier.ended_s,
            seconds=max(self.ended_s - earlier.ended_s, 0.0),
            draft=None
            if self.draft is None or earlier.draft is None
            else self.draft - earlier.draft,
        )

    def __add__(self, other: ExpertSnapshot) -> ExpertSnapshot:
        """Merge with the snapshot of another machine or engine that serves the same model.

        The window is the span from the first begin to the last end.

        Raises:
            SnapshotError: another model or another shape.
        """
        if not isinstance(other, ExpertSnapshot):
            return NotImplemented
        self._require_same_model(other, "merge")
        if self.draft is not None and other.draft is not None:
            draft: ExpertSnapshot | None = self.draft + other.draft
        else:
            draft = self.draft or other.draft
        started_s = min(self.started_s, other.started_s)
        return replace(
            self,
            # Two counts below 2^63 wrap to a negative one, which is refused.
            counts=self.counts + other.counts,
            tokens=self.tokens + other.tokens,
            requests=self.requests + other.requests,
            started_s=started_s,
            seconds=max(self.ended_s, other.ended_s) - started_s,
            last_activation_s=_later(self.last_activation_s, other.last_activation_s),
            draft=draft,
        )

    def _require_same_model(self, other: ExpertSnapshot, verb: str) -> None:
        for what, mine, theirs in (
            ("model", self.model, other.model),
            ("layers", _shorten(self.layers), _shorten(other.layers)),
            ("layers", self.layers, other.layers),
            ("experts per layer", self.num_experts, other.num_experts),
            ("experts per token", self.experts_per_token, other.experts_per_token),
        ):
            if mine != theirs:
                raise SnapshotError(
                    f"cannot {verb} snapshots: {what} {mine!r} and {theirs!r}; expected the same "
                    "in both. Take both from servers of one model."
                )

    def _require_later_than(self, earlier: ExpertSnapshot) -> None:
        if abs(self.started_s - earlier.started_s) > _WINDOW_TOLERANCE_S:
            raise SnapshotError(
                f"cannot subtract snapshots: their windows begin at {format_utc(self.started_s)} "
                f"and {format_utc(earlier.started_s)}; expected one begin. The engine restarted "
                "or its statistics were reset in between: take both after that."
            )
        backwards = (
            bool((self.counts < earlier.counts).any())
            or self.tokens < earlier.tokens
            or self.requests < earlier.requests
            or self.ended_s < earlier.ended_s - _WINDOW_TOLERANCE_S
        )
        if backwards:
            raise SnapshotError(
                f"cannot subtract snapshots: the one subtracted, to {format_utc(earlier.ended_s)}, "
                f"counts more than the other, to {format_utc(self.ended_s)}; expected the earlier "
                "one. Swap them; if they are in order, the engine restarted in between."
            )

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; counts stay exact integers, an expert that never ran has null."""
        return {"format": FORMAT, "version": VERSION, **self._fields()}

    def _fields(self) -> dict[str, Any]:
        times = self.last_activation_s
        return {
            "model": self.model,
            "experts_per_token": self.experts_per_token,
            "tokens": self.tokens,
            "requests": self.requests,
            "started_s": self.started_s,
            "seconds": self.seconds,
            "layers": list(self.layers),
            "counts": self.counts.tolist(),
            "last_activation_s": None if times is None else [_nan_to_none(r) for r in times],
            "draft": None if self.draft is None else self.draft._fields(),
        }

    @classmethod
    def from_dict(cls, content: Any) -> ExpertSnapshot:
        """Read what ``to_dict`` gave; nothing about ``content`` is taken on trust.

        Raises:
            SnapshotError: it is no snapshot, of an unknown version, too large or malformed.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, Mapping) else content
            refuse("format", show(found), f"{FORMAT!r}")
        if type(content.get("version")) is not int or content["version"] != VERSION:
            raise SnapshotError(
                f"version: found {show(content.get('version'))}, expected {VERSION}. "
                "Use the release of vllm-mixprec that wrote it, or a newer one."
            )
        fields = {key: value for key, value in content.items() if key not in ("format", "version")}
        return cls._from_fields(fields, "")

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any], prefix: str) -> ExpertSnapshot:
        check_keys(fields, prefix, cls.__dataclass_fields__)
        layers = fields["layers"]
        if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
            refuse(f"{prefix}layers", show(layers), f"a list of 1 to {MAX_LAYERS} labels")
        shape = check_matrix(f"{prefix}counts", fields["counts"], len(layers), None)
        times, draft = fields["last_activation_s"], fields["draft"]
        if times is not None:
            check_matrix(f"{prefix}last_activation_s", times, *shape)
        if draft is not None and (prefix or not isinstance(draft, Mapping)):
            refuse(f"{prefix}draft", show(draft), "an object, or null" if not prefix else "null")
        parsed_draft = None if draft is None else cls._from_fields(draft, "draft.")
        try:
            return cls(
                model=fields["model"],
                layers=tuple(layers),
                experts_per_token=fields["experts_per_token"],
                counts=parse_counts(fields["counts"]),
                tokens=fields["tokens"],
                requests=fields["requests"],
                started_s=fields["started_s"],
                seconds=fields["seconds"],
                last_activation_s=None if times is None else parse_times(times),
                draft=parsed_draft,
            )
        except SnapshotError as error:
            raise SnapshotError(f"{prefix}{error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the snapshot as JSON, all of it or nothing.

        Raises:
            SnapshotError: the file cannot be written.
        """
        write_atomically(path, json.dumps(self.to_dict(), separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertSnapshot:
        """Read a file that ``save`` wrote, or the server's export in the format ``snapshot``.

        Raises:
            SnapshotError: the file cannot be read, or is not a well-formed snapshot.
        """
        content = read_file(Path(path))
        try:
            return cls.from_json(content)
        except SnapshotError as error:
            raise SnapshotError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_json(cls, content: bytes | str) -> ExpertSnapshot:
        """Read the text of a snapshot.

        Raises:
            SnapshotError: it is not JSON, or not a well-formed snapshot.
        """
        if len(content) > MAX_FILE_BYTES:
            refuse("size", f"over {MAX_FILE_BYTES} bytes", f"up to {MAX_FILE_BYTES}")
        try:
            parsed = json.loads(content, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            # RecursionError: thousands of opening brackets, which no snapshot has.
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise SnapshotError(
                f"not JSON ({reason}), expected a snapshot; tables and pictures cannot be read "
                f"back. {REMEDY}"
            ) from None
        return cls.from_dict(parsed)

    # Tables and pictures

    def to_pandas(self) -> pd.DataFrame:
        """Return one row an expert: layer, expert, count, share, last_activation (UTC, NaT).

        A draft's layers are in ``snapshot.draft.to_pandas()``.

        Raises:
            MixPrecError: pandas is not installed.
        """
        return tables.to_pandas(self)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the rows of ``to_pandas`` as CSV, and write them to ``path`` if one is given.

        ``last_activation`` is ISO 8601 in UTC, empty for an expert that never ran.

        Raises:
            SnapshotError: the file cannot be written.
        """
        text = tables.to_csv(self)
        if path is not None:
            write_atomically(path, text)
        return text

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw a heatmap of layers x experts and the sorted load; save it if ``path`` is given.

        A notebook shows the figure that is returned. No global state of pyplot is touched.

        Raises:
            MixPrecError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            # here, because matplotlib is an extra and takes a second to import
            from vllm_mixprec.experts.plot import draw, save_figure
        except ImportError as error:
            raise MixPrecError(
                f"plot: {error}; expected matplotlib. pip install 'vllm-mixprec[notebook]'"
            ) from None
        figure = draw(self)
        if path is not None:
            save_figure(figure, path)
        return figure

    def __repr__(self) -> str:
        return (
            f"<ExpertSnapshot {self.model}: {len(self.layers)} layers x {self.num_experts} "
            f"experts, {self.tokens} tokens in {self.seconds:.1f} s"
            f"{'' if self.draft is None else ', with a draft'}>"
        )

    def _repr_html_(self) -> str:
        """Return a short table, for notebooks."""
        return tables.to_html(self)


def _shorten(layers: tuple[str, ...]) -> str:
    return f"{len(layers)} ({layers[0]} to {layers[-1]})"


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array = np.array(array, order="C")
    array.flags.writeable = False
    return array


def _divide(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """Divide, with NaN where the denominator is 0."""
    safe = np.where(denominator == 0, np.nan, denominator)
    return cast("NDArray[np.float64]", numerator / safe)


def _later(
    left: NDArray[np.float64] | None, right: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    """Return the later of two times, elementwise; NaN only where both are."""
    if left is None or right is None:
        return right if left is None else left
    return cast("NDArray[np.float64]", np.fmax(left, right))


def _nan_to_none(times: Any) -> list[float | None]:
    return [None if time != time else float(time) for time in times]
