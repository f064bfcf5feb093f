# SPDX-License-Identifier: Apache-2.0
"""Whose next-token predictors draft, the mixed model's own and no others; how layers are named."""

from pathlib import Path
from typing import Any

import pytest
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs

from tests.loading.serving import GLM, make_plan, needs_cpu, write_base
from tests.routing.models import ARCHITECTURES
from vllm_mixprec import Plan, compose
from vllm_mixprec.errors import RouteError, UnsupportedError
from vllm_mixprec.quant.config import MixPrecConfig, is_own_draft, layout_of
from vllm_mixprec.routing import Platform, load_route_table

pytestmark = needs_cpu

MTP = {"method": "mtp", "num_speculative_tokens": 1}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    compose(make_plan(write_base(folder / "base"), {}, {}), folder / "mixed")
    return folder / "mixed"


def arguments(model: Path, speculative: dict[str, Any] | None) -> EngineArgs:
    return EngineArgs(
        str(model), skip_tokenizer_init=True, max_model_len=64, speculative_config=speculative
    )


def test_no_draft_is_not_its_own(mixed: Path) -> None:
    assert is_own_draft(None) is False
    assert layout_of(arguments(mixed, None).create_engine_config()).draft is False


@pytest.mark.parametrize("named", [False, True])
def test_model_s_own_predictors_draft(mixed: Path, named: bool) -> None:
    speculative = MTP | ({"model": str(mixed)} if named else {})
    config = arguments(mixed, speculative).create_engine_config()
    assert is_own_draft(config.speculative_config) is True
    assert layout_of(config).draft is True


def test_other_methods_are_not_its_own(mixed: Path) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 2}
    config = arguments(mixed, speculative).create_engine_config()
    assert isinstance(config.speculative_config, SpeculativeConfig)
    assert is_own_draft(config.speculative_config) is False
    assert layout_of(config).draft is False


def test_predictors_of_another_checkpoint_are_refused(mixed: Path) -> None:
    match = rf"^--speculative-config: an MTP draft from {GLM}, beside a mixed model; expected"
    with pytest.raises(UnsupportedError, match=match):
        arguments(mixed, MTP | {"model": str(GLM)}).create_engine_config()


def test_unmixed_model_may_draft_with_another_checkpoint(mixed: Path) -> None:
    """Which vLLM serves by itself: nothing of ours asks."""
    base = mixed.parent / "base"
    config = arguments(base, MTP | {"model": str(GLM)}).create_engine_config()
    assert config.speculative_config.draft_model_config.model == str(GLM)


def test_parts_that_only_vllm_fuses_are_refused_with_a_rule() -> None:
    """Such as a family's that no table of routing has: ``check`` cannot widen them."""
    base = ARCHITECTURES / "olmoe"
    parent = "model.layers.0.self_attn"
    plan = Plan.from_dict(
        {
            "version": 1,
            "base": "bf16",
            "sources": {name: {"path": str(base / name)} for name in ("bf16", "fp8")},
            "rules": [{"match": f"{parent}.o_proj", "source": "fp8"}],
        }
    )
    config = MixPrecConfig()
    config._table = load_route_table(plan, platform=Platform("cpu-avx512"))
    config.packed_modules_mapping = {"qo_proj": ["q_proj", "o_proj"]}
    match = (
        rf"^{parent}\.qo_proj: vLLM fuses {parent}\.o_proj \(fp8_block 128x128\), {parent}\.q_proj "
        r"\(bf16\) into one layer that routing does not know, so options\.mixed_fused has no "
        r"effect; expected one format\. Route them to one source, by a first rule such as "
        rf'\{{match: "{parent}\.\{{o_proj,q_proj\}}", source: \.\.\.\}}$'
    )
    with pytest.raises(RouteError, match=match):
        config._served(f"{parent}.qo_proj")
