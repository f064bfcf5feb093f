# SPDX-License-Identifier: Apache-2.0
"""How vLLM loads the indexer's ``wk``, which it fuses unquantised with ``weights_proj``.

``_try_load_fp8_indexer_wk`` (models/deepseek_v2.py) waits for FP8 weight and scale and dequantises.
The loader of a plan dequantises ``wk`` itself, from any format and in any order, and hands over a
plain weight (loading/intake.py): none of these is met there. Each probe calls vLLM's function.
"""

import inspect
from typing import Any

import torch
from vllm.model_executor.models import deepseek_mtp, deepseek_v2

from vllm_mixprec.patches import Patch

_WK = "model.layers.0.self_attn.indexer.wk"
_MENDED = "a plan's loader dequantises wk before the model sees it"


class _Fused:
    """Stands for the parameter ``wk_weights_proj``; keeps what was loaded."""

    def __init__(self) -> None:
        self.loaded: torch.Tensor | None = None

    def weight_loader(self, _: Any, weight: torch.Tensor, shard: int) -> None:
        self.loaded = weight


def _load(*tensors: tuple[str, torch.Tensor], missing: tuple[str, ...] = ()) -> _Fused:
    fused = _Fused()
    params = {} if missing else {"model.layers.0.self_attn.indexer.wk_weights_proj.weight": fused}
    waiting: dict[str, Any] = {}
    for suffix, tensor in tensors:
        deepseek_v2._try_load_fp8_indexer_wk(
            f"{_WK}.{suffix}", tensor, waiting, params, set(), list(missing)
        )
    return fused


def _fails_on_other_stages() -> bool:
    weight = torch.zeros(128, 128).to(torch.float8_e4m3fn)
    try:
        _load(
            ("weight", weight),
            ("weight_scale_inv", torch.ones(1, 1)),
            missing=("model.layers.0.",),
        )
    except KeyError:
        return True
    return False


def _forgets_between_calls() -> bool:
    """The MTP model and the CUDA model keep what waits in a local variable of ``load_weights``."""
    source = inspect.getsource(deepseek_mtp.DeepSeekMTP.load_weights)
    return "_pending_wk_fp8: dict = {}" in source


def _misreads_formats() -> bool:
    """Four ue8m0 exponents in an int32 are taken for the scale itself."""
    weight = torch.ones(128, 512).to(torch.float8_e4m3fn)
    packed = torch.full((1, 1), 127 * 0x01010101, dtype=torch.int32)  # four times 2 ** 0
    try:
        loaded = _load(("weight", weight), ("weight_scale", packed)).loaded
    except Exception:
        return True
    return loaded is None or not torch.equal(loaded.float(), torch.ones(128, 512))


STAGES = Patch(
    name="indexer_wk_stages",
    issues=("vllm#38870", "vllm#42944"),
    broken="KeyError for the FP8 wk of a layer on another pipeline stage",
    mended=_MENDED,
    needed=_fails_on_other_stages,
    apply=None,
    remove_when="no supported vLLM has it; 0.32 has not",
)
CALLS = Patch(
    name="indexer_wk_calls",
    issues=("vllm#46168",),
    broken="wk and its scale in two load_weights calls: never loaded, NaN (MTP and CUDA models; "
    "the generic model of 0.32 keeps them)",
    mended=_MENDED,
    needed=_forgets_between_calls,
    apply=None,
    remove_when="every load_weights keeps what waits on the model",
)
FORMATS = Patch(
    name="indexer_wk_formats",
    issues=("miles#1928", "omlx#2347", "TensorRT-LLM#18658"),
    broken="wk in int4, or FP8 with ue8m0 scales packed four to an int32: KeyError or wrong values",
    mended=_MENDED,
    needed=_misreads_formats,
    apply=None,
    remove_when="vLLM builds wk_weights_proj with a quantization config",
)
