# SPDX-License-Identifier: Apache-2.0
"""A vLLM that has moved what the package leans on: real ones, one file of which is another."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.harness import ENVIRONMENT, compose_plan
from tests.engine.mixes import MIXES

LOADERS = "model_executor/model_loader"


def doctor(folder: Path, file: str, old: str, new: str) -> Path:
    """Make a package ``vllm`` of links to the installed one, but for one file with other text."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    installed, made = Path(spec.origin).parent, folder / "vllm"
    parts = file.split("/")
    for depth in range(len(parts)):
        below = Path(*parts[:depth])
        (made / below).mkdir(parents=True)
        for entry in (installed / below).iterdir():
            if entry.name not in (parts[depth], "__pycache__"):
                (made / below / entry.name).symlink_to(entry)
    text = (installed / file).read_text()
    assert text.count(old) == 1
    (made / file).write_text(text.replace(old, new))
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        pytest.param(
            f"{LOADERS}/mtp_validation.py",
            "def disable_mtp_completeness_check(",
            "def skip_mtp_completeness_check(",
            "vllm.model_executor.model_loader.mtp_validation:disable_mtp_completeness_check: not "
            "there: AttributeError",
            id="gone, so that the plug-in cannot even register",
        ),
        pytest.param(
            f"{LOADERS}/weight_utils.py",
            "def default_weight_loader(param: torch.Tensor, loaded_weight: torch.Tensor)",
            "def default_weight_loader(param: torch.Tensor, tensor: torch.Tensor)",
            "vllm.model_executor.model_loader.weight_utils:default_weight_loader: takes no "
            "loaded_weight, only param, tensor",
            id="other parameters",
        ),
    ],
)
def test_start_is_refused_in_one_line_with_the_coupling(
    tmp_path: Path, file: str, old: str, new: str, said: str
) -> None:
    mixed = compose_plan(tmp_path / "mixed", MIXES[0].plan())
    overlay = doctor(tmp_path / "overlay", file, old, new)
    done = subprocess.run(
        [Path(sys.executable).parent / "vllm", "serve", mixed, "--port", "0"],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(overlay)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"vllm-mixprec: {said}"), done.stderr
    assert "expected that it" in last and "This vLLM does not fit: install one >=0.32,<0.34" in last
