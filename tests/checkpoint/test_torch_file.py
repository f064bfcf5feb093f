# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own files: read without their data, and without running what they ask for."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_mixprec import Plan, compose
from vllm_mixprec.checkpoint import open_checkpoint
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.checkpoint.torch_file import read_torch_header
from vllm_mixprec.errors import CheckpointError, MixPrecError, UnsupportedError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
)


def save(folder: Path, content: object, name: str = "pytorch_model.bin", **options: object) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def read(file: Path) -> dict[str, torch.Tensor]:
    return {spec.name: tensor for spec, tensor in read_tensors(read_torch_header(file).values())}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        raw, stored = (t.contiguous().flatten().view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(raw, stored), name


def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{dtype} {shape}": torch.randint(0, 2, shape).to(torch.float32).to(dtype)
        for dtype in DTYPES
        for shape in ((), (3,), (4, 5), (0, 7), (2, 3, 4))
    }
    tensors["noise"] = torch.randn(33, 65)
    same(read(save(tmp_path, tensors)), tensors)


def test_parameters_shared_memory_and_views_are_read(tmp_path: Path) -> None:
    whole = torch.arange(48.0).reshape(6, 8)
    tensors = {
        "whole": whole,
        "tied": whole,
        "rows": whole[2:5],
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    file = save(tmp_path, tensors)
    specs = read_torch_header(file)
    assert (specs["tied"].start, specs["tied"].end) == (specs["whole"].start, specs["whole"].end)
    assert specs["rows"].start == specs["whole"].start + 2 * 8 * 4
    same(read(file), {name: tensor.detach() for name, tensor in tensors.items()})


def test_no_data_is_read(tmp_path: Path) -> None:
    """A process that reads the header of a tensor of 256 MiB grows by less than that."""
    file = save(tmp_path, {"a": torch.ones(4), "b": torch.full((2,), 2.0)})
    specs = read_torch_header(file)
    spec = specs["a"]
    assert spec.file.read_bytes()[spec.start : spec.end] == torch.ones(4).numpy().tobytes()
    code = (
        "import sys, resource, torch\n"
        "from vllm_mixprec.checkpoint.torch_file import read_torch_header\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(read_torch_header(sys.argv[1])))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    big = save(tmp_path, {"big": torch.zeros(64 << 20)}, "big.bin")  # 256 MiB
    done = subprocess.run(
        [sys.executable, "-c", code, str(big)], capture_output=True, text=True, check=True
    )
    count, grown_kib = map(int, done.stdout.split())
    big.unlink()
    assert (count, grown_kib < 100 << 10) == (1, True)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code of a checkpoint ran",)


def test_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path, {"weight": torch.ones(2), "trap": Malicious()})
    with pytest.raises(CheckpointError, match="pytorch_model.bin: refused, its pickle holds more"):
        read_torch_header(file)
    assert capsys.readouterr().out == ""
    torch.load(file, weights_only=False)  # negative control: the trap is one
    assert "code of a checkpoint ran" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.ones(2)], "a list, expected a dict of tensor names"),
        ({1: torch.ones(2)}, "a dict, expected a dict of tensor names"),
        ({"state_dict": {"weight": torch.ones(2)}}, "'state_dict' is a dict, expected a dense"),
        ({"epoch": 3}, "'epoch' is a int, expected a dense tensor"),
        ({"w": torch.eye(3).to_sparse()}, "'w' is a torch.sparse_coo, expected a dense tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w': dtype is torch.complex64, expected"),
        (
            {"w": torch.ones(4, 6).t()},
            r"'w': shape \[6, 4\] with strides \[1, 6\], expected a contiguous tensor",
        ),
        ({"w": torch.ones(4, 6)[:, :3]}, r"with strides \[6, 1\], expected a contiguous"),
        ({"w": torch._neg_view(torch.ones(4))}, "'w': a view that negates what is stored, expec"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "'w': dtype is torch.complex64, expe"),
    ],
)
def test_what_is_no_dict_of_plain_tensors_is_named(
    tmp_path: Path, content: object, match: str
) -> None:
    file = save(tmp_path, content)
    with pytest.raises(UnsupportedError, match=f"pytorch_model.bin: .*{match}.* safetensors"):
        read_torch_header(file)


def test_file_from_before_zip_archives_is_named(tmp_path: Path) -> None:
    file = save(tmp_path, {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"no zip archive, expected .*Convert"):
        read_torch_header(file)


def test_file_that_is_cut_short_or_missing_is_an_error(tmp_path: Path) -> None:
    file = save(tmp_path, {"w": torch.ones(2000)})
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UnsupportedError, match="no zip archive, .*cut short looks like them"):
        read_torch_header(file)
    with pytest.raises(CheckpointError, match=r"absent\.bin: cannot be read .*No such file"):
        read_torch_header(tmp_path / "absent.bin")


def test_pipe_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    os.mkfifo(file)
    descriptor = os.open(file, os.O_RDWR)  # so that who opens it need not wait
    try:
        with pytest.raises(CheckpointError, match=r"model\.bin: cannot be read .*not a regular fi"):
            read_torch_header(file)
    finally:
        os.close(descriptor)


def test_damaged_file_is_read_or_refused(tmp_path: Path) -> None:
    whole = save(tmp_path, {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4)}).read_bytes()
    file, chosen = tmp_path / "damaged.bin", random.Random(0)
    refused = 0
    for _ in range(600):
        raw = bytearray(whole)
        for _ in range(chosen.randint(1, 2)):
            raw[chosen.randrange(len(raw))] = chosen.randrange(256)
        file.write_bytes(raw)
        try:
            specs = read_torch_header(file)
        except MixPrecError as error:
            assert str(error).startswith(str(file))
            refused += 1
        else:
            assert all(0 <= spec.start <= spec.end <= len(raw) for spec in specs.values())
    assert 200 < refused < 500


def rewrite(file: Path, change: object, **options: int) -> None:
    """Write the archive's records anew, one of them changed."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    records = change(records)
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def test_storage_that_is_shorter_than_its_tensor_is_an_error(tmp_path: Path) -> None:
    file = save(tmp_path, {"w": torch.ones(2000)})
    rewrite(file, lambda r: {n: d[:100] if "/data/" in n else d for n, d in r.items()})
    with pytest.raises(CheckpointError, match=r"'w': bytes 0 to 8000 of its storage.*\(100\)"):
        read_torch_header(file)


def test_records_that_are_compressed_or_big_endian_are_named(tmp_path: Path) -> None:
    file = save(tmp_path, {"w": torch.ones(2000)})
    rewrite(file, lambda r: r | {n: b"big" for n in r if n.endswith("byteorder")})
    with pytest.raises(UnsupportedError, match="big-endian, expected little-endian"):
        read_torch_header(file)
    file = save(tmp_path, {"w": torch.ones(2000)})
    rewrite(file, lambda records: records, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedError, match="is compressed, expected it stored"):
        read_torch_header(file)


def test_archive_without_a_pickle_is_an_error(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/notes.txt", pickle.dumps({}))
    (tmp_path / "x.bin").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError, match=r"x\.bin: cannot be read \(RuntimeError"):
        read_torch_header(tmp_path / "x.bin")


# Directories.


def as_torch(folder: Path, source: str, shards: int = 1) -> Path:
    """Write a fixture again as PyTorch's files."""
    tensors = {}
    for file in sorted((FIXTURES / source).glob("*.safetensors")):
        tensors |= load_file(file)
    folder.mkdir()
    (folder / "config.json").write_bytes((FIXTURES / source / "config.json").read_bytes())
    if shards == 1:
        save(folder, tensors)
        return folder
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = names[shard::shards]
        save(folder, {name: tensors[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("source", ["bf16", "fp8", "gptq-asym"])
def test_checkpoint_is_the_one_in_safetensors(tmp_path: Path, source: str, shards: int) -> None:
    found = open_checkpoint(as_torch(tmp_path / source, source, shards))
    expected = open_checkpoint(FIXTURES / source)
    assert found.problems == ()
    assert {n: (m.scheme, m.shape, m.problems) for n, m in found.modules.items()} == {
        n: (m.scheme, m.shape, m.problems) for n, m in expected.modules.items()
    }
    tensors = {spec.name: tensor for spec, tensor in read_tensors(found.tensors.values())}
    same(tensors, {s.name: t for s, t in read_tensors(expected.tensors.values())})
    (note,) = found.notes
    assert note.startswith(f"{tmp_path / source}: its shards are pickles")


def test_shards_that_the_index_names_are_checked(tmp_path: Path) -> None:
    folder = as_torch(tmp_path / "bf16", "bf16", 3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    (problem,) = open_checkpoint(folder).problems
    assert "00002-of-00003.bin: missing, though pytorch_model.bin.index.json keeps" in problem


def test_index_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    folder = as_torch(tmp_path / "bf16", "bf16")
    index = {"weight_map": {"x": "../pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected the name of a bin file in the same direc"):
        open_checkpoint(folder)


def test_safetensors_win_with_a_note(tmp_path: Path) -> None:
    folder = as_torch(tmp_path / "bf16", "bf16")
    save_file({"other.weight": torch.ones(2)}, folder / "model.safetensors")
    found = open_checkpoint(folder)
    assert found.tensors.keys() == {"other.weight"}
    assert found.notes == (
        f"{folder / 'pytorch_model.bin'}: not read, since safetensors files lie beside it",
    )


def test_other_bin_files_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save(tmp_path, {"lr": 0.1}, "training_args.bin")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file .*nor pytorch_model\*.bin"):
        open_checkpoint(tmp_path)


def test_plan_is_checked_with_a_note_and_composed_with_links(tmp_path: Path) -> None:
    source = as_torch(tmp_path / "fp8", "fp8", 3)
    plan = Plan.from_dict(
        {
            "version": 1,
            "base": "bf16",
            "sources": {"bf16": {"path": str(FIXTURES / "bf16")}, "fp8": {"path": str(source)}},
            "rules": [{"match": "**.experts.{0-3}", "source": "fp8"}],
        }
    )
    report = compose(plan, tmp_path / "mixed")
    (finding,) = [finding for finding in report.findings if finding.code == "source-files"]
    assert (finding.level, finding.where) == ("note", "source 'fp8'")
    composed = open_checkpoint(tmp_path / "mixed" / "sources" / "fp8")
    assert composed.problems == ()
    assert composed.tensors.keys() == open_checkpoint(source).tensors.keys()
    assert all(spec.file.is_symlink() for spec in composed.tensors.values())
