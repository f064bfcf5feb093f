# SPDX-License-Identifier: Apache-2.0
"""Experts packed while the next layer is read are those packed when all are loaded."""

import threading
from pathlib import Path

import pytest
import torch
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from tests.loading.indexers import FIXTURES
from tests.loading.serving import Serving, needs_cpu, serve
from vllm_mixprec.loading.ledger import Ledger
from vllm_mixprec.quant import cpu
from vllm_mixprec.routing.kernels import detect_platform

pytestmark = [
    needs_cpu,
    pytest.mark.skipif(detect_platform().name != "cpu-avx512", reason="needs AVX512_BF16"),
]
MIXTRAL = FIXTURES / "architectures" / "mixtral"
EXPERTS = "model.layers.*.block_sparse_moe.experts"
RULES = {f"{EXPERTS}.0": "fp8", f"{EXPERTS}.1": "int4"}


def load(serving: Serving) -> dict[str, torch.Tensor]:
    built = serving.build()
    serving.loader.load_weights(built.model, built.model_config)
    process_weights_after_loading(built.model, built.model_config, torch.device("cpu"))
    return {name: value.detach().clone() for name, value in built.model.named_parameters()}


def serve_mixtral(folder: Path, packs_ahead: bool):
    sources = {name: MIXTRAL / name for name in ("fp8", "int4")}
    return serve(folder, MIXTRAL / "bf16", sources, RULES, has_draft=False, packs_ahead=packs_ahead)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Method -> names of the threads that packed by it."""
    found: dict[str, set[str]] = {}
    for method in (cpu.CpuBf16ExpertsMethod, cpu.CpuFp8ExpertsMethod, cpu.CpuInt4ExpertsMethod):

        def noted(self, *tensors, pack=method.pack):
            name = threading.current_thread().name.partition("_")[0]
            found.setdefault(type(self).__name__, set()).add(name)
            return pack(self, *tensors)

        monkeypatch.setattr(method, "pack", noted)
    return found


def test_packed_ahead_or_not_is_the_same(tmp_path: Path, threads: dict[str, set[str]]) -> None:
    with serve_mixtral(tmp_path / "after", packs_ahead=False) as serving:
        expected = load(serving)
    assert set().union(*threads.values()) == {"MainThread"}
    threads.clear()
    with serve_mixtral(tmp_path / "ahead", packs_ahead=True) as serving:
        found = load(serving)
    assert threads == {
        "CpuBf16ExpertsMethod": {"mixprec-pack"},
        "CpuFp8ExpertsMethod": {"mixprec-pack"},
        "CpuInt4ExpertsMethod": {"MainThread"},
    }
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_an_error_while_packing_ahead_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self, *tensors):
        raise RuntimeError("no memory for this")

    monkeypatch.setattr(cpu.CpuFp8ExpertsMethod, "pack", fail)
    with (
        serve_mixtral(tmp_path, packs_ahead=True) as serving,
        pytest.raises(RuntimeError, match="no memory for this"),
    ):
        load(serving)


def test_a_layer_that_lacks_a_module_is_not_packed(
    tmp_path: Path, threads: dict[str, set[str]]
) -> None:
    with serve_mixtral(tmp_path, packs_ahead=True) as serving:
        built = serving.build()
        lost = next(name for name in built.held if ".layers.1." in name and ".experts.2." in name)
        feed = serving.loader.get_all_weights(built.model_config, built.model)
        ledger = Ledger(built.model)
        built.model.load_weights(
            (pair for pair in feed if pair[0].rpartition(".")[0] != lost), ledger
        )
        ledger.release()
        groups = [
            module
            for module in built.model.modules()
            if isinstance(getattr(module, "quant_method", None), cpu.CpuExpertsMethod)
        ]
    begun = {
        (group.layer_name, type(group.quant_method).__name__)
        for group in groups
        if hasattr(group, "mixprec_ahead")
    }
    plain, fp8 = "CpuBf16ExpertsMethod", "CpuFp8ExpertsMethod"
    assert {method for layer, method in begun if ".layers.1." in f"{layer}."} == {fp8}
    assert {method for layer, method in begun if ".layers.0." in f"{layer}."} == {plain, fp8}
