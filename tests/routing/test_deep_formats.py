# SPDX-License-Identifier: Apache-2.0
"""``check --deep`` over every format, each weight stored by a tool that users have."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.formats.tools import CASES
from tests.routing.models import CPU, FIXTURES, edit_json, make_plan
from vllm_mixprec.routing import Finding, check

EXPERTS = "model.layers.0.mlp.experts"
CHOSEN = (2, 5)
# This one's tool changes the order of the weight's columns, not only that of their groups.
SOUND = [case for case in CASES if case != "gptq-act-order"]


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    index = json.loads((FIXTURES / "bf16" / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(FIXTURES / "bf16" / file)
    return tensors


def errors(
    folder: Path, case: str, base: dict[str, torch.Tensor], holds: tuple[int, int]
) -> list[Finding]:
    """Check two experts' up_proj, in whose place a source holds those of the experts ``holds``."""
    (folder / "bf16").symlink_to(FIXTURES / "bf16")
    source = folder / "source"
    source.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for expert, held in zip(CHOSEN, holds, strict=True):
        made = CASES[case].store(base[f"{EXPERTS}.{held}.up_proj.weight"].float())
        name = f"{EXPERTS}.{expert}.up_proj"
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.tensors.items()}
    save_file(tensors, source / "model.safetensors")
    shutil.copy(FIXTURES / "bf16" / "config.json", source)
    edit_json(source / "config.json", quantization_config=made.config)
    rule = (f"{EXPERTS}.{{2,5}}.up_proj", "source")
    plan = make_plan(rule, folder=folder, sources=("bf16", "source"))
    report = check(plan, platform=CPU, deep=True)
    return [finding for finding in report.findings if finding.level == "error"]


@pytest.mark.parametrize("case", SOUND)
def test_nothing_is_found_in_a_sound_export(
    case: str, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert errors(tmp_path, case, base, CHOSEN) == []


@pytest.mark.parametrize("case", ["fp8-mx", "ct-fp8-channel", "ct-int4-asym", "awq-g128"])
def test_two_experts_that_changed_places_are_found(
    case: str, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (found,) = errors(tmp_path, case, base, CHOSEN[::-1])
    assert found.code == "weights-differ"
    assert f"{EXPERTS}.2.up_proj holds {EXPERTS}.5.up_proj" in found.message
    assert "2 modules" in found.message
