# SPDX-License-Identifier: Apache-2.0
"""The quantization config that stands for ours on a vLLM that the package does not fit."""

from typing import Any, NoReturn

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_mixprec.errors import UnsupportedError

_METHOD = "mixprec"


def make_refusal(reason: str) -> type[QuantizationConfig]:
    """Return a config class that refuses every mixed model with ``reason``, and no other."""

    class RefuseMixedModels(QuantizationConfig):  # type: ignore[misc]
        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, *_: Any, **__: Any
        ) -> None:
            if _METHOD in (user_quant, (hf_quant_cfg or {}).get("quant_method")):
                raise UnsupportedError(reason)

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> NoReturn:
            raise UnsupportedError(reason)

        @classmethod
        def get_name(cls) -> str:
            return _METHOD

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        def get_quant_method(self, layer: Any, prefix: str) -> NoReturn:
            raise UnsupportedError(reason)

    return RefuseMixedModels
