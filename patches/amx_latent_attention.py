# SPDX-License-Identifier: Apache-2.0
"""With AMX, latent attention leaves its ``kv_b_proj`` such that no reload can follow.

``MLAAttention.process_weights_after_loading`` (layers/attention/mla_attention.py, vLLM 0.32) puts
an empty ``weight`` in ``kv_b_proj`` once ``AMXMLAImpl`` has packed a copy of its own. A reload
(model_loader/reload/layerwise.py) then copies what it loaded into that, or looks for a ``weight``
that int4 never had, as 0.33 does at the first load. Quantised tensors of other names stay beside
the copy.
"""

import inspect
from collections.abc import Iterable

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
    weights = _weights(self.kv_b_proj.named_parameters(recurse=False))
    if _are_empty(weights):
        return  # a reload that brought nothing for it
    self.impl.process_weights_after_loading(act_dtype)
    for name, tensor in weights.items():
        nothing = torch.empty(0, dtype=tensor.dtype)
        self.kv_b_proj.register_parameter(name, Parameter(nothing, requires_grad=False))


def _copy_and_restore(layer: Module, info: LayerReloadingInfo) -> None:
    parameters, _ = info.kernel_tensors
    weights = _weights(parameters.items())
    if getattr(layer, "_cpu_skip_gemm_dispatch", False) and _are_empty(weights):
        return  # what came stays until its attention, which is finished last, takes it
    _RESTORE(layer, info)


def _weights(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return what attention takes of ``kv_b_proj``."""
    return {name: tensor for name, tensor in parameters if name != "bias"}


def _are_empty(weights: dict[str, torch.Tensor]) -> bool:
    return bool(weights) and not any(tensor.numel() for tensor in weights.values())


def needed() -> bool:
    """Whether attention leaves an empty weight, which the reload would copy into."""
    return "empty(0)" in inspect.getsource(_PROCESS)


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
