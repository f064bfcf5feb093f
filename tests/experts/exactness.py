# SPDX-License-Identifier: Apache-2.0
"""What the counts of any engine must be, whatever it runs on; needs no vLLM."""

import numpy as np

TRAFFIC = ["nothing", "plain", "cached_prefix", "sampled_in_parallel", "aborted"]
"""Scenarios of :mod:`tests.experts.counting`."""


def check_sums(result: dict, scenario: str) -> None:
    """Hold every layer's counts against the tokens that the scheduler handed out."""
    (scheduled,) = set(result["scheduled"])
    assert scheduled > 0 or scenario == "nothing"
    assert result["tokens"] == scheduled
    sums = np.array(result["counts"]).sum(axis=1)
    assert sums.tolist() == [scheduled * result["top_k"]] * len(result["layers"])


def check_preempted(results: dict) -> None:
    """A request that was thrown out is counted for what it computes anew."""
    assert results["preemptions"] > 0
    assert results["preempted"]["tokens"] > 100 + 101 + 102 + 103 + 4 * 59
