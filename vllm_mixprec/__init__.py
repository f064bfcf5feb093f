# SPDX-License-Identifier: Apache-2.0
"""Serve one MoE model whose tensors come each from the checkpoint a plan chose."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_mixprec.composition import compose
    from vllm_mixprec.experts.collect import expert_stats
    from vllm_mixprec.experts.snapshot import ExpertSnapshot
    from vllm_mixprec.plan import Plan
    from vllm_mixprec.routing import check

    __version__: str

__all__ = ["ExpertSnapshot", "Plan", "__version__", "check", "compose", "expert_stats"]

# Public name -> where it is defined. Looked up on first use, so that importing the package is
# quick and imports neither torch nor vLLM.
_PUBLIC = {
    "ExpertSnapshot": "vllm_mixprec.experts.snapshot",
    "Plan": "vllm_mixprec.plan",
    "check": "vllm_mixprec.routing",
    "compose": "vllm_mixprec.composition",
    "expert_stats": "vllm_mixprec.experts.collect",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vllm-mixprec")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
