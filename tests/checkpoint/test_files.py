# SPDX-License-Identifier: Apache-2.0
"""Files that are not what their names say."""

import re
import shutil
from pathlib import Path

import pytest

from vllm_mixprec.checkpoint import open_checkpoint, read_header
from vllm_mixprec.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
# git-lfs, docs/spec.md, its own example.
POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize(
    "name",
    [
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ],
)
def test_git_lfs_pointer_is_told_for_what_it_is(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(FIXTURES / "bf16", tmp_path / "bf16"))
    if name.startswith("pytorch_model"):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
    (folder / name).write_bytes(POINTER)
    match = (
        f"^{re.escape(str(folder / name))}: a Git LFS pointer, {len(POINTER)} bytes, expected the "
        f"file itself. Run `git lfs pull` in {re.escape(str(folder))}, or "
    )
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder)


def test_small_file_that_is_no_pointer_is_read(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert read_header(file)["a"].shape == (1,)
