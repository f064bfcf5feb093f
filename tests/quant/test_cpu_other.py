# SPDX-License-Identifier: Apache-2.0
"""Int4 linears on a CPU without AVX512_BF16: the loader into vLLM's layers, against float32.

``VLLM_MIXPREC_PLATFORM`` stands for such a CPU, and the kernel is that of this machine's library;
tests/engine/test_cpu_other.py runs the library that vLLM has for such CPUs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.checkpoint.formats.tools import CASES, Stored, awq, gptq, make_weight
from tests.loading.serving import Built, Serving, needs_cpu, serve_plan
from tests.quant.format_model import HIDDEN, Tensors, modules_of, write_formats
from tests.quant.test_cpu_ops import relative_error
from vllm_mixprec import Plan
from vllm_mixprec.checkpoint import Scheme, open_checkpoint
from vllm_mixprec.quant import cpu_int4_w16, cpu_probe, methods
from vllm_mixprec.quant.cpu_linear import CpuInt4W16LinearMethod
from vllm_mixprec.routing import Layout, Platform, RouteTable, load_route_table, resolve
from vllm_mixprec.routing.platform import INT4_W16, detect_platform

pytestmark = [
    needs_cpu,
    pytest.mark.skipif(cpu_probe.probe_int4_w16("gptq") is not None, reason="needs AVX512F"),
]
PACKED = [case for case, entry in CASES.items() if entry.other is not None]
ASYMMETRIC = "gptq-asym"
# Scales and results rounded to the dtype; bf16's arithmetic of older CPUs costs 0.006.
BOUND = {torch.bfloat16: 0.012, torch.float16: 0.002}
OTHER = Platform("cpu-other")


@dataclass(frozen=True)
class Served:
    serving: Serving
    built: Built
    table: RouteTable
    weights: Tensors

    def layer(self, case: str) -> tuple[str, torch.nn.Module]:
        name = f"model.layers.{PACKED.index(case)}.self_attn.o_proj"
        return name, self.built.model.get_submodule(name)

    def error(self, case: str, tokens: int, factor: float = 1, roll: int = 0) -> float:
        """Relative error of a layer's output, of weights ``factor`` times the tool's."""
        name, layer = self.layer(case)
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, HIDDEN, generator=generator).to(layer.scales.dtype)
        weight = (self.weights[f"{name}.weight"] * factor).roll(roll, 0)
        out = layer.quant_method.apply(layer, x)
        assert (out.dtype, out.shape) == (x.dtype, (tokens, HIDDEN))
        return relative_error(out, x.float() @ weight.T)


@pytest.fixture(scope="module", params=BOUND, ids=["bf16", "fp16"])
def served(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One of the two is packed while it is loaded, as a server's are."""
    folder = tmp_path_factory.mktemp("other")
    plan, weights = write_formats(folder, PACKED)
    file = folder / "base" / "config.json"
    name = str(request.param).removeprefix("torch.")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": name}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MIXPREC_PLATFORM", "cpu-other")
        methods.usable_platform.cache_clear()
        plan, is_bf16 = Plan.from_dict(plan), request.param == torch.bfloat16
        with serve_plan(folder, folder / "base", plan, packs_ahead=is_bf16) as serving:
            with set_default_torch_dtype(request.param):
                built = serving.build()
                serving.loader.load_weights(built.model, built.model_config)
                process_weights_after_loading(built.model, built.model_config, torch.device("cpu"))
            yield Served(serving, built, serving.config.quant_config.table, weights)
        methods.usable_platform.cache_clear()


@pytest.mark.parametrize("case", PACKED)
def test_linears_are_packed_and_experts_widened(served: Served, case: str) -> None:
    assert served.table.platform == OTHER
    for module, (_, k) in modules_of(PACKED.index(case)).items():
        route = served.table.routes[module]
        if ".experts." in module:
            assert route.widened and route.kernel is None
            assert route.reason is not None and route.reason.endswith("on cpu-other for experts")
        else:
            expected = CASES[case].other
            assert expected is not None and route.served.label == expected.format(k=k)
            assert route.kernel == INT4_W16


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_linear(served: Served, case: str, tokens: int, record_property) -> None:
    name, layer = served.layer(case)
    assert type(layer.quant_method) is CpuInt4W16LinearMethod
    assert layer.qweight.nbytes == HIDDEN * HIDDEN // 2
    most = BOUND[layer.scales.dtype]
    assert served.error(case, tokens) < most
    assert served.error(case, tokens, roll=1) > 10 * most  # negative control: a neighbour's rows
    label = f"packed: {served.table.routes[name].served.label}"
    record_property("matrix", (case, "AVX512F linear", label))


def test_bias_and_leading_dimensions(served: Served) -> None:
    name, layer = served.layer(ASYMMETRIC)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, HIDDEN, generator=generator).to(layer.scales.dtype)
    bias = torch.randn(HIDDEN, generator=generator).to(x.dtype)
    out = layer.quant_method.apply(layer, x, bias)
    expected = x.float() @ served.weights[f"{name}.weight"].T + bias.float()
    assert relative_error(out, expected) < BOUND[x.dtype]
    assert relative_error(out, expected - bias.float()) > 10 * BOUND[x.dtype]  # negative control
    assert layer.quant_method.apply(layer, x[:0]).shape == (0, 3, HIDDEN)
    # Rows that do not lie one after the other.
    wide = torch.cat([x, x], -1)[..., :HIDDEN]
    assert torch.equal(layer.quant_method.apply(layer, wide, bias), out)


def test_reload_brings_new_weights_in_place(served: Served) -> None:
    """Scales halved, then the files' again; captured graphs hold on to the tensors."""
    cases = (ASYMMETRIC, "gptq-g16", "awq-g32", "ct-int4-asym")
    layers = {case: served.layer(case)[1] for case in cases}
    before = {case: _places(layer) for case, layer in layers.items()}
    model, config = served.built.model, served.built.model_config
    halved = [
        (name, tensor / 2 if name.endswith(("scales", "weight_scale")) else tensor.clone())
        for name, tensor in served.serving.loader.get_all_weights(config, model)
    ]
    for weights, factor in ((halved, 0.5), (None, 1)):
        with set_default_torch_dtype(config.dtype):
            reload_weights(served.serving.config, model, weights, None, True)
        for case, layer in layers.items():
            most = BOUND[layer.scales.dtype]
            assert _places(layer) == before[case]
            assert served.error(case, 9, factor=factor) < most
            assert served.error(case, 9, factor=1.5 - factor) > 10 * most  # negative control


def _places(layer: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}


SIZES = [(16, 256), (32, 256), (48, 96), (64, 256), (96, 96), (128, 256), (6, 96), (192, 384)]


def store(layout: str, symmetric: bool, group_size: int, weight: torch.Tensor) -> Stored:
    kind = scalar_types.uint4b8 if symmetric else scalar_types.uint4
    if layout == "awq":
        return awq(group_size, kind)(weight)
    return gptq(kind, group_size, layout=layout)(weight)


@pytest.mark.parametrize("dtype", BOUND, ids=["bf16", "fp16"])
@pytest.mark.parametrize(("group_size", "k"), SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_every_even_group(
    layout: str, symmetric: bool, group_size: int, k: int, dtype: torch.dtype
) -> None:
    made = store(layout, symmetric, group_size, make_weight(96, k, seed=group_size))
    scheme = Scheme(
        layout.removesuffix("_v2"),
        4,
        group_size=group_size,
        symmetric=symmetric,
        zero_offset=int(layout == "gptq"),
    )
    tensors = made.tensors
    weight, zeros = cpu_int4_w16.pack_int4_w16(scheme, tensors["qweight"], tensors["qzeros"])
    assert (zeros is None) == symmetric
    scales = tensors["scales"].to(dtype)
    for tokens in (1, 5, 33):
        x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        out = cpu_int4_w16.int4_w16_linear(scheme, x, weight, scales, zeros)
        assert relative_error(out, x.float() @ made.weight.T) < BOUND[dtype]


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_probe_sees_a_wrong_layout(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    probe = cpu_probe.probe_int4_w16.__wrapped__
    assert probe(format) is None
    packed = cpu_int4_w16.pack_int4_w16

    def wrong(*args):
        weight, zeros = packed(*args)
        return weight.roll(1, 1), zeros

    monkeypatch.setattr(cpu_int4_w16, "pack_int4_w16", wrong)
    assert "its probe is off by" in (probe(format) or "")
    monkeypatch.setattr(cpu_int4_w16, "_ISA", "no such")
    assert "its probe" in (probe(format) or "")


def test_kernel_that_fails_its_probe_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MIXPREC_PLATFORM", "cpu-other")
    monkeypatch.setattr(methods, "probe_int4_w16", {"awq": "wrong"}.get)
    methods.kernel_problem.cache_clear()
    platform = methods.usable_platform.__wrapped__()
    methods.kernel_problem.cache_clear()
    assert platform == detect_platform().without({("awq", INT4_W16): "wrong"})


def test_cut_through_a_group_is_told(tmp_path: Path) -> None:
    """288 columns on two ranks: 144 are three groups of 48, but one and a half of 96."""
    plan, _ = write_formats(tmp_path, ["gptq-g32"])
    plan = Plan.from_dict(plan)
    name = "model.layers.0.self_attn.o_proj"
    checkpoints = {each: open_checkpoint(tmp_path / each, each) for each in ("base", "gptq-g32")}

    def served(group_size: int, columns: int, ranks: int):
        for checkpoint in checkpoints.values():
            module = checkpoint.modules[name]
            scheme = module.scheme
            if scheme.is_quantized:
                scheme = replace(scheme, group_size=group_size)
            made = replace(module, shape=(HIDDEN, columns), scheme=scheme)
            checkpoint.modules[name] = made
        layout = Layout(tensor_parallel_size=ranks)
        return resolve(plan, checkpoints, layout, OTHER).routes[name]

    assert served(48, 384, 2).kernel == INT4_W16
    assert served(16, 288, 1).kernel == INT4_W16
    assert "K=144 on a rank is not a multiple of 32" in (served(48, 288, 2).reason or "")
    assert served(96, 288, 2).reason == (
        "o_proj: a tensor-parallel shard of 144 columns cuts a group of 96"
    )
    finer = served(256, 256, 2)  # a scale a row of 256 is one of 128 twice
    assert (finer.served.group_size, finer.kernel) == (128, INT4_W16)


def test_bytes_per_rank_count_packed_linears(tmp_path: Path) -> None:
    plan, _ = write_formats(tmp_path, ["gptq-g16"])
    table = load_route_table(Plan.from_dict(plan), Layout(tensor_parallel_size=2), OTHER)
    route = table.routes["model.layers.0.self_attn.o_proj"]
    held = dict(route.served_tensors())
    codes, groups = HIDDEN * HIDDEN // 2, HIDDEN // 16
    assert (held["qweight"], held["scales"]) == (codes, groups * HIDDEN * 2)
    base = Plan.from_dict(plan | {"rules": []})
    plain = load_route_table(base, Layout(tensor_parallel_size=2), OTHER)
    saved = plain.bytes_per_rank()[0] - table.bytes_per_rank()[0]
    assert saved == pytest.approx((HIDDEN * HIDDEN * 2 - sum(held.values())) / 2, abs=HIDDEN * 4)
