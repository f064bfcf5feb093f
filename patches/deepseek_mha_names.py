# SPDX-License-Identifier: Apache-2.0
"""DeepSeek v1's attention linears have no name.

``DeepseekAttention`` (models/deepseek_v2.py, vLLM 0.32) builds ``qkv_proj`` and ``o_proj`` without
a prefix, so a quantization config that decides by layer is asked about the layer "". The same was
mended elsewhere as vllm#44817 (DeepSeek-V4's MTP layer).
"""

import inspect
from typing import Any

from torch.nn import Module
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.models import deepseek_v2

from vllm_mixprec.patches import Patch
from vllm_mixprec.quant.config import MixPrecConfig

_STOCK = deepseek_v2.DeepseekAttention
_NAMES: dict[type[Module], str] = {QKVParallelLinear: "qkv_proj", RowParallelLinear: "o_proj"}


class _Named:
    """A quantization config that is told a layer's name where vLLM forgets it."""

    def __init__(self, config: QuantizationConfig, prefix: str) -> None:
        self._config = config
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        name = _NAMES.get(type(layer))
        if not prefix and name is not None:
            prefix = f"{self._prefix}.{name}"
        return self._config.get_quant_method(layer, prefix)


class DeepseekAttention(_STOCK):  # type: ignore[misc,valid-type]
    """vLLM's, with named linears where the model is served through a plan."""

    def __init__(
        self,
        *args: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        if isinstance(quant_config, MixPrecConfig):
            quant_config = _Named(quant_config, prefix)
        super().__init__(*args, quant_config=quant_config, prefix=prefix, **kwargs)


def needed() -> bool:
    """Whether vLLM's class leaves the names out."""
    return 'prefix=f"{prefix}.qkv_proj"' not in inspect.getsource(_STOCK)


def apply() -> None:
    """Put our class in the place where vLLM's decoder layer looks it up."""
    deepseek_v2.DeepseekAttention = DeepseekAttention


PATCH = Patch(
    name="deepseek_mha_names",
    issues=("vllm#44817",),
    broken="DeepSeek v1: qkv_proj and o_proj are built without a name, so no layer of them can "
    "have a format of its own",
    mended="a subclass names them",
    needed=needed,
    apply=apply,
    remove_when="DeepseekAttention passes a prefix to its linears",
)
