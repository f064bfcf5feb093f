# SPDX-License-Identifier: Apache-2.0
"""Every point where the package leans on vLLM, as literal tables.

``vllm-mixprec doctor`` probes them against the installed version, and a test compares them with
the imports of the package; a new vLLM release is read against them first. vLLM itself is imported
only inside :func:`find_problem`.
"""

from vllm_mixprec.couplings.base import Coupling, find_problem
from vllm_mixprec.couplings.loading import LOADING
from vllm_mixprec.couplings.statistics import STATISTICS

__all__ = ["COUPLINGS", "TESTED_VLLM", "Coupling", "couplings_for", "find_problem"]

COUPLINGS: tuple[Coupling, ...] = (*LOADING, *STATISTICS)

TESTED_VLLM = ((0, 32), (0, 34))
"""Versions that the package is tested with: from the first, inclusive, to the second."""


def couplings_for(family: str) -> tuple[Coupling, ...]:
    """Return the couplings that a platform family (``cpu-avx512``, ``cuda``, ...) needs."""
    return tuple(
        coupling
        for coupling in COUPLINGS
        if coupling.family is None or family.startswith(coupling.family)
    )
