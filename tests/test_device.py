# SPDX-License-Identifier: Apache-2.0
"""What a device cannot serve is refused in one line with the numbers, before an engine starts."""

from types import SimpleNamespace

import pytest
from vllm.config import OffloadConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs

from tests.loading.serving import make_plan, needs_cpu, write_base
from vllm_mixprec import compose, device
from vllm_mixprec.device import driver_problem, refuse_old_driver, refuse_too_little_memory
from vllm_mixprec.errors import UnsupportedError

GIB = 2**30


def config(**offload) -> SimpleNamespace:
    return SimpleNamespace(
        offload_config=OffloadConfig(**offload),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.9),
        parallel_config=ParallelConfig(),
    )


class NvmlCudaPlatform:
    """As vLLM's platform on a GPU of 80 GiB answers."""

    def is_cuda(self) -> bool:
        return True

    def get_device_total_memory(self, device: int) -> int:
        return 80 * GIB


@pytest.fixture
def gpu(monkeypatch) -> None:
    monkeypatch.setattr(device, "current_platform", NvmlCudaPlatform())


def test_a_gpu_that_is_too_small_is_told_with_numbers(gpu):
    with pytest.raises(UnsupportedError) as raised:
        refuse_too_little_memory(config(), [10 * GIB, 73 * GIB])
    assert str(raised.value) == (
        "rank 1: its weights take 73.0 GiB; expected at most 72.0 GiB, which "
        "--gpu-memory-utilization 0.9 leaves of the GPU's 80.0 GiB. Use more tensor- or "
        "pipeline-parallel ranks, route more experts to fewer bits, or offload"
    )


def test_what_fits_or_is_offloaded_starts(gpu):
    refuse_too_little_memory(config(), [72 * GIB, 72 * GIB])
    refuse_too_little_memory(config(uva={"cpu_offload_gb": 20}), [90 * GIB])


def test_a_gpu_that_cannot_be_asked_is_left_to_vllm(gpu, monkeypatch):
    def unanswered(self, device):
        raise RuntimeError("driver/library version mismatch")

    monkeypatch.setattr(NvmlCudaPlatform, "get_device_total_memory", unanswered)
    refuse_too_little_memory(config(), [900 * GIB])


@needs_cpu
def test_a_machine_that_is_too_small_refuses_before_an_engine_starts(tmp_path, monkeypatch):
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    monkeypatch.setattr(
        device.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=1000)
    )
    arguments = EngineArgs(str(tmp_path / "mixed"), skip_tokenizer_init=True, max_model_len=64)
    with pytest.raises(UnsupportedError, match=r"GiB on 1 ranks; expected at most the machine's"):
        arguments.create_engine_config()


@pytest.fixture
def driver(monkeypatch) -> SimpleNamespace:
    """NVML of a driver that runs CUDA 12.4."""

    class NVMLError(Exception):
        pass

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion=lambda: 12040,
        nvmlSystemGetDriverVersion=lambda: "550.54.14",
    )
    monkeypatch.setattr(device, "import_pynvml", lambda: nvml)
    return nvml


def test_a_driver_that_is_too_old_is_told_with_both_versions(driver, gpu, monkeypatch):
    assert driver_problem("13.0") == (
        "the NVIDIA driver 550.54.14 runs CUDA 12.4; expected 13.0 or later, for which this torch "
        "is built. Update the driver, or install a vLLM built for its CUDA"
    )
    monkeypatch.setattr(device, "driver_problem", lambda: "too old")
    with pytest.raises(UnsupportedError, match="too old"):
        refuse_old_driver()


@pytest.mark.parametrize("built_for", ["12.4", "12.9", "11.8", None])
def test_a_driver_of_the_same_cuda_will_do(driver, built_for):
    assert driver_problem(built_for) is None


def test_no_driver_is_no_old_driver(driver):
    def absent():
        raise driver.NVMLError("Driver Not Loaded")

    driver.nvmlInit = absent
    assert driver_problem("13.0") is None
