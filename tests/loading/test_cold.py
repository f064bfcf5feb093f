# SPDX-License-Identifier: Apache-2.0
"""A model loaded from a cold disk, past the page cache, is the one loaded from the cache."""

import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from tests.loading.indexers import FIXTURES
from tests.loading.serving import needs_cpu, serve
from vllm_mixprec.checkpoint import stream
from vllm_mixprec.checkpoint.ranges import OpenFile
from vllm_mixprec.loading import loader, placement

pytestmark = needs_cpu
MIXTRAL = FIXTURES / "architectures" / "mixtral"
EXPERTS = "model.layers.*.block_sparse_moe.experts"
RULES = {f"{EXPERTS}.0": "fp8", f"{EXPERTS}.1": "int4"}


def forget(folder: Path) -> None:
    """Have a folder's files on the disk alone; skips where the system cannot, or does not tell."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        with closing(OpenFile(file, None, may_pass=True)) as opened:
            if opened.direct is None or opened.is_cached(0, file.stat().st_size):
                pytest.skip("this file system has no reading past its cache")


def load(folder: Path, models: Path, is_cold: bool) -> dict[str, torch.Tensor]:
    sources = {name: models / name for name in ("fp8", "int4")}
    with serve(
        folder, models / "bf16", sources, RULES, has_draft=False, packs_ahead=True
    ) as serving:
        built = serving.build()
        if is_cold:
            forget(models)
        serving.loader.load_weights(built.model, built.model_config)
        process_weights_after_loading(built.model, built.model_config, torch.device("cpu"))
        return {name: value.detach().clone() for name, value in built.model.named_parameters()}


@pytest.mark.parametrize("least_bytes", [1 << 20, 1])
def test_cold_and_warm_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_bytes: int
) -> None:
    """By buffers, as small weights are read, and straight into place."""
    monkeypatch.setattr(stream, "_PLACED_BYTES", least_bytes)
    monkeypatch.setattr(placement, "_SMALLEST_BYTES", least_bytes)
    lines: list[str] = []
    monkeypatch.setattr(
        loader.logger, "info", lambda text, *given, **named: lines.append(text % given)
    )
    shutil.copytree(MIXTRAL, tmp_path / "models")
    expected = load(tmp_path / "warm", tmp_path / "models", is_cold=False)
    assert not any("past the page cache" in line for line in lines), lines
    found = load(tmp_path / "cold", tmp_path / "models", is_cold=True)
    [line] = [line for line in lines if "GiB were read past the page cache" in line]
    assert ("0% of it straight into place" in line) == (least_bytes > 1), line
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)), name
