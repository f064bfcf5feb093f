# SPDX-License-Identifier: Apache-2.0
"""As :mod:`tests.engine.runner`, with the library that vLLM has for CPUs without AVX512_BF16.

vLLM asks torch for the CPU's instructions before it loads one of its libraries, and this package
/proc/cpuinfo: the one is told here, the other by ``VLLM_MIXPREC_PLATFORM``. oneDNN knows the CPU.
"""

from typing import Any

import torch

from tests.engine.runner import run, run_jobs


def run_older(job: dict, options: dict) -> dict[str, Any]:
    """Run one job; adds the names of vLLM's compiled libraries that the process has loaded."""
    result = run(job, options)
    with open("/proc/self/maps") as maps:
        names = {line.split()[-1].rpartition("/")[2] for line in maps if "/vllm/_C" in line}
    return result | {"libraries": sorted(names)}


if __name__ == "__main__":
    torch.cpu._is_avx512_bf16_supported = lambda: False
    torch.cpu._is_amx_tile_supported = lambda: False
    run_jobs(run_older)
