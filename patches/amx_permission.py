# SPDX-License-Identifier: Apache-2.0
"""A worker process on a CPU with AMX dies of an illegal instruction.

Linux gives a process AMX tiles only when it asks (arch_prctl, ARCH_REQ_XCOMP_PERM). vLLM 0.32's own
AMX kernels, those of unquantised experts for one, do not ask: whoever did before them in the same
process did it for them. In a worker of the ``mp`` executor, which may have run nothing else, a
stock BF16 Qwen3-MoE ends at its first step, "Worker proc VllmWorker-0 died unexpectedly (exit code:
-4)".
"""

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_mixprec.patches import Patch

logger = init_logger("vllm.mixprec")


def needed() -> bool:
    """Whether vLLM computes on a CPU that has AMX."""
    return current_platform.is_cpu() and bool(torch.cpu._is_amx_tile_supported())


def apply() -> bool:
    """Ask for this process, which may be done again, and return whether it may use AMX.

    Not asked for where there is none.
    """
    if not needed():
        return False
    allowed = bool(torch.cpu._init_amx())
    if not allowed:
        logger.warning(
            "the CPU has AMX, and Linux refuses it to this process, which may end with an illegal "
            "instruction. Allow arch_prctl where this container's sandbox is set up"
        )
    return allowed


PATCH = Patch(
    name="amx_permission",
    issues=(),
    broken="a worker of the mp executor on a CPU with AMX dies of SIGILL in vLLM's own kernels",
    mended="each worker asks Linux for AMX before it loads",
    needed=needed,
    apply=apply,
    remove_when="vLLM's worker asks for it, or its kernels do",
)
