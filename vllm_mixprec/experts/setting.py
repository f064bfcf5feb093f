# SPDX-License-Identifier: Apache-2.0
"""The environment variable that turns expert statistics down or off."""

import os
from typing import Literal, cast

from vllm_mixprec.errors import UnsupportedError

VARIABLE = "VLLM_MIXPREC_EXPERT_METRICS"
Metrics = Literal["auto", "full", "off"]


def metrics_setting() -> Metrics:
    """Return how much is exported: ``auto``, ``full`` (every expert's series) or ``off``.

    Raises:
        UnsupportedError: the variable holds something else.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in ("auto", "full", "off"):
        raise UnsupportedError(
            f"{VARIABLE}={value}; expected auto, full or off. Set one of these, or unset it"
        )
    return cast(Metrics, value)
