# SPDX-License-Identifier: Apache-2.0
"""Load vLLM's model for each of two tensor-parallel ranks, reading rows and reading whole tensors.

python -m tests.loading.rank_weights MODEL OUT.json

OUT: for each rank ``rows``, how many tensors were read in part; ``bytes`` and ``whole_bytes``, what
the system was asked for in either way; ``unlike``, the parameters that then differ; ``parameters``,
how many there are; ``digest`` of their values. Both ranks are built in this one process, which
talks to nobody.
"""

import functools
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
    parallel_state,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.loading.stage_modules import talk_to_nobody
from vllm_mixprec.loading import rows
from vllm_mixprec.loading.loader import MixPrecLoader
from vllm_mixprec.loading.pack_ahead import PackAhead

RANKS = 2
PackAhead.is_on = False  # weights are compared in their checkpoint's layout


def read_bytes() -> int:
    """Bytes that this process has asked the system for."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


def load(vllm_config: VllmConfig, whole: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """Return the parameters, how many tensors were read in part, and the bytes asked for."""
    loader = MixPrecLoader(vllm_config.load_config)
    vllm_config.compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(torch.bfloat16):
        model = loader.create_model(vllm_config, vllm_config.model_config)
        if whole:
            model.mixprec_rows, model.mixprec_copied = {}, set()
        before = read_bytes()
        loader.load_weights(model, vllm_config.model_config)
        nbytes = read_bytes() - before
    parameters = {name: value.data.clone() for name, value in model.named_parameters()}
    return parameters, len(model.mixprec_rows), nbytes


def compare_rank(vllm_config: VllmConfig, rank: int) -> dict[str, Any]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(RANKS, rank, local_rank=0, backend="fake")
        initialize_model_parallel(RANKS, 1, backend="fake")
        found, in_part, nbytes = load(vllm_config, whole=False)
        expected, _, whole_bytes = load(vllm_config, whole=True)
    destroy_model_parallel()
    destroy_distributed_environment()
    raw = {name: value.contiguous().view(torch.uint8) for name, value in found.items()}
    return {
        "rows": in_part,
        "bytes": nbytes,
        "whole_bytes": whole_bytes,
        "parameters": len(expected),
        "digest": sha256(b"".join(v.numpy().tobytes() for v in raw.values())).hexdigest(),
        "unlike": [
            name
            for name, value in expected.items()
            if not torch.equal(value.contiguous().view(torch.uint8), raw[name])
        ],
    }


def without_queue(make_group: Any, *args: Any, **kwargs: Any) -> Any:
    return make_group(*args, **(kwargs | {"use_message_queue_broadcaster": False}))


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    talk_to_nobody()
    parallel_state.init_model_parallel_group = functools.partial(  # its queue waits for readers
        without_queue, parallel_state.init_model_parallel_group
    )
    rows._SMALLEST_BYTES = 1024  # the model is small
    arguments = EngineArgs(
        model, tensor_parallel_size=RANKS, skip_tokenizer_init=True, max_model_len=64
    )
    vllm_config = arguments.create_engine_config()
    out.write_text(json.dumps([compare_rank(vllm_config, rank) for rank in range(RANKS)]))


if __name__ == "__main__":
    main()
