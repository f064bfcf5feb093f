# SPDX-License-Identifier: Apache-2.0
"""Compares a few weights of each source with the base's, which ``check --deep`` does with all."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.routing.deep import examine
from vllm_mixprec.routing.findings import Finding, FindingLog, generalise
from vllm_mixprec.routing.strangers import report_strangers
from vllm_mixprec.routing.table import RouteTable

MAY_BE_MEANT = ("weights-differ", "scale-zero", "base-not-finite")
"""Codes of findings that need not be a fault: fine-tuned weights, empty groups, a base's damage."""

_MOST_WEIGHTS = 1 << 27  # some three seconds of reading and dequantising; those folded take longer


def compare_samples(
    table: RouteTable, checkpoints: Mapping[str, Checkpoint]
) -> tuple[Finding, ...]:
    """Read a weight of each kind, source and format that is here, the smaller kinds first.

    A source may hold the base's weights with factors that another module takes back, or in another
    basis, of which no header tells. Quantising tools do to all weights of a kind what they do to
    one. A few rows of each file are read besides (:mod:`.strangers`). Imports torch.

    Raises:
        CheckpointError: a file changed since its header was read.
    """
    log = FindingLog()
    threads = torch.get_num_threads()
    # OpenMP that has run here hangs in workers that are forked.
    torch.set_num_threads(1)
    try:
        report_strangers(table, checkpoints, log)
        examine(table, checkpoints, log, lambda done: None, only=_sample(table))
    finally:
        torch.set_num_threads(threads)
    return log.findings()


def _sample(table: RouteTable) -> frozenset[str]:
    """Choose modules, the smaller kinds first: up to the most weights that are read."""
    kinds: dict[tuple[str, str, str], tuple[int, str]] = {}
    for alike in table.alike:
        route = alike.example
        if route.source != table.plan.base and all(s.file.exists() for s in route.tensors.values()):
            kind = route.source, route.stored.label, generalise(route.module)
            kinds.setdefault(kind, (prod(route.shape), route.module))
    chosen, weights = set(), 0
    for size, module in sorted(kinds.values()):
        weights += size
        if weights > _MOST_WEIGHTS:
            break
        chosen.add(module)
    return frozenset(chosen)
