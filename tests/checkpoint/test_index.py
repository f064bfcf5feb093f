# SPDX-License-Identifier: Apache-2.0
"""Opening a checkpoint directory: which shards are read, and where index and shards disagree."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.routing.models import CPU, edit_tensors
from vllm_mixprec import Plan, check
from vllm_mixprec.checkpoint.header import DTYPE_BITS
from vllm_mixprec.checkpoint.index import open_checkpoint, resolve_path
from vllm_mixprec.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "bf16", tmp_path / "bf16"))


def edit_index(path: Path, edit: Any) -> None:
    index = json.loads((path / INDEX).read_text())
    edit(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["bf16", "fp8", "gptq", "gptq-asym"])
def test_real_checkpoints_open_without_problems(name: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / name, name)
    expected = set()
    for shard in (FIXTURES / name).glob("*.safetensors"):
        with safe_open(shard, framework="pt") as theirs:
            expected |= set(theirs.keys())
    assert set(checkpoint.tensors) == expected
    assert checkpoint.problems == ()
    assert [m.problems for m in checkpoint.modules.values() if m.problems] == []
    assert (checkpoint.name, checkpoint.path) == (name, FIXTURES / name)
    assert checkpoint.config["architectures"] == ["Qwen3MoeForCausalLM"]


def test_every_source_has_the_same_modules_and_logical_shapes() -> None:
    shapes = [
        {m.name: m.shape for m in open_checkpoint(FIXTURES / name).modules.values()}
        for name in ("bf16", "fp8", "gptq", "gptq-asym")
    ]
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    assert len(shapes[0]) == 69


def test_modules_hold_each_tensor_once() -> None:
    checkpoint = open_checkpoint(FIXTURES / "gptq")
    held = [spec for module in checkpoint.modules.values() for spec in module.tensors.values()]
    assert {spec.name: spec for spec in held} == checkpoint.tensors
    assert len(held) == len(checkpoint.tensors)
    assert set(checkpoint.modules["model.layers.0.mlp.experts.3.up_proj"].tensors) == {
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    }


def test_opening_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from vllm_mixprec.checkpoint import open_checkpoint\n"
        f"open_checkpoint(Path({str(FIXTURES / 'gptq')!r}))\n"
        "print(sorted({'torch', 'vllm', 'huggingface_hub'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_shard_that_the_directory_lacks_is_a_problem(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    checkpoint = open_checkpoint(sharded)
    (problem,) = checkpoint.problems
    assert f"{SHARDS[1]}: missing, though {INDEX} keeps 25 tensors there, e.g. model." in problem
    assert len(checkpoint.tensors) == 69 - 25


def test_shard_that_the_index_lacks_is_a_problem_and_is_not_read(sharded: Path) -> None:
    shutil.copy(sharded / SHARDS[0], sharded / "old.safetensors")
    checkpoint = open_checkpoint(sharded)
    (problem,) = checkpoint.problems
    assert f"old.safetensors: {INDEX} does not name this shard" in problem
    assert {spec.file.name for spec in checkpoint.tensors.values()} == set(SHARDS)


def test_tensor_that_the_index_puts_in_the_wrong_shard_is_a_problem(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": SHARDS[2]}))
    checkpoint = open_checkpoint(sharded)
    here, there = checkpoint.problems
    assert f"{SHARDS[0]}: holds 1 tensors that {INDEX} does not keep there, e.g. lm_head" in here
    assert f"{SHARDS[2]}: lacks 1 tensors that {INDEX} keeps there, e.g. lm_head" in there
    assert "lm_head.weight" not in checkpoint.tensors


def test_tensor_that_the_index_does_not_name_is_a_problem_and_is_not_read(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop("lm_head.weight"))
    checkpoint = open_checkpoint(sharded)
    assert len(checkpoint.problems) == 1
    assert "lm_head" not in checkpoint.modules


def test_index_without_any_of_its_shards_is_refused(sharded: Path) -> None:
    for shard in SHARDS:
        (sharded / shard).unlink()
    with pytest.raises(CheckpointError, match="none of its 3 shards is in the directory"):
        open_checkpoint(sharded)


def test_dangling_link_to_a_shard_is_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).symlink_to(sharded / "gone.safetensors")
    assert "missing, though" in open_checkpoint(sharded).problems[0]


@pytest.mark.parametrize(
    "shard",
    [
        "../other/model.safetensors",
        "/etc/x.safetensors",
        "//etc/x.safetensors",
        "pytorch_model.bin",
        3,
        None,
        "",
    ],
)
def test_index_that_leaves_the_directory_is_refused(sharded: Path, shard: Any) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": shard}))
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head.weight' is in .*expected the name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON list, expected an object"),
        ("{}", "weight_map is NoneType, expected an object"),
        ('{"weight_map": {}}', "none of its 0 shards"),
    ],
)
def test_malformed_index_is_refused(sharded: Path, content: str, match: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(INDEX)}: {match}"):
        open_checkpoint(sharded)


def test_shard_that_is_cut_short_is_refused_by_name(sharded: Path) -> None:
    file = sharded / SHARDS[2]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{SHARDS[2]}: .*cut short"):
        open_checkpoint(sharded)


def test_all_shards_are_read_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    checkpoint = open_checkpoint(sharded)
    assert (len(checkpoint.tensors), checkpoint.problems) == (69, ())


def test_tensor_in_two_files_is_refused_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(sharded / SHARDS[0], sharded / "z.safetensors")
    with pytest.raises(CheckpointError, match=rf"z.safetensors: 19 tensors .* {SHARDS[0]}, e\.g\."):
        open_checkpoint(sharded)


def test_single_file_is_read_alone(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURES / "fp8", tmp_path / "fp8"))
    shutil.copy(path / "model.safetensors", path / "adapter.safetensors")
    files = {spec.file.name for spec in open_checkpoint(path).tensors.values()}
    assert files == {"model.safetensors"}


@pytest.mark.parametrize("dtype", ["U16", "F8_E4M3FNUZ", "C64"])
def test_tensor_of_a_dtype_that_no_layer_takes_is_a_problem(tmp_path: Path, dtype: str) -> None:
    """The weight beside it is sound."""
    path = Path(shutil.copytree(FIXTURES / "fp8", tmp_path / "fp8"))
    projection = "model.layers.0.self_attn.q_proj"

    def add_tensors(tensors: dict[str, Any]) -> None:
        for suffix in ("bias", "input_scale"):
            tensors[f"{projection}.{suffix}"] = (dtype, [], bytes(DTYPE_BITS[dtype] // 8))

    edit_tensors(path / "model.safetensors", add_tensors)
    marked = [m for m in open_checkpoint(path).modules.values() if m.problems]
    assert [module.name for module in marked] == [projection]
    (problem,) = marked[0].problems  # the scale of activations is not loaded
    assert problem.startswith(f"{projection}.bias: {dtype} [], expected one of BF16, BOOL, F16,")
    plan = {"version": 1, "base": "fp8", "sources": {"fp8": {"path": str(path)}}}
    (finding,) = [
        f for f in check(Plan.from_dict(plan), platform=CPU).findings if f.level == "error"
    ]
    assert (finding.code, finding.where) == ("module-tensors", f"{projection}.bias")


def test_directory_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: not a directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_directory_without_config_is_refused(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read \(No such file"):
        open_checkpoint(sharded)


def test_config_that_is_no_json_is_refused(sharded: Path) -> None:
    (sharded / "config.json").write_bytes(b"\x80{")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        open_checkpoint(sharded)


def test_malformed_quantization_config_is_refused_with_its_path(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURES / "gptq", tmp_path / "gptq"))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["bits"] = "four"
    (path / "config.json").write_text(json.dumps(config))
    match = f"^{re.escape(str(path))}/config.json: quantization_config.bits is 'four'"
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(path)


def test_quantization_config_of_the_text_model_is_found(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURES / "gptq", tmp_path / "gptq"))
    config = json.loads((path / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (path / "config.json").write_text(json.dumps(config))
    module = open_checkpoint(path).modules["model.layers.0.self_attn.q_proj"]
    assert module.scheme.label == "gptq int4 g128"


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file and no model"):
        open_checkpoint(tmp_path)


def test_relative_path_starts_from_the_plans_folder() -> None:
    assert resolve_path("bf16", None, FIXTURES) == FIXTURES / "bf16"
    assert resolve_path("../random-moe/fp8", None, FIXTURES) == FIXTURES / "fp8"


def test_absolute_path_and_home_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_path(str(FIXTURES), None, tmp_path) == FIXTURES
    assert resolve_path("~/model", None, FIXTURES) == tmp_path / "model"


@pytest.mark.parametrize("path", ["/no/such/dir", "./owner/model", "a/b/c", "model", ""])
def test_path_that_is_no_hub_id_must_be_a_directory(tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory, and .* is not a hub id"):
        resolve_path(path, None, tmp_path / "absent")


@pytest.mark.parametrize("path", ["Qwen3-FP8", "Qwen3-FP8/deeper/still"])
def test_path_that_is_nearly_a_directory_s_names_it(tmp_path: Path, path: str) -> None:
    for name in ("Qwen3_FP8", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "Qwen3-FP9").touch()
    near = re.escape(f"Nearest: {tmp_path / 'Qwen3_FP8'}. Correct the source's path.")
    with pytest.raises(CheckpointError, match=near):
        resolve_path(f"./{path}", None, tmp_path)


def test_hub_id_comes_from_the_cache_when_offline(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once, on import."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--owner--model"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    models = tmp_path / "models"
    (models / "owners").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = (
        "from pathlib import Path\n"
        "from vllm_mixprec.checkpoint import resolve_path\n"
        "from vllm_mixprec.errors import CheckpointError\n"
        "print(resolve_path('owner/model', 'main', None))\n"
        f"try: resolve_path('owner/absent', None, Path({str(models)!r}))\n"
        "except CheckpointError as error: print(error)\n"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    found, refused = done.stdout.splitlines()
    assert found == str(snapshot)
    assert refused.startswith(
        f"owner/absent: no directory {models}/owner/absent, and the Hugging Face hub"
    )
    assert refused.endswith(
        f"Nearest: {models}/owners. Correct the path, or download the model first."
    )


def test_file_in_place_of_a_directory_is_named(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="a file, expected the directory of a checkpoint"):
        resolve_path(str(sharded / SHARDS[0]), None, None)


def test_composed_directory_is_no_source(sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mixprec"}
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"that compose made, .* sources/NAME in it"):
        open_checkpoint(sharded)
