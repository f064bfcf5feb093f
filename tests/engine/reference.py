# SPDX-License-Identifier: Apache-2.0
"""What the engine is held against: transformers in float32 on independently dequantised weights.

Nothing of vllm_mixprec is used. FP8 blocks are dequantised by transformers' own code, GPTQ words
unpacked by vLLM's; which tensor comes from which checkpoint is said by a plain function.
DeepSeek-MoE, which transformers lacks, is :mod:`tests.engine.deepseek_v1`.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.scalar_type import scalar_types

from tests.engine import deepseek_v1  # noqa: F401  makes "deepseek" known to transformers

Weights = dict[str, torch.Tensor]
BLOCK = 128


def dequantised(folder: Path) -> Weights:
    """Return a checkpoint's weights in float32 under the names of its BF16 form."""
    stored = {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }
    weights: Weights = {}
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            weights[f"{module}.weight"] = _gptq(module, stored)
        elif suffix == "weight" and f"{module}.weight_scale_inv" in stored:
            weights[name] = _fp8(tensor, stored[f"{module}.weight_scale_inv"])
        elif suffix not in ("qzeros", "scales", "g_idx", "weight_scale_inv"):
            weights[name] = tensor.float()
    return weights


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Blocks of 128 x 128. transformers wants whole blocks: the cut one is filled up meanwhile."""
    rows, columns = weight.shape
    whole = torch.zeros(scale.shape[0] * BLOCK, scale.shape[1] * BLOCK)
    whole[:rows, :columns] = weight.float()
    dequantised = Fp8Dequantize(None)._dequantize_one(whole, scale.float(), torch.float32)
    return dequantised[:rows, :columns].contiguous()


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


def mtp_layer(config: Path) -> int | None:
    """Number of the first multi-token-prediction layer of a checkpoint, None without one."""
    plain = json.loads((config / "config.json").read_text())
    return plain["num_hidden_layers"] if plain.get("num_nextn_predict_layers") else None


def load(config: Path, weights: Weights) -> torch.nn.Module:
    """Return transformers' model in float32.

    Multi-token-prediction layers are left out: they have no part in what the model says.

    Raises:
        ValueError: ``weights`` are not exactly the model's.
    """
    plain = json.loads((config / "config.json").read_text())
    for key in ("quantization_config", "auto_map", "torch_dtype"):
        plain.pop(key, None)
    prediction = f"model.layers.{mtp_layer(config)}."
    weights = {n: tensor for n, tensor in weights.items() if not n.startswith(prediction)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(plain))
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        # By name: vLLM, in the same process, gives some model types another class.
        architecture = getattr(transformers, plain["architectures"][0], AutoModelForCausalLM)
        model, report = architecture.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    wrong = {key: sorted(names) for key, names in report.items() if names}
    if wrong:
        raise ValueError(f"{config}: not the weights of {type(model).__name__}: {wrong}")
    return model.eval()


@torch.no_grad()
def log_probs(config: Path, weights: Weights, prompts: list[list[int]]) -> torch.Tensor:
    """Return (tokens,) float32 log-probabilities of each prompt's tokens after its first."""
    model = load(config, weights)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        found.append(logits.gather(1, ids[0, 1:, None]).squeeze(1))
    return torch.cat(found)


@torch.no_grad()
def greedy_margins(
    config: Path, weights: Weights, prompts: torch.Tensor, steps: int
) -> torch.Tensor:
    """Continue ``prompts`` (n, length) greedily in float32.

    Returns:
        (n, steps) nats between each token, the likeliest, and the next likely one.
    """
    model = load(config, weights)
    ids, margins = prompts, []
    for _ in range(steps):
        best = model(ids).logits[:, -1].topk(2)
        margins.append(best.values[:, 0] - best.values[:, 1])
        ids = torch.cat([ids, best.indices[:, :1]], dim=1)
    return torch.stack(margins, dim=1)
