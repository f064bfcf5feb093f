# SPDX-License-Identifier: Apache-2.0
"""A server with two front ends whose model may be changed: reloads, and the death of a worker."""

import json
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.engine.mixes import ROOT
from tests.serving.conftest import TOP_K, Server, routed, serve
from tests.serving.test_server import new_prompt

pytestmark = pytest.mark.engine

TEXT = (ROOT / "examples" / "demo-moe" / "heldout.txt").read_text()[4000:4200]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(
        tmp_path_factory.mktemp("updates"),
        "--api-server-count",
        "2",
        environment={"VLLM_MIXPREC_ALLOW_UPDATES": "1"},
    ) as running:
        yield running


def log_probs(server: Server) -> list[float]:
    body = {"model": "demo", "prompt": TEXT, "max_tokens": 1, "temperature": 0}
    answer = server.ask("/v1/completions", body | {"prompt_logprobs": 0}).json()
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    return [next(iter(entry.values()))["logprob"] for entry in entries]


def shift(first: list[float], second: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)


def blank(file: Path, part: str, leaf: str) -> bytes:
    """Zero the tensors named like ``*part*leaf``; returns the whole file as it was."""
    before = file.read_bytes()
    (size,) = struct.unpack("<Q", before[:8])
    blanked = 0
    with file.open("r+b") as stream:
        for name, entry in json.loads(before[8 : 8 + size]).items():
            if part in name and name.endswith(leaf):
                begin, end = entry["data_offsets"]
                stream.seek(8 + size + begin)
                stream.write(bytes(end - begin))
                blanked += 1
    assert blanked, f"{file} has no tensor {part}...{leaf}"
    return before


def rewrite(file: Path, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.write(content)
        stream.truncate()


def test_all_front_ends_tell_one_truth(server):
    server.ask("reset_expert_stats", {})
    sent = sum(routed(server.complete(new_prompt(), 10)["usage"]) for _ in range(8))
    # Each question is a connection of its own, which either process may take.
    totals = {server.stats("?detail=none")["summary"]["activations"] for _ in range(12)}
    layers = len(server.stats()["layers"])
    assert totals == {sent * TOP_K * layers}
    server.ask("reset_expert_stats", {})
    assert {server.stats("?detail=none")["summary"]["tokens"] for _ in range(12)} == {0}


def test_a_reload_that_changes_nothing_changes_nothing(server):
    before = log_probs(server)
    assert server.ask("reload_weights", {}).json()["status"] == "reloaded"
    assert log_probs(server) == before


@pytest.mark.parametrize(
    ("source", "part", "leaf"),
    [
        ("bf16", ".mlp.experts.1.", "down_proj.weight"),
        ("fp8", ".mlp.experts.5.", "weight_scale_inv"),
        ("fp8", ".self_attn.o_proj", "weight_scale_inv"),
        ("int4", ".mlp.experts.12.", "scales"),
    ],
)
def test_a_reload_reads_what_the_sources_hold_now(server, source, part, leaf):
    before = log_probs(server)
    file = server.folder / "demo-moe" / source / "model.safetensors"
    stored = blank(file, part, leaf)
    try:
        assert log_probs(server) == before  # not read until asked
        assert server.ask("reload_weights", {}).status == 200
        assert shift(log_probs(server), before) > 0.05  # far above what rounding gives
    finally:
        rewrite(file, stored)
    assert server.ask("reload_weights", {}).status == 200
    assert log_probs(server) == before


def test_a_source_that_does_not_fit_any_more_changes_nothing(server):
    before = log_probs(server)
    file = server.folder / "demo-moe" / "int4" / "model.safetensors"
    stored = file.read_bytes()
    header = stored.replace(b'"F16"', b'"I16"')
    for content, says in ((stored[:-100_000], "model.safetensors"), (header, "nothing was")):
        try:
            rewrite(file, content)
            answer = server.ask("reload_weights", {})
        finally:
            rewrite(file, stored)
        assert answer.status == 409
        assert says in answer.json()["error"]["message"]
        assert server.ask("health").status == 200
        assert log_probs(server) == before


def test_changing_the_plan_names_the_way(server):
    answer = server.ask("update_weight_mapping", {"weight_mapping": {"model.layers.0": "fp8"}})
    assert answer.status == 501
    assert "vllm-mixprec compose" in answer.json()["error"]["message"]
    assert server.ask("update_weight_mapping", {}).json()["error"]["field"] == "weight_mapping"


def test_a_reload_that_breaks_off_serves_nothing_wrong(server):
    """Zero points that a kernel for symmetric weights would not read show up midway."""
    blank(server.folder / "demo-moe" / "int4" / "model.safetensors", ".experts.12.", ".qzeros")
    answer = server.ask("reload_weights", {})
    assert answer.status == 500
    message = answer.json()["error"]["message"]
    assert "zero points vary" in message and "restart the server" in message
    assert {server.ask("health").status for _ in range(8)} == {503}  # both front ends know
    assert server.ask("reload_weights", {}).status == 409
    assert server.stats()["summary"]["layers"] == 3  # what asks the workers still works
    pool = ThreadPoolExecutor(1)
    waiting = pool.submit(server.complete, new_prompt(), 3)
    time.sleep(3)
    assert not waiting.done()
    pool.shutdown(wait=False, cancel_futures=True)


def test_polls_end_when_a_worker_dies(server):
    """The last test, like the one before it: nothing of use is left of the server."""
    workers = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "Worker" in process.name() or "Worker" in " ".join(process.cmdline())
    ]
    assert workers, "no worker process was found"

    def poll() -> float:
        begun = time.monotonic()
        for _ in range(200):
            try:
                if server.ask("expert_stats?detail=none").status != 200:
                    break
            except OSError:
                break
            time.sleep(0.05)
        return time.monotonic() - begun

    with ThreadPoolExecutor(4) as pool:
        polls = [pool.submit(poll) for _ in range(4)]
        time.sleep(0.5)
        workers[0].kill()
        assert max(one.result(60) for one in polls) < 30
