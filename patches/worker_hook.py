# SPDX-License-Identifier: Apache-2.0
"""A plug-in cannot see a worker's model between its loading and its compilation.

``WorkerWrapperBase`` (v1/worker/worker_base.py, vLLM 0.32) builds the worker, and everything that
a plug-in may add to it (``worker_extension_cls``) is a base class behind the worker's own, which
can add methods and override none. What counts experts must be in the layers before torch.compile
traces them and before CUDA graphs are captured.
"""

from vllm.v1.worker.worker_base import WorkerWrapperBase

from vllm_mixprec.patches import Patch, amx_permission

_STOCK = WorkerWrapperBase.init_device


def _init_device(self: WorkerWrapperBase) -> None:
    amx_permission.apply()
    _STOCK(self)
    from vllm_mixprec.experts.worker import watch

    watch(self.worker)


def needed() -> bool:
    """Whether vLLM has no such hook; it has none in any version so far."""
    return True


def apply() -> None:
    """Wrap the call that every executor makes once its worker is there and before it loads."""
    WorkerWrapperBase.init_device = _init_device  # type: ignore[method-assign]


PATCH = Patch(
    name="worker_hook",
    issues=(),
    broken="no extension point sees a worker's model between its loading and its compilation",
    mended="expert counters are put into a worker once its device is there",
    needed=needed,
    apply=apply,
    remove_when="a worker extension can override load_model, or vLLM counts experts itself",
)
