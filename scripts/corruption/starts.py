# SPDX-License-Identifier: Apache-2.0
"""What is done with a damaged model: ``check``, the start up to its weights, a whole engine."""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corruption.cases import FIXTURES
from corruption.composed import MIXED
from corruption.kinds import Kind

MODEL = {"skip_tokenizer_init": True, "max_model_len": 64, "enforce_eager": True}
ENGINE = MODEL | {
    "distributed_executor_backend": "uni",
    "num_gpu_blocks_override": 8,
    "max_num_seqs": 2,
    "disable_log_stats": True,
}
PROMPTS = [list(range(3, 40)), list(range(300, 250, -1))]
NEW_TOKENS = 8


def check_case(folder: Path, change: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run the command as a user does, once for people and once as JSON."""
    from vllm_mixprec import cli
    from vllm_mixprec.routing import sources

    if change is not None:
        real, waiting = sources.same_values, [change]

        def changing(one: Any, other: Any) -> bool:
            while waiting:
                waiting.pop()()
            return real(one, other)

        sources.same_values = changing
    arguments = ["check", str(folder / "plan.yaml"), "--platform", "cpu-avx512"]
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(printed):
        code = cli.main([*arguments, "--json"])
        if change is None and cli.main(arguments) != code:
            raise AssertionError("the exit codes with and without --json differ")
        printed.flush()
    text = printed.buffer.getvalue().decode()
    report, _ = json.JSONDecoder().raw_decode(text)
    findings = report.get("findings", [])
    return {
        "code": code,
        "findings": [[f["level"], f["code"], f.get("count", 1)] for f in findings],
        "detail": findings[0]["message"][:300] if findings else str(report.get("error", "")),
    }


def warm_vllm() -> None:
    """Import what a start needs, once, and have vLLM look at the model's class."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    import torch
    import vllm.v1.worker.cpu_worker  # noqa: F401  what it does to torch.accelerator

    torch.set_num_threads(1)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model  # noqa: F401
    from vllm.model_executor.models import ModelRegistry, qwen3_moe  # noqa: F401
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    EngineArgs(str(FIXTURES / "bf16"), skip_tokenizer_init=True).create_model_config()


def start_case(folder: Path, damage: Kind | None = None, number: int = 0) -> dict[str, Any]:
    """Configure vLLM and load the model; returns a digest over every parameter as loaded.

    Every other case has its files on the disk alone, so that they are read past the page cache.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    config = EngineArgs(
        str(folder / "bf16"),
        quantization="mixprec",
        hf_overrides={"mixprec_plan": str(folder / "plan.yaml")},
        **MODEL,
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, backend="gloo")
        initialize_model_parallel(1, 1, backend="gloo")
        if damage is not None and damage.moment:
            _change_while_loading(damage, folder)
        loaded = _digest_what_is_loaded()
        if number % 2:
            _forget(folder)
        get_model(vllm_config=config)
    return loaded


def serve_case(folder: Path, damage: Kind | None = None, number: int = 0) -> dict[str, Any]:
    """Compose, and start vLLM's engine on that; returns tokens and log-probabilities of prompts."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from vllm_mixprec import Plan, compose

    compose(Plan.from_yaml(folder / "plan.yaml"), folder / MIXED)
    if damage is not None and damage.moment == "composed":
        damage.damage(random.Random(f"{damage.name} {number}"), folder, number)
    elif damage is not None and damage.moment:
        _change_while_loading(damage, folder)
    llm = LLM(str(folder / MIXED), **ENGINE)
    parameters = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        prompt_logprobs=0,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
    served = []
    for output in llm.generate(prompts, parameters, use_tqdm=False):
        (completion,) = output.outputs
        tokens = [*output.prompt_token_ids, *completion.token_ids]
        entries = [*output.prompt_logprobs, *completion.logprobs][1:]
        pairs = zip(tokens[1:], entries, strict=True)
        served.append([[token, entry[token].logprob] for token, entry in pairs])
    return {"served": served}


def _digest_what_is_loaded() -> dict[str, Any]:
    """Have our loader note a digest when it is done, before kernels repack the weights."""
    import torch

    from vllm_mixprec.loading.loader import MixPrecLoader
    from vllm_mixprec.loading.pack_ahead import PackAhead

    noted: dict[str, Any] = {}
    PackAhead.is_on = False  # or a layer may be packed by then
    real = MixPrecLoader.load_weights

    def load_weights(loader: Any, model: Any, model_config: Any) -> None:
        real(loader, model, model_config)
        digest = hashlib.sha256()
        for name, parameter in sorted(model.named_parameters()):
            data = parameter.detach().contiguous().view(-1).view(torch.uint8)
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(data.numpy())
        noted.update(served=digest.hexdigest())

    MixPrecLoader.load_weights = load_weights
    return noted


def _forget(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        with contextlib.suppress(OSError):  # damaged, so perhaps not to be opened
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _change_while_loading(damage: Kind, folder: Path) -> None:
    """Damage the files right before the loader opens the first, or before its third read."""
    from vllm_mixprec.checkpoint import stream

    change = functools.partial(damage.damage, random.Random(0), folder, 0)
    if damage.moment == "load":
        real_open, waiting = stream.OpenFile, [change]

        def changing_open(*arguments: Any) -> Any:
            while waiting:
                waiting.pop()()
            return real_open(*arguments)

        stream.OpenFile = changing_open
        return
    real_read, reads = os.preadv, iter(range(10**9))

    def changing_read(*arguments: Any) -> int:
        if next(reads) == 2:
            change()
        return real_read(*arguments)

    os.preadv = changing_read
