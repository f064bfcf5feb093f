# SPDX-License-Identifier: Apache-2.0
"""A worker for :func:`tests.engine.harness.run_ranks`, with a meeting place for each engine."""

import os

from vllm.v1.worker.cpu_worker import CPUWorker


class StageWorker(CPUWorker):
    """vLLM's CPU worker, which finds the other stage through a file.

    The executor for torchrun says "env://" to every worker, and vLLM names the stages' shared
    memory after that: two test runs on one machine would meet in it.
    """

    def __init__(self, *args, **kwargs) -> None:
        kwargs["distributed_init_method"] = f"file://{os.environ['STAGES_MEET_AT']}"
        super().__init__(*args, **kwargs)
