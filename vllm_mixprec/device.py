# SPDX-License-Identifier: Apache-2.0
"""Whether a device can serve a plan: memory and driver, said before a byte is read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil
import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml

from vllm_mixprec.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.mixprec")

_GIB = 2**30


def driver_problem(built_for: str | None = torch.version.cuda) -> str | None:
    """Say in what the NVIDIA driver is too old for torch; None where it is not, or not known.

    Within one major version of CUDA any driver runs what a later minor version built. Asks NVML,
    which makes no CUDA context.

    Args:
        built_for: CUDA version of torch, such as "13.0"; None for a build without CUDA.
    """
    if built_for is None:
        return None
    nvml = import_pynvml()
    try:
        nvml.nvmlInit()
        try:
            number = int(nvml.nvmlSystemGetCudaDriverVersion())
            driver = nvml.nvmlSystemGetDriverVersion()
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None
    if number // 1000 >= int(built_for.partition(".")[0]):
        return None
    return (
        f"the NVIDIA driver {driver} runs CUDA {number // 1000}.{number % 1000 // 10}; expected "
        f"{built_for.partition('.')[0]}.0 or later, for which this torch is built. Update the "
        "driver, or install a vLLM built for its CUDA"
    )


def refuse_old_driver() -> None:
    """Refuse to start on a GPU whose driver is too old, which torch would say in a traceback.

    Raises:
        UnsupportedError: with both versions.
    """
    problem = driver_problem() if current_platform.is_cuda() else None
    if problem is not None:
        raise UnsupportedError(problem)


def refuse_too_little_memory(vllm_config: "VllmConfig", bytes_per_rank: Sequence[int]) -> None:
    """Refuse a plan whose weights alone are more than the memory that they may take.

    Args:
        bytes_per_rank: as ``check`` reports them, by rank.

    Raises:
        UnsupportedError: they do not fit, with the numbers.
    """
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size or not bytes_per_rank:
        return
    most = max(bytes_per_rank)
    if current_platform.is_cuda():
        total = _gpu_bytes()
        share = vllm_config.cache_config.gpu_memory_utilization
        if total is None or most <= total * share:
            return
        raise UnsupportedError(
            f"rank {bytes_per_rank.index(most)}: its weights take {most / _GIB:.1f} GiB; expected "
            f"at most {total * share / _GIB:.1f} GiB, which --gpu-memory-utilization {share} "
            f"leaves of the GPU's {total / _GIB:.1f} GiB. Use more tensor- or pipeline-parallel "
            "ranks, route more experts to fewer bits, or offload"
        )
    parallel = vllm_config.parallel_config
    local = (
        parallel.nnodes == 1 and parallel.data_parallel_size_local == parallel.data_parallel_size
    )
    if current_platform.is_cpu() and local:
        total, needed = psutil.virtual_memory().total, sum(bytes_per_rank)
        if needed > total:
            raise UnsupportedError(
                f"the weights take {needed / _GIB:.1f} GiB on {len(bytes_per_rank)} ranks; "
                f"expected at most the machine's {total / _GIB:.1f} GiB. Route more experts to "
                "fewer bits"
            )


def _gpu_bytes() -> int | None:
    """Memory of the first GPU by NVML; elsewhere asking would make a CUDA context before a fork."""
    if type(current_platform).__name__ != "NvmlCudaPlatform":
        return None
    try:
        return int(current_platform.get_device_total_memory(0))
    except Exception as error:  # vLLM will say itself what is wrong with the driver
        logger.warning("how much memory the GPU has is not known: %s", error)
        return None
