# SPDX-License-Identifier: Apache-2.0
"""How far a source's weight lies from the base's, and whether its format explains that.

A quantiser may move a weight away from the nearest code, to make up for the errors of others; so
the bound is no single weight's. It is on the root mean square of the difference, in units of what
rounding to the nearest would make with the scales that are stored: 1 for such rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

# Exports that round to nearest came to 0.99 to 1.16 roundings, 1.3 in the worst tile. GPTQ's own
# algorithm, on trained experts and inputs of very unlike and correlated channels, came to 3.1, and
# 8.1 in the worst group of 32; unrelated weights are 13 away in int4, a scale's wrong sign 18.
Side = Literal["rows", "columns"]

TOLERATED = 6.0
"""Roundings of a whole weight that count as the format's own."""

TOLERATED_TILE = 16.0
"""So of the weights that share one scale, of which there are few."""

UNRELATED = 1.2
"""Difference over the weight that no format explains; unrelated weights differ by 1.4, and 2 bits
by up to 1."""

# A factor of a whole weight. Rounding shrinks a weight by its own share at most; auto-round and
# GPTQ, which choose scales, stay within a few percent.
_LEAST_GAIN, _MOST_GAIN = 0.8, 1.25

_FOLD_FROM = 1.5  # roundings from which a look for folded factors is worth it
_FOLD_EXPLAINS = 0.8  # of the squared difference, what factors must leave at most
_FOLD_NEEDS = 1.2  # times what factors of both sides leave, from which one side's do not do
_VARYING = 0.02  # of factors, from which they are not all alike
_LEAST_SIDE = 16  # of a matrix whose rows and columns are many enough to tell factors from chance
_SAMPLES = 224  # of two bytes, so that Python's own allocator keeps them


@dataclass
class Comparison:
    """Sums over the weights w of the base and w' of a source, and over what rounding explains.

    What it keeps of each range of rows lies in tensors that were made before the first: small ones
    between the large ones that come and go would break the heap into pieces, and it would grow.
    """

    rows: int
    columns: int
    rows_done: int = 0
    error2: float = 0.0
    base2: float = 0.0
    source2: float = 0.0
    rounding2: float = 0.0
    tiles: int = 0
    wrong_tiles: int = 0
    column_products: torch.Tensor = field(init=False)
    column_base2: torch.Tensor = field(init=False)
    row_products: torch.Tensor = field(init=False)
    row_base2: torch.Tensor = field(init=False)
    base_sample: bytes | None = None
    source_sample: bytes | None = None
    noise2: float = 0.0
    """Mean square of the relative error of factors that the source's weight was multiplied by."""

    def __post_init__(self) -> None:
        self.column_products = torch.zeros(self.columns, dtype=torch.float64)
        self.column_base2 = torch.zeros(self.columns, dtype=torch.float64)
        self.row_products = torch.zeros(self.rows, dtype=torch.float64)
        self.row_base2 = torch.zeros(self.rows, dtype=torch.float64)

    def add(
        self,
        source: torch.Tensor,
        base: torch.Tensor,
        rounding2: float,
        tile_errors: torch.Tensor | None = None,
    ) -> None:
        """Add some rows.

        Args:
            source, base: float32 (rows, K).
            rounding2: sum of the squared errors that rounding to the nearest makes in both.
            tile_errors: for each tile, the mean square of the difference in units of its rounding.
        """
        products, squares = source * base, base.square()
        self.error2 += float((source - base).square().sum(dtype=torch.float64))
        self.base2 += float(squares.sum(dtype=torch.float64))
        self.source2 += float(source.square().sum(dtype=torch.float64))
        self.rounding2 += rounding2 + self.noise2 * float(squares.sum(dtype=torch.float64))
        self.column_products += products.sum(0, dtype=torch.float64)
        self.column_base2 += squares.sum(0, dtype=torch.float64)
        done = slice(self.rows_done, self.rows_done + len(base))
        self.rows_done = done.stop
        self.row_products[done] = products.sum(1, dtype=torch.float64)
        self.row_base2[done] = squares.sum(1, dtype=torch.float64)
        if tile_errors is not None:
            self.tiles += tile_errors.numel()
            self.wrong_tiles += int((tile_errors > TOLERATED_TILE**2).sum())
        if self.base_sample is None:
            self.base_sample, self.source_sample = _sample(base), _sample(source)

    @property
    def error(self) -> float:
        """Norm of the difference over the base's."""
        if self.error2 == 0.0:
            return 0.0
        return math.sqrt(self.error2 / self.base2) if self.base2 else math.inf

    @property
    def bound(self) -> float:
        """What ``error`` is at most where the format explains it."""
        rounding = math.sqrt(self.rounding2 / self.base2) if self.base2 else 0.0
        return min(TOLERATED * rounding, UNRELATED)

    @property
    def gain(self) -> float:
        """The one factor that brings the base nearest to the source."""
        return float(self.row_products.sum()) / self.base2 if self.base2 else 1.0

    @property
    def verdict(self) -> Literal["same", "scaled", "differs", "tiles"]:
        """Whether the weights are the same up to their formats, or how they are not.

        "scaled": but for a factor of the whole, which the bound hides where the scales that are
        stored grew with it. "tiles": all but some tiles.
        """
        if self.base2 and not self.source2:
            return "differs"
        share = self.rounding2 / self.base2 if self.base2 else 0.0
        is_scaled = not _LEAST_GAIN - share <= self.gain <= _MOST_GAIN + share
        if self.error > self.bound:
            is_along = 2 * self.gain**2 * self.base2 > self.source2
            return "scaled" if is_scaled and is_along else "differs"
        if is_scaled:
            return "scaled"
        return "tiles" if self.wrong_tiles else "same"

    @property
    def may_be_folded(self) -> bool:
        """Whether a factor a column or a row explains much of the difference."""
        if self.error2 <= _FOLD_FROM**2 * self.rounding2 or self.source2 == 0.0:
            return False
        if min(self.columns, self.rows) < _LEAST_SIDE:
            return False
        return min(self.left2("columns"), self.left2("rows")) < _FOLD_EXPLAINS * self.error2

    def left2(self, side: Side) -> float:
        """Return what the best factors of one side leave of the squared difference."""
        return self.source2 - _explained(*self._sums(side))

    def factors(self, side: Side) -> torch.Tensor:
        """Return the factor a row or column that brings the base nearest to the source, float64."""
        return _ratio(*self._sums(side))

    def explained_by(self, side: Side) -> bool:
        """Whether factors of one side bring the difference down to what the format explains."""
        bound = min(TOLERATED**2 * self.rounding2, UNRELATED**2 * self.source2)
        return self.left2(side) <= bound

    def _sums(self, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        if side == "rows":
            return self.row_products, self.row_base2
        return self.column_products, self.column_base2

    def fit_side(self) -> FoldedFit | None:
        """Return factors of rows alone, or of columns, that leave what rounding does."""
        side: Side = "rows" if self.left2("rows") <= self.left2("columns") else "columns"
        if self.left2(side) > min(_FOLD_FROM**2 * self.rounding2, _FOLD_EXPLAINS * self.error2):
            return None
        ones = {
            "rows": torch.ones(self.rows, dtype=torch.float64),
            "columns": torch.ones(self.columns, dtype=torch.float64),
        }
        found = ones | {side: self.factors(side)}
        return FoldedFit(found["columns"].float(), found["rows"], self.left2(side))


@dataclass
class FoldedFit:
    """Fits w' = a[n] * w * b[k] for given b, which are the factors of columns.

    ``rows``, float64 (N,), is filled with the factors a.
    """

    columns: torch.Tensor
    rows: torch.Tensor
    left2: float = 0.0
    rows_done: int = 0
    _products: torch.Tensor | float = 0.0
    _squares: torch.Tensor | float = 0.0

    def add(self, source: torch.Tensor, base: torch.Tensor) -> None:
        """Add some rows, float32 (rows, K)."""
        scaled = base * self.columns
        products = (source * scaled).sum(1, dtype=torch.float64)
        squares = scaled.square().sum(1, dtype=torch.float64)
        rows = _ratio(products, squares)
        done = slice(self.rows_done, self.rows_done + len(base))
        self.rows_done = done.stop
        self.rows[done] = rows
        scaled = base * rows.float()[:, None]
        self._products += (source * scaled).sum(0, dtype=torch.float64)
        self._squares += scaled.square().sum(0, dtype=torch.float64)
        total = float(source.square().sum(dtype=torch.float64))
        self.left2 += total - _explained(products, squares)

    def better_columns(self) -> torch.Tensor:
        """Return the factors of columns that fit best beside the rows' that were found."""
        assert isinstance(self._products, torch.Tensor) and isinstance(self._squares, torch.Tensor)
        return _ratio(self._products, self._squares).float()

    def explains(self, comparison: Comparison) -> bool:
        """Whether the factors bring the difference down to what the format explains."""
        if self.left2 > _FOLD_EXPLAINS * comparison.error2:
            return False
        bound = min(TOLERATED**2 * comparison.rounding2, UNRELATED**2 * comparison.source2)
        return self.left2 <= bound

    def varying(self, comparison: Comparison, tile: tuple[int, int]) -> frozenset[Side]:
        """Return which factors are not all alike within a tile, beyond noise, and are needed.

        What is folded is one factor a channel. One for a tile's rows or columns together is a
        damaged scale.
        """
        left2 = max(self.left2, 0.0)
        noise = math.sqrt(left2 / max(comparison.source2, 1e-300))
        found: dict[Side, tuple[torch.Tensor, int, int]] = {
            "rows": (self.rows, tile[0], len(self.columns)),
            "columns": (self.columns.double(), tile[1], len(self.rows)),
        }
        others: Mapping[Side, Side] = {"rows": "columns", "columns": "rows"}
        return frozenset(
            side
            for side, (factors, size, count) in found.items()
            if comparison.left2(others[side]) > _FOLD_NEEDS * left2
            and _spread(factors, size)
            > max(_VARYING, 3 * math.hypot(noise / math.sqrt(count), math.sqrt(comparison.noise2)))
        )


@dataclass(frozen=True)
class Inverse:
    """Factors that take back those that were folded into a weight (N, K), as others hold them.

    ``rows`` (N,) and ``columns`` (K,), float32; ``sides`` are those that are not all 1, and
    ``noise2`` is the mean square of their relative error.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    sides: frozenset[Side] = frozenset()
    noise2: float = 0.0

    def times(self, side: Side, factors: torch.Tensor, noise2: float) -> Inverse:
        """Add one side's factors, unless they are all 1 but for noise."""
        noise = max(_VARYING, 3 * math.sqrt(noise2))
        if _spread(factors) <= noise and abs(float(factors.median()) - 1) <= noise:
            return self
        new = replace(self, sides=self.sides | {side}, noise2=self.noise2 + noise2)
        if side == "rows":
            return replace(new, rows=self.rows * factors.float())
        return replace(new, columns=self.columns * factors.float())


def directions(samples: Sequence[bytes]) -> torch.Tensor:
    """Return samples of weights of one shape as unit vectors, whose products are cosines."""
    rows = [torch.frombuffer(bytearray(sample), dtype=torch.float16) for sample in samples]
    return torch.nn.functional.normalize(torch.stack(rows).float())


def _sample(weight: torch.Tensor) -> bytes:
    """Return some of a weight's entries, float16 and up to one factor."""
    flat = weight.flatten()
    some = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]
    return bytes((some / some.abs().max().clamp(min=1e-30)).half().numpy().tobytes())


def _ratio(products: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    return torch.where(squares > 0, products / squares.clamp(min=1e-300), 1.0)


def _explained(products: torch.Tensor, squares: torch.Tensor) -> float:
    return float((_ratio(products, squares) * products).sum())


def _spread(factors: torch.Tensor, size: int = 1) -> float:
    """Return the median distance from the median, relatively: a few damaged rows do not count.

    The median is that of each ``size`` factors, where so many belong together.
    """
    whole = len(factors) // size * size
    groups = factors[:whole].view(-1, size) if size > 1 and whole else factors[None]
    groups = groups.double()
    middle = groups.median(1, keepdim=True).values
    return float(((groups - middle).abs() / middle.abs().clamp(min=1e-300)).median())
