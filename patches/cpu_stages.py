# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism on the CPU without compilation: the second stage has no room for its input.

``GPUModelRunner`` allocates the tensors that a stage receives in ``_dummy_run``, and asserts later
that they are there. Without compilation the CPU's runner makes no dummy run (``warming_up_model``
of v1/worker/cpu_model_runner.py, vLLM 0.32), so --enforce-eager and a draft model, which turns
compilation off, die of ``assert self.intermediate_tensors is not None``.
"""

import inspect
from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_mixprec.patches import Patch

_STOCK = CPUModelRunner.sync_and_gather_intermediate_tensors


def _sync_and_gather_intermediate_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return _STOCK(self, *args, **kwargs)


def needed() -> bool:
    """Whether the runner can reach a real step without having allocated them."""
    return "assert self.intermediate_tensors is not None" in inspect.getsource(
        _STOCK
    ) and "CompilationMode.NONE" in inspect.getsource(CPUModelRunner.warming_up_model)


def apply() -> None:
    """Allocate them at the first step at the latest."""
    CPUModelRunner.sync_and_gather_intermediate_tensors = _sync_and_gather_intermediate_tensors


PATCH = Patch(
    name="cpu_stages",
    issues=(),
    broken="--pipeline-parallel-size over 1 on the CPU with --enforce-eager or a draft model: "
    "AssertionError on the second stage",
    mended="a stage allocates what it receives at the first step at the latest",
    needed=needed,
    apply=apply,
    remove_when="the runner allocates the tensors between stages without a dummy run",
)
