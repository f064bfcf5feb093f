# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.routing import detect_platform, platform


def test_environment_overrides_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MIXPREC_PLATFORM", "cuda-80")
    platform = detect_platform()
    assert (platform.name, platform.family, platform.compute_capability) == ("cuda-80", "cuda", 80)


def test_unknown_platform_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MIXPREC_PLATFORM", "tpu")
    with pytest.raises(UnsupportedError, match="VLLM_MIXPREC_PLATFORM is 'tpu'; expected cpu-avx"):
        detect_platform()


def test_this_machine_is_detected_as_one_of_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_MIXPREC_PLATFORM", raising=False)
    assert detect_platform().family in ("cpu-avx512", "cpu-other", "cuda", "other")


@pytest.mark.parametrize("others", [set(), {"sse", "aes"}])
def test_features_that_choose_kernels_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, others: set[str]
) -> None:
    monkeypatch.setattr(platform, "_cpu_flags", lambda: frozenset({"avx2", "amx_tile"} | others))
    assert platform.dispatched_flags() == ("amx_tile", "avx2")
