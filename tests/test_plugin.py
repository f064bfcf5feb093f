# SPDX-License-Identifier: Apache-2.0
"""What registering does to models that no plan mixes: DSA models start where they can be served."""

from pathlib import Path

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.loading.serving import needs_cpu
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.models.dsa import ARCHITECTURES_KEY, INDEXER_KEY

pytestmark = needs_cpu

ARCHITECTURES = Path(__file__).parent / "fixtures" / "architectures"
DSA = {"deepseek_v32": "DeepseekV32ForCausalLM", "glm_moe_dsa": "GlmMoeDsaForCausalLM"}
TOPK = 64
"""index_topk of both; their max_position_embeddings is 4096."""


def configure(name: str, **options: int) -> VllmConfig:
    model = str(ARCHITECTURES / name / "bf16")
    return EngineArgs(model=model, skip_tokenizer_init=True, **options).create_engine_config()


@pytest.mark.parametrize("name", DSA)
def test_dsa_model_is_served_dense_up_to_index_topk(name: str) -> None:
    config = configure(name).model_config
    assert config.max_model_len == TOPK
    assert config.use_mla
    assert not hasattr(config.hf_config, "index_topk")
    assert config.hf_config.architectures == ["MixPrecDenseDsaForCausalLM", DSA[name]]
    assert getattr(config.hf_config, ARCHITECTURES_KEY) == [DSA[name]]
    assert getattr(config.hf_config, INDEXER_KEY)["layers"]


@pytest.mark.parametrize("name", DSA)
@pytest.mark.parametrize("asked", [16, TOPK])
def test_shorter_context_is_kept(name: str, asked: int) -> None:
    assert configure(name, max_model_len=asked).model_config.max_model_len == asked


@pytest.mark.parametrize("name", DSA)
@pytest.mark.parametrize("asked", [TOPK + 1, 4096])
def test_more_context_than_the_indexer_selects_is_refused(name: str, asked: int) -> None:
    match = rf"^--max-model-len {asked}: .* {DSA[name]} .*index_topk {TOPK}\); expected at most"
    with pytest.raises(UnsupportedError, match=match):
        configure(name, max_model_len=asked)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_other_models_keep_their_context(name: str) -> None:
    config = configure(name).model_config
    assert config.max_model_len > TOPK
    assert not hasattr(config.hf_config, INDEXER_KEY)
