# SPDX-License-Identifier: Apache-2.0
"""With AMX, latent attention leaves its ``kv_b_proj`` such that no reload can follow.

``MLAAttention.process_weights_after_loading`` (layers/attention/mla_attention.py, vLLM 0.32) puts
an empty ``weight`` in ``kv_b_proj`` once ``AMXMLAImpl`` has packed a copy of its own. A reload
(model_loader/reload/layerwise.py) then copies what it loaded into that, or looks for a ``weight``
that int4 never had. Quantised tensors that are not called ``weight`` stay beside the copy.
"""

import inspect

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

from vllm_mixprec.patches import Patch

_PROCESS = MLAAttention.process_weights_after_loading
_RESTORE = layerwise._copy_and_restore_kernel_tensors


def _process_weights_after_loading(self: MLAAttention, act_dtype: torch.dtype) -> None:
    if not self.is_amx_bmm_enabled:
        _PROCESS(self, act_dtype)
        return
    if _is_taken(self.kv_b_proj):
        return  # a reload that brought nothing for it
    _PROCESS(self, act_dtype)
    for name, tensor in list(self.kv_b_proj.named_parameters(recurse=False)):
        if name != "bias":
            nothing = torch.empty(0, dtype=tensor.dtype)
            self.kv_b_proj.register_parameter(name, Parameter(nothing, requires_grad=False))


def _copy_and_restore(layer: Module, info: LayerReloadingInfo) -> None:
    parameters, _ = info.kernel_tensors
    weight = parameters.get("weight")
    if getattr(layer, "_cpu_skip_gemm_dispatch", False) and weight is not None:
        if not weight.numel():
            return  # what came stays until its attention, which is finished last, takes it
    _RESTORE(layer, info)


def _is_taken(kv_b_proj: Module) -> bool:
    """Whether attention has its copy, and nothing was loaded since."""
    return not any(
        tensor.numel()
        for name, tensor in kv_b_proj.named_parameters(recurse=False)
        if name != "bias"
    )


def needed() -> bool:
    """Whether attention leaves an empty weight, which the reload would copy into."""
    return "torch.empty(0)" in inspect.getsource(_PROCESS)


def apply() -> None:
    """Have the reload leave ``kv_b_proj`` to attention, which keeps its own copy only."""
    MLAAttention.process_weights_after_loading = _process_weights_after_loading
    layerwise._copy_and_restore_kernel_tensors = _copy_and_restore


PATCH = Patch(
    name="amx_latent_attention",
    issues=(),
    broken="multi-head latent attention on CPUs with AMX: weights cannot be reloaded, and int4 "
    "ones of kv_b_proj stay beside attention's own copy",
    mended="a reload leaves kv_b_proj to attention, which frees all of it",
    needed=needed,
    apply=apply,
    remove_when="kv_b_proj can be reloaded once attention has packed it",
)
