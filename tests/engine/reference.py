# SPDX-License-Identifier: Apache-2.0
"""What the engine is held against: transformers in float32 on independently dequantised weights.

Nothing of vllm_mixprec is used. FP8 blocks are dequantised by transformers' own code, GPTQ words
unpacked by vLLM's; which tensor comes from which checkpoint is said by a plain function.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.scalar_type import scalar_types

Weights = dict[str, torch.Tensor]


def dequantised(folder: Path) -> Weights:
    """Return a checkpoint's weights in float32 under the names of its BF16 form."""
    stored = {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }
    weights: Weights = {}
    fp8 = Fp8Dequantize(None)
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            weights[f"{module}.weight"] = _gptq(module, stored)
        elif suffix == "weight" and f"{module}.weight_scale_inv" in stored:
            scale = stored[f"{module}.weight_scale_inv"].float()
            weights[name] = fp8._dequantize_one(tensor, scale, torch.float32)
        elif suffix not in ("qzeros", "scales", "g_idx", "weight_scale_inv"):
            weights[name] = tensor.float()
    return weights


def _gptq(module: str, stored: Weights) -> torch.Tensor:
    """GPTQ v1: qzeros hold zero point - 1; row k of the (K, N) codes is of group g_idx[k]."""
    codes = unpack_quantized_values_into_int32(stored[f"{module}.qweight"], scalar_types.uint4, 0)
    zeros = (
        unpack_quantized_values_into_int32(stored[f"{module}.qzeros"], scalar_types.uint4, 1) + 1
    )
    group = stored[f"{module}.g_idx"].long()
    scales = stored[f"{module}.scales"].float()
    return ((codes - zeros[group]).float() * scales[group]).T.contiguous()


def mix(sources: dict[str, Weights], base: str, choose: Callable[[str], str]) -> Weights:
    """Take each tensor of ``base`` from the source that ``choose`` names for it."""
    return {name: sources[choose(name)][name] for name in sources[base]}


@torch.no_grad()
def log_probs(config: Path, weights: Weights, prompts: list[list[int]]) -> torch.Tensor:
    """Return (tokens,) float32 log-probabilities of each prompt's tokens after its first."""
    plain = json.loads((config / "config.json").read_text())
    plain.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(plain))
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        found.append(logits.gather(1, ids[0, 1:, None]).squeeze(1))
    return torch.cat(found)
