# SPDX-License-Identifier: Apache-2.0
"""Parameters begin where a device can read their tensors straight into them."""

from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from tests.loading.serving import needs_cpu
from vllm_mixprec.checkpoint import TensorSpec, read_header
from vllm_mixprec.checkpoint.filling import Filling
from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.checkpoint.ranges import OpenFile, RangeReader
from vllm_mixprec.checkpoint.stored import StoredTensor
from vllm_mixprec.checkpoint.threads import start_readers
from vllm_mixprec.loading.placement import Placement, _lay
from vllm_mixprec.quant.int4_blocks import (
    Int4Layout,
    block_in_place,
    blocked_in_place,
    pack_int4,
    with_room,
)
from vllm_mixprec.routing import Route

pytestmark = needs_cpu
SHAPE = (1024, 1024)


class Method:
    """Stands for one of the package's."""

    __module__ = "vllm_mixprec.quant"


def layer(method: object, weight: torch.Tensor) -> Module:
    module = Module()
    module.quant_method = method
    module.weight = Parameter(weight, requires_grad=False)
    return module


def write(file: Path, first: int, names: list[str]) -> dict[str, TensorSpec]:
    """Write tensors of whole sectors behind one of some bytes."""
    tensors = {name: torch.randn(SHAPE).bfloat16() for name in names}
    save_file({"a": torch.zeros(first // 2).bfloat16()} | tensors, file)
    return read_header(file)


@pytest.fixture
def stored():
    """Makes what the reader hands out of a tensor that is to be read past the page cache."""
    with ExitStack() as stack:
        pool, reader = stack.enter_context(start_readers()), RangeReader(may_pass=True)

        def make(spec: TensorSpec, is_past: bool = True) -> StoredTensor:
            file = stack.enter_context(closing(OpenFile(spec.file, spec.stamp, may_pass=True)))
            if file.alignment is None or file.alignment.memory < 16:
                pytest.skip("direct reads need nothing here, or nobody tells")
            filling = Filling(file, pool, reader, is_past)
            return StoredTensor(spec, filling=filling)

        yield make


def place(parameter: Parameter, memory: int = 512) -> int:
    return parameter.data_ptr() % memory


def test_a_parameter_begins_where_its_first_tensor_does(tmp_path: Path, stored):
    specs = write(tmp_path / "a.safetensors", 168, ["b", "c"])
    linear = layer(UnquantizedLinearMethod(), torch.empty(2 * SHAPE[0], SHAPE[1]).bfloat16())
    placement = Placement(linear, [])
    for number, name in enumerate("bc"):
        first = stored(specs[name])
        memory = first.filling.file.alignment.memory
        placement.suit(linear.weight, first)
        assert place(linear.weight, memory) == specs["b"].start % memory
        linear.weight.data[number * SHAPE[0] :][: SHAPE[0]].copy_(first)
    expected = [tensor.read() for tensor in map(stored, (specs["b"], specs["c"]))]
    assert torch.equal(linear.weight, torch.cat(expected))
    assert linear.weight.shape == (2 * SHAPE[0], SHAPE[1]) and linear.weight.is_contiguous()


def test_rows_of_a_tensor_count_where_they_begin(tmp_path: Path, stored):
    specs = write(tmp_path / "a.safetensors", 24, ["b"])
    linear = layer(UnquantizedLinearMethod(), torch.empty(1000, 1000).bfloat16())
    part = stored(specs["b"])[3:]
    memory = part.filling.file.alignment.memory
    Placement(linear, []).suit(linear.weight, part)
    assert place(linear.weight, memory) == (specs["b"].start + 3 * 2048) % memory


def test_experts_of_two_files_begin_where_most_do(tmp_path: Path, stored):
    modules = [f"model.layers.0.mlp.experts.{expert}.down_proj" for expert in range(5)]
    specs = write(tmp_path / "a.safetensors", 24, modules[:2])
    specs |= write(tmp_path / "b.safetensors", 88, modules[2:])
    scheme = Scheme("bf16", 16)
    routes = [
        Route(
            module=module,
            source="base",
            stored=scheme,
            served=scheme,
            reason=None,
            tensors={"weight": specs[module]},
            shape=SHAPE,
        )
        for module in modules
    ]
    experts = layer(Method(), torch.empty(5, *SHAPE).bfloat16())
    first = stored(specs[modules[0]])
    memory = first.filling.file.alignment.memory
    Placement(experts, routes).suit(experts.weight, first)
    assert place(experts.weight, memory) == specs[modules[2]].start % memory


def test_int4_words_keep_their_room_and_begin_with_a_run(tmp_path: Path, stored):
    specs = write(tmp_path / "a.safetensors", 24, ["b"])
    words = with_room(torch.empty(4, 256, 512, dtype=torch.int32), 128)
    experts = layer(Method(), words)
    Placement(experts, []).suit(experts.weight, stored(specs["b"]))
    assert experts.weight.shape == words.shape and experts.weight.stride() == words.stride()
    assert experts.weight.data_ptr() % 16 == 0


@pytest.mark.parametrize("moved", [16, 48, 4096])
def test_int4_words_that_were_moved_are_blocked_where_they_are(moved: int):
    generator = torch.Generator().manual_seed(moved)
    stored, zeros = (
        torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
        for shape in ((4, 32, 64), (4, 2, 8))
    )
    scales = torch.rand(4, 2, 64, generator=generator)
    experts = layer(Method(), with_room(stored, 128))
    room = torch.empty(experts.weight.untyped_storage().nbytes() + 4096, dtype=torch.uint8)
    _lay(experts.weight, room, moved)
    words = experts.weight.data
    assert words.data_ptr() == room.data_ptr() + moved
    words.copy_(stored)
    for some in (slice(2, 3), slice(0, 2), slice(3, 4)):
        block_in_place(words[some], scales[some], zeros[some], Int4Layout.GPTQ)
    found = blocked_in_place(words, scales, zeros, Int4Layout.GPTQ)
    assert found[0].data_ptr() == words.data_ptr()
    for one, other in zip(found, pack_int4(stored, scales, zeros, Int4Layout.GPTQ), strict=True):
        assert torch.equal(one, other)


def test_codes_of_a_byte_begin_where_packing_can_view_them(tmp_path: Path, stored):
    """It views eight at a time; a file may have them begin anywhere."""
    codes = torch.zeros(SHAPE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for first in (1, 4, 24):
        file = tmp_path / f"{first}.safetensors"
        save_file({"a": torch.zeros(first, dtype=torch.uint8), "b": codes}, file)
        spec = read_header(file)["b"]
        linear = layer(Method(), torch.empty(SHAPE, dtype=codes.dtype))
        tensor = stored(spec)
        Placement(linear, []).suit(linear.weight, tensor)
        memory = tensor.filling.file.alignment.memory
        assert linear.weight.storage_offset() % 8 == 0
        assert (place(linear.weight, memory) == spec.start % memory) == (spec.start % 8 == 0)


@pytest.mark.parametrize("why", ["another's method", "small", "cached", "not read late"])
def test_others_stay_where_they_are(tmp_path: Path, stored, why: str):
    specs = write(tmp_path / "a.safetensors", 24, ["b"])
    shape = (8, 8) if why == "small" else SHAPE
    method = object() if why == "another's method" else UnquantizedLinearMethod()
    weight = torch.full(shape, 7.0).bfloat16()
    linear = layer(method, weight)
    placement = Placement(linear, [])
    first = stored(specs["b"], is_past=why != "cached")
    before = linear.weight.data_ptr()
    placement.suit(linear.weight, first.read() if why == "not read late" else first)
    assert linear.weight.data_ptr() == before
    if why in ("another's method", "small"):
        assert before == weight.data_ptr() and bool((linear.weight == 7).all())


def test_a_tied_head_stays_tied(tmp_path: Path, stored):
    specs = write(tmp_path / "a.safetensors", 24, ["b"])
    model = Module()
    model.embed = layer(UnquantizedLinearMethod(), torch.empty(SHAPE).bfloat16())
    model.head = layer(UnquantizedLinearMethod(), torch.empty(1))
    model.head.weight = model.embed.weight
    Placement(model, []).suit(model.head.weight, stored(specs["b"]))
    assert model.head.weight is model.embed.weight
