# SPDX-License-Identifier: Apache-2.0
"""What ``check --deep`` holds of a tensor that is larger than all that it may hold."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.mixes import ROOT
from tests.routing.models import FIXTURES, edit_json

ROWS, COLUMNS = 8192, 4096
CEILING_MIB = 128  # the tensor has as many in float32, and its base again

CHILD = """
import json, sys
from pathlib import Path
import torch
from tests.routing.models import CPU, make_plan
from vllm_mixprec.routing import check, pairs

def peak_mib():  # of this process since it began; what its parent had does not count
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10

torch.set_num_threads(1)
pairs._CHUNK_WEIGHTS = int(sys.argv[2])
check(make_plan(("**.experts", "fp8")), platform=CPU, deep=True)  # all code, and small tensors
before = peak_mib()
plan = make_plan(("lm_head", "fp8"), folder=Path(sys.argv[1]), sources=("bf16", "fp8"))
report = check(plan, platform=CPU, deep=True)
print(json.dumps([peak_mib() - before, [f.code for f in report.findings]]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BF16 fixture with a large head, and the same with that head in FP8."""
    folder = tmp_path_factory.mktemp("large")
    tensors = {}
    for file in sorted((FIXTURES / "bf16").glob("*.safetensors")):
        tensors |= load_file(file)
    torch.manual_seed(0)
    head = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    fp8 = {
        "lm_head.weight": head.to(torch.float8_e4m3fn),
        "lm_head.weight_scale_inv": torch.ones(ROWS // 128, COLUMNS // 128),
    }
    for name, own in (("bf16", {"lm_head.weight": head}), ("fp8", fp8)):
        (folder / name).mkdir()
        shutil.copy(FIXTURES / "bf16" / "config.json", folder / name)
        save_file(tensors | own, folder / name / "model.safetensors")
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(folder / "fp8" / "config.json", quantization_config=block)
    return folder


def peak(models: Path, chunk_weights: int) -> int:
    """Return the MiB by which a process grew at most."""
    command = [sys.executable, "-c", CHILD, str(models), str(chunk_weights)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    grown, codes = json.loads(done.stdout.splitlines()[-1])
    # The head is larger than the model's; nothing says that its weights differ.
    assert codes == ["config-sizes", "layer-unquantized"]
    return int(grown)


def test_large_tensor_is_compared_a_few_rows_at_a_time(models: Path) -> None:
    from vllm_mixprec.routing import pairs

    assert peak(models, pairs._CHUNK_WEIGHTS) < CEILING_MIB


def test_the_measure_finds_a_tensor_that_is_read_in_large_parts(models: Path) -> None:
    assert peak(models, ROWS * COLUMNS // 8) > CEILING_MIB
