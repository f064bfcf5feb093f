# SPDX-License-Identifier: Apache-2.0
"""The compiled expert kernels through our op, against float32 loops over the same weights."""

import os
import subprocess
import sys

import pytest
import torch
import vllm._C  # noqa: F401  registers the compiled kernels
from vllm import _custom_ops as ops

from vllm_mixprec.checkpoint.packing import pack
from vllm_mixprec.patches import amx_permission
from vllm_mixprec.quant import cpu_ops, cpu_probe, int4_blocks, methods
from vllm_mixprec.quant.cpu_ops import ExpertKernel, mixed_experts
from vllm_mixprec.quant.int4_blocks import Int4Layout, with_room
from vllm_mixprec.routing.platform import detect_platform

pytestmark = pytest.mark.skipif(
    detect_platform().name != "cpu-avx512", reason="needs AVX512_BF16 and AVX512_VNNI"
)

KERNELS = [
    kernel
    for kernel in ExpertKernel
    if kernel is not ExpertKernel.BF16_AMX or amx_permission.apply()
]
HIDDEN, INNER = 256, 128
# bf16 rounding of inputs and outputs; the int4 kernel also rounds activations to int8.
BOUND = {kernel: 0.01 for kernel in KERNELS} | {ExpertKernel.INT4: 0.03}
BLOCKS = {kernel: [0, 0] for kernel in KERNELS} | {ExpertKernel.FP8_BLOCK: [128, 128]}
ALL_BLOCKS = [size for kernel in KERNELS for size in BLOCKS[kernel]]


def make_group(kernel, experts, seed):
    """Return (dense w13, dense w2, packed tensors) of a group of random experts."""
    generator = torch.Generator().manual_seed(seed)
    dense, stored = [], []
    for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        weight = torch.randn(experts, n, k, generator=generator) / k**0.5
        if kernel in (ExpertKernel.BF16, ExpertKernel.BF16_AMX):
            stored.append([cpu_ops.pack_weight(kernel, weight.bfloat16())])
            dense.append(weight.bfloat16().float())
        elif kernel is ExpertKernel.FP8_BLOCK:
            blocks = weight.view(experts, n // 128, 128, k // 128, 128)
            scale = blocks.abs().amax((2, 4)) / 448
            codes = (blocks / scale[:, :, None, :, None]).to(torch.float8_e4m3fn)
            dense.append((codes.float() * scale[:, :, None, :, None]).view(experts, n, k))
            stored.append([cpu_ops.pack_plain(codes.view(experts, n, k)), scale])
        elif kernel is ExpertKernel.FP8_CHANNEL:
            scale = weight.abs().amax(2) / 448
            codes = (weight / scale.unsqueeze(2)).to(torch.float8_e4m3fn)
            dense.append(codes.float() * scale.unsqueeze(2))
            stored.append([cpu_ops.pack_plain(codes), scale])
        else:
            groups = weight.view(experts, n, k // 64, 64)
            scale = groups.abs().amax(3) / 7
            codes = (groups / scale[..., None]).round().clamp(-8, 7)
            dense.append((codes * scale[..., None]).view(experts, n, k))
            rows = (codes.view(experts, n, k) + 8).int().mT.reshape(experts, k // 8, 8, n)
            words = sum(rows[:, :, i].long() << (4 * i) for i in range(8))
            words = torch.where(words >= 2**31, words - 2**32, words).int()
            zeros = torch.full((experts, k // 64, n // 8), 0x77777777, dtype=torch.int32)
            stored.append([*int4_blocks.pack_int4(words, scale.mT, zeros, Int4Layout.GPTQ)])
    tensors = [tensor for pair in zip(*stored, strict=True) for tensor in pair]
    return dense[0], dense[1], tensors


def expected_output(x, weights, ids, experts):
    """Loop over tokens and choices in float32; ``experts`` maps an id to (w13, w2), or lacks it."""
    out = torch.zeros(x.shape)
    for token in range(x.shape[0]):
        for choice, expert in enumerate(ids[token].tolist()):
            if expert in experts:
                w13, w2 = experts[expert]
                gate, up = (w13 @ x[token].float()).chunk(2)
                act = torch.nn.functional.silu(gate) * up
                out[token] += weights[token, choice] * (w2 @ act)
    return out


def relative_error(found, expected):
    return ((found.float() - expected).norm() / expected.norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize("format", methods._CPU_KERNELS)
def test_probe_trusts_every_kernel_here(format):
    assert cpu_probe.probe(*methods._CPU_KERNELS[format]) is None


needs_amx = pytest.mark.skipif(ExpertKernel.BF16_AMX not in KERNELS, reason="this CPU has no AMX")


@needs_amx
def test_weights_are_reordered_for_amx_where_they_are():
    weight = torch.randn(3, 64, 96).bfloat16()
    place, expected = weight.data_ptr(), ops.cpu_prepack_moe_weight(weight, "amx")
    packed = cpu_ops.pack_weight(ExpertKernel.BF16_AMX, weight)
    assert packed.data_ptr() == place
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))


@needs_amx
def test_platform_has_amx_where_its_kernel_passes_the_probe():
    assert cpu_probe.probe(ExpertKernel.BF16_AMX) is None
    assert detect_platform().has_amx and methods.usable_platform().has_amx


@needs_amx
@pytest.mark.parametrize("fault", ["layout", "refused"])
def test_platform_that_cannot_use_its_amx_says_so(monkeypatch, fault):
    said = []
    monkeypatch.setattr(methods.logger, "warning", lambda text, *given: said.append(text % given))
    monkeypatch.setattr(methods, "probe", cpu_probe.probe.__wrapped__)
    if fault == "layout":
        monkeypatch.setattr(
            cpu_probe.ops, "cpu_prepack_moe_weight", lambda weight, isa: weight.flip(1)
        )
    else:
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    methods.kernel_problem.cache_clear()
    platform = methods.usable_platform.__wrapped__()
    methods.kernel_problem.cache_clear()
    reason = {"layout": "vLLM lays its weights out otherwise than is known here"}.get(
        fault, "Linux refuses AMX"
    )
    assert not platform.has_amx and platform.name == "cpu-avx512"
    assert dict(platform.broken) == {("bf16", "cpu_fused_moe"): reason}
    name = "the kernel cpu_fused_moe for bf16 of this vLLM is not used"
    assert said[-1] == f"{name}: {reason}"


@needs_amx
@pytest.mark.parametrize("scratch_bytes", [1, 8000])
def test_amx_takes_many_tokens_some_at_a_time(monkeypatch, scratch_bytes):
    _, _, packed = make_group(ExpertKernel.BF16_AMX, 4, 0)
    x = torch.randn(33, HIDDEN).bfloat16()
    ids = torch.rand(33, 4).argsort(1)[:, :2].int()
    given = (x, torch.rand(33, 2), ids, None, packed, [ExpertKernel.BF16_AMX], [0, 0])
    expected = mixed_experts(*given)
    monkeypatch.setattr(cpu_ops, "_AMX_SCRATCH_BYTES", scratch_bytes)
    assert torch.equal(mixed_experts(*given), expected)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((3, 48, 64), torch.bfloat16),  # rows that are no multiple of the kernel's block
        ((1072, 2048), torch.bfloat16),  # more than one part, the last one short
        ((2, 3200, 1024), torch.float8_e4m3fn),
        ((5, 32, 64), torch.float8_e4m3fn),
    ],
)
def test_weights_are_reordered_where_they_are_as_the_kernel_orders_them_at_once(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored, expected = weight.clone(), torch.ops._C.convert_weight_packed(weight)
    place = weight.data_ptr()
    packed = cpu_ops.pack_plain(weight)
    assert packed.data_ptr() == place and packed.shape == stored.shape
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))
    assert not torch.equal(packed.view(torch.uint8), stored.view(torch.uint8))


def int4_words(layout, experts, k, n, group_size):
    generator = torch.Generator().manual_seed(0)
    words = (k, n // 8) if layout == Int4Layout.AWQ else (k // 8, n)
    weight, zero = (
        torch.randint(-(2**31), 2**31, (*experts, *shape), generator=generator, dtype=torch.int32)
        for shape in (words, (k // group_size, n // 8))
    )
    return weight, torch.rand(*experts, k // group_size, n, generator=generator), zero


@pytest.mark.parametrize("layout", Int4Layout)
@pytest.mark.parametrize(
    "experts, k, n, group_size",
    [
        ((), 1024, 1056, 128),
        ((3,), 256, 96, 64),
        ((2,), 512, 64, 256),  # blocks that are half a group
        ((), 96, 32, 96),
        ((), 80, 32, 40),
        ((1,), 16384, 32, 16384),
        ((2,), 64, 2048, 32),
    ],
)
def test_int4_weights_are_blocked_as_vllm_blocks_them(layout, experts, k, n, group_size):
    weight, scale, zero = int4_words(layout, experts, k, n, group_size)
    weights, zeros, scales = ops.convert_weight_packed_scale_zp(weight, zero, scale, layout)
    found = int4_blocks.pack_int4(weight, scale, zero, layout)
    for one, other in zip(found, (weights, scales, zeros), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("layout", Int4Layout)
@pytest.mark.parametrize("group_size", [64, 256])
def test_int4_weights_with_room_are_blocked_where_they_are(layout, group_size):
    weight, scale, zero = int4_words(layout, (3,), 256, 96, group_size)
    roomy = with_room(weight, group_size)
    assert roomy.shape == weight.shape and not roomy.is_contiguous()
    roomy.copy_(weight)
    for some in (slice(1, 2), slice(2, 3), slice(0, 1)):  # one by one, in any order
        int4_blocks.block_in_place(roomy[some], scale[some], zero[some], layout)
    found = int4_blocks.blocked_in_place(roomy, scale, zero, layout)
    assert found[0].data_ptr() == roomy.data_ptr() and found[0].is_contiguous()
    for one, other in zip(found, int4_blocks.pack_int4(weight, scale, zero, layout), strict=True):
        assert torch.equal(one, other)


def test_room_is_told_of_one_expert_and_of_none():
    weight, scale, zero = int4_words(Int4Layout.GPTQ, (1,), 256, 96, 64)
    assert int4_blocks.has_room(with_room(weight, 64), scale, Int4Layout.GPTQ)
    assert not int4_blocks.has_room(weight, scale, Int4Layout.GPTQ)


@pytest.mark.parametrize("layout", Int4Layout)
def test_weights_are_blocked_where_nothing_compiled_can_be_kept(layout, tmp_path):
    """As in a container whose file system is read-only: numba then has no place for its cache."""
    weight, scale, zero = int4_words(layout, (), 256, 64, 64)
    blocked = int4_blocks.pack_int4(weight, scale, zero, layout)[0]
    torch.save((weight, scale, zero, blocked), tmp_path / "case.pt")
    script = f"""
import torch
from vllm_mixprec.quant import int4_blocks, cpu_loops
weight, scale, zero, blocked = torch.load({str(tmp_path / "case.pt")!r})
layout = int4_blocks.Int4Layout({int(layout)})
assert torch.equal(int4_blocks.pack_int4(weight, scale, zero, layout)[0], blocked)
assert type(cpu_loops.block_gptq._cache).__name__ == "NullCache"
"""
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": ""}
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | nowhere)


def test_a_cache_that_is_damaged_or_full_is_done_without(tmp_path):
    """Numba's own raises what it finds at the first call; a start would end, or do it slowly."""

    def run(before=""):
        script = f"""
import resource, signal, torch
from vllm_mixprec.quant import cpu_ops, cpu_loops
weight = torch.randn(64, 64).bfloat16()
expected = torch.ops._C.convert_weight_packed(weight)
{before}
assert torch.equal(cpu_ops.pack_plain(weight), expected)
"""
        command = [sys.executable, "-c", script]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run(command, check=True, env=environment)
        return [file for file in tmp_path.rglob("*.nb?") if file.stat().st_size]

    full = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    assert not run(before=full)
    kept = run()
    assert kept  # the control
    for file in kept:
        file.write_bytes(b"")
    run()


def test_a_worker_can_start_where_numba_was_imported():
    """vLLM's looks for Triton kernels in all modules, llvmlite's among them."""
    script = """
import vllm_mixprec.quant.cpu_loops
from vllm.triton_utils.dispatcher import _rebind_kernels
_rebind_kernels([])
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("layout", Int4Layout)
def test_codes_that_sum_to_the_most_are_added_up_right(layout):
    """15 everywhere: where a byte's sum would overflow, it would show."""
    weight, scale, zero = int4_words(layout, (), 512, 64, 128)
    weight.fill_(-1)
    blocked = int4_blocks.pack_int4(weight, scale, zero, layout)[0]
    assert torch.equal(blocked, ops.convert_weight_packed_scale_zp(weight, zero, scale, layout)[0])


@pytest.mark.parametrize("layout", Int4Layout)
def test_probe_tells_a_layout_that_is_not_vllms(monkeypatch, layout):
    right = cpu_probe.ops.convert_weight_packed_scale_zp

    def other(*args):
        blocked, *rest = right(*args)
        blocked.view(-1)[7] += 1
        return blocked, *rest

    monkeypatch.setattr(cpu_probe.ops, "convert_weight_packed_scale_zp", other)
    assert "lays its weights out otherwise" in cpu_probe.probe.__wrapped__(
        ExpertKernel.INT4, layout
    )


def test_groups_over_128_columns_that_are_no_multiple_are_wrong_in_vllm():
    """Why routing refuses them: the kernel takes blocks of 128 with one scale each."""
    error = {}
    for group_size in (128, 192):
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (384, 64), generator=generator)
        scale = torch.rand(384 // group_size, 64, generator=generator) / 40
        zero = torch.full((384 // group_size, 8), 0x77777777, dtype=torch.int32)
        words = pack(codes.T.int(), 4).T.contiguous()
        blocked, zeros, scales = ops.convert_weight_packed_scale_zp(words, zero, scale, 1)
        x = torch.randn(4, 384, generator=generator).bfloat16()
        dense = ((codes - 8) * scale.repeat_interleave(group_size, 0)).T
        out = cpu_ops.int4_linear(x, blocked, scales, zeros)
        error[group_size] = relative_error(out, x.float() @ dense.T)
    assert error[128] < 0.03 and not error[192] < 0.3


@pytest.mark.parametrize("part", ["_run", "int4_linear"])
def test_probe_reports_a_kernel_that_is_wrong(monkeypatch, part):
    right = getattr(cpu_ops, part)
    monkeypatch.setattr(cpu_ops, part, lambda *args: right(*args) * 0.5)
    assert "off by 0.5" in cpu_probe.probe.__wrapped__(ExpertKernel.INT4, Int4Layout.GPTQ)


def test_probe_reports_a_linear_kernel_that_is_wrong_for_experts_too(monkeypatch):
    """Those of FP8 with a scale a row run through it."""
    right = cpu_ops.fp8_linear
    monkeypatch.setattr(cpu_ops, "fp8_linear", lambda *args: right(*args) * 0.5)
    assert "off by 0." in cpu_probe.probe.__wrapped__(ExpertKernel.FP8_CHANNEL)


@pytest.mark.parametrize("layout", Int4Layout)
def test_probe_reports_the_other_layout(monkeypatch, layout):
    """Words of one layout, read as the other's: the shapes alone would not tell."""
    right = int4_blocks.pack_int4

    def wrong(weight, scale, zero, layout):
        shape = weight.shape[:-2] + torch.Size(
            (weight.shape[-2] * 8, weight.shape[-1] // 8)
            if layout == Int4Layout.GPTQ
            else (weight.shape[-2] // 8, weight.shape[-1] * 8)
        )
        other = Int4Layout.AWQ if layout == Int4Layout.GPTQ else Int4Layout.GPTQ
        return right(weight.reshape(shape), scale, zero, other)

    monkeypatch.setattr(int4_blocks, "pack_int4", wrong)
    assert "otherwise" in cpu_probe.probe.__wrapped__(ExpertKernel.INT4, layout)
    monkeypatch.setattr(cpu_probe, "_is_blocked_as_vllm_does", lambda layout: True)
    assert "off by" in cpu_probe.probe.__wrapped__(ExpertKernel.INT4, layout)


def test_probe_reports_a_kernel_that_is_missing(monkeypatch):
    def missing(*args):
        raise AttributeError("'_OpNamespace' '_C' object has no attribute 'fused_experts_cpu'")

    monkeypatch.setattr(cpu_ops, "_run", missing)
    assert "raised AttributeError" in cpu_probe.probe.__wrapped__(ExpertKernel.BF16)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_one_group_matches_float32(kernel, tokens):
    w13, w2, packed = make_group(kernel, 4, 0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(tokens, 4, generator=generator).argsort(1)[:, :2].int()
    weights = torch.rand(tokens, 2, generator=generator)
    out = mixed_experts(x, weights, ids, None, packed, [kernel], BLOCKS[kernel])
    experts = {e: (w13[e], w2[e]) for e in range(4)}
    assert relative_error(out, expected_output(x, weights, ids, experts)) < BOUND[kernel]
    experts = {e: (w13[e].roll(1, 0), w2[e]) for e in range(4)}  # negative control
    assert relative_error(out, expected_output(x, weights, ids, experts)) > 10 * BOUND[kernel]


@pytest.fixture(scope="module")
def all_groups():
    """Three experts a kernel, dealt to the kernels in turn; the last lives on another rank."""
    experts, tensors, slots = {}, [], torch.full((2, 3 * len(KERNELS) + 1), -1, dtype=torch.int32)
    for number, kernel in enumerate(KERNELS):
        w13, w2, packed = make_group(kernel, 3, 10 + number)
        tensors += packed
        for slot in range(3):
            expert = len(KERNELS) * slot + number
            experts[expert] = (w13[slot], w2[slot])
            slots[0, expert], slots[1, expert] = number, slot
    return experts, tensors, slots


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_all_formats_in_one_layer_match_float32(all_groups, tokens):
    experts, tensors, slots = all_groups
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(tokens, slots.shape[1], generator=generator).argsort(1)[:, :4]
    weights = torch.rand(tokens, 4, generator=generator)
    out = mixed_experts(x, weights, ids, slots, tensors, KERNELS, ALL_BLOCKS)
    expected = expected_output(x, weights, ids, experts)
    assert relative_error(out, expected) < BOUND[ExpertKernel.INT4]
    # Negative control: the same comparison with one expert's slot shifted.
    wrong = slots.clone()
    chosen = next(expert for expert in ids[0].tolist() if expert in experts)
    wrong[1, chosen] = (wrong[1, chosen] + 1) % 3
    out = mixed_experts(x, weights, ids, wrong, tensors, KERNELS, ALL_BLOCKS)
    assert relative_error(out, expected) > BOUND[ExpertKernel.INT4]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_tokens_without_a_local_expert_give_zero(all_groups, tokens):
    _, tensors, slots = all_groups
    x = torch.randn(tokens, HIDDEN).bfloat16()
    ids = torch.full((tokens, 2), slots.shape[1] - 1)
    out = mixed_experts(
        x,
        torch.ones(tokens, 2),
        ids,
        slots,
        tensors,
        KERNELS,
        ALL_BLOCKS,
    )
    assert out.shape == x.shape and not out.any()


def test_strided_inputs_give_the_contiguous_result(all_groups):
    """The kernels read garbage from strided ids or rows without an error; the op must not."""
    experts, tensors, slots = all_groups
    x = torch.randn(6, 2 * HIDDEN).bfloat16()[:, ::2]
    ids = torch.stack([torch.randperm(12)[:4] for _ in range(6)])[:, ::2]
    weights = torch.rand(6, 4)[:, ::2]
    out = mixed_experts(x, weights, ids, slots, tensors, KERNELS, ALL_BLOCKS)
    expected = expected_output(x, weights, ids, experts)
    assert relative_error(out, expected) < BOUND[ExpertKernel.INT4]


def test_the_op_compiles_with_dynamic_tokens(all_groups):
    _, tensors, slots = all_groups

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(x, weights, ids):
        return mixed_experts(x * 1, weights, ids, slots, tensors, KERNELS, ALL_BLOCKS)

    for tokens in (3, 5):
        x, weights = torch.randn(tokens, HIDDEN).bfloat16(), torch.rand(tokens, 2)
        ids = torch.stack([torch.randperm(12)[:2] for _ in range(tokens)])
        plain = mixed_experts(x, weights, ids, slots, tensors, KERNELS, ALL_BLOCKS)
        assert torch.equal(layer(x, weights, ids), plain)
