# SPDX-License-Identifier: Apache-2.0
"""Build vLLM's model for every stage of a pipeline, on no device, and say what each would read.

python -m tests.loading.stage_modules MODEL STAGES OUT.json [PARTITION ...]

OUT: for each partition ("" is vLLM's own), for each stage, ``modules`` to read, by the base's
names, and ``parameters`` of vLLM's model, by its own; for the last stage the same of the draft. All
stages are built in this one process: torch.distributed's "fake" backend talks to nobody.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_mixprec import start
from vllm_mixprec.loading.loader import rank_routes


def talk_to_nobody() -> None:
    """Keep torch.distributed from waiting for the other stages, or reading what none sent."""
    new_group = torch.distributed.new_group

    def new_fake_group(*args: Any, **kwargs: Any) -> Any:  # vLLM asks for gloo groups too
        return new_group(*args, **(kwargs | {"backend": "fake"}))

    def hear_nothing(objects: list[Any], *args: Any, **kwargs: Any) -> None:
        """What others would send stays unset."""

    def hear_itself(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[torch.distributed.get_rank(group)] = own

    torch.distributed.new_group = new_fake_group
    torch.distributed.broadcast_object_list = hear_nothing
    torch.distributed.all_gather_object = hear_itself
    os.environ["VLLM_DIST_IDENT"] = "nobody"  # what vLLM's executors set for their workers


def describe_stage(vllm_config: VllmConfig, stage: int, stages: int) -> dict[str, Any]:
    """Build one stage, and the draft on the last one."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=stage, world_size=stages)
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(stages, stage, local_rank=0, backend="fake")
        initialize_model_parallel(1, stages, backend="fake")
        described = describe_model(vllm_config, vllm_config.model_config)
        if stage == stages - 1:
            draft = vllm_config.speculative_config.draft_model_config
            described["draft"] = describe_model(vllm_config, draft)
    vllm_config.compilation_config.static_forward_context.clear()
    destroy_model_parallel()
    destroy_distributed_environment()
    return described


def describe_model(vllm_config: VllmConfig, model_config: ModelConfig) -> dict[str, Any]:
    vllm_config.quant_config.begin_model()  # as the loader does
    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        model = initialize_model(vllm_config, model_config=model_config)
    return {
        "modules": [route.module for route in rank_routes(model, vllm_config.quant_config)],
        "parameters": [name for name, _ in model.named_parameters()],
    }


def main() -> None:
    model, stages, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    talk_to_nobody()
    start.refuse_too_little_memory = lambda *_: None  # nothing of the 800 GB is loaded here
    arguments = EngineArgs(
        model,
        pipeline_parallel_size=stages,
        skip_tokenizer_init=True,
        max_model_len=64,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    )
    found = {}
    for partition in sys.argv[4:]:
        os.environ.pop("VLLM_PP_LAYER_PARTITION", None)
        if partition:
            os.environ["VLLM_PP_LAYER_PARTITION"] = partition
        vllm_config = arguments.create_engine_config()
        found[partition] = [describe_stage(vllm_config, stage, stages) for stage in range(stages)]
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
