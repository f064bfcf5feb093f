# SPDX-License-Identifier: Apache-2.0
"""The routed experts of one layer in several formats, as one Triton launch a GEMM.

Stock kernels take all experts in one tensor of one format. Here each tile reads its expert's line
of a descriptor table (:class:`~vllm_mixprec.quant.grouped_weights.ExpertTable`), which holds the
format and the addresses, and branches on it; a program serves one tile, so no warp diverges.
Weights are widened in registers; activations are never quantised.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
# Triton has no types, and what it compiles cannot be annotated.

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_mixprec.quant.grouped_tiles import Aligned, TileConfig, align_tokens, choose_config
from vllm_mixprec.quant.grouped_weights import FIELDS, ExpertTable, Field, Format

# A jitted function reads no globals but these.
_FIELDS = tl.constexpr(FIELDS)
_FORMAT = tl.constexpr(int(Field.FORMAT))
_WEIGHT = tl.constexpr(int(Field.WEIGHT))
_SCALES = tl.constexpr(int(Field.SCALES))
_ZEROS = tl.constexpr(int(Field.ZEROS))
_WEIGHT_STRIDE = tl.constexpr(int(Field.WEIGHT_STRIDE))
_SCALE_STRIDE = tl.constexpr(int(Field.SCALE_STRIDE))
_BLOCK_ROWS = tl.constexpr(int(Field.BLOCK_ROWS))
_BLOCK_COLS = tl.constexpr(int(Field.BLOCK_COLS))
_UP_SHIFT = tl.constexpr(int(Field.UP_SHIFT))
_UP_SCALES = tl.constexpr(int(Field.UP_SCALES))
_FP16_SCALES = tl.constexpr(int(Field.FP16_SCALES))
_ABSENT = tl.constexpr(int(Format.ABSENT))
_BF16 = tl.constexpr(int(Format.BF16))
_FP8_BLOCK = tl.constexpr(int(Format.FP8_BLOCK))
_INT4 = tl.constexpr(int(Format.INT4))

# The power of two whose last mantissa bit is 1, and its bits: a code or'ed into them is added.
_BITS_BF16, _BASE_BF16 = tl.constexpr(0x4300), tl.constexpr(128.0)
_BITS_FP16, _BASE_FP16 = tl.constexpr(0x6400), tl.constexpr(1024.0)
_BITS_FP32, _BASE_FP32 = tl.constexpr(0x4B000000), tl.constexpr(8388608.0)

_TILES_A_GROUP = tl.constexpr(8)
_SUM_BLOCK = 1024


@triton.jit
def decode_e4m3(codes, KEEP_NAN: tl.constexpr):
    """Widen E4M3 bytes to float32, exactly, on any device.

    Triton converts fp8e4nv from compute capability 8.9 on only. With the bits moved into place the
    exponent is 120 too small, for normal and subnormal numbers alike, which one product mends.
    """
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    value = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    if KEEP_NAN:
        value = tl.where((codes & 0x7F) == 0x7F, float("nan"), value)
    return value


@triton.jit
def subtract_zero(code, zero, COMPUTE: tl.constexpr):
    """Return int4 ``code`` (uint8, 0 to 15) minus float32 ``zero`` (0 to 16), exact in COMPUTE.

    Several times cheaper than converting an integer; see ``_BITS_BF16``.
    """
    if COMPUTE == tl.bfloat16:
        value = (code.to(tl.uint16) | _BITS_BF16).to(tl.bfloat16, bitcast=True)
        return value - (zero + _BASE_BF16).to(tl.bfloat16)
    elif COMPUTE == tl.float16:
        value = (code.to(tl.uint16) | _BITS_FP16).to(tl.float16, bitcast=True)
        return value - (zero + _BASE_FP16).to(tl.float16)
    else:
        value = (code.to(tl.uint32) | _BITS_FP32).to(tl.float32, bitcast=True)
        return value - (zero + _BASE_FP32)


@triton.jit
def _load_x(x_rows, is_pair, k, cols, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr):
    """Load [BLOCK_M, len(k)] of the hidden states; 0 for padding and past the last column."""
    mask = is_pair[:, None]
    if not EVEN_K:
        mask = mask & (k < cols)[None, :]
    return tl.load(x_rows[:, None] + k[None, :], mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _load_weight(pointers, k, cols, EVEN_K: tl.constexpr):
    """Load [len(k), BLOCK_N] of a weight, 0 past the last column."""
    if EVEN_K:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < cols)[:, None], other=0)


@triton.jit
def _multiply_plain(
    x_rows, is_pair, line, row, cols, acc,
    EVEN_K: tl.constexpr, COMPUTE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    cols = tl.multiple_of(cols, 8)
    weight = tl.load(line + _WEIGHT).to(x_rows.dtype)
    weight = tl.multiple_of(weight, 16)
    stride = tl.multiple_of(tl.load(line + _WEIGHT_STRIDE).to(tl.int32), 8)
    k = tl.arange(0, STEP)
    tile = row[None, :] * stride + k[:, None]
    for first in range(0, cols, STEP):
        x = _load_x(x_rows, is_pair, first + k, cols, EVEN_K, COMPUTE)
        w = _load_weight(weight + first + tile, first + k, cols, EVEN_K)
        acc = tl.dot(x, w.to(COMPUTE), acc)
    return acc


@triton.jit
def _multiply_fp8(
    x_rows, is_pair, line, row, part, row_in_part, cols, acc,
    EVEN_K: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr, STEP: tl.constexpr, KEEP_NAN: tl.constexpr,
):  # fmt: skip
    cols = tl.multiple_of(cols, 16)
    weight = tl.multiple_of(tl.load(line + _WEIGHT).to(tl.pointer_type(tl.uint8)), 16)
    stride = tl.multiple_of(tl.load(line + _WEIGHT_STRIDE).to(tl.int32), 16)
    scales = tl.load(line + _SCALES).to(tl.pointer_type(tl.float32))
    scale_stride = tl.load(line + _SCALE_STRIDE).to(tl.int32)
    block_rows = tl.load(line + _BLOCK_ROWS).to(tl.int32)
    block_cols = tl.load(line + _BLOCK_COLS).to(tl.int32)
    shift = tl.load(line + _UP_SHIFT).to(tl.int32)
    scale_row = (row_in_part + part * shift) // block_rows
    scale_row += part * tl.load(line + _UP_SCALES).to(tl.int32)
    scales += scale_row * scale_stride
    k = tl.arange(0, STEP)
    tile = row[None, :] * stride + k[:, None]
    scale = tl.load(scales)
    for outer in range(0, cols, BLOCK_K):
        for inner in tl.static_range(BLOCK_K // STEP):
            first = outer + inner * STEP
            # Triton pipelines only what a dot reads: the scale is fetched a step ahead here.
            next_scale = tl.load(scales + tl.minimum(first + STEP, cols - 1) // block_cols)
            x = _load_x(x_rows, is_pair, first + k, cols, EVEN_K, COMPUTE)
            codes = _load_weight(weight + first + tile, first + k, cols, EVEN_K)
            acc += tl.dot(x, decode_e4m3(codes, KEEP_NAN).to(COMPUTE)) * scale[None, :]
            scale = next_scale
    return acc


@triton.jit
def _multiply_int4(
    x_rows, is_pair, line, row, cols, acc,
    EVEN_K: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    cols = tl.multiple_of(cols, 32)
    weight = tl.multiple_of(tl.load(line + _WEIGHT).to(tl.pointer_type(tl.uint8)), 16)
    stride = tl.multiple_of(tl.load(line + _WEIGHT_STRIDE).to(tl.int32), 16)
    scales = tl.load(line + _SCALES).to(tl.pointer_type(tl.uint16)) + row
    scale_stride = tl.load(line + _SCALE_STRIDE).to(tl.int32)
    is_fp16 = tl.load(line + _FP16_SCALES) != 0
    address = tl.load(line + _ZEROS)
    zeros = address.to(tl.pointer_type(tl.uint8)) + row
    has_zeros = tl.where(address != 0, row, -1) >= 0
    group_size = tl.load(line + _BLOCK_COLS).to(tl.int32)
    byte = tl.arange(0, STEP // 2)
    k = byte // 16 * 32 + byte % 16
    tile = row[None, :] * 16 + (byte // 16 * stride + byte % 16)[:, None]
    zero = tl.full((BLOCK_N,), 8.0, tl.float32)
    bits = tl.load(scales)
    if HAS_ZEROS:
        stored = tl.load(zeros, mask=has_zeros, other=8)
    for outer in range(0, cols, BLOCK_K):
        for inner in tl.static_range(BLOCK_K // STEP):
            first = outer + inner * STEP
            # Triton pipelines only what a dot reads: these are fetched a step ahead here.
            group = tl.minimum(first + STEP, cols - 1) // group_size * scale_stride
            next_bits = tl.load(scales + group)
            if HAS_ZEROS:
                next_stored = tl.load(zeros + group, mask=has_zeros, other=8)
                zero = stored.to(tl.float32)
                stored = next_stored
            low_x = _load_x(x_rows, is_pair, first + k, cols, EVEN_K, COMPUTE)
            high_x = _load_x(x_rows, is_pair, first + k + 16, cols, EVEN_K, COMPUTE)
            slices = weight + (first // 32).to(tl.int64) * stride
            codes = _load_weight(slices + tile, first + k, cols, EVEN_K)
            part = tl.dot(low_x, subtract_zero(codes & 15, zero[None, :], COMPUTE))
            part = tl.dot(high_x, subtract_zero(codes >> 4, zero[None, :], COMPUTE), part)
            scale = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
            scale = tl.where(is_fp16, bits.to(tl.float16, bitcast=True).to(tl.float32), scale)
            acc += part * scale[None, :]
            bits = next_bits
    return acc


@triton.jit(do_not_specialize=["tiles", "pairs"])  # they change with every batch
def _gemm_kernel(
    x, out, table, sorted_ids, expert_ids, padded, router_weights,
    tiles, pairs, experts, rows, cols, x_stride,
    TOP_K: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr,
    PLAIN: tl.constexpr, FP8_STEP: tl.constexpr, FP8_NAN: tl.constexpr,
    INT4_STEP: tl.constexpr, INT4_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile: rows of x for pairs of one expert, times BLOCK_N rows of its weight.

    GATED: column 2i of the tile is gate row i, column 2i + 1 up row i, and out [pairs, rows] is
    silu(gate) * up. Otherwise out [pairs, rows] is the product times the router's weight.
    """
    PARTS: tl.constexpr = 2 if GATED else 1
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    # Tiles of the same expert follow each other; those that share weights run close in time.
    program = tl.program_id(0)
    columns = tl.cdiv(rows, WIDTH)
    group = program // (_TILES_A_GROUP * columns)
    first = group * _TILES_A_GROUP
    height = tl.minimum(tiles - first, _TILES_A_GROUP)
    within = program % (_TILES_A_GROUP * columns)
    pid_m, pid_n = first + within % height, within // height
    if pid_m * BLOCK_M >= tl.load(padded):
        return
    expert = tl.load(expert_ids + pid_m)
    if (expert < 0) | (expert >= experts):
        return
    line = table + expert.to(tl.int64) * _FIELDS
    storage = tl.load(line + _FORMAT)
    if storage == _ABSENT:  # the sum skips its rows
        return

    pair = tl.load(sorted_ids + pid_m * BLOCK_M + tl.arange(0, BLOCK_M))
    is_pair = pair < pairs
    pair = pair.to(tl.int64)
    x_rows = x + pair // TOP_K * x_stride
    column = tl.arange(0, BLOCK_N)
    part = column % PARTS
    # Past the last row the last is read again; its results are not stored.
    row_in_part = tl.minimum(pid_n * WIDTH + column // PARTS, rows - 1)
    row = part * rows + row_in_part

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PLAIN:
        if storage == _BF16:
            acc = _multiply_plain(
                x_rows, is_pair, line, row, cols, acc, EVEN_K, COMPUTE, BLOCK_K // 2
            )
    if FP8_STEP:
        if storage == _FP8_BLOCK:
            acc = _multiply_fp8(
                x_rows, is_pair, line, row, part, row_in_part, cols, acc,
                EVEN_K, COMPUTE, BLOCK_K, FP8_STEP, FP8_NAN,
            )  # fmt: skip
    if INT4_STEP:
        if storage == _INT4:
            acc = _multiply_int4(
                x_rows, is_pair, line, row, cols, acc,
                EVEN_K, COMPUTE, BLOCK_N, BLOCK_K, INT4_STEP, INT4_ZEROS,
            )  # fmt: skip

    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, WIDTH, 2)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    else:
        weight = tl.load(router_weights + pair, mask=is_pair, other=0.0)
        acc = acc * weight[:, None]
    out_column = pid_n * WIDTH + tl.arange(0, WIDTH)
    mask = is_pair[:, None] & (out_column < rows)[None, :]
    tl.store(out + pair[:, None] * rows + out_column[None, :], acc, mask=mask)


@triton.jit
def _sum_kernel(rows, ids, table, out, experts, cols, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Add the rows of a token's experts in float32, without those that no tile wrote."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(ids + pair).to(tl.int64)
        is_id = (expert >= 0) & (expert < experts)
        line = table + tl.where(is_id, expert, 0) * _FIELDS
        storage = tl.load(line + _FORMAT, mask=is_id, other=_ABSENT)
        written = tl.where(storage != _ABSENT, cols, 0)
        total += tl.load(rows + pair * cols + column, mask=column < written, other=0.0)
    tl.store(out + token * cols + column, total, mask=column < cols)


_COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
if not isinstance(_gemm_kernel, triton.runtime.JITFunction):
    # Triton's interpreter does no arithmetic in bfloat16. float32 holds the same operands.
    _COMPUTE[torch.bfloat16] = tl.float32


def grouped_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    table: ExpertTable,
    *,
    config: TileConfig | None = None,
    aligned: Aligned | None = None,
) -> Tensor:
    """Run the routed experts of a layer.

    ``out[m] = sum_j topk_weights[m, j] * W2 @ (silu(gate @ x[m]) * (up @ x[m]))``. Products are
    accumulated in float32; what is between the GEMMs is rounded to the dtype of ``x``, as in vLLM.

    Args:
        x: [M, K], the table's dtype and device.
        topk_weights: [M, top_k].
        topk_ids: integer [M, top_k], lines of the table. -1, and an expert that is absent, add 0.
        table: the weights.
        config: the tile; by default :func:`choose_config`'s.
        aligned: :func:`align_tokens`' result for ``topk_ids`` and ``config.block_m``, or that of
            vLLM's ``moe_align_block_size`` without an expert map.

    Returns:
        A new tensor like ``x``.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    rows, top_k = topk_ids.shape
    if x.dtype != table.dtype or x.shape != (rows, table.hidden_size):
        raise ValueError(
            f"hidden states {list(x.shape)} {x.dtype}, expected {[rows, table.hidden_size]} "
            f"{table.dtype}. Pass what the table was built for"
        )
    if topk_weights.shape != topk_ids.shape or (aligned is not None and config is None):
        raise ValueError(
            f"topk_weights {list(topk_weights.shape)}, topk_ids {list(topk_ids.shape)}, config "
            f"{config}, expected equal shapes, and a config with aligned tokens. Pass both"
        )
    out = torch.empty(rows, table.hidden_size, dtype=x.dtype, device=x.device)
    if out.numel() == 0 or top_k == 0:
        return out.zero_()
    config = config or choose_config(rows, top_k, table.experts, table.intermediate_size)
    topk_ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    aligned = aligned or align_tokens(topk_ids, config.block_m, table.experts)
    pairs = rows * top_k
    inner = torch.empty(pairs, table.intermediate_size, dtype=x.dtype, device=x.device)
    parts = torch.empty(pairs, table.hidden_size, dtype=x.dtype, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    _launch_gemm(x, inner, table, 0, aligned, weights, top_k, config)
    _launch_gemm(inner, parts, table, 1, aligned, weights, 1, config)
    grid = (rows, triton.cdiv(table.hidden_size, _SUM_BLOCK))
    _sum_kernel[grid](
        parts,
        topk_ids,
        table.descriptors[1],
        out,
        table.experts,
        table.hidden_size,
        TOP_K=top_k,
        BLOCK=_SUM_BLOCK,
    )
    return out


def _launch_gemm(
    x: Tensor,
    out: Tensor,
    table: ExpertTable,
    number: int,
    aligned: Aligned,
    weights: Tensor,
    top_k: int,
    config: TileConfig,
) -> None:
    """Launch GEMM ``number`` of ``table``: 0, x [M, K] to [pairs, N], or 1, [pairs, N] to K."""
    sorted_ids, expert_ids, padded = aligned
    traits = table.traits[number]
    width = config.block_n // (1 if number else 2)
    tiles = expert_ids.numel()
    _gemm_kernel[(tiles * triton.cdiv(out.shape[1], width),)](
        x,
        out,
        table.descriptors[number],
        sorted_ids,
        expert_ids,
        padded,
        weights,
        tiles,
        weights.numel(),
        table.experts,
        out.shape[1],
        x.shape[1],
        x.stride(0),
        TOP_K=top_k,
        GATED=number == 0,
        EVEN_K=x.shape[1] % config.block_k == 0,
        COMPUTE=_COMPUTE[x.dtype],
        PLAIN=traits.plain,
        FP8_STEP=min(traits.fp8_step, config.block_k),
        FP8_NAN=traits.fp8_nan,
        INT4_STEP=min(traits.int4_step, config.block_k),
        INT4_ZEROS=traits.int4_zeros,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
