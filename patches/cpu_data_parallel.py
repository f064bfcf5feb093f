# SPDX-License-Identifier: Apache-2.0
"""MoE layers cannot exchange tokens between data-parallel ranks on the CPU.

Before the experts, ranks gather one another's tokens, as many as each has; after them, they add up
and take back their own. ``CpuCommunicator`` (distributed/device_communicators/cpu_communicator.py,
vLLM 0.32) has the manager for that and neither of the two collectives: it inherits ``all_gatherv``
and ``reduce_scatterv``, which raise NotImplementedError. Besides, the sizes are read from the
forward context in Python, which other platforms hide from torch.compile in a custom operator, and
``MoERunner._select_forward`` (fused_moe/runner/moe_runner.py) on the CPU does not.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_mixprec.patches import Patch

_STOCK_GATHER = CpuCommunicator.all_gatherv
_STOCK_SCATTER = CpuCommunicator.reduce_scatterv
_STOCK_FORWARD = MoERunner._select_forward


def _all_gatherv(
    self: CpuCommunicator,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Concatenate the ranks' tensors, of ``sizes`` along ``dim``, or all of one size.

    gloo gathers equal shapes only, so the shorter ones travel with a tail that is cut off again.
    """
    if isinstance(input_, list):
        return [self.all_gatherv(tensor, dim, sizes) for tensor in input_]
    if sizes is None or len(set(sizes)) == 1:
        return self.all_gather(input_.contiguous(), dim)
    shape = list(input_.shape)
    shape[dim] = max(sizes)
    padded = input_.new_zeros(shape)
    padded.narrow(dim, 0, input_.shape[dim]).copy_(input_)
    parts = self.all_gather(padded, dim).split(max(sizes), dim)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, sizes, strict=True)], dim)


def _reduce_scatterv(
    self: CpuCommunicator, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """Add up the ranks' tensors and return this rank's part, of ``sizes`` along ``dim``."""
    total = self.all_reduce(input_.clone(memory_format=torch.contiguous_format))
    parts = total.split(sizes or input_.shape[dim] // self.world_size, dim)
    return parts[self.rank_in_group].contiguous()


def _select_forward(self: MoERunner) -> Callable[..., Any]:
    if self.moe_config.dp_size == 1:
        return _STOCK_FORWARD(self)
    if self._shared_experts is None:
        return torch.ops.vllm.moe_forward
    return torch.ops.vllm.moe_forward_shared


def needed() -> bool:
    """Whether the communicator has no collectives of its own for ranks of unlike sizes."""
    return _STOCK_GATHER is DeviceCommunicatorBase.all_gatherv


def apply() -> None:
    """Give the communicator both, and hide the layer from torch.compile where they are used."""
    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv
    MoERunner._select_forward = _select_forward


PATCH = Patch(
    name="cpu_data_parallel",
    issues=(),
    broken="--data-parallel-size over 1 with a MoE model on the CPU: NotImplementedError in the "
    "first step",
    mended="the CPU's communicator gathers and scatters tokens of ranks with unlike batches",
    needed=needed,
    apply=apply,
    remove_when="CpuCommunicator has all_gatherv and reduce_scatterv of its own, and compiled "
    "models call them",
)
