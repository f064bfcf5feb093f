# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` behind an API key: statistics follow its traffic, to the last one."""

import csv
import http.client
import io
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.serving.conftest import EXPERTS, KEY, LAYERS, TOP_K, Server, routed
from vllm_mixprec.experts.snapshot import ExpertSnapshot

pytestmark = pytest.mark.engine

ROUTES = (
    ("GET", "model_info"),
    ("GET", "expert_stats"),
    ("POST", "expert_stats"),
    ("POST", "reset_expert_stats"),
    ("POST", "export_expert_stats"),
    ("POST", "update_weight_mapping"),
    ("POST", "reload_weights"),
    ("POST", "generate"),
    ("POST", "batch_generate"),
    ("GET", "health"),
    ("GET", "dashboard"),
)


def new_prompt() -> str:
    """A prompt that no request before shares its first tokens with, so nothing is cached."""
    return f"{uuid.uuid4().hex} = "


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_is_401_without_the_key(server, method, path):
    for key in (None, "wrong"):
        answer = server.ask(path, {} if method == "POST" else None, key=key, method=method)
        assert answer.status == 401
        assert b"demo" not in answer.body


def test_the_page_comes_with_the_401_and_without_it(server):
    locked, opened = server.ask("dashboard", key=None), server.ask("dashboard")
    assert (locked.status, opened.status) == (401, 200)
    for answer in (locked, opened):
        assert answer.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert b'data-locked="true"' in locked.body


def test_health(server):
    assert server.ask("health").json() == {"status": "ok"}


def test_model_info_tells_of_the_plan(server):
    info = server.ask("model_info").json()
    assert info["model"] == "demo"
    assert info["plan"]["path"].endswith("mixprec_plan.yaml")
    assert len(info["plan"]["sha256"]) == 64
    assert {source["source"] for source in info["sources"]} == {"bf16", "fp8", "int4"}
    assert [layer["layer"] for layer in info["expert_layers"]] == [
        layer["layer"] for layer in server.stats()["layers"]
    ]
    assert sum(entry["bytes"] for entry in info["bytes"]) > 5_000_000


def counts_of(stats: dict) -> list[list[int]]:
    return [[expert["count"] for expert in layer["detail"]] for layer in stats["layers"]]


def test_counts_follow_traffic_to_the_last_one(server):
    before = server.stats()
    expected = sum(routed(server.complete(new_prompt(), n)["usage"]) for n in (1, 7, 40))
    after = server.stats()
    assert after["summary"]["tokens"] - before["summary"]["tokens"] == expected
    for old, new in zip(counts_of(before), counts_of(after), strict=True):
        assert len(new) == EXPERTS
        assert sum(new) - sum(old) == expected * TOP_K
    assert len(after["layers"]) == LAYERS
    assert after["summary"]["activations"] == sum(sum(row) for row in counts_of(after))
    assert after["summary"]["requests"] >= before["summary"]["requests"] + 2


def test_generate_gives_what_vllms_own_route_gives(server):
    prompt = "    def __init__(self, name"
    own = server.complete(prompt, 30)
    body = {"prompt": prompt, "max_new_tokens": 30}
    for greedy in ({"do_sample": False}, {"temperature": 0.0}):
        answer = server.ask("generate", body | greedy).json()
        assert answer["text"] == own["choices"][0]["text"]
        assert answer["finish_reason"] == own["choices"][0]["finish_reason"]
        assert answer["usage"]["total_tokens"] == own["usage"]["total_tokens"]
    texts = {server.ask("generate", body | {"temperature": 1.5}).json()["text"] for _ in range(4)}
    assert len(texts) > 1


def test_batch_generate_answers_in_order(server):
    prompts = ["def read(self, ", "class ", "import "]
    body = {"prompts": prompts, "max_new_tokens": 12, "do_sample": False}
    answer = server.ask("batch_generate", body).json()
    alone = [server.complete(prompt, 12) for prompt in prompts]
    # Their lengths tell them apart. Texts can differ: a batch rounds otherwise than one alone.
    assert [one["usage"] for one in answer["results"]] == [
        {name: own["usage"][name] for name in one["usage"]}
        for one, own in zip(answer["results"], alone, strict=True)
    ]
    assert answer["usage"]["total_tokens"] == sum(one["usage"]["total_tokens"] for one in alone)
    (single,) = server.ask("batch_generate", body | {"prompts": prompts[:1]}).json()["results"]
    assert single["text"] == alone[0]["choices"][0]["text"]


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("expert_stats?top_k=0", None, 422, "top_k"),
        ("expert_stats?minutes=-1", None, 422, "minutes"),
        ("expert_stats", {"minutes": "soon"}, 422, "minutes"),
        ("export_expert_stats", {"format": "xml"}, 422, "format"),
        ("generate", {"prompt": 5}, 422, "prompt"),
        ("batch_generate", {"prompts": "one"}, 422, "prompts"),
        ("generate", {"prompt": "x", "max_new_tokens": 100_000}, 400, "max_new_tokens"),
    ],
)
def test_bad_parameters_name_the_field(server, path, body, status, field):
    answer = server.ask(path, body)
    assert answer.status == status
    error = answer.json()["error"]
    assert (error["type"], error["field"]) == ("invalid_request", field)


def test_a_prompt_that_is_too_long_is_400(server):
    answer = server.ask("generate", {"prompt": "x" * 600, "max_new_tokens": 1})
    assert answer.status == 400
    assert "512" in answer.json()["error"]["message"]


def test_changes_are_403_unless_allowed(server):
    for path, body in (("reload_weights", {}), ("update_weight_mapping", {"weight_mapping": {}})):
        answer = server.ask(path, body)
        assert answer.status == 403
        assert "VLLM_MIXPREC_ALLOW_UPDATES=1" in answer.json()["error"]["message"]


def test_recent_minutes_leave_out_what_is_older(server):
    server.complete(new_prompt(), 5)
    server.ask("reset_expert_stats", {})
    recent = server.stats("?minutes=60")["summary"]
    assert recent["tokens"] >= 5  # a reset is for the window alone
    assert 0 < recent["window"]["seconds"] <= 3600 + 15


def test_export_as_csv(server):
    server.complete(new_prompt(), 5)
    answer = server.ask("export_expert_stats", {"format": "csv"})
    rows = list(csv.DictReader(io.StringIO(answer.body.decode())))
    assert len(rows) == LAYERS * EXPERTS
    assert "attachment" in answer.headers["Content-Disposition"]
    assert sum(int(row["count"]) for row in rows) == server.stats()["summary"]["activations"]


def test_simultaneous_resets_and_exports_lose_nothing(server):
    """Three clients end windows while two send requests: what they hold adds up to all of it."""
    server.ask("reset_expert_stats", {})

    def work(_: int) -> int:
        return sum(routed(server.complete(new_prompt(), 25)["usage"]) for _ in range(8))

    def export(_: int) -> int:
        tokens = 0
        for _ in range(15):
            body = {"format": "snapshot", "reset": True}
            snapshot = ExpertSnapshot.from_dict(server.ask("export_expert_stats", body).json())
            assert (snapshot.layer_totals == snapshot.tokens * TOP_K).all()
            tokens += snapshot.tokens
        return tokens

    def reset(_: int) -> int:
        return sum(
            server.ask("reset_expert_stats", {}).json()["ended"]["tokens"] for _ in range(15)
        )

    with ThreadPoolExecutor(5) as pool:
        working = [pool.submit(work, i) for i in range(2)]
        taking = [pool.submit(export, i) for i in range(2)] + [pool.submit(reset, 0)]
        sent = sum(one.result() for one in working)
        taken = sum(one.result() for one in taking)
    assert taken + server.stats()["summary"]["tokens"] == sent


def test_two_hundred_simultaneous_polls_are_answered(server):
    with ThreadPoolExecutor(201) as pool:
        generating = pool.submit(server.complete, new_prompt(), 300)
        begun = time.monotonic()
        polls = [pool.submit(server.ask, "expert_stats") for _ in range(200)]
        answers = [poll.result() for poll in polls]
        seconds = time.monotonic() - begun
        generating.result()
    assert {answer.status for answer in answers} == {200}
    # One reading each would take 200 turns of 0.2 s; the threads of this test take most of this.
    assert seconds < 20


def test_a_client_that_leaves_ends_its_requests(server):
    def tokens() -> int:
        return server.stats("?detail=none")["summary"]["tokens"]

    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    begun = left = now = requested = 0
    for _ in range(5):  # on a busy machine one is slow to leave, and nearly all is generated
        prompts, new_tokens = [new_prompt() for _ in range(32)], 450
        requested = len(prompts) * new_tokens
        body = {"prompts": prompts, "max_new_tokens": new_tokens}
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
        begun = tokens()
        connection.request("POST", "/v1/mixprec/batch_generate", json.dumps(body), headers)
        while (left := tokens()) == begun:
            time.sleep(0.05)
        connection.close()
        last, now = left, tokens()
        while now != last:
            time.sleep(1)
            last, now = now, tokens()
        if left - begun < requested * 0.3:
            break
    # Random text of this model rarely ends by itself: nearly all would have been generated.
    assert begun < left <= now < begun + requested * 0.6


def test_metrics_never_go_down_when_a_window_begins(server: Server):
    def total() -> float:
        lines = server.ask("/metrics").body.decode().splitlines()
        wanted = [line for line in lines if line.startswith("mixprec_routed_tokens_total{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in wanted)

    expected = total() + routed(server.complete(new_prompt(), 20)["usage"])
    deadline = time.monotonic() + 15
    while total() < expected and time.monotonic() < deadline:
        time.sleep(0.2)
    known = total()
    assert known >= expected
    server.ask("reset_expert_stats", {})
    time.sleep(2)
    assert total() >= known
