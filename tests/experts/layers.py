# SPDX-License-Identifier: Apache-2.0
"""vLLM's own MoE layers in this process, and batches for their counters."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import (
    DPMetadata,
    create_forward_context,
    override_forward_context,
)
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_mixprec.experts.counter import LayerCounter

MODEL = Path(__file__).parent.parent / "fixtures" / "random-moe" / "bf16"
EXPERTS, TOP_K = 8, 3
"""As the fixture's."""
ROWS = 96
"""Of the buffer that says which rows are real."""


class Counters:
    """The counters of a model's layers as a worker makes them, the first one marking."""

    def __init__(
        self,
        layers: int = 2,
        shares: tuple[int, int, int] = (0, 0, 1),
        ubatches: int = 1,
        device: str = "cpu",
    ) -> None:
        self.rows = [torch.zeros(EXPERTS, dtype=torch.int64, device=device) for _ in range(layers)]
        self.tokens = torch.zeros(1, dtype=torch.int64, device=device)
        # As a run before may have left it.
        self.real = torch.ones((ubatches, ROWS), dtype=torch.bool, device=device)
        self.layers = [
            LayerCounter(
                self.rows[layer],
                self.tokens,
                self.real,
                experts=EXPERTS,
                marks=layer == 0,
                shares=shares,
            )
            for layer in range(layers)
        ]

    @property
    def counts(self) -> np.ndarray:
        return torch.stack(self.rows).cpu().numpy()

    def count(self, *topk_ids: Tensor) -> None:
        """One forward pass: a batch a layer."""
        for layer, ids in zip(self.layers, topk_ids, strict=True):
            layer.count(ids)


def routed(rows: int, seed: int, layers: int = 2) -> list[Tensor]:
    """Distinct experts of every row, one int32 ``[rows, TOP_K]`` a layer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.int32)
        for _ in range(layers)
    ]


def bincount(ids: Tensor) -> list[int]:
    return np.bincount(ids.numpy().ravel(), minlength=EXPERTS).tolist()


@contextmanager
def forward(config: VllmConfig, dp_tokens: list[int] | None = None, **options: Any) -> Iterator:
    """vLLM's forward context; ``dp_tokens`` of each data-parallel rank, as ranks exchange them."""
    dp_metadata = None if dp_tokens is None else DPMetadata(torch.tensor(dp_tokens))
    context = create_forward_context(None, config, dp_metadata=dp_metadata, **options)
    with override_forward_context(context):
        yield context


def padding(real: int, rows: int) -> Tensor:
    return torch.arange(rows) >= real


@contextmanager
def one_rank(folder: Path) -> Iterator[VllmConfig]:
    """Make this process the one rank of a small MoE model."""
    config = EngineArgs(
        str(MODEL), skip_tokenizer_init=True, max_model_len=64
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, backend="gloo")
        try:
            initialize_model_parallel(1, 1, backend="gloo")
            yield config
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def moe_layer(number: int = 0) -> MoERunner:
    """One of vLLM's MoE layers, without weights; inside :func:`one_rank`."""
    config_of_experts: Any = {"hidden_size": 64, "intermediate_size": 64}
    layer = FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=TOP_K,
        params_dtype=torch.bfloat16,
        prefix=f"model.layers.{number}.mlp.experts",
        **config_of_experts,
    )
    assert isinstance(layer, MoERunner)
    return layer
