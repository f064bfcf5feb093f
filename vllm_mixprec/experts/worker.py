# SPDX-License-Identifier: Apache-2.0
"""Expert statistics in a vLLM worker process: installs the counters and answers for them.

Nothing of vLLM is replaced: :func:`watch` wraps three methods of the one worker object, and its
answers are methods of that object, which ``collective_rpc`` finds by name.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCaptureSource,
)
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import extract_layer_index

from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.experts.collect import counters_enabled
from vllm_mixprec.experts.counter import LayerCounter, attach, attach_source, detach, keep_sink
from vllm_mixprec.experts.history import History, Totals

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

logger = init_logger("vllm.mixprec")

_UNEXPECTED = (
    "expert statistics are off or incomplete: this worker is not as expected. Please report it; "
    "VLLM_MIXPREC_EXPERT_METRICS=off does without them"
)
_ANSWERED = ("layer", "draft", "experts", "experts_per_token")


def watch(worker: "WorkerBase") -> None:
    """Have a worker count its experts, if its engine was told to.

    A model must be served even where its experts cannot be counted, so whatever goes wrong here
    is a line in the log.
    """
    config = worker.vllm_config
    parallel = config.parallel_config
    if not counters_enabled(config):
        return
    for what, why in (
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        (parallel.enable_elastic_ep, "elastic expert parallelism"),
    ):
        if what:
            logger.warning(
                "expert statistics are off: which rows of a batch belong to a rank under %s is "
                "not known",
                why,
            )
            return
    statistics = WorkerStatistics(worker)
    try:
        _after(worker, "load_model", statistics.install)
        _after(worker, "initialize_from_config", statistics.keep)
        # Compilation, profiling and warm-up are over when this returns, and no request has come.
        _after(worker, "compile_or_warm_up_model", statistics.begin)
        for name in ("mixprec_expert_stats", "mixprec_reset_expert_stats"):
            setattr(worker, name, getattr(statistics, name))
    except Exception:
        logger.exception(_UNEXPECTED)


def _after(worker: "WorkerBase", name: str, then: Callable[[], None]) -> None:
    method = getattr(worker, name)

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        try:
            then()
        except Exception:
            logger.exception(_UNEXPECTED)
        return result

    setattr(worker, name, wrapped)


class WorkerStatistics:
    """The counters of one worker's layers, and what it answers about them."""

    def __init__(self, worker: "WorkerBase") -> None:
        self._worker = worker
        self._requests = 0
        self._running: set[str] = set()
        self._begun = False
        self._layers: list[dict[str, Any]] = []
        self._read_rows: list[torch.Tensor] = []
        self._read_arrays: list[NDArray[Any]] = []  # on a CPU, the memory of the same
        self._tokens_arrays: list[NDArray[Any]] = []
        self._told = b"[]"
        self._experts = 0
        self._attached: list[tuple[MoERunner, LayerCounter]] = []
        self._counts: list[torch.Tensor] = []
        self._tokens = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        self._history = History(time.time(), 0, 0)

    def install(self) -> None:
        """Find the worker's MoE layers, its draft's too, and attach a counter to each."""
        try:
            self._install()
            self._count_requests()
        except Exception:
            for runner, _ in self._attached:
                detach(runner)
            self._layers.clear()
            raise
        # What never changes is made ready once, and passes through two processes as it is.
        self._read_rows = [self._counts[layer["row"]] for layer in self._layers]
        if self._worker.device.type == "cpu":
            self._read_arrays = [row.numpy() for row in self._read_rows]
            self._tokens_arrays = [tokens.numpy() for tokens in self._tokens]
        told = [{key: layer[key] for key in _ANSWERED} for layer in self._layers]
        self._told = json.dumps(told).encode()

    def _install(self) -> None:
        config = self._worker.vllm_config
        target = {id(module) for module in self._worker.get_model().modules()}
        found: list[tuple[Any, str, bool]] = [
            (layer, layer.layer_name, id(layer) not in target)
            for layer in config.compilation_config.static_forward_context.values()
            if isinstance(layer, MoERunner)
        ]
        found += [
            (module, name, False)
            for name, module in self._worker.get_model().named_modules()
            if isinstance(module, RoutedExpertsCaptureSource)
        ]
        if not found:
            return
        parallel = config.parallel_config
        experts = max(_experts_of(layer, config) for layer, _, _ in found)
        device = self._worker.device
        # CUDA graphs pad a batch to a captured size, sequence parallelism to whole shares.
        rows = max(
            config.scheduler_config.max_num_batched_tokens,
            config.compilation_config.max_cudagraph_capture_size or 0,
        )
        rows = (rows + parallel.tensor_parallel_size) * parallel.data_parallel_size
        ubatches = parallel.num_ubatches if parallel.use_ubatching else 1
        real = [torch.zeros(rows, dtype=torch.bool, device=device) for _ in range(ubatches)]
        # Inductor's CPU code adds float64 in place in the layer's own loop, and calls an operator
        # for int64. A float64 is exact up to 2^53.
        dtype = torch.float64 if device.type == "cpu" else torch.int64
        self._counts = [torch.zeros(experts, dtype=dtype, device=device) for _ in found]
        # Two tensors: torch.compile copies a part of one before it writes to it.
        tokens = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
        self._tokens = tokens
        scratch = torch.zeros(1, dtype=torch.int64, device=device)
        marked: set[bool] = set()
        labels = _labels([(name, draft) for _, name, draft in found])
        for row, (layer, _, draft) in enumerate(found):
            sp_size = layer.moe_config.sp_size if isinstance(layer, MoERunner) else 1
            # A CPU's batches have no padding, and its dummy runs are over before begin(); without
            # the question which rows are real, counting costs half.
            alone = parallel.data_parallel_size == sp_size == 1
            every_row = device.type == "cpu" and alone and not draft
            counter = LayerCounter(
                self._counts[row],
                # Drafts of several modules run one a pass: each of them marks, the first counts.
                scratch if draft in marked else tokens[draft],
                None if every_row else real,
                experts=_experts_of(layer, config),
                marks=draft or draft not in marked,
                shares=(
                    parallel.data_parallel_rank,
                    get_tp_group().rank_in_group if sp_size > 1 else 0,
                    sp_size,
                ),
            )
            try:
                _refuse_unknown_rows(labels[row], draft, every_row, parallel)
                if isinstance(layer, MoERunner):
                    attach(layer, counter)
                    self._attached.append((layer, counter))
                    if not parallel.use_ubatching:
                        self._share_buffer(counter)
                else:
                    attach_source(layer, counter)
            except UnsupportedError as problem:
                logger.warning("expert statistics: %s", problem)
                continue
            marked.add(draft)
            self._layers.append(
                {
                    "layer": labels[row],
                    "draft": draft,
                    "row": row,
                    "experts": counter.experts,
                    "experts_per_token": _top_k_of(layer, config),
                    "shared": sp_size > 1,
                }
            )
        self._experts = experts
        if self._layers and get_tp_group().rank_in_group == 0:
            logger.info("counting which experts work, in %d layers", len(self._layers))

    def _share_buffer(self, counter: LayerCounter) -> None:
        """Have kernels that route by themselves report into one buffer, read after each layer."""
        sinks = [known.sink for _, known in self._attached if known.sink is not None]
        if counter.sink is not None and counter.sink.buffer.shape == sinks[0].buffer.shape:
            counter.sink.buffer = sinks[0].buffer

    def keep(self) -> None:
        """Share a kernel's report with vLLM's own capture, which may just have taken it over."""
        for runner, counter in self._attached:
            keep_sink(runner, counter)

    def _count_requests(self) -> None:
        """Listen to the model runner, which every executor goes through."""
        runner = self._worker.model_runner  # type: ignore[attr-defined]
        execute = runner.execute_model

        @wraps(execute)
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.count_requests(scheduler_output)
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = execute_model

    def begin(self) -> None:
        """Forget what profiling and warm-up ran through the layers; at the first call alone."""
        if self._begun:
            return
        self._begun = True
        for counted in (*self._counts, *self._tokens):
            counted.zero_()
        self._requests = 0
        self._history = History(time.time(), len(self._layers), self._experts)

    def count_requests(self, scheduler_output: Any) -> None:
        """Count the requests that begin; the V2 runner is told of a preempted one as of a new."""
        self._running -= scheduler_output.finished_req_ids
        if scheduler_output.scheduled_new_reqs:
            begun = {request.req_id for request in scheduler_output.scheduled_new_reqs}
            self._requests += len(begun - self._running)
            self._running |= begun

    def mixprec_expert_stats(
        self, now_s: float, minutes: float | None = None, total: bool = False
    ) -> dict[str, Any] | None:
        """Answer what this worker counted.

        Args:
            now_s: unix time of the caller's clock, the same for all workers.
            minutes: over the last that many minutes, at most 60; None for since the last reset.
            total: since the engine's start, whatever was reset, and the counts alone.

        Returns:
            None where another rank of the tensor-parallel group answers; else, in types that
            msgpack knows: ``layers`` (JSON: label, draft, experts, experts_per_token each),
            ``experts`` (of the widest layer), ``counts`` (int64 bytes, ``[layers, experts]``),
            ``tokens`` (target's, draft's), ``requests``, ``started_s``, ``seconds``,
            ``last_activation_s`` (float64 bytes, as counts; None with ``total``), ``pp_rank``.
        """
        totals = self._read(now_s)
        if totals is None:
            return None
        history = self._history
        history.add(totals)
        if total:
            return self._answer(history.start, totals, times=False)
        if minutes is not None:
            return self._answer(history.since(now_s - 60 * minutes), totals)
        return self._answer(history.window, totals)

    def mixprec_reset_expert_stats(self, now_s: float) -> dict[str, Any] | None:
        """Begin a new window, while what is counted in all goes on.

        Returns:
            What :meth:`mixprec_expert_stats` would have said of the window that ends: whoever
            resets reads it in the same breath, so that nothing falls between two windows.
        """
        totals = self._read(now_s)
        if totals is None:
            return None
        ended = self._history.window
        self._history.reset(totals)
        return self._answer(ended, totals)

    def _answer(self, first: Totals, last: Totals, *, times: bool = True) -> dict[str, Any]:
        """Say what was counted between two readings."""
        return {
            "pp_rank": get_pp_group().rank_in_group,
            "layers": self._told,
            "experts": self._experts,
            "counts": (last.counts - first.counts).tobytes(),
            "tokens": [now - then for now, then in zip(last.tokens, first.tokens, strict=True)],
            "requests": last.requests - first.requests,
            "started_s": first.time_s,
            "seconds": max(0.0, last.time_s - first.time_s),
            "last_activation_s": self._history.last_activation_s.tobytes() if times else None,
        }

    def _read(self, now_s: float) -> Totals | None:
        """Copy the counters to the host; waits for the step that runs."""
        silent = get_tp_group().rank_in_group > 0
        if silent and not any(layer["shared"] for layer in self._layers):
            return None
        if self._read_arrays:  # without torch, whose operators are cold between two steps
            flat = np.concatenate(self._read_arrays).astype(np.int64)
            counts = flat.reshape(-1, self._experts)
            target, draft = (int(tokens[0]) for tokens in self._tokens_arrays)
        elif self._read_rows:  # put together on the device: one copy
            flat = torch.cat([*self._read_rows, *self._tokens]).cpu().numpy()
            counts = flat[:-2].reshape(-1, self._experts)
            target, draft = flat[-2:].tolist()
        else:
            counts, target, draft = np.zeros((0, self._experts), np.int64), 0, 0
        if silent:  # what is not shared among the ranks, rank 0 tells
            counts[[not layer["shared"] for layer in self._layers]] = 0
            shared = {layer["draft"] for layer in self._layers if layer["shared"]}
            target, draft = target * (False in shared), draft * (True in shared)
        return Totals(now_s, counts, (target, draft), self._requests)


def _refuse_unknown_rows(label: str, draft: bool, every_row: bool, parallel: Any) -> None:
    """Raise UnsupportedError where the rows that a layer gets are not those that were marked."""
    if not every_row and not label.removeprefix("draft.").isdigit():
        raise UnsupportedError(
            f"{label} is one of several MoE layers under one number, which may each get a part of "
            "the batch; expected one. This layer is not counted"
        )
    if draft and parallel.data_parallel_size > 1:
        raise UnsupportedError(
            f"draft layer {label}: an idle data-parallel step of a draft looks like a real one; "
            "expected one engine. The draft is not counted"
        )
    if draft and parallel.decode_context_parallel_size > 1:
        raise UnsupportedError(
            f"draft layer {label}: under decode context parallelism a draft's rows cannot be told "
            "from padding. The draft is not counted"
        )


def _experts_of(layer: Any, config: Any) -> int:
    """Return how many logical experts a layer has."""
    if isinstance(layer, MoERunner):
        return int(layer.moe_config.num_logical_experts)
    return int(config.model_config.get_num_experts())


def _top_k_of(layer: Any, config: Any) -> int:
    if isinstance(layer, MoERunner):
        return int(layer.moe_config.experts_per_token)
    return int(config.model_config.get_num_experts_per_tok())


def _labels(layers: list[tuple[str, bool]]) -> list[str]:
    """Name layers by their number in the model.

    A draft whose numbers are the target's too gets ``draft.0``; a model with several MoE layers
    under one number (text and vision experts) gets whole names.
    """
    numbers = [_number_of(name) for name, _ in layers]
    targets = Counter(n for n, (_, draft) in zip(numbers, layers, strict=True) if not draft)
    drafts = Counter(n for n, (_, draft) in zip(numbers, layers, strict=True) if draft)
    labels = []
    for number, (name, draft) in zip(numbers, layers, strict=True):
        if (drafts if draft else targets)[number] > 1:
            labels.append(name)
        else:
            labels.append(f"draft.{number}" if draft and number in targets else number)
    return labels


def _number_of(name: str) -> str:
    try:
        return str(extract_layer_index(name))
    except (AssertionError, ValueError):  # none or several numbers
        return name
