# SPDX-License-Identifier: Apache-2.0
"""The CPU's rotary embedding turns queries of several heads and strided keys wrongly.

``RotaryEmbedding.forward_cpu`` (layers/rotary_embedding/base.py, vLLM 0.32) hands queries (tokens,
heads, size) and keys cut out of a wider tensor to a kernel that takes neither, without an error:
multi-head latent attention passes both. Compiled models take another way, so that DeepSeek V2,
which is right compiled, is 0.2 nats a token off with --enforce-eager, and GLM-5, which vLLM never
compiles on a CPU, always.
"""

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from vllm_mixprec.patches import Patch

_STOCK = RotaryEmbedding.forward_cpu


def _forward_cpu(
    self: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    flat = (query,) if key is None else (query, key)
    if all(tensor.dim() == 2 and tensor.is_contiguous() for tensor in flat):
        return _STOCK(self, positions, query, key)
    return self.forward_native(positions, query, key)


def needed() -> bool:
    """Whether the kernel differs from the definition on two heads."""
    rope = RotaryEmbedding.__new__(RotaryEmbedding)
    torch.nn.Module.__init__(rope)
    rope.head_size = rope.rotary_dim = 8
    rope.is_neox_style = False
    with torch.device("cpu"):  # a model may be under construction on another
        positions = torch.arange(3)
        angle = positions[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125])
        rope.cos_sin_cache = torch.cat((angle.cos(), angle.sin()), dim=-1)
        query = torch.arange(48.0).view(3, 2, 8)
        expected, _ = rope.forward_native(positions, query.clone(), query[:, :1].clone())
        found, _ = _STOCK(rope, positions, query.clone(), query[:, :1].clone())
    return not torch.allclose(found, expected)


def apply() -> None:
    """Take the native way for what the kernel cannot do."""
    RotaryEmbedding.forward_cpu = _forward_cpu


PATCH = Patch(
    name="cpu_rotary",
    issues=(),
    broken="multi-head latent attention without compilation on the CPU: rotary embeddings of "
    "several heads are wrong, and with them every answer",
    mended="such queries take vLLM's native implementation",
    needed=needed,
    apply=apply,
    remove_when="the kernel honours three dimensions and strides, or refuses them",
)
