# SPDX-License-Identifier: Apache-2.0
"""Every format through the loader into vLLM's own layers, against float32 on the tool's weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.checkpoint.formats.tools import CASES
from tests.loading.serving import needs_cpu, serve_plan
from tests.quant.format_model import (
    EXPERTS,
    HIDDEN,
    INNER,
    QUANTISED,
    Tensors,
    modules_of,
    write_formats,
)
from tests.quant.test_cpu_ops import expected_output, relative_error
from vllm_mixprec import Plan
from vllm_mixprec.checkpoint.dequantize import relayout
from vllm_mixprec.checkpoint.formats import FORMATS
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.quant import cpu_linear
from vllm_mixprec.quant.cpu import CpuExpertsMethod, CpuFp8ChannelExpertsMethod
from vllm_mixprec.quant.cpu_ops import ExpertKernel
from vllm_mixprec.quant.experts import holder_of
from vllm_mixprec.quant.methods import linear_method
from vllm_mixprec.routing import Platform, RouteTable, missing_kernel
from vllm_mixprec.routing.fused import parse_expert
from vllm_mixprec.routing.kernels import kernels_for
from vllm_mixprec.routing.parts import Part, layer_parts
from vllm_mixprec.routing.platform import detect_platform

pytestmark = [
    needs_cpu,
    pytest.mark.skipif(detect_platform().name != "cpu-avx512", reason="needs AVX512_BF16"),
]
every_case = pytest.mark.parametrize("case", CASES)
LAYER = {case: layer for layer, case in enumerate(CASES)}
# As in test_cpu_ops: bf16 rounding, or int8 activations; widened weights are rounded to bf16.
BOUND = {"int4": 0.03, "other": 0.012}
# Activations rounded to E4M3: of three bits at most 2^-4 of a value, uniformly.
FP8_ACTIVATIONS = 2**-4 / 3**0.5

INSTALLED = {
    UnquantizedLinearMethod: "vLLM's own",
    cpu_linear.CpuFp8LinearMethod: "fp8_scaled_mm_cpu",
    cpu_linear.CpuFp8ChannelLinearMethod: "fp8_scaled_mm_cpu",
    CpuFp8ChannelExpertsMethod: "fp8_scaled_mm_cpu",  # expert by expert
    cpu_linear.CpuInt4LinearMethod: "int4_scaled_mm_cpu",
    cpu_linear.CpuInt4W16LinearMethod: "cpu_gemm_wna16",
}


@dataclass(frozen=True)
class Served:
    model: torch.nn.Module
    config: VllmConfig
    table: RouteTable
    weights: Tensors


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("formats")
    plan, weights = write_formats(folder)
    with serve_plan(folder, folder / "base", Plan.from_dict(plan)) as serving:
        with set_default_torch_dtype(torch.bfloat16):
            built = serving.build()
            serving.loader.load_weights(built.model, built.model_config)
            process_weights_after_loading(built.model, built.model_config, torch.device("cpu"))
        yield Served(built.model, serving.config, serving.config.quant_config.table, weights)


def bound(served: Served, module: str) -> float:
    rounds = served.table.routes[module].kernel == "int4_scaled_mm_cpu"
    return BOUND["int4" if rounds else "other"]


def served_as(served: Served, module: str) -> str:
    route = served.table.routes[module]
    return "widened" if route.widened else f"packed: {route.served.label}"


@every_case
def test_served_as_expected(served: Served, case: str) -> None:
    for module, (_, k) in modules_of(LAYER[case]).items():
        route = served.table.routes[module]
        expected = CASES[case].cpu
        if ".experts." in module:
            expected = CASES[case].experts
            k = INNER  # an expert's groups have one size: the least K's, where each spans its K
        assert route.served.label == (expected.format(k=k) if expected else "bf16")
        assert route.widened == (expected is None)


def test_views_name_the_kernel_that_was_installed(served: Served) -> None:
    """What the log, ``inspect`` and the routes show, beside the methods that the layers have."""
    shown = layer_parts(served.table)
    for layer in LAYER.values():
        prefix = f"model.layers.{layer}"
        linear = served.model.get_submodule(f"{prefix}.self_attn.o_proj").quant_method
        experts = served.model.get_submodule(f"{prefix}.mlp.experts").routed_experts
        own = {f"{prefix}.self_attn.o_proj": linear}
        own |= {
            f"{prefix}.mlp.experts.{expert}.down_proj": holder_of(experts, expert).quant_method
            for expert in range(EXPERTS)
        }
        for module, method in own.items():
            parts = [part for part in shown[layer] if is_in(module, part)]
            assert parts  # several of an expert whose projections are in groups of several sizes
            kernel = INSTALLED.get(type(method))
            if isinstance(method, CpuExpertsMethod) and kernel is None:
                in_amx = method.kernel is ExpertKernel.BF16_AMX
                kernel = "cpu_fused_moe" if in_amx else "fused_experts_cpu"
            is_widened = served.table.routes[module].widened
            for part in parts:
                assert (part.kernel, part.reason is not None) == (kernel, is_widened), module


def is_in(module: str, part: Part) -> bool:
    expert = parse_expert(module)
    if expert is not None:
        return expert.expert in part.experts
    return part.kind == "attention" and part.source != "base"


@every_case
@pytest.mark.parametrize("tokens", [1, 9])
def test_linear(served: Served, case: str, tokens: int, record_property) -> None:
    name = f"model.layers.{LAYER[case]}.self_attn.o_proj"
    layer, weight = served.model.get_submodule(name), served.weights[f"{name}.weight"]
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    out = layer.quant_method.apply(layer, x)
    expected = x.float() @ weight.T
    most = bound(served, name)
    assert relative_error(out, expected) < most
    # Negative control: each row is its neighbour's.
    assert relative_error(out, x.float() @ weight.roll(1, 0).T) > 10 * most
    record_property("matrix", (case, "cpu linear", served_as(served, name)))


@every_case
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts(served: Served, case: str, tokens: int, record_property) -> None:
    prefix = f"model.layers.{LAYER[case]}.mlp.experts"
    layer = served.model.get_submodule(prefix).routed_experts
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :QUANTISED].int()
    ids[0] = torch.arange(QUANTISED)
    weights = torch.tensor([[1.0, 0.25]]).repeat(tokens, 1)  # unlike, so that a swap shows

    def reference(order: list[int]) -> torch.Tensor:
        def weight(expert: int, part: str) -> torch.Tensor:
            return served.weights[f"{prefix}.{order[expert]}.{part}_proj.weight"]

        experts = {
            expert: (
                torch.cat([weight(expert, "gate"), weight(expert, "up")]),
                weight(expert, "down"),
            )
            for expert in range(EXPERTS)
        }
        return expected_output(x, weights, ids, experts)

    out = layer.quant_method.apply(layer, x, weights, ids, None, None)
    most = bound(served, f"{prefix}.0.gate_proj")
    assert relative_error(out, reference([0, 1, 2, 3])) < most
    assert relative_error(out, reference([1, 0, 2, 3])) > 10 * most  # negative control
    served_label = served_as(served, f"{prefix}.0.gate_proj")
    record_property("matrix", (case, "cpu experts", served_label))


def by_vllms_own(label: str | None) -> bool:
    return label is not None and ("int4" in label or label == "fp8_channel")


@pytest.mark.parametrize("case", [case for case in CASES if by_vllms_own(CASES[case].cuda)])
def test_layouts_for_cuda_are_what_vllms_own_methods_read(served: Served, case: str) -> None:
    """On a CPU the same method classes take a kernel for CPUs: int4's, or torch's FP8."""
    name = f"model.layers.{LAYER[case]}.self_attn.o_proj"
    route = served.table.routes[name]
    tensors = {
        spec.name.rpartition(".")[2]: tensor
        for spec, tensor in read_tensors(route.tensors.values())
    }
    layouts = FORMATS[route.stored.format].layouts(route.stored)
    cuda = Platform("cuda-90")
    shape = (HIDDEN, HIDDEN)
    scheme = next(
        layout
        for layout in (route.stored, *layouts)
        if missing_kernel(cuda, layout, "linear", shape) is None
    )
    if scheme != route.stored:
        tensors = relayout(route.stored, scheme, tensors)
    named = served.model.get_submodule(name)
    layer = torch.nn.Module()
    layer.register_parameter("bias", None)  # as vLLM's linears do
    with set_current_vllm_config(served.config):
        kernel = kernels_for(cuda, scheme.format, "linear")[0].name
        method = linear_method(scheme, kernel, named, name)
        if hasattr(named, "scheme"):  # compressed-tensors' methods leave theirs with the layer
            layer.scheme = named.scheme
        sizes = (HIDDEN, [HIDDEN], HIDDEN, HIDDEN, torch.bfloat16)
        method.create_weights(layer, *sizes, weight_loader=default_weight_loader)
        is_fp8 = scheme.format == "fp8_channel"
        for suffix in ("weight", "weight_scale") if is_fp8 else ("qweight", "qzeros", "scales"):
            getattr(layer, suffix).data.copy_(tensors[suffix])
        method.process_weights_after_loading(layer)
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
        out = method.apply(layer, x)
    weight, most = served.weights[f"{name}.weight"], FP8_ACTIVATIONS if is_fp8 else BOUND["int4"]
    assert relative_error(out, x.float() @ weight.T) < most
    # Negative control: each row is its neighbour's.
    assert relative_error(out, x.float() @ weight.roll(1, 0).T) > 10 * most
