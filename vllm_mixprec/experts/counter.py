# SPDX-License-Identifier: Apache-2.0
"""Counts on the device, inside the forward pass, which experts real tokens are routed to.

The first MoE layer of a forward pass marks which rows are real tokens; every layer then adds its
rows' expert ids to an int64 tensor of its own. Both work on tensors that live as long as the model,
with static shapes, no allocation that a CUDA graph could not replay and no device sync. On a GPU
the router runs inside vLLM's opaque MoE op, so this code runs while a graph is captured and its
kernels are replayed. On a CPU torch.compile traces through the router: there the marking is an
operator of its own, because it asks vLLM's forward context, and the counting is plain in-place
tensor arithmetic that is compiled with the layer.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import vllm.envs as envs
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCaptureSource,
    RoutedExpertsSink,
)
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.experts.rows import own_rows

logger = init_logger("vllm.mixprec")

Capture = Callable[[Tensor], None]


class LayerCounter:
    """Adds one MoE layer's expert ids to its counts.

    Attributes:
        counts: int64, on a CPU float64, ``[at least experts]``, of this layer alone. Not a row of
            one tensor for all: torch.compile would have every layer wait for the one before and
            count them all at the end of the pass, in loops of their own, which at batch 1 cost
            1.6 % of a step; so each is counted in a loop that its layer has anyway.
        tokens: int64 ``[1]``, the real rows that passed; shared by the layers of one model.
        real: for each micro-batch bool ``[rows]``, which rows are real tokens; shared by all
            layers. Not one tensor, whose part torch.compile would copy before it is written to.
            None where every row is one.
        experts: of the layer.
        marks: whether this layer, the first of its model, says which rows are real.
    """

    def __init__(
        self,
        counts: Tensor,
        tokens: Tensor,
        real: Sequence[Tensor] | None,
        *,
        experts: int,
        marks: bool,
        shares: tuple[int, int, int],
    ) -> None:
        self.counts = counts
        self.tokens = tokens
        self.real = real
        self.experts = experts
        self.marks = marks
        self.shares = shares
        self.sink: RoutedExpertsSink | None = None

    def count(self, topk_ids: Tensor) -> None:
        """Count one batch: integer logical ids ``[rows, experts per token]``.

        Ids outside the layer's experts, which some kernels write into padding, are not counted.
        """
        rows = topk_ids.shape[0]
        if self.real is None:
            real = None
            if self.marks:
                self.tokens.add_(rows)
        else:
            real = self.real[0 if len(self.real) == 1 else dbo_current_ubatch_id()]
            if self.marks:
                mark_real_rows(real, self.tokens, rows, *self.shares)
        if topk_ids.is_cuda and HAS_TRITON:
            assert real is not None, "a CUDA graph pads its batch"
            count_experts(topk_ids, real, self.counts, self.experts)
            return
        ids = topk_ids.to(torch.int64)
        counted = (ids >= 0) & (ids < self.experts)
        if real is not None:
            counted = counted & real[:rows].unsqueeze(1)
        where = ids.clamp(0, self.experts - 1)
        self.counts.index_put_(
            (where.flatten(),), counted.flatten().to(self.counts.dtype), accumulate=True
        )


def _mark_real_rows(
    real: Tensor, tokens: Tensor, rows: int, dp_rank: int, sp_rank: int, sp_size: int
) -> None:
    """Write which of the batch's rows are tokens that this rank counts, and add their number.

    Args:
        real: bool ``[at least rows]``, overwritten up to ``rows``.
        tokens: int64 ``[1]``, added to.
        rows: of the batch that the routers see.
        dp_rank: of this worker.
        sp_rank: of this worker in its sequence-parallel group.
        sp_size: of that group, 1 without.
    """
    context = get_forward_context()
    # The model runners say for the target model which rows are padding or a dummy run; the V2
    # runner only under this variable. A draft only has its KV-cache slots, -1 where nothing is
    # to be written.
    padding = context.is_padding if envs.VLLM_MOE_SKIP_PADDING else None
    if context.ubatch_slices is not None:
        padding = None
    slots = context.slot_mapping
    mask = padding
    if mask is None and isinstance(slots, dict):
        mask = next(iter(slots.values()), None)
    if mask is None:  # profiling, before there is a KV cache
        real[:rows].zero_()
        return
    dp = context.dp_metadata
    span = own_rows(
        rows,
        len(mask),
        dp_tokens=None if dp is None else dp.num_tokens_across_dp_cpu.tolist(),
        dp_rank=dp_rank,
        sp_rank=sp_rank,
        sp_size=sp_size,
    )
    if span is None:
        real[:rows].zero_()
        logger.warning_once(
            "expert statistics: %d rows for %d tokens is a layout that is not known, and is not "
            "counted. Please report it with the server's arguments",
            rows,
            len(mask),
        )
        return
    own = real[:rows]
    if not span.tokens == rows == len(mask):
        own.zero_()
        own = own[span.row : span.row + span.tokens]
        mask = mask[span.token : span.token + span.tokens]
    if padding is not None:
        torch.bitwise_not(mask, out=own)
    else:
        torch.ge(mask, 0, out=own)
    tokens.add_(own.sum())


_library = torch.library.Library("vllm_mixprec", "FRAGMENT")
direct_register_custom_op(
    "mark_real_rows",
    _mark_real_rows,
    mutates_args=["real", "tokens"],
    fake_impl=lambda real, tokens, rows, dp_rank, sp_rank, sp_size: None,
    target_lib=_library,
    dispatch_key="CompositeExplicitAutograd",
)
mark_real_rows = torch.ops.vllm_mixprec.mark_real_rows


def attach(runner: MoERunner, counter: LayerCounter) -> None:
    """Have a layer's router count, and keep doing so beside vLLM's own capture.

    Raises:
        UnsupportedError: the layer's kernel routes by itself and does not tell what it chose.
    """
    if isinstance(runner.router, ZeroExpertRouter):
        raise UnsupportedError(
            f"{runner.layer_name}: its router reports zero experts as expert 0; expected the ids "
            "as they were chosen. This layer is not counted"
        )
    if runner.is_monolithic:
        kernel = getattr(runner._quant_method, "moe_kernel", None)
        experts = getattr(getattr(kernel, "impl", None), "fused_experts", None)
        tells = getattr(experts, "supports_routing_replay_capture", None)
        if tells is None or not tells():
            raise UnsupportedError(
                f"{runner.layer_name}: the kernel {type(experts).__name__} routes by itself and "
                "does not tell what it chose; expected one that reports its routing. Choose "
                "another with --moe-backend triton, or do without this layer's counts"
            )
        counter.sink = RoutedExpertsSink(experts.moe_config, counter.count)
        runner.routed_experts.routing_sink = counter.sink
        return
    router = runner.router
    if not isinstance(router, BaseRouter):
        raise UnsupportedError(
            f"{runner.layer_name}: a router of type {type(router).__name__}; expected a "
            "BaseRouter, which reports its choice. This layer is not counted"
        )
    router.capture_fn = chain(counter.count, router.capture_fn)
    # vLLM's --enable-return-routed-experts sets its own later, and would put ours out.
    router.set_capture_fn = partial(_chain_capture, router, counter.count)  # type: ignore[method-assign]


def detach(runner: MoERunner) -> None:
    """Have a layer stop counting."""
    if runner.is_monolithic:
        runner.routed_experts.routing_sink = None
    elif isinstance(runner.router, BaseRouter):
        runner.router.__dict__.pop("set_capture_fn", None)
        runner.router.capture_fn = None


def keep_sink(runner: MoERunner, counter: LayerCounter) -> None:
    """Count on where vLLM's own capture has put its sink in the place of ours.

    It does so when the KV cache is there, for kernels that route by themselves; routers are
    asked through ``set_capture_fn``, which :func:`attach` watches.
    """
    sink = runner.routed_experts.routing_sink if runner.is_monolithic else None
    if sink is not None and sink is not counter.sink:
        sink.capture_fn = chain(counter.count, sink.capture_fn)
        counter.sink = sink


def attach_source(source: RoutedExpertsCaptureSource, counter: LayerCounter) -> None:
    """Have a layer count that reports its routing without vLLM's runner."""
    source.capture_fn = chain(counter.count, source.capture_fn)


def chain(ours: Capture, theirs: Capture | None) -> Capture:
    """Return a callback that serves both."""
    if theirs is None:
        return ours

    def both(topk_ids: Tensor) -> None:
        ours(topk_ids)
        theirs(topk_ids)

    return both


def _chain_capture(router: BaseRouter, ours: Capture, theirs: Capture | None) -> None:
    router.capture_fn = chain(ours, theirs)


if HAS_TRITON:
    from vllm_mixprec.experts.kernel import count_experts
