# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.experts.setting import VARIABLE, metrics_setting


@pytest.mark.parametrize("value", ["auto", "full", "off"])
def test_setting_is_read(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MIXPREC_EXPERT_METRICS", value)
    assert metrics_setting() == value


def test_unset_and_empty_are_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_MIXPREC_EXPERT_METRICS", raising=False)
    assert metrics_setting() == "auto"
    monkeypatch.setenv("VLLM_MIXPREC_EXPERT_METRICS", "")
    assert metrics_setting() == "auto"


@pytest.mark.parametrize("value", ["OFF", "0", "on", "full "])
def test_other_values_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UnsupportedError, match=f"METRICS={value}; expected auto, full or off"):
        metrics_setting()
