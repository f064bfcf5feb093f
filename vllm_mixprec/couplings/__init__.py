# SPDX-License-Identifier: Apache-2.0
"""Every point where the package leans on vLLM, as literal tables.

``vllm-mixprec doctor`` probes them against the installed version, ``scripts/check_couplings.py``
against the sources in a wheel, a start against those without which no plan is served; a test
compares them with the imports of the package. vLLM itself is imported only inside
:func:`find_problem`.
"""

from collections.abc import Iterable

from vllm_mixprec.couplings.base import Coupling, find_problem
from vllm_mixprec.couplings.kernels import AMX, KERNELS
from vllm_mixprec.couplings.layers import LAYERS
from vllm_mixprec.couplings.loading import LOADING
from vllm_mixprec.couplings.patching import PATCHING
from vllm_mixprec.couplings.startup import STARTUP
from vllm_mixprec.couplings.statistics import STATISTICS

__all__ = [
    "COUPLINGS",
    "SERVING",
    "TESTED_VLLM",
    "Coupling",
    "couplings_for",
    "find_problem",
    "find_unfit",
]

SERVING: tuple[Coupling, ...] = (*STARTUP, *LAYERS, *LOADING, *KERNELS)
"""Those without which no plan is served."""

COUPLINGS: tuple[Coupling, ...] = (*SERVING, *AMX, *STATISTICS, *PATCHING)

TESTED_VLLM = ((0, 32), (0, 34))
"""Versions that the package is tested with: from the first, inclusive, to the second."""


def couplings_for(family: str, couplings: Iterable[Coupling] = COUPLINGS) -> tuple[Coupling, ...]:
    """Return the couplings that a platform family (``cpu-avx512``, ``cuda``, ...) needs.

    ``cpu``, which is all that a wheel tells, stands for every kind of CPU.
    """
    return tuple(
        coupling
        for coupling in couplings
        if coupling.family is None
        or family.startswith(coupling.family)
        or coupling.family.startswith(family)
    )


def find_unfit(family: str, couplings: Iterable[Coupling]) -> str | None:
    """Say in a line which coupling the installed vLLM breaks; None when all hold.

    Imports vLLM.
    """
    for coupling in couplings_for(family, couplings):
        problem = find_problem(coupling)
        if problem is not None:
            low, high = (".".join(map(str, version)) for version in TESTED_VLLM)
            return (
                f"{coupling.symbol}: {problem}; expected that it {coupling.relies_on}. This vLLM "
                f"does not fit: install one >={low},<{high}, or a newer vllm-mixprec"
            )
    return None
