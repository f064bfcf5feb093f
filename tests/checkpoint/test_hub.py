# SPDX-License-Identifier: Apache-2.0
"""Hub ids, through the hub's own client and a server that counts what it is asked for.

Clients run in processes of their own: huggingface_hub reads its environment once, on import.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.hub_server import COMMIT, serve
from tests.checkpoint.test_torch_file import as_torch
from tests.routing.models import edit_json, edit_tensors
from vllm_mixprec.checkpoint.hub import HubFile, hub_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "random-moe"
ROOT = Path(__file__).parents[2]
SHARD = "bf16/model-00001-of-00003.safetensors"
UNREACHABLE = "http://127.0.0.1:9"
PRELUDE = """
import json, sys
from pathlib import Path
from vllm_mixprec import Plan, check, compose
from vllm_mixprec.checkpoint import hub
from vllm_mixprec.routing import Platform, load_route_table

folder = Path(sys.argv[1])
CPU = Platform("cpu-avx512")

def plan(base, *rules):
    names = {base} | {source for _, source in rules}
    return Plan.from_dict({
        "version": 1, "base": base,
        "sources": {name: {"path": f"owner/{name}"} for name in sorted(names)},
        "rules": [{"match": match, "source": source} for match, source in rules],
    })

def findings(report):
    return [[finding.level, finding.code, finding.where] for finding in report.findings]
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("bf16", "fp8"):
        shutil.copytree(FIXTURES / name, tmp_path / "hub" / name)
    return tmp_path / "hub"


def client(folder: Path, code: str, endpoint: str = "", offline: bool = False) -> Any:
    """Run ``code`` after PRELUDE, with its own cache below ``folder``; return what it printed."""
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "NO_PROXY": "127.0.0.1",
        "HOME": str(folder),
    } | ({"HF_ENDPOINT": endpoint} if endpoint else {})
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_check_downloads_no_shard(models: Path, tmp_path: Path) -> None:
    code = "print(json.dumps(findings(check(plan('bf16', ('**.experts', 'fp8')), platform=CPU))))"
    with serve(models) as hub:
        assert client(tmp_path, code, hub.url) == []
        assert hub.whole() == []
        shards_bytes = sum(file.stat().st_size for file in models.rglob("*.safetensors"))
        assert 0 < hub.ranged_bytes() < shards_bytes
        asked = len(hub.requests)
        assert client(tmp_path, code, hub.url) == []
        headers = [request for request in hub.requests[asked:] if request[1] == 0]
    assert headers == []  # kept in the cache


def test_router_of_another_model_is_told_by_range(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "fp8", models / "other")

    def disturb(tensors: dict[str, Any]) -> None:
        name = "model.layers.1.mlp.gate.weight"
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, bytes([data[0] ^ 64]) + data[1:])

    edit_tensors(models / "other" / "model.safetensors", disturb)
    code = "print(json.dumps(findings(check(plan('bf16', ('**.experts', 'other'))))))"
    with serve(models) as hub:
        found = client(tmp_path, code, hub.url)
        assert ["error", "router-mismatch", "model.layers.1.mlp.gate"] in found
        assert hub.whole() == []


def test_of_routers_on_the_hub_the_first_rows_are_compared(models: Path, tmp_path: Path) -> None:
    """A difference behind the sample is not found, and the report says that it could not be."""
    code = """
import vllm_mixprec.routing.sources as sources
sources._SAMPLE_BYTES = 3 * 512  # three rows of 256 BF16
def found(source):
    report = check(plan('bf16', ('**.experts', source)))
    return [f.code for f in report.findings if f.level == 'error'], report.sampled_routers
print(json.dumps([found('early'), found('late')]))
"""
    for source, byte in (("early", 2 * 512), ("late", 3 * 512)):
        shutil.copytree(models / "fp8", models / source)

        def disturb(tensors: dict[str, Any], byte: int = byte) -> None:
            dtype, shape, data = tensors["model.layers.1.mlp.gate.weight"]
            assert (dtype, shape) == ("BF16", [8, 256])
            data = data[:byte] + bytes([data[byte] ^ 64]) + data[byte + 1 :]
            tensors["model.layers.1.mlp.gate.weight"] = (dtype, shape, data)

        edit_tensors(models / source / "model.safetensors", disturb)
    with serve(models) as hub:
        early, late = client(tmp_path, code, hub.url)
        assert early == [["router-mismatch"], ["early"]]
        assert late == [[], ["late"]]
        routers = [last - first + 1 for _, first, last in hub.requests if first]
        assert set(routers) >= {3 * 512}


def test_compose_downloads_the_shards_in_use_only(models: Path, tmp_path: Path) -> None:
    code = """
compose(plan('fp8', ('lm_head', 'bf16')), folder / 'mixed')
table = load_route_table(Plan.from_yaml(folder / 'mixed' / 'mixprec_plan.yaml'))
print(json.dumps(sorted(route.module for route in table.routes.values() if route.source == 'bf16')))
"""
    with serve(models) as hub:
        assert client(tmp_path, code, hub.url) == ["lm_head"]
        assert hub.whole() == [SHARD, "fp8/model.safetensors"]
    # What is composed needs the hub no more.
    code = """
composed = Plan.from_yaml(folder / 'mixed' / 'mixprec_plan.yaml')
print(json.dumps(findings(check(composed))))
"""
    assert client(tmp_path, code, offline=True) == []


def test_deep_check_downloads_what_it_reads(models: Path, tmp_path: Path) -> None:
    code = "print(json.dumps(findings(check(plan('fp8', ('lm_head', 'bf16')), deep=True))))"
    with serve(models) as hub:
        found = client(tmp_path, code, hub.url)
        assert not [finding for finding in found if finding[0] == "error"]
        assert hub.whole() == [SHARD, "fp8/model.safetensors"]


def test_base_of_which_only_the_headers_count_is_not_downloaded(
    models: Path, tmp_path: Path
) -> None:
    code = """
compose(plan('bf16', ('**', 'fp8')), folder / 'mixed')
composed = Plan.from_yaml(folder / 'mixed' / 'mixprec_plan.yaml')
report = check(composed)
print(json.dumps([findings(report), len(report.table.routes)]))
"""
    with serve(models) as hub:
        found, modules = client(tmp_path, code, hub.url)
        assert hub.whole() == ["fp8/model.safetensors"]
    assert not [finding for finding in found if finding[0] == "error"]
    index = json.loads((models / "bf16" / "model.safetensors.index.json").read_text())
    assert modules == len({name.rpartition(".")[0] for name in index["weight_map"]})
    assert not list((tmp_path / "mixed" / "sources" / "bf16").glob("*.safetensors"))
    # What is not compared with that base is said.
    code = """
composed = Plan.from_yaml(folder / 'mixed' / 'mixprec_plan.yaml')
found = check(composed, deep=True).findings
print(json.dumps([f.message for f in found if f.code == 'not-compared']))
"""
    [message] = client(tmp_path, code, offline=True)
    assert message.startswith(f"the base's shards of {modules} modules")
    # A plan that takes tensors from where only headers are is refused.
    code = """
composed = Plan.from_yaml(folder / 'mixed' / 'mixprec_plan.yaml')
bare = composed.model_copy(update={'rules': ()})
print(json.dumps(findings(check(bare))))
"""
    found = client(tmp_path, code, offline=True)
    assert [finding[:2] for finding in found] == [["error", "index-mismatch"]] * 3


def test_rank_downloads_what_it_reads(models: Path, tmp_path: Path) -> None:
    """As the loader does for a plan over hub ids, without a composed directory."""
    code = """
table = load_route_table(plan('bf16', ('**.experts', 'fp8')), platform=CPU)
specs = list(table.routes['lm_head'].tensors.values())
hub.fetch(spec.file for spec in specs)
from vllm_mixprec.checkpoint.stream import read_tensors
[(spec, tensor)] = read_tensors(specs)
print(json.dumps([spec.name, list(tensor.shape), float(tensor.float().abs().sum())]))
"""
    with serve(models) as hub:
        name, shape, total = client(tmp_path, code, hub.url)
        assert hub.whole() == [SHARD]
    from safetensors.torch import load_file

    expected = load_file(models / SHARD)["lm_head.weight"]
    assert (name, shape) == ("lm_head.weight", list(expected.shape))
    assert total == pytest.approx(float(expected.float().abs().sum()))


def test_offline_the_shards_that_are_missing_are_named(models: Path, tmp_path: Path) -> None:
    code = "print(json.dumps(findings(check(plan('bf16')))))"
    with serve(models) as hub:
        assert client(tmp_path, code, hub.url) == []
    found = client(tmp_path, code, offline=True)
    assert [finding[:2] for finding in found] == [["error", "index-mismatch"]] * 3
    assert SHARD.removeprefix("bf16/") in found[0][2]


def test_headers_longer_than_the_first_request_come_whole(models: Path, tmp_path: Path) -> None:
    code = """
hub._FIRST_BYTES = 64
print(json.dumps(findings(check(plan('bf16')))))
"""
    with serve(models) as hub:
        assert client(tmp_path, code, hub.url) == []


def test_damaged_index_is_an_error(models: Path, tmp_path: Path) -> None:
    edit_json(models / "bf16" / "model.safetensors.index.json", weight_map=[])
    code = "print(json.dumps([f.message for f in check(plan('bf16')).findings]))"
    with serve(models) as hub:
        [message] = client(tmp_path, code, hub.url)
    assert "weight_map is list" in message


def test_server_that_ignores_ranges_is_an_error(models: Path, tmp_path: Path) -> None:
    code = "print(json.dumps([f.message for f in check(plan('bf16')).findings]))"
    with serve(models, ignores_ranges=True) as hub:
        [message] = client(tmp_path, code, hub.url)
    assert message.startswith("owner/bf16: no directory") and "content-range None" in message


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin in three"])
def test_model_that_is_all_here_needs_no_hub(models: Path, tmp_path: Path, kind: str) -> None:
    if kind != "safetensors":
        shutil.rmtree(models / "fp8")
        as_torch(models / "fp8", "fp8", 1 if kind == "bin" else 3)
    code = """
from vllm_mixprec.checkpoint import open_checkpoint
snapshot = hub.open_snapshot('owner/fp8', None, folder)
hub.fetch(spec.file for spec in open_checkpoint(snapshot).tensors.values())
opened = open_checkpoint(snapshot)
print(json.dumps([len(opened.modules), opened.container.kind, opened.problems]))
"""
    with serve(models) as hub:
        found = client(tmp_path, code, hub.url)
    assert found == [69, kind.split()[0], []]
    assert client(tmp_path, code, UNREACHABLE) == found


def test_hub_out_of_reach_is_not_blamed_on_the_name(models: Path, tmp_path: Path) -> None:
    code = "print(json.dumps([f.message for f in check(plan('absent')).findings]))"
    [message] = client(tmp_path, code, UNREACHABLE)
    assert message.startswith("owner/absent: no directory") and "Connection refused" in message
    assert message.endswith(
        "). Check the network and the hub's cache, or download the model first."
    )
    with serve(models) as hub:
        [message] = client(tmp_path, code, hub.url)
    assert message.endswith("). Correct the path, or download the model first.")


def test_headers_that_cannot_be_kept_are_not(models: Path, tmp_path: Path) -> None:
    code = """
def keep_headers(*_):
    raise OSError(30, 'Read-only file system')
hub.keep_headers = keep_headers
print(json.dumps([f.message for f in check(plan('bf16')).findings]))
"""
    with serve(models) as hub:
        [message] = client(tmp_path, code, hub.url)
    assert "none of its 3 shards is in the directory" in message


def test_shards_come_into_the_cache_that_they_were_looked_for_in(
    models: Path, tmp_path: Path
) -> None:
    code = """
from huggingface_hub import constants
snapshot = hub.open_snapshot('owner/fp8', None, folder)
constants.HF_HUB_CACHE = str(folder / 'other')
hub.fetch([snapshot / 'model.safetensors'])
print(json.dumps((snapshot / 'model.safetensors').exists()))
"""
    with serve(models) as hub:
        assert client(tmp_path, code, hub.url) is True
    assert not (tmp_path / "other").exists()


def test_shard_that_does_not_come_is_an_error(models: Path, tmp_path: Path) -> None:
    code = "print(json.dumps(str(hub.open_snapshot('owner/fp8', None, folder))))"
    with serve(models) as hub:
        file = f"{client(tmp_path, code, hub.url)}/model.safetensors"
    # As older clients leave it, which keep no list of what a model has.
    shutil.rmtree(tmp_path / "cache" / "models--owner--fp8" / "trees")
    code = f"""
try:
    hub.fetch([Path({file!r})])
    print(json.dumps('nothing'))
except hub.CheckpointError as error:
    print(json.dumps(str(error)))
"""
    message = client(tmp_path, code, offline=True)
    assert message.startswith(f"{file}: not there after it was asked for from the hub")


def test_path_in_the_cache_tells_repository_and_commit() -> None:
    path = Path(f"/c/models--owner--my-model.1/snapshots/{COMMIT}/sub/model.safetensors")
    expected = HubFile(Path("/c"), "owner/my-model.1", COMMIT, "sub/model.safetensors")
    assert hub_file(path) == expected
    assert hub_file(Path("/models/mine/model.safetensors")) is None
