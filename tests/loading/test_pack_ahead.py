# SPDX-License-Identifier: Apache-2.0
"""Weights packed while the next are read are those packed when all are loaded."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from tests.loading.indexers import FIXTURES
from tests.loading.serving import Serving, needs_cpu, serve
from vllm_mixprec.loading import pack_ahead
from vllm_mixprec.loading.ledger import Ledger
from vllm_mixprec.loading.pack_ahead import PackAhead
from vllm_mixprec.quant import cpu
from vllm_mixprec.routing.platform import detect_platform

pytestmark = [
    needs_cpu,
    pytest.mark.skipif(detect_platform().name != "cpu-avx512", reason="needs AVX512_BF16"),
]
MIXTRAL = FIXTURES / "architectures" / "mixtral"
EXPERTS = "model.layers.*.block_sparse_moe.experts"
RULES = {f"{EXPERTS}.0": "fp8", f"{EXPERTS}.{{1,3}}": "int4"}


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
    methods = {
        cpu.CpuBf16ExpertsMethod: "pack_in_place",
        cpu.CpuFp8ExpertsMethod: "pack_in_place",
        cpu.CpuInt4ExpertsMethod: "pack_in_place",
        UnquantizedLinearMethod: "process_weights_after_loading",
        UnquantizedEmbeddingMethod: "process_weights_after_loading",
    }

    def noted(pack: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(pack)
        def note(self: Any, *given: Any) -> Any:
            thread = threading.current_thread().name.partition("_")[0]
            found.setdefault(type(self).__name__, set()).add(thread)
            return pack(self, *given)

        return note

    for method, name in methods.items():
        monkeypatch.setattr(method, name, noted(getattr(method, name)))
    return found


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread leaves all that is begun to the other."""
    leave = PackAhead.__exit__

    def leave_when_done(self: PackAhead, failure: type[BaseException] | None, *rest: Any) -> None:
        if failure is None:
            experts = [future for begun in self._experts.values() for future, _ in begun]
            wait([*self._whole.values(), *experts])
        leave(self, failure, *rest)

    monkeypatch.setattr(PackAhead, "__exit__", leave_when_done)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The other thread gets to nothing until the test is over."""
    over = threading.Event()
    monkeypatch.setattr(pack_ahead, "unpin", over.wait)
    yield
    over.set()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_packed_ahead_or_not_is_the_same(
    tmp_path: Path, threads: dict[str, set[str]], patient: None
) -> None:
    with serve_mixtral(tmp_path / "after", packs_ahead=False) as serving:
        expected = load(serving)
    assert set().union(*threads.values()) == {"MainThread"}
    threads.clear()
    with serve_mixtral(tmp_path / "ahead", packs_ahead=True) as serving:
        found = load(serving)
    assert threads == {
        "CpuBf16ExpertsMethod": {"mixprec-pack"},
        "CpuFp8ExpertsMethod": {"mixprec-pack"},
        "CpuInt4ExpertsMethod": {"mixprec-pack"},
        "UnquantizedLinearMethod": {"mixprec-pack"},
        "UnquantizedEmbeddingMethod": {"mixprec-pack"},
    }
    assert_same(found, expected)


def test_what_is_not_begun_by_then_is_done_by_the_main_thread(
    tmp_path: Path, threads: dict[str, set[str]], stuck: None
) -> None:
    with serve_mixtral(tmp_path / "after", packs_ahead=False) as serving:
        expected = load(serving)
    with serve_mixtral(tmp_path / "ahead", packs_ahead=True) as serving:
        found = load(serving)
    assert set().union(*threads.values()) == {"MainThread"}
    assert_same(found, expected)


def test_weights_that_were_replaced_are_freed_while_the_model_still_loads(
    tmp_path: Path, patient: None
) -> None:
    """vLLM's loaders keep all parameters until they return; a second copy of each would stay."""
    with serve_mixtral(tmp_path, packs_ahead=True) as serving:
        built = serving.build()
        before = dict(built.model.named_parameters())
        serving.loader.load_weights(built.model, built.model_config)
        process_weights_after_loading(built.model, built.model_config, torch.device("cpu"))
        name = "model.layers.1.self_attn.o_proj.weight"
        assert built.model.get_parameter(name) is not before[name]
        assert before[name].untyped_storage().nbytes() == 0


def test_an_error_while_packing_ahead_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self, *tensors):
        raise RuntimeError("no memory for this")

    monkeypatch.setattr(cpu.CpuFp8ExpertsMethod, "pack_in_place", fail)
    with (
        serve_mixtral(tmp_path, packs_ahead=True) as serving,
        pytest.raises(RuntimeError, match="no memory for this"),
    ):
        load(serving)


def test_an_error_while_a_linear_is_packed_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    def fail(layer: torch.nn.Module) -> None:
        raise RuntimeError("no memory for that")

    monkeypatch.setattr(pack_ahead, "_pack_whole", fail)
    with (
        serve_mixtral(tmp_path, packs_ahead=True) as serving,
        pytest.raises(RuntimeError, match="no memory for that"),
    ):
        load(serving)


def test_an_error_amid_loading_leaves_no_thread_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when the error is kept, which keeps all that was under way."""
    monkeypatch.setattr(pack_ahead, "_TOGETHER_BYTES", 1)
    real, left = Ledger._record, [40]

    def fail(self: Ledger, *given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of patience")
        real(self, *given)

    monkeypatch.setattr(Ledger, "_record", fail)
    with (
        serve_mixtral(tmp_path, packs_ahead=True) as serving,
        pytest.raises(RuntimeError, match="out of patience") as kept,
    ):
        load(serving)
    assert kept.tb is not None
    ours = [each for each in threading.enumerate() if each.name.startswith("mixprec")]
    for thread in ours:
        thread.join(9)
        assert not thread.is_alive(), thread.name


def test_a_layer_that_lacks_a_module_is_not_packed(
    tmp_path: Path, threads: dict[str, set[str]]
) -> None:
    with serve_mixtral(tmp_path, packs_ahead=True) as serving:
        built = serving.build()
        lost = next(name for name in built.held if ".layers.1." in name and ".experts.2." in name)
        feed = serving.loader.get_all_weights(built.model_config, built.model)
        with PackAhead() as ahead:
            ledger = Ledger(built.model, on_loaded=ahead.loaded)
            rest = (pair for pair in feed if pair[0].rpartition(".")[0] != lost)
            built.model.load_weights(rest, ledger, ahead.wait_for)
            ledger.release()
        groups = [
            module
            for module in built.model.modules()
            if isinstance(getattr(module, "quant_method", None), cpu.CpuExpertsMethod)
        ]
    begun = {
        (group.layer_name, type(group.quant_method).__name__)
        for group in groups
        if "process_weights_after_loading" in vars(group.quant_method)
    }
    plain = "CpuBf16ExpertsMethod"
    packed = {"CpuFp8ExpertsMethod", "CpuInt4ExpertsMethod"}
    assert {method for layer, method in begun if ".layers.1." in f"{layer}."} == packed
    assert {method for layer, method in begun if ".layers.0." in f"{layer}."} == packed | {plain}
