# SPDX-License-Identifier: Apache-2.0
"""The grouped kernel against float32 loops over independently dequantised weights.

Without a GPU it runs in Triton's interpreter. That is chosen when Triton is imported, and vLLM must
not see it: the kernel runs in a process of its own, which is this file run as a script, once for
all cases. With a GPU the same cases run compiled.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
# Triton has no types, and what it compiles cannot be annotated.

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from vllm_mixprec.errors import UnsupportedError  # noqa: E402
from vllm_mixprec.quant import grouped_kernel  # noqa: E402
from vllm_mixprec.quant.grouped_kernel import (  # noqa: E402
    decode_e4m3,
    grouped_experts,
    subtract_zero,
)
from vllm_mixprec.quant.grouped_tiles import (  # noqa: E402
    TileConfig,
    align_tokens,
    choose_config,
)
from vllm_mixprec.quant.grouped_weights import (  # noqa: E402
    ExpertTable,
    Fp8Weight,
    Int4Weight,
    PlainWeight,
    Traits,
    Weight,
    pack_int4,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
"""Written by transformers (bf16) and auto-round (the others), never by this package."""


@dataclass(frozen=True)
class Stored:
    """A weight as a checkpoint stores it, ``kind`` and arguments, and its ``dense`` float32."""

    kind: str
    arguments: dict[str, Any]
    dense: Tensor

    def load(self, device: str = "cpu") -> Weight:
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        if self.kind == "int4":
            return pack_int4(**moved)
        return PlainWeight(**moved) if self.kind == "plain" else Fp8Weight(**moved)


def plain(rows: int, cols: int, dtype: torch.dtype, gap: int = 0) -> Stored:
    weight = (torch.randn(rows, cols + gap) / cols**0.5).to(dtype)[:, :cols]
    return Stored("plain", {"weight": weight}, weight.float())


def fp8(rows: int, cols: int, dtype: torch.dtype, block: tuple[int, int], parts: int = 1) -> Stored:
    bn, bk = block
    weight = torch.randn(rows, cols).to(torch.float8_e4m3fn)
    part = rows // parts
    grid = (parts * -(-part // bn), -(-cols // bk))
    scales = (torch.rand(grid) + 0.5) / cols**0.5
    row = torch.arange(part) // bn
    row = torch.cat([row + number * (-(-part // bn)) for number in range(parts)])
    dense = weight.float() * scales[row][:, torch.arange(cols) // bk]
    arguments = {"weight": weight, "scales": scales, "block": block, "parts": parts}
    return Stored("fp8", arguments, dense)


def pack_words(codes: Tensor) -> Tensor:
    """Pack eight codes along the last dimension into an int32 word, the first lowest."""
    raw = codes.numpy().astype(np.uint8)
    pairs = raw[..., 0::2] | raw[..., 1::2] << 4
    return torch.from_numpy(np.ascontiguousarray(pairs).view("<i4"))


def int4(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    group: int,
    asymmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> Stored:
    codes = torch.randint(0, 16, (rows, cols))
    zeros = torch.randint(0, 16, (cols // group, rows)) if asymmetric else None
    scales = ((torch.rand(cols // group, rows) + 0.5) / 8 / cols**0.5).to(scale_dtype or dtype)
    place = torch.arange(cols) // group
    zero = 8 if zeros is None else (zeros + 1)[place].T
    dense = (codes - zero).float() * scales.float()[place].T
    arguments = {
        "qweight": pack_words(codes).T.contiguous(),
        "scales": scales,
        "qzeros": None if zeros is None else pack_words(zeros),
    }
    return Stored("int4", arguments, dense)


Expert = tuple[Stored, Stored] | None

MAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (plain, {}),
    "plain, padded rows": (plain, {"gap": 24}),
    "fp8 32x64": (fp8, {"block": (32, 64)}),
    "fp8 128x128": (fp8, {"block": (128, 128)}),
    "fp8 48x96": (fp8, {"block": (48, 96)}),
    "fp8 channel": (fp8, {"block": (1, 256)}),
    "fp8 tensor": (fp8, {"block": (1 << 20, 1 << 20)}),
    "int4 g32": (int4, {"group": 32}),
    "int4 g64": (int4, {"group": 64}),
    "int4 g128": (int4, {"group": 128}),
    "int4 g32 asymmetric": (int4, {"group": 32, "asymmetric": True}),
    "int4 g64 asymmetric": (int4, {"group": 64, "asymmetric": True}),
    "int4 fp16 scales": (int4, {"group": 64, "scale_dtype": torch.float16}),
}


def make_expert(name: str, n: int, k: int, dtype: torch.dtype) -> Expert:
    """Make an expert of one of MAKERS, "int4 g=K", "A | B" (w13 | w2) or "absent"."""
    if name == "absent":
        return None
    made: list[Stored] = []
    first, _, second = name.partition(" | ")
    for part, (rows, cols) in zip((first, second or first), ((2 * n, k), (k, n)), strict=True):
        stacked = part.endswith(" stacked")  # as vLLM: gate and up each have blocks of their own
        if part == "int4 g=K":
            made.append(int4(rows, cols, dtype, group=cols))
            continue
        maker, options = MAKERS[part.removesuffix(" stacked")]
        parts = {"parts": 2} if stacked and not made else {}
        made.append(maker(rows, cols, dtype, **options, **parts))
    return made[0], made[1]


@dataclass(frozen=True)
class Case:
    """A layer and a batch; ``x`` [M, K], ``ids`` and ``weights`` [M, top_k]."""

    name: str
    experts: tuple[Expert, ...]
    x: Tensor
    ids: Tensor
    weights: Tensor
    config: TileConfig | None = None
    aligned: bool = False

    def expected(self) -> tuple[Tensor, Tensor]:
        """Return the float64 result [M, K] and how far roundings may move each element of it.

        The kernel rounds to the dtype three times: the input of w2, each expert's row, the sum. A
        rounding is off by less than ``eps`` of the value, the distance between neighbours, be it to
        nearest or, as the interpreter's for bfloat16, down. float32 accumulation adds at most a
        float32 rounding a term.
        """
        info = torch.finfo(self.x.dtype)
        out, slack = torch.zeros(2, *self.x.shape, dtype=torch.float64)
        for token in range(len(self.x)):
            x = self.x[token].double()
            for weight, expert in zip(self.weights[token], self.ids[token].tolist(), strict=True):
                stored = self.experts[expert] if 0 <= expert < len(self.experts) else None
                if stored is None:
                    continue
                w13, w2 = stored[0].dense.double(), stored[1].dense.double()
                gate, up = (w13 @ x).chunk(2)
                terms = (w13.abs() @ x.abs()).chunk(2)
                act = torch.nn.functional.silu(gate)
                inner = act * up
                lost = len(x) * 2.0**-24 * (1.1 * terms[0] * up.abs() + act.abs() * terms[1])
                lost += (info.eps + len(inner) * 2.0**-24) * inner.abs() + info.tiny * info.eps
                row = weight.double() * (w2 @ inner)
                out[token] += row
                slack[token] += weight.abs() * (w2.abs() @ lost) + info.eps * row.abs()
        return out, (slack + info.eps * out.abs()) * (1 + info.eps) + info.tiny * info.eps

    def fits(self, result: Tensor) -> bool:
        """Tell whether ``result`` is right but for rounding, by element and as a whole.

        Worst cases of many terms bound an element loosely. Over a whole result roundings are
        independent of the values, so that three of them change its norm by less than 3 eps.
        """
        out, slack = self.expected()
        error = result.double() - out
        eps = torch.finfo(self.x.dtype).eps
        return bool((error.abs() <= slack).all()) and error.norm() <= 3 * eps * out.norm()

    def inputs(self) -> dict[str, Any]:
        stored = [expert and [(w.kind, w.arguments) for w in expert] for expert in self.experts]
        config = self.config and vars(self.config)
        batch = {"x": self.x, "topk_weights": self.weights, "topk_ids": self.ids}
        return {"experts": stored, "batch": batch, "config": config, "aligned": self.aligned}


def case(
    name: str,
    *names: str,
    m: int = 5,
    n: int = 64,
    k: int = 128,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    tile: tuple[int, int, int] | None = (16, 128, 128),
    aligned: bool = False,
) -> Case:
    """Make a random case; with fewer names than experts they take turns."""
    torch.manual_seed(len(name) * 1000 + m * 10 + n)
    count = max(len(names), top_k, 4)
    experts = tuple(make_expert(names[e % len(names)], n, k, dtype) for e in range(count))
    ids = torch.rand(m, count).argsort(1)[:, :top_k].int()
    x = torch.randn(m, k).to(dtype)
    config = TileConfig(*tile, warps=4, stages=2) if tile else None
    return Case(name, experts, x, ids, torch.rand(m, top_k) + 0.1, config, aligned)


def cases() -> Iterator[Case]:
    half = torch.float16
    for name in MAKERS:
        yield case(f"only {name}", name, n=128, k=256)
    for name in ("plain", "fp8 48x96", "int4 g32", "int4 g64 asymmetric"):
        yield case(f"only {name}, fp16", name, dtype=half, n=128, k=256, tile=(16, 128, 64))
    yield case("only int4 g=K", "int4 g=K", k=96, n=96)
    yield case("only int4 g=K, longer than a step", "int4 g=K", k=288, n=96)

    three = ("plain", "fp8 32x64", "int4 g32")
    yield case("plain and fp8", *three[:2])
    yield case("plain and int4", *three[::2])
    yield case("fp8 and int4", *three[1:])
    yield case("three formats", *three, m=17)
    yield case("three formats, fp16", *three, m=17, dtype=half)
    yield case("two group sizes", "int4 g32", "int4 g128", n=128)
    yield case("zero points and none", "int4 g64", "int4 g64 asymmetric")
    yield case("scales in two dtypes", "int4 g64", "int4 fp16 scales")
    yield case("two FP8 blocks", "fp8 32x64", "fp8 48x96", n=96, k=192)
    yield case("blocks in all ways", "fp8 48x96", "fp8 channel", "fp8 tensor", n=96, k=192)
    yield case("w13 and w2 differ", "int4 g32 | fp8 32x64", "fp8 32x64 | plain")
    every = ("plain", "fp8 32x64", "fp8 48x96", "int4 g32", "int4 g32 asymmetric", "int4 g=K")
    for dtype in (torch.bfloat16, half):
        yield case(f"six at once, {dtype}", *every, n=96, k=192, m=17, top_k=3, dtype=dtype)

    for m in (1, 3, 65):
        yield case(f"{m} tokens", *three, m=m)
    for m in (1, 33):
        yield case(f"default tile, {m} tokens", *three, m=m, tile=None)
    yield case("top 1", *three, top_k=1)
    yield case("top 8", *three, top_k=8)
    for tile in ((16, 32, 64), (32, 64, 64), (16, 64, 256), (64, 128, 128)):
        yield case(f"tile {tile}", *three, "int4 g64 asymmetric", n=128, k=192, tile=tile)
    ragged = ("fp8 48x96", "plain")
    yield case("ragged rows and columns", *ragged, n=80, k=208)
    yield case("ragged, fp16", *ragged, n=80, k=208, dtype=half, tile=(16, 64, 64))
    yield case("ragged, stacked", "fp8 48x96 stacked", "plain", n=80, k=208)
    yield case("a tensor's scale, stacked", "fp8 tensor stacked", "plain", n=80, k=208)
    yield case("plain of odd sizes", "plain", n=40, k=72)
    yield case("groups that end in the middle of a step", "int4 g32", "int4 g=K", n=160, k=96)

    base = case("", *three, m=9)
    yield replace(base, name="one token", x=base.x[:1], ids=base.ids[:1], weights=base.weights[:1])
    yield replace(base, name="all to one expert", ids=torch.full_like(base.ids, 1))
    yield replace(base, name="experts without tokens", ids=base.ids % 2)
    yield replace(base, name="ids of int64", ids=base.ids.long())
    yield replace(base, name="tokens aligned by the caller", aligned=True)
    holes = base.ids.clone()
    holes[::2, 0], holes[3] = -1, -1
    yield replace(base, name="ids of -1", ids=holes)
    yield replace(base, name="all -1", ids=torch.full_like(base.ids, -1))
    yield replace(base, name="ids past the last expert", ids=base.ids * 2)
    yield replace(base, name="an absent expert", experts=(None, *base.experts[1:]))
    yield replace(base, name="only one is here", experts=(None, None, base.experts[2], None))
    wide_ids = base.ids.repeat_interleave(2, 1)
    yield replace(base, name="every second column", ids=wide_ids[:, ::2])
    yield replace(base, name="transposed ids", ids=base.ids.t().contiguous().t())
    yield replace(base, name="strided x", x=base.x.repeat(1, 2)[:, :128])
    yield replace(base, name="transposed x", x=base.x.t().contiguous().t())
    yield fixture_case()


def load_fixture(name: str) -> dict[str, Tensor]:
    shards = sorted((FIXTURES / name).glob("*.safetensors"))
    return {key: tensor for shard in shards for key, tensor in load_file(shard).items()}


def read_fixture(name: str, expert: int) -> tuple[Stored, Stored]:
    """Read an expert as vLLM's parameters hold it, gate and up stacked."""
    tensors = load_fixture(name)

    def stack(projections: tuple[str, ...], suffix: str, dim: int) -> Tensor:
        stem = f"model.layers.0.mlp.experts.{expert}"
        return torch.cat([tensors[f"{stem}.{part}.{suffix}"] for part in projections], dim)

    made = []
    for projections in (("gate_proj", "up_proj"), ("down_proj",)):
        if name == "bf16":
            weight = stack(projections, "weight", 0)
            made.append(Stored("plain", {"weight": weight}, weight.float()))
        elif name == "fp8":
            weight = stack(projections, "weight", 0)
            scales = stack(projections, "weight_scale_inv", 0).float()
            arguments = {"weight": weight, "scales": scales, "block": (128, 128)}
            row, col = (torch.arange(size) // 128 for size in weight.shape)
            made.append(Stored("fp8", arguments, weight.float() * scales[row][:, col]))
        else:
            words, scales, qzeros = (
                stack(projections, suffix, 1) for suffix in ("qweight", "scales", "qzeros")
            )
            arguments = {"qweight": words, "scales": scales, "qzeros": qzeros}
            made.append(Stored("int4", arguments, define_gptq(words, scales, qzeros)))
    return made[0], made[1]


def unpack_words(words: Tensor) -> Tensor:
    """Read int4 codes bit by bit from the little-endian bytes of words, along the last dim."""
    raw = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)
    bits = np.unpackbits(raw, axis=-1, bitorder="little").reshape(len(words), -1, 4)
    return torch.from_numpy(bits.astype(np.int64) @ (1 << np.arange(4)))


def define_gptq(words: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
    """(code - zero) * scale, of AutoGPTQ's v1, which stores the zero point less one: (N, K)."""
    codes = unpack_words(words.t())
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // len(scales))
    return (codes - (unpack_words(qzeros) + 1)[group].T).float() * scales.float()[group].T


def fixture_case() -> Case:
    """Experts as users' tools write them, all formats in one layer."""
    torch.manual_seed(1)
    names = ("bf16", "fp8", "gptq", "gptq-asym")
    experts = tuple(read_fixture(name, number) for number, name in enumerate(names))
    ids = torch.rand(6, 4).argsort(1)[:, :2]
    return Case("users' tools", experts, torch.randn(6, 256).bfloat16(), ids, torch.rand(6, 2))


CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run everything that needs the kernel; name of the case -> its result [M, K]."""
    folder: Path = tmp_path_factory.mktemp("grouped")
    torch.save({name: case.inputs() for name, case in CASES.items()}, folder / "cases.pt")
    interpreter = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | ({} if torch.cuda.is_available() else interpreter),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    results: dict[str, Any] = torch.load(folder / "results.pt")
    return results


@pytest.mark.parametrize("name", CASES)
def test_kernel_computes_the_layer(name: str, ran: dict[str, Any]) -> None:
    assert ran[name].dtype == CASES[name].x.dtype
    assert CASES[name].fits(ran[name])


def test_nothing_here_adds_exactly_zero(ran: dict[str, Any]) -> None:
    assert not ran["all -1"].any()
    unrouted = (CASES["only one is here"].ids != 2).all(1)
    assert unrouted.any() and not ran["only one is here"][unrouted].any()


def test_comparison_notices_another_expert(ran: dict[str, Any]) -> None:
    for name in ("three formats", "three formats, fp16"):
        case = CASES[name]
        shifted = replace(case, ids=(case.ids + 1) % len(case.experts))
        assert not shifted.fits(ran[name])
        one = case.ids.clone()
        one[4, 1] = next(e for e in range(4) if e not in one[4])
        assert not replace(case, ids=one).fits(ran[name])


@pytest.mark.parametrize("number", range(3))
def test_comparison_notices_a_halved_scale(number: int, ran: dict[str, Any]) -> None:
    case = CASES["three formats"]
    for which in range(2):
        weights = list(case.experts[number] or ())
        weights[which] = replace(weights[which], dense=weights[which].dense / 2)
        experts = list(case.experts)
        experts[number] = (weights[0], weights[1])
        assert not replace(case, experts=tuple(experts)).fits(ran[case.name])


def test_comparison_notices_one_group_and_swapped_parts(ran: dict[str, Any]) -> None:
    case = CASES["only int4 g32, fp16"]
    group, swapped = [], []
    for w13, w2 in filter(None, case.experts):
        dense = w2.dense.clone()
        dense[:, 32:64] /= 2
        group.append((w13, replace(w2, dense=dense)))
        swapped.append((replace(w13, dense=w13.dense.roll(len(w13.dense) // 2, 0)), w2))
    assert not replace(case, experts=tuple(group)).fits(ran[case.name])
    assert not replace(case, experts=tuple(swapped)).fits(ran[case.name])


def test_every_e4m3_code_is_decoded_exactly(ran: dict[str, Any]) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(ran["e4m3 with nan"].isnan(), expected.isnan())
    finite = ~expected.isnan()
    for name in ("e4m3 with nan", "e4m3"):
        found = ran[name][finite]
        # Bits, not values: -0.0 equals 0.0.
        assert torch.equal(found.view(torch.int32), expected[finite].view(torch.int32))
    assert torch.equal(expected[finite].bfloat16().float(), expected[finite])
    assert torch.equal(expected[finite].half().float(), expected[finite])


def test_every_int4_code_less_every_zero_point_is_exact(ran: dict[str, Any]) -> None:
    expected = torch.arange(16)[:, None] - torch.arange(17)[None, :]
    for name in ("int4 float32", "int4 float16"):
        assert torch.equal(ran[name][:, :17], expected.float())
    # The interpreter does no bfloat16 arithmetic, so the constants of that branch are tried here.
    bits, base = grouped_kernel._BITS_BF16.value, grouped_kernel._BASE_BF16.value
    plus = torch.tensor([bits | code for code in range(16)], dtype=torch.int16).view(torch.bfloat16)
    minus = (torch.arange(17) + base).bfloat16()
    assert torch.equal((plus[:, None] - minus[None, :]).float(), expected.float())


def test_nan_weights_reach_what_they_touch_and_no_more(ran: dict[str, Any]) -> None:
    out, ids, expert, row = (ran[f"nan {part}"] for part in ("out", "ids", "expert", "row"))
    nan = torch.zeros_like(out, dtype=torch.bool)
    nan[(ids == expert).any(1), row] = True
    assert nan.any() and torch.equal(out.isnan(), nan)


@pytest.mark.parametrize("name", ["gptq", "gptq-asym"])
def test_packed_int4_is_what_the_tool_stored(name: str) -> None:
    """Our bytes by their definition, against GPTQ words of auto-round by theirs."""
    for stored in read_fixture(name, 0):
        packed = stored.load()
        assert isinstance(packed, Int4Weight)
        slices, rows, _ = packed.codes.shape
        nibbles = torch.cat([packed.codes & 15, packed.codes >> 4], dim=2)  # k, then k + 16
        codes = nibbles.permute(1, 0, 2).reshape(rows, 32 * slices)
        group = torch.arange(32 * slices) // (32 * slices // len(packed.scales))
        zeros = torch.tensor(8) if packed.zeros is None else packed.zeros.int()[group].T
        assert (packed.zeros is None) == (name == "gptq")
        dense = (codes.int() - zeros).float() * packed.scales.float()[group].T
        assert torch.equal(dense, stored.dense)


def test_zero_points_of_gptq_v2_and_the_highest_of_v1() -> None:
    words = torch.zeros(4, 8, dtype=torch.int32)
    scales = torch.ones(1, 8, dtype=torch.float16)
    fifteen = torch.full((1, 1), -1, dtype=torch.int32)
    for offset in (0, 1):
        zeros = pack_int4(words, scales, fifteen, zero_offset=offset).zeros
        assert zeros is not None and (zeros == 15 + offset).all()


def align_plainly(ids: np.ndarray, block: int, experts: int) -> tuple[list[int], list[int], int]:
    order, tiles = [], []
    for expert in range(experts):
        mine = [place for place, value in enumerate(ids.ravel()) if value == expert]
        count = -(-len(mine) // block)
        order += mine + [ids.size] * (count * block - len(mine))
        tiles += [expert] * count
    return order, tiles, len(order)


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_aligned_tokens_are_a_plain_sort(block: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(block)
    for _ in range(60):
        rows, top_k, experts = generator.integers(1, 20, 3)
        ids = generator.integers(-1, experts + 2, (rows, top_k))
        if rows % 3 == 0:
            ids = np.repeat(ids, 2, 1)[:, ::2]
        found, tiles, padded = align_tokens(torch.from_numpy(ids).to(dtype), block, experts)
        order, plain_tiles, length = align_plainly(ids, block, experts)
        assert (found.dtype, tiles.dtype, padded.dtype) == (torch.int32,) * 3
        assert padded.tolist() == [length]
        assert found[:length].tolist() == order and (found[length:] == ids.size).all()
        used = length // block
        assert tiles[:used].tolist() == plain_tiles and (tiles[used:] == -1).all()
        # The sizes that vLLM's wrapper gives its op.
        most = min(ids.size + experts * (block - 1), ids.size * block)
        assert (len(found), len(tiles)) == (most, -(-most // block))


def test_aligning_tokens_never_waits_for_the_device() -> None:
    """Meta tensors have no values: reading one, or a shape that depends on one, raises."""
    ids = torch.zeros(7, 3, dtype=torch.int32, device="meta")
    found, tiles, padded = align_tokens(ids, 16, 8)
    assert (found.shape, tiles.shape, padded.shape) == ((21 + 8 * 15,), (9,), (1,))


def test_chosen_tiles_grow_with_the_tokens_of_an_expert() -> None:
    one = choose_config(1, 8, 128, 768)
    assert one.block_m == 16
    assert 8 * -(-2 * 768 // one.block_n) >= 264  # two programs a multiprocessor
    sizes = [choose_config(rows, 8, 128, 768).block_m for rows in (1, 64, 512, 1024, 8192)]
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0]


@pytest.mark.parametrize("sizes", [(8, 64, 64, 4, 2), (16, 48, 64, 4, 2), (16, 64, 32, 4, 2)])
def test_tiles_are_powers_of_two(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected powers of two, block_. of .* or more"):
        TileConfig(*sizes)


BF16 = torch.bfloat16


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def fp8_of(rows: int, cols: int, grid: tuple[int, int], **options: Any) -> Fp8Weight:
    options = {"block": (32, 32), "scale_dtype": torch.float32} | options
    scales = zeros(*grid, dtype=options.pop("scale_dtype"))
    return Fp8Weight(zeros(rows, cols, dtype=torch.uint8), scales, **options)


def int4_of(slices: int, groups: int, rows: int, **changes: Tensor) -> Int4Weight:
    codes = zeros(slices, rows, 16, dtype=torch.uint8)
    return replace(Int4Weight(codes, zeros(groups, rows)), **changes)


GOOD13, GOOD2 = PlainWeight(zeros(128, 32)), PlainWeight(zeros(32, 64))

BAD_W13: dict[str, tuple[Weight, type[Exception], str]] = {
    "shape": (PlainWeight(zeros(128, 64)), ValueError, r"PlainWeight of \[128, 64\], expected \["),
    "dimensions": (PlainWeight(zeros(2, 128, 32)), ValueError, "expected matrices"),
    "dtype": (PlainWeight(zeros(128, 32).half()), ValueError, "float16 .* expected bfloat16"),
    "row stride": (PlainWeight(zeros(128, 33)[:, :32]), UnsupportedError, "multiples of 16 bytes"),
    "column stride": (PlainWeight(zeros(32, 128).t()), UnsupportedError, "rows without gaps"),
    "address": (PlainWeight(zeros(4097)[1:].view(128, 32)), UnsupportedError, "multiples of 16"),
    "block": (fp8_of(128, 32, (4, 2), block=(32, 16)), UnsupportedError, r"block \[32, 16\]"),
    "grid": (fp8_of(128, 32, (4, 2)), ValueError, r"scales float32 \[4, 2\], expected \[4, 1\]"),
    "fp8 scales": (fp8_of(128, 32, (4, 1), scale_dtype=BF16), ValueError, "expected float32"),
    "three parts": (fp8_of(128, 32, (6, 1), parts=3), ValueError, "1 or for w13 2"),
    "groups": (int4_of(1, 2, 128), ValueError, r"expected \[K / 32, 128, 16\]"),
    "no groups": (int4_of(1, 0, 128), ValueError, r"then \[K / group size, 128\]"),
    "int4 scales": (
        int4_of(1, 1, 128, scales=zeros(1, 128).float()),
        ValueError,
        "scales is float32 .* expected bfloat16 or float16",
    ),
    "int4 zeros": (
        int4_of(1, 1, 128, zeros=zeros(1, 64, dtype=torch.uint8)),
        ValueError,
        "codes, scales and zeros",
    ),
    "int4 strides": (
        int4_of(1, 1, 128, codes=zeros(1, 16, 128, dtype=torch.uint8).mT),
        UnsupportedError,
        "rows without gaps",
    ),
    "scale strides": (
        int4_of(1, 1, 128, scales=zeros(1, 256)[:, ::2]),
        ValueError,
        "expected contiguous ones",
    ),
    "device": (PlainWeight(zeros(128, 32).to("meta")), ValueError, "on meta, expected cpu"),
}


@pytest.mark.parametrize("name", BAD_W13)
def test_table_rejects_a_weight_it_cannot_serve(name: str) -> None:
    weight, error, message = BAD_W13[name]
    with pytest.raises(error, match=f"w13 of expert 1: .*{message}"):
        ExpertTable([GOOD13, weight], [GOOD2, GOOD2], BF16)


def test_table_rejects_layers_it_cannot_serve() -> None:
    with pytest.raises(ValueError, match="expert 1: w13 is absent, w2 is PlainWeight"):
        ExpertTable([GOOD13, None], [GOOD2, GOOD2], BF16)
    with pytest.raises(ValueError, match="all 2 experts are absent"):
        ExpertTable([None, None], [None, None], BF16)
    with pytest.raises(UnsupportedError, match="hidden states in torch.float32"):
        ExpertTable([GOOD13], [GOOD2], torch.float32)
    odd = PlainWeight(zeros(128, 36)), PlainWeight(zeros(36, 64))
    with pytest.raises(UnsupportedError, match=r"w13 .* \[128, 36\], expected .* multiple of 8"):
        ExpertTable(odd[:1], odd[1:], BF16)
    with pytest.raises(ValueError, match="w2 of expert 0: .* in 2 parts"):
        ExpertTable([GOOD13], [fp8_of(32, 64, (2, 2), block=(16, 32), parts=2)], BF16)


def test_table_knows_the_step_that_all_experts_of_a_format_allow() -> None:
    def traits(*weights: Weight) -> Traits:
        table = ExpertTable([PlainWeight(zeros(128, 384))] * len(weights), weights, BF16)
        return table.traits[1]

    def int4_of_groups(groups: int) -> Int4Weight:
        return int4_of(2, groups, 384)

    assert traits(GOOD2_WIDE) == Traits(True, 0, False, 0, False)
    assert traits(int4_of_groups(1)).int4_step == 256  # one group: any step will do
    assert traits(int4_of_groups(2)).int4_step == 32
    assert traits(fp8_of(384, 64, (12, 2)), fp8_of(384, 64, (3, 1), block=(128, 128))) == Traits(
        False, 32, False, 0, False
    )


GOOD2_WIDE = PlainWeight(zeros(384, 64))


@pytest.mark.parametrize(
    "qweight, scales, qzeros, error, message",
    [
        ((8, 16), (3, 16), None, ValueError, "a group size that divides K"),
        ((8, 16), (1, 8), None, ValueError, r"expected \[K / group size, 16\]"),
        ((6, 16), (1, 16), None, UnsupportedError, "K=48 and group_size=48"),
        ((8, 16), (4, 16), None, UnsupportedError, "group_size=16, expected multiples of 32"),
        ((8, 16), (2, 16), (2, 4), ValueError, r"qzeros int32 \[2, 4\], expected int32 \[2, 2\]"),
    ],
)
def test_packing_rejects_what_it_cannot_pack(
    qweight: tuple[int, ...],
    scales: tuple[int, ...],
    qzeros: tuple[int, ...] | None,
    error: type[Exception],
    message: str,
) -> None:
    stored = zeros(*qzeros, dtype=torch.int32) if qzeros else None
    with pytest.raises(error, match=message):
        pack_int4(zeros(*qweight, dtype=torch.int32), zeros(*scales), stored)


def test_call_rejects_what_does_not_fit_the_table() -> None:
    table = ExpertTable([GOOD13], [GOOD2], BF16)
    ids = torch.zeros(3, 1, dtype=torch.int32)
    for x in (zeros(3, 64), zeros(2, 32), zeros(3, 32).half()):
        with pytest.raises(ValueError, match=r"hidden states .*, expected \[3, 32\]"):
            grouped_experts(x, torch.ones(3, 1), ids, table)
    with pytest.raises(ValueError, match="expected equal shapes"):
        grouped_experts(zeros(3, 32), torch.ones(3, 2), ids, table)
    aligned = align_tokens(ids, 16, 1)
    with pytest.raises(ValueError, match="a config with aligned tokens"):
        grouped_experts(zeros(3, 32), torch.ones(3, 1), ids, table, aligned=aligned)


def test_no_tokens_give_no_rows() -> None:
    table = ExpertTable([GOOD13], [GOOD2], BF16)
    out = grouped_experts(
        zeros(0, 32), torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.int32), table
    )
    assert out.shape == (0, 32)


POINTERS = {"table": "*i64", "router_weights": "*fp32"} | dict.fromkeys(
    ("sorted_ids", "expert_ids", "padded"), "*i32"
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows, gated, dtype", [(8, True, "bf16"), (4096, False, "fp16")])
def test_kernel_lowers_for_gpus(
    capability: int,
    rows: int,
    gated: bool,
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compile all formats at once down to machine code, which the interpreter does not show."""
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no nvidia backend")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = choose_config(rows, 8, 128, 768)
    constants = {
        "TOP_K": 8 if gated else 1,
        "GATED": gated,
        "EVEN_K": True,
        "COMPUTE": tl.bfloat16 if dtype == "bf16" else tl.float16,
        "PLAIN": True,
        "FP8_STEP": min(128, config.block_k),
        "FP8_NAN": False,
        "INT4_STEP": 64,
        "INT4_ZEROS": True,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    kernel = grouped_kernel._gemm_kernel
    signature = {
        name: "constexpr"
        if name in constants
        else POINTERS.get(name, f"*{dtype}" if name in ("x", "out") else "i32")
        for name in kernel.arg_names
    }
    # What the launcher finds out: addresses and sizes that are multiples of 16.
    odd = {"tiles", "pairs", "experts"}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in odd and name not in constants
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, aligned),
        target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx and compiled.asm["cubin"]
    assert "wgmma" in ptx if capability == 90 and config.block_m == 64 else "mma.sync" in ptx
    assert "cp.async.cg.shared.global" in ptx  # 16 bytes at a time, past the first-level cache
    assert "e4m3" not in ptx  # FP8 is decoded by bits, as 8.0 needs
    assert ".ftz" not in ptx  # the subnormals that decoding passes through must not become zero
    assert compiled.metadata.shared <= 99 * 1024  # of capability 8.6 and 8.9, the least


@triton.jit
def _decode_kernel(codes, out, KEEP_NAN: tl.constexpr):
    place = tl.arange(0, 256)
    tl.store(out + place, decode_e4m3(tl.load(codes + place), KEEP_NAN))


@triton.jit
def _subtract_kernel(codes, out, COMPUTE: tl.constexpr):
    code = tl.load(codes + tl.arange(0, 16))
    zero = tl.arange(0, 32)
    value = subtract_zero(code[:, None], zero.to(tl.float32)[None, :], COMPUTE)
    tl.store(out + tl.arange(0, 16)[:, None] * 32 + zero[None, :], value.to(tl.float32))


def run_case(inputs: dict[str, Any], device: str) -> Tensor:
    w13: list[Weight | None] = []
    w2: list[Weight | None] = []
    for expert in inputs["experts"]:
        for weights, stored in zip((w13, w2), expert or (None, None), strict=True):
            weights.append(stored and Stored(stored[0], stored[1], zeros(0)).load(device))
    batch = {name: tensor.to(device) for name, tensor in inputs["batch"].items()}
    table = ExpertTable(w13, w2, batch["x"].dtype)
    config = inputs["config"] and TileConfig(**inputs["config"])
    aligned = None
    if inputs["aligned"]:
        config = TileConfig(32, 64, 64, 4, 2)
        aligned = align_tokens(batch["topk_ids"], config.block_m, table.experts)
    return grouped_experts(**batch, table=table, config=config, aligned=aligned).cpu()


def run_nan(device: str) -> dict[str, Any]:
    """Put one NaN into w2 of one FP8 expert; every format but int4 is in the layer."""
    nan_case = case("nan", "fp8 32x64", "plain", m=9)
    expert, row = 2, 40
    stored = nan_case.experts[expert]
    assert stored is not None
    stored[1].arguments["weight"].view(torch.uint8)[row, 3] = 0xFF
    out = run_case(nan_case.inputs(), device)
    return {"nan out": out, "nan ids": nan_case.ids, "nan expert": expert, "nan row": row}


def main(folder: Path) -> None:
    # torch.empty is then full of NaN, so that a row which nothing wrote shows when it is read.
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.load(folder / "cases.pt")
    results = {name: run_case(arguments, device) for name, arguments in inputs.items()}
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    for name, keep in (("e4m3", False), ("e4m3 with nan", True)):
        out = torch.empty(256, device=device)
        _decode_kernel[(1,)](codes, out, KEEP_NAN=keep)
        results[name] = out.cpu()
    for name, compute in (("int4 float32", tl.float32), ("int4 float16", tl.float16)):
        out = torch.empty(16, 32, device=device)
        _subtract_kernel[(1,)](codes, out, COMPUTE=compute)
        results[name] = out.cpu()
    torch.save(results | run_nan(device), folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
