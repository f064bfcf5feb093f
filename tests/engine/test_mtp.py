# SPDX-License-Identifier: Apache-2.0
"""Drafts by the model's own multi-token-prediction layer, mixed with the rest.

A draft never changes what a greedy server says; it is right or rejected. That it is right as often
as when it was trained (scripts/make_test_models.py: a fifth to a third of the time) shows that its
weights arrived.
"""

import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine import reference
from tests.engine.architectures import ARCHITECTURES, BY_NAME, MAX_MODEL_LEN
from tests.engine.conftest import reference_weights
from tests.engine.harness import EAGER, compose_plan, run_engines
from tests.engine.mixes import SOURCES

pytestmark = pytest.mark.engine

MIXES = ("deepseek_v3/experts", "glm_moe_dsa/experts", "glm4_moe/experts")
DRAFTS = (0, 1, 2)
PROMPTS, NEW_TOKENS = 6, 16
# The second token of a draft is checked by another kernel than the first, so that BF16 rounds
# elsewhere: nothing that is decided by less than this many nats can be expected to stay.
UNDECIDED = 0.05


@cache
def decided(name: str) -> list[list[int]]:
    """Find prompts of 12 tokens whose greedy continuation in float32 meets no near-tie."""
    mix = BY_NAME[name]
    candidates = torch.randint(64, (512, 12), generator=torch.Generator().manual_seed(2))
    margins = reference.greedy_margins(
        SOURCES[mix.model]["bf16"], reference_weights(mix), candidates, NEW_TOKENS
    )
    best = margins.min(dim=1).values.topk(PROMPTS)
    assert best.values.min() > UNDECIDED, best.values
    return candidates[best.indices].tolist()


def damage(name: str, folder) -> dict:
    """Return the plan of a mix whose base has its draft's ``eh_proj`` the wrong way round."""
    plan = BY_NAME[name].plan()
    source = folder / "bf16"
    shutil.copytree(SOURCES[BY_NAME[name].model]["bf16"], source)
    tensors = load_file(source / "model.safetensors")
    (projection,) = (tensor for key, tensor in tensors.items() if key.endswith("eh_proj.weight"))
    projection.copy_(projection.flip(1).contiguous())
    save_file(tensors, source / "model.safetensors")
    plan["sources"]["bf16"]["path"] = str(source)
    return plan


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Continue prompts with drafts of 0, 1 and 2 tokens, and with a broken one."""
    folder = tmp_path_factory.mktemp("mtp")
    jobs = []
    for name in MIXES:
        mixed = compose_plan(folder / name.replace("/", "-"), BY_NAME[name].plan())
        job = {"prompts": decided(name), "new_tokens": NEW_TOKENS}
        for length in DRAFTS:
            options = ARCHITECTURES[BY_NAME[name].model].options.copy()
            if length:
                options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": length}
            jobs.append(job | {"name": f"{name} {length}", "model": str(mixed), "options": options})
    mixed = compose_plan(folder / "damaged" / "mixed", damage(name, folder / "damaged"))
    jobs.append(jobs[-2] | {"name": "damaged", "model": str(mixed)})
    options = {"max_model_len": MAX_MODEL_LEN, "disable_log_stats": False}
    return run_engines(folder, jobs, **options, **EAGER)


@pytest.mark.parametrize("length", DRAFTS[1:])
@pytest.mark.parametrize("name", MIXES)
def test_greedy_tokens_are_those_without_a_draft(engines, name, length):
    result, plain = engines[f"{name} {length}"], engines[f"{name} 0"]
    assert "error" not in result, result["error"]
    assert "error" not in plain, plain["error"]
    assert result["tokens"] == plain["tokens"]
    assert [len(tokens) for tokens in plain["tokens"]] == [NEW_TOKENS] * PROMPTS


@pytest.mark.parametrize("length", DRAFTS[1:])
@pytest.mark.parametrize("name", MIXES)
def test_drafts_are_proposed_and_accepted(engines, name, length):
    result = engines[f"{name} {length}"]
    assert "error" not in result, result["error"]
    share = result["accepted_tokens"] / result["draft_tokens"]
    print(f"{name}, {length} tokens: {result['draft_tokens']} drafted, {share:.0%} accepted")
    assert result["draft_tokens"] > 0
    assert share > 0.15 / length


def test_a_broken_draft_changes_no_token_and_is_noticed(engines):
    """Negative control: of the drafts above hardly one is accepted when ``eh_proj`` is wrong."""
    result = engines["damaged"]
    assert "error" not in result, result["error"]
    assert result["tokens"] == engines[f"{MIXES[-1]} 0"]["tokens"]
    share = result["accepted_tokens"] / result["draft_tokens"]
    print(f"damaged: {result['draft_tokens']} drafted, {share:.0%} accepted")
    assert share < 0.1
