# SPDX-License-Identifier: Apache-2.0
"""Negative controls of the engines: sources in which one thing is wrong each, and served."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.engine.mixes import SOURCES

DAMAGES = ("halved-scale", "swollen-gate")
_PREFIX = "model.layers.1.mlp.experts"


def write_damaged(folder: Path) -> dict[str, Path]:
    """Copy the random model's FP8 source once for each of ``DAMAGES``; returns the copies."""
    written = {}
    for name in DAMAGES:
        written[name] = folder / name / "fp8"
        shutil.copytree(SOURCES["random"]["fp8"], written[name])
        shard = written[name] / "model.safetensors"
        tensors = load_file(shard)
        if name == "halved-scale":
            for expert in range(5):
                tensors[f"{_PREFIX}.{expert}.down_proj.weight_scale_inv"] /= 2
        else:
            for expert in range(5):
                tensors[f"{_PREFIX}.{expert}.gate_proj.weight_scale_inv"] *= 4
        save_file(tensors, shard)
    return written
