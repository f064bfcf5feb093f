# SPDX-License-Identifier: Apache-2.0
"""``check --deep`` over every format, each weight stored by a tool that users have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.formats.tools import CASES
from tests.routing.models import CPU, FIXTURES, edit_json, make_plan
from vllm_mixprec.checkpoint.formats import Scheme
from vllm_mixprec.routing import Finding, check
from vllm_mixprec.routing.stored import expected_error2, tile_mean

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
    weights = {
        f"{EXPERTS}.{expert}.up_proj": base[f"{EXPERTS}.{held}.up_proj.weight"]
        for expert, held in zip(CHOSEN, holds, strict=True)
    }
    return errors_of(folder, case, weights)


def errors_of(
    folder: Path,
    case: str,
    weights: dict[str, torch.Tensor],
    change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
) -> list[Finding]:
    """Check weights that a source stores against the "bf16" that lies in the folder.

    ``change`` is told the tensors of each, to damage them.
    """
    source = folder / "source"
    source.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        made = CASES[case].store(weight.float())
        stored = dict(made.tensors)
        change(stored)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
    save_file(tensors, source / "model.safetensors")
    shutil.copy(FIXTURES / "bf16" / "config.json", source)
    edit_json(source / "config.json", quantization_config=made.config)
    rules = [(name, "source") for name in weights]
    plan = make_plan(*rules, folder=folder, sources=("bf16", "source"))
    report = check(plan, platform=CPU, deep=True)
    return [finding for finding in report.findings if finding.level == "error"]


def put_base(folder: Path, base: dict[str, torch.Tensor]) -> None:
    (folder / "bf16").mkdir()
    save_file(base, folder / "bf16" / "model.safetensors")
    shutil.copy(FIXTURES / "bf16" / "config.json", folder / "bf16")


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


FP4 = ["ct-nvfp4", "modelopt-nvfp4", "ct-mxfp4"]


def normal(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def outliers(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    weight = normal(shape, generator)
    weight[:, ::37] *= 30
    return weight


def student_t(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return (
        normal(shape, generator)
        / torch.stack([normal(shape, generator) for _ in range(4)]).square().mean(0).sqrt()
    )


def unlike_rows(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return normal(shape, generator) * (1.5 * normal((shape[0], 1), generator)).exp()


@pytest.mark.parametrize("make", [normal, outliers, student_t, unlike_rows])
@pytest.mark.parametrize("case", FP4)
def test_nothing_is_found_in_fp4_of_any_weights(
    case: str,
    make: Callable[[tuple[int, int], torch.Generator], torch.Tensor],
    base: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(3)
    names = [f"{EXPERTS}.{expert}.up_proj" for expert in CHOSEN]
    weights = {name: (0.02 * make((128, 256), generator)).bfloat16() for name in names}
    put_base(tmp_path, base | {f"{name}.weight": weight for name, weight in weights.items()})
    assert errors_of(tmp_path, case, weights) == []
    for weight in weights.values():
        assert 0.75 < roundings(case, weight.float()) < 1.2  # measured: 0.79 (outliers) to 1.02


def roundings(case: str, weight: torch.Tensor) -> float:
    """Return the error that a tool makes, in units of what is expected of its format."""
    made = CASES[case].store(weight)
    is_mx = case == "ct-mxfp4"
    block = (1, 32) if is_mx else (1, 16)
    scheme = Scheme(case[-5:], bits=4, block=block, scale_format="e8m0" if is_mx else "float")
    read = made.weight.float()
    expected = expected_error2(scheme, made.tensors, read)
    found = tile_mean((weight - read).square(), block)
    assert (found <= 3**2 * expected.clamp(min=1e-30)).all()  # measured: 2 in the worst group
    return float((found.mean() / expected.mean()).sqrt())


@pytest.mark.parametrize("case", FP4)
def test_damaged_fp4_is_found(case: str, base: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The whole twice as large, and noise as large as the weights beside it."""

    def double(tensors: dict[str, torch.Tensor]) -> None:
        if "weight_global_scale" in tensors:
            tensors["weight_global_scale"] = tensors["weight_global_scale"] / 2
        elif "weight_scale_2" in tensors:
            tensors["weight_scale_2"] = tensors["weight_scale_2"] * 2
        else:
            tensors["weight_scale"] = tensors["weight_scale"] + 1

    names = [f"{EXPERTS}.{expert}.up_proj" for expert in CHOSEN]
    (tmp_path / "bf16").symlink_to(FIXTURES / "bf16")
    sound = {name: base[f"{name}.weight"].float() for name in names}
    (found,) = errors_of(tmp_path, case, sound, double)
    assert found.code == "weights-differ"
    percent = float(found.message.partition(" as a whole ")[2].partition(" %")[0])
    assert percent == pytest.approx(200, rel=0.02)  # but for rounding
    shutil.rmtree(tmp_path / "source")
    generator = torch.Generator().manual_seed(4)
    noisy = {
        name: weight + 1.1 * weight.std() * torch.randn(weight.shape, generator=generator)
        for name, weight in sound.items()
    }
    (found,) = errors_of(tmp_path, case, noisy)
    assert found.code == "weights-differ" and "made from other weights" in found.message


FOLDED = ["gptq-g128", "gptq-int8", "awq-g32", "ct-int4-act-order", "fp8-128x128", *FP4]


@pytest.mark.parametrize("case", FOLDED)
def test_factors_that_stay_within_a_quantised_expert_are_right(
    case: str, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """And are found where one scale of up_proj, which has them in its rows, is damaged."""
    (tmp_path / "bf16").symlink_to(FIXTURES / "bf16")
    generator = torch.Generator().manual_seed(5)
    up, down = (f"{EXPERTS}.2.{part}_proj" for part in ("up", "down"))
    factors = torch.rand(base[f"{up}.weight"].shape[0], generator=generator) * 1.5 + 0.5
    weights = {
        up: base[f"{up}.weight"].float() / factors[:, None],
        down: base[f"{down}.weight"].float() * factors,
    }
    assert errors_of(tmp_path, case, weights) == []
    shutil.rmtree(tmp_path / "source")
    weights[up] *= torch.rand(len(factors), 1, generator=generator) * 1.5 + 0.5
    found = errors_of(tmp_path, case, weights)
    assert {(finding.code, finding.where) for finding in found} == {
        ("weights-differ", up),
        ("weights-differ", down),
    }
