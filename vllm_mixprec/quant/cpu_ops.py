# SPDX-License-Identifier: Apache-2.0
"""vLLM's compiled x86 expert kernels, for experts of one layer in several formats.

vLLM 0.32 ships ``fused_experts_cpu`` (csrc/cpu/sgl-kernels/moe.cpp) for bf16, FP8 and int4 weights
but offers it only on CPUs with AMX tiles. The kernels themselves run on AVX512_BF16 without AMX;
:func:`probe` runs each on a known case before it is trusted. Their traps, all avoided here: an
expert id of -1 crashes them, an empty batch divides by zero, and non-contiguous ids or weights give
wrong results without an error.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import cache

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.utils.torch_utils import direct_register_custom_op, set_default_torch_dtype

from vllm_mixprec.checkpoint.packing import AWQ_ORDER, pack, unpack
from vllm_mixprec.checkpoint.stored import unpin
from vllm_mixprec.quant.int4_blocks import block_awq, block_columns, block_gptq

Int4Layout = ops.CPUQuantAlgo
"""What int4 weights are packed from: AWQ's words or GPTQ v1's."""


class ExpertKernel(IntEnum):
    """A weight format of ``fused_experts_cpu``; the values are vLLM's ``CPUQuantMethod``."""

    BF16 = 0
    FP8_BLOCK = 2
    INT4 = 3


# How many tensors a group passes to the op: w13, w2, then scales, then zero points.
_TENSORS: dict[int, int] = {ExpertKernel.BF16: 2, ExpertKernel.FP8_BLOCK: 4, ExpertKernel.INT4: 6}

# The kernels order weights by blocks of output features, each by itself.
_BLOCK_ROWS = 32
_REORDER_BYTES = 2 << 20
_THREADS = 4


def pack_plain(weight: torch.Tensor) -> torch.Tensor:
    """Reorder bf16 or E4M3 weights, (N, K) or (experts, N, K), for the kernel, and return them.

    They are reordered where they are, a few megabytes at a time: a copy of a layer's experts would
    be the peak of loading, and its fresh pages cost as much time as the work does.
    """
    row_bytes = weight.shape[-1] * weight.element_size()
    rows = max(_REORDER_BYTES // (_BLOCK_ROWS * row_bytes), 1) * _BLOCK_ROWS
    for matrix in weight.view(-1, *weight.shape[-2:]):
        for part in matrix.split(rows):
            part.copy_(torch.ops._C.convert_weight_packed(part))
    return weight


def pack_int4(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, layout: Int4Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block int4 tensors, of one linear or, with a leading dimension, of experts.

    Of GPTQ v1 ``weight`` is (K / 8, N) int32, of AWQ (K, N / 8); ``scale`` (K / g, N), ``zero``
    (K / g, N / 8) int32 holding the zero points, of GPTQ less 1, each as its checkpoints pack it.
    Returns the blocked weight uint8, scale float32 and zero point int8.
    """
    awq = layout == Int4Layout.AWQ
    experts = weight[None] if weight.dim() == 2 else weight
    groups, n = scale.shape[-2:]
    group_size = experts.shape[1] * (1 if awq else 8) // groups
    room = _room_of(experts, group_size)
    in_place = room is not None
    if room is None:
        room = torch.empty(_roomy_shape(experts, group_size), dtype=torch.int32)
    blocked = room.view(torch.uint8).view(
        len(experts), n // _BLOCK_ROWS, -1, 16 * block_columns(group_size) + 128
    )
    zeros = unpack(zero, 4, AWQ_ORDER) if awq else unpack(zero, 4) + 1
    place = block_awq if awq else block_gptq

    def block(words: torch.Tensor, points: torch.Tensor, out: torch.Tensor) -> None:
        place(words.clone() if in_place else words, points, group_size, out)

    each = experts, zeros.view(-1, groups, n), blocked
    if len(experts) == 1 or torch.get_num_threads() > 1:
        list(map(block, *each))
    else:  # where OpenMP has one thread, whole experts go to the cores that it leaves idle
        with ThreadPoolExecutor(_THREADS, initializer=unpin) as pool:
            list(pool.map(block, *each))
    factors, points = (
        each.unflatten(-1, (-1, _BLOCK_ROWS)).transpose(-3, -2).to(dtype).contiguous()
        for each, dtype in ((scale, torch.float32), (zeros, torch.int8))
    )
    return (blocked if weight.dim() == 3 else blocked[0]), factors, points


def with_room(words: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return a tensor of this shape, (experts, K / 8, N) or (experts, K, N / 8), not its values.

    Its experts lie as far apart as :func:`pack_int4` needs to block them where they are: fresh
    memory for the result costs as much time as the work does, and would be the peak of loading.
    """
    room = torch.empty(_roomy_shape(words, group_size), dtype=torch.int32)
    return room[:, : words[0].numel()].view(words.shape)


def _room_of(words: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """Return the whole memory of a tensor that :func:`with_room` made; None of any other."""
    experts, each = _roomy_shape(words, group_size)
    storage = words.untyped_storage()
    if words.stride(0) != each or storage.nbytes() != 4 * experts * each:
        return None
    return torch.empty(0, dtype=torch.int32).set_(storage).view(experts, each)


def _roomy_shape(words: torch.Tensor, group_size: int) -> tuple[int, int]:
    """Experts, and int32 that each takes when blocked: its words, and a sum a block and column."""
    each = words[0].numel()
    return len(words), each + 8 * each // block_columns(group_size)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block: list[int]
) -> torch.Tensor:
    """Multiply (M, K) bfloat16 by a packed E4M3 weight (N, K) with its block scales: (M, N)."""
    return torch.ops._C.fp8_scaled_mm_cpu(x.contiguous(), weight, scale, block, None, x.dtype, True)


def int4_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """Multiply (M, K) bfloat16 by a blocked int4 weight: (M, N)."""
    return ops.int4_scaled_mm_cpu(x.contiguous(), weight, zero, scale, None)


def _run(
    kernel: int,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    tensors: list[torch.Tensor],
    block: list[int],
) -> torch.Tensor:
    """Run one kernel: ``x`` (M, H), ``weights`` float32 and ``ids`` int32 (M, k) of local slots."""
    out = torch.empty_like(x)
    scales = tensors[2:4] if len(tensors) > 2 else (None, None)
    zeros = tensors[4:6] if len(tensors) > 4 else (None, None)
    # The dispatcher is called directly: the Python wrapper of vLLM costs as much again per call.
    torch.ops._C.fused_experts_cpu(
        *(out, x, tensors[0], tensors[1], weights, ids, kernel, *scales, *zeros, None),
        *(block or None, None, None, None, None, True),
    )
    return out


def _mixed_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor | None,
    tensors: list[torch.Tensor],
    kernels: list[int],
    blocks: list[int],
) -> torch.Tensor:
    """Run the routed experts of one layer, one kernel call for each group of one format.

    Args:
        x: (M, H) bfloat16.
        topk_weights: (M, k) float32.
        topk_ids: (M, k) logical expert ids.
        slots: (2, experts) int32, contiguous: group of an expert (-1: on another rank) and its slot
            in that group. None: one group that holds every expert in order.
        tensors: the groups' packed tensors, one group after the other.
        kernels: an :class:`ExpertKernel` a group.
        blocks: two ints a group, the FP8 block (N, K); 0 where the format has none.

    Returns:
        (M, H) like ``x``: the sum over groups, accumulated in float32.
    """
    topk_weights = topk_weights.float().contiguous()
    if x.shape[0] == 0:
        return torch.empty_like(x)
    x = x.contiguous()
    if slots is None:
        ids = topk_ids.to(torch.int32).contiguous()
        return _run(kernels[0], x, topk_weights, ids, tensors, _block(blocks, 0))

    # Indices are worked out in numpy: at decode sizes a torch operator costs more than the work.
    pair_group, pair_slot = slots.numpy()[:, topk_ids.reshape(-1).numpy()]
    if x.shape[0] == 1:
        return _mixed_one_token(x, topk_weights, pair_group, pair_slot, tensors, kernels, blocks)

    # Each (token, choice) pair becomes a row with one expert, because the kernel cannot skip a
    # pair that belongs to another group.
    top_k = topk_ids.shape[1]
    pair_weights = topk_weights.view(-1, 1)
    total = torch.zeros(x.shape, dtype=torch.float32)
    for number, kernel, group in _groups(kernels, tensors):
        pairs = (pair_group == number).nonzero()[0]
        if pairs.size == 0:
            continue
        rows = torch.from_numpy(pairs // top_k)
        part = _run(
            kernel,
            x.index_select(0, rows),
            pair_weights.index_select(0, torch.from_numpy(pairs)),
            torch.from_numpy(pair_slot[pairs]).unsqueeze(1),
            group,
            _block(blocks, number),
        )
        total.index_add_(0, rows, part.float())
    return total.to(x.dtype)


def _mixed_one_token(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    pair_group: np.ndarray,
    pair_slot: np.ndarray,
    tensors: list[torch.Tensor],
    kernels: list[int],
    blocks: list[int],
) -> torch.Tensor:
    """Decode at batch 1: every group reads the same row, so nothing is gathered or scattered."""
    total = None
    weights = topk_weights.numpy()
    for number, kernel, group in _groups(kernels, tensors):
        mine = pair_group == number
        if not mine.any():
            continue
        ids = torch.from_numpy(pair_slot[None, mine])
        part = _run(
            kernel, x, torch.from_numpy(weights[:, mine]), ids, group, _block(blocks, number)
        )
        total = part if total is None else total.add_(part)
    return torch.zeros_like(x) if total is None else total


def _groups(
    kernels: list[int], tensors: list[torch.Tensor]
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """Yield (group, kernel, its tensors) from the flat list that a torch operator can take."""
    start = 0
    for number, kernel in enumerate(kernels):
        end = start + _TENSORS[kernel]
        yield number, kernel, tensors[start:end]
        start = end


def _block(blocks: list[int], number: int) -> list[int]:
    block = blocks[2 * number : 2 * number + 2]
    return block if block[0] else []


def _mixed_experts_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    slots: torch.Tensor | None,
    tensors: list[torch.Tensor],
    kernels: list[int],
    blocks: list[int],
) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("vllm_mixprec", "FRAGMENT")
direct_register_custom_op(
    "cpu_mixed_experts",
    _mixed_experts,
    fake_impl=_mixed_experts_fake,
    target_lib=_library,
    dispatch_key="CPU",
)
mixed_experts = torch.ops.vllm_mixprec.cpu_mixed_experts


@cache
def probe(kernel: ExpertKernel, layout: Int4Layout | None = None) -> str | None:
    """Run a kernel, experts and linear, on a small known case; None means it can be trusted.

    Two experts, 256 x 128, three tokens, against float32 arithmetic on the same dequantised
    weights; ``layout`` is that of int4 ones. Returns what went wrong otherwise. A CPU without the
    instructions would die of SIGILL here, so the caller asks the CPU's flags first.
    """
    # A worker calls this while it builds the model, under the model's default dtype and device.
    with set_default_torch_dtype(torch.float32), torch.device("cpu"):
        try:
            if layout is not None and not _is_blocked_as_vllm_does(layout):
                return "vLLM lays int4 out otherwise than is known here"
            error = _probe(kernel, layout)
        except (RuntimeError, AttributeError, NotImplementedError) as problem:
            return f"its probe raised {type(problem).__name__}: {str(problem).splitlines()[0]}"
    # int8 activations cost the int4 kernel about 0.02, rounding to bf16 the others 0.004; a wrong
    # layout, sign or scale is off by 0.3 and more.
    if not error < 0.06:
        return f"its probe is off by {error:.3f} of the result's norm (at most 0.06)"
    return None


def _probe(kernel: ExpertKernel, layout: Int4Layout | None) -> float:
    """Return the larger relative error of the expert and the linear kernel."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = 256, 128
    x = torch.randn(3, hidden, generator=generator).bfloat16()
    ids = torch.tensor([[0, 1], [1, 0], [1, 0]], dtype=torch.int32)
    weights = torch.rand(3, 2, generator=generator)
    w13, stored13 = _probe_weights(kernel, layout, 2 * inner, hidden, generator)
    w2, stored2 = _probe_weights(kernel, layout, hidden, inner, generator)
    linear = _pack(layout, [tensor[0].clone() for tensor in stored13])  # packing may be in place
    packed = zip(_pack(layout, stored13), _pack(layout, stored2), strict=True)
    block = [128, 128] if kernel is ExpertKernel.FP8_BLOCK else [0, 0]
    tensors = [tensor for pair in packed for tensor in pair]
    out = mixed_experts(x, weights, ids, None, tensors, [kernel], block)
    expected = torch.zeros(3, hidden)
    for token in range(3):
        for choice, expert in enumerate(ids[token].tolist()):
            gate, up = (w13[expert] @ x[token].float()).chunk(2)
            act = torch.nn.functional.silu(gate) * up
            expected[token] += weights[token, choice] * (w2[expert] @ act)
    error = ((out.float() - expected).norm() / expected.norm()).item()
    if kernel is ExpertKernel.BF16:  # vLLM's own linear serves bf16
        return error
    out = (
        fp8_linear(x, *linear, block)
        if kernel is ExpertKernel.FP8_BLOCK
        else int4_linear(x, *linear)
    )
    expected = x.float() @ w13[0].T
    return max(error, ((out.float() - expected).norm() / expected.norm()).item())


def _is_blocked_as_vllm_does(layout: Int4Layout) -> bool:
    """Compare :func:`pack_int4` with vLLM's own, byte by byte, in each size of block."""
    generator = torch.Generator().manual_seed(0)
    for group_size in (32, 64, 128, 256):
        words = (256, 8) if layout == Int4Layout.AWQ else (32, 64)
        weight, zero = (
            torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
            for shape in (words, (256 // group_size, 8))
        )
        scale = torch.rand(256 // group_size, 64, generator=generator)
        expected = ops.convert_weight_packed_scale_zp(weight, zero, scale, layout)
        found, scales, zeros = pack_int4(weight, scale, zero, layout)
        if not all(map(torch.equal, (found, zeros, scales), expected)):
            return False
    return True


def _pack(layout: Int4Layout | None, stored: list[torch.Tensor]) -> list[torch.Tensor]:
    if layout is not None:
        weight, scale, zero = stored
        return list(pack_int4(weight, scale, zero, layout))
    return [pack_plain(stored[0]), *stored[1:]]


def _probe_weights(
    kernel: ExpertKernel,
    layout: Int4Layout | None,
    n: int,
    k: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return two experts' float32 weights (2, n, k) and the tensors a checkpoint holds of them."""
    weight = torch.randn(2, n, k, generator=generator)
    if kernel is ExpertKernel.BF16:
        weight = (weight / k**0.5).bfloat16()
        return weight.float(), [weight]
    if kernel is ExpertKernel.FP8_BLOCK:
        weight = (weight * 8).to(torch.float8_e4m3fn)
        scale = torch.rand(2, n // 128, k // 128, generator=generator) / (8 * k**0.5)
        wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        return weight.float() * wide, [weight, scale]
    group = 64
    codes = torch.randint(0, 16, (2, k, n), generator=generator)
    offset = 0 if layout == Int4Layout.AWQ else 1  # what is added to a stored zero point
    zeros = torch.randint(0, 16, (2, k // group, n), generator=generator) + offset
    scale = torch.rand(2, k // group, n, generator=generator) / (6 * k**0.5)
    centred = codes - zeros.repeat_interleave(group, 1)
    dense = (centred * scale.repeat_interleave(group, 1)).mT.contiguous()
    if layout == Int4Layout.AWQ:
        words, zero_words = (pack(each.int(), 4, AWQ_ORDER) for each in (codes, zeros))
    else:
        words, zero_words = pack(codes.mT.int(), 4).mT, pack((zeros - offset).int(), 4)
    return dense, [words, scale, zero_words]
