# SPDX-License-Identifier: Apache-2.0
"""A head that is tied to the embeddings computes with what a reload brought for them."""

from pathlib import Path

import pytest
import torch
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from tests.engine import dense
from tests.loading.serving import needs_cpu, serve

pytestmark = needs_cpu


@pytest.mark.parametrize("vocabulary", [64, 100])  # the second is padded, and ready last
def test_reload_of_embeddings_reaches_the_tied_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int
) -> None:
    monkeypatch.setitem(dense.SIZES, "vocab_size", vocabulary)
    sources = dense.write_dense(tmp_path, "llama")
    base = sources.pop("bf16")
    rules = {"model.layers.*.self_attn.*_proj": "fp8", "model.layers.*.mlp.*_proj": "int4"}
    with serve(tmp_path, base, sources, rules, has_draft=False) as serving:
        built = serving.build()
        model, config = built.model, built.model_config
        serving.loader.load_weights(model, config)
        process_weights_after_loading(model, config, torch.device("cpu"))
        hidden = torch.randn(3, model.config.hidden_size, dtype=torch.bfloat16)

        def logits() -> torch.Tensor:
            return model.compute_logits(hidden)

        assert model.lm_head.weight is model.model.embed_tokens.weight
        first = logits()
        assert first.any()
        doubled = [
            (name, tensor * 2 if name.endswith("embed_tokens.weight") else tensor.clone())
            for name, tensor in serving.loader.get_all_weights(config, model)
        ]
        reload_weights(serving.config, model, doubled, None, True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(logits(), 2 * first)
        reload_weights(serving.config, model, None, None, True)
        assert torch.equal(logits(), first)
