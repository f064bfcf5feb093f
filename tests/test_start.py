# SPDX-License-Identifier: Apache-2.0
"""What a start leaves in a mixed model's ``VllmConfig``; tests/engine starts engines."""

from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.loading.serving import make_plan, needs_cpu, write_base
from vllm_mixprec import compose, start
from vllm_mixprec.composition import PLAN_FILE
from vllm_mixprec.errors import PlanError
from vllm_mixprec.quant.config import LOAD_FORMAT, METHOD, layout_of
from vllm_mixprec.routing import Layout

pytestmark = needs_cpu

SAID = "draft_load_config is not used: the plan routes the MTP layers too"


def engine_config(folder: Path, **options: Any) -> VllmConfig:
    return EngineArgs(
        str(folder), skip_tokenizer_init=True, max_model_len=64, **options
    ).create_engine_config()


def draft(folder: Path, **options: Any) -> VllmConfig:
    compose(make_plan(write_base(folder / "base"), {}, {}), folder / "mixed")
    speculative = {"method": "mtp", "num_speculative_tokens": 1, **options}
    return engine_config(folder / "mixed", speculative_config=speculative)


def test_own_draft_loads_through_the_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = draft(tmp_path)
    assert config.load_config.load_format == LOAD_FORMAT
    assert config.speculative_config.draft_load_config is None
    assert config.speculative_config.draft_model_config.quantization == METHOD
    assert SAID not in caplog.text


def test_log_says_what_each_layer_is_served_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(start.logger, "info", lambda text, *args: lines.append(text % args))
    draft(tmp_path)
    shown = [line.partition(": ")[0] for line in lines if " bf16 of base, vLLM's own" in line]
    assert shown == ["layers 0-1", "layer 2", "layer 3 (MTP)", "outside of the layers"]


def test_load_config_beside_an_own_draft_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = draft(tmp_path, draft_load_config={"load_format": "dummy"})
    assert config.speculative_config.draft_load_config is None
    assert [r.levelname for r in caplog.records if SAID in r.getMessage()] == ["WARNING"]


def test_replicas_share_experts_in_the_layout_that_is_checked(tmp_path: Path) -> None:
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    config = engine_config(tmp_path / "mixed", data_parallel_size=2)
    assert config.load_config.load_format == LOAD_FORMAT
    assert layout_of(config) == Layout(data_parallel_size=2)


def test_a_composed_plan_that_was_changed_is_refused(tmp_path: Path) -> None:
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    file = tmp_path / "mixed" / PLAN_FILE
    text = file.read_text()
    file.write_text(text + "# a comment\n")
    assert engine_config(tmp_path / "mixed").load_config.load_format == LOAD_FORMAT
    file.write_text(text.replace("mixed_fused: widen", "mixed_fused: error"))
    with pytest.raises(PlanError, match=r"it was edited or cut short\. Compose the directory"):
        engine_config(tmp_path / "mixed")
