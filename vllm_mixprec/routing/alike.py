# SPDX-License-Identifier: Apache-2.0
"""Routes of a layer's experts that are one and the same but for the expert's number.

A large model has 50,000 routes, of which a few hundred are not alike: what is counted or compared
by route is done once for each of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vllm_mixprec.routing.fused import parse_experts
from vllm_mixprec.routing.route import Route


class Alike(NamedTuple):
    """Routes of one projection of one layer, from one source, stored and served in one way.

    Attributes:
        example: the first of them.
        layer: of the routed experts, ``model.layers.3.mlp.experts``; None for what is no expert's,
            which stands alone.
        experts: logical ids, in the routes' order; empty for what is no expert's.
    """

    example: Route
    layer: str | None
    experts: list[int]

    @property
    def num_routes(self) -> int:
        """How many routes there are."""
        return len(self.experts) or 1


def gather_alike(routes: Mapping[str, Route]) -> tuple[Alike, ...]:
    """Put routes together that are alike, in the order of the first of each."""
    gathered: list[Alike] = []
    # Equal looks, and equal schemes as served, mostly are one object among a table's routes: to
    # compare what they hold takes longer than all the rest.
    found: dict[tuple[str, str, str, int, int, str | None], Alike] = {}
    for route, expert in zip(routes.values(), parse_experts(routes), strict=True):
        if expert is None:
            gathered.append(Alike(route, None, []))
            continue
        layer, number, projection = expert
        kind = route.source, id(route.looks), id(route.served), route.reason
        key = (layer, projection, *kind)
        alike = found.get(key)
        if alike is None or route.looks is None:
            alike = found[key] = Alike(route, layer, [])
            gathered.append(alike)
        alike.experts.append(number)
    return tuple(gathered)
