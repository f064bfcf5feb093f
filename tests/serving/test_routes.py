# SPDX-License-Identifier: Apache-2.0
"""The routes over hand-made counts; test_server.py asks the same of a real server."""

import asyncio
import csv
import io
import re
import socket

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from vllm.v1.engine.exceptions import EngineDeadError

from tests.serving.app import Counters, make_app, serve
from vllm_mixprec.errors import StatsUnavailableError
from vllm_mixprec.experts.snapshot import ExpertSnapshot
from vllm_mixprec.serving.routes import PREFIX
from vllm_mixprec.serving.statistics import Statistics
from vllm_mixprec.serving.updates import VARIABLE

ONE_EACH = np.ones((4, 16), np.int64)


@pytest.fixture
def counters() -> Counters:
    counters = Counters()
    counters.work(ONE_EACH)
    return counters


@pytest.fixture
def client(counters) -> TestClient:
    return TestClient(make_app(counters), base_url=f"http://test{PREFIX}")


def error_of(answer, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    return answer.json()["error"]


def test_get_and_post_answer_alike(client):
    asked = client.get("expert_stats", params={"top_k": 3, "minutes": 2.5}).json()
    posted = client.post("expert_stats", json={"top_k": 3, "minutes": 2.5}).json()
    for answer in (asked, posted):
        answer["summary"].pop("uptime_s")
    assert asked == posted
    assert len(asked["busiest"]) == 3
    assert client.post("expert_stats").json()["summary"]["tokens"] == 8


def test_server_is_up_for_as_long_as_it_has_counted(client, counters):
    """Engines begin before the API server does; a reset shortens the window alone."""
    summary = client.get("expert_stats").json()["summary"]
    assert summary["uptime_s"] >= summary["window"]["seconds"] == 10
    counters.seconds = 1.0
    assert client.get("expert_stats").json()["summary"]["uptime_s"] >= summary["uptime_s"]


def test_minutes_reach_the_workers(client, counters):
    client.get("expert_stats", params={"minutes": 0.5})
    client.get("expert_stats")
    assert counters.asked == [0.5, None]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("top_k=0", "top_k"),
        ("top_k=1001", "top_k"),
        ("top_k=many", "top_k"),
        ("minutes=0", "minutes"),
        ("minutes=-1", "minutes"),
        ("minutes=nan", "minutes"),
        ("minutes=inf", "minutes"),
        ("detail=all", "detail"),
        ("topk=5", "topk"),
    ],
)
def test_bad_query_is_422_with_the_field(client, counters, query, field):
    error = error_of(client.get(f"expert_stats?{query}"), 422)
    assert error["type"] == "invalid_request"
    assert error["field"] == field
    assert error["message"].startswith(f"{field}: ")
    assert counters.reads == 0


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        ("expert_stats", {"top_k": "5"}, "top_k"),
        ("expert_stats", {"top_k": True}, "top_k"),
        ("expert_stats", [], "body"),
        ("export_expert_stats", {"format": "xml"}, "format"),
        ("export_expert_stats", {"minutes": 0}, "minutes"),
        ("export_expert_stats", {"minutes": 1, "reset": True}, "minutes"),
        ("export_expert_stats", {"file": "/etc/passwd"}, "file"),
        ("generate", {}, "prompt"),
        ("generate", {"prompt": ""}, "prompt"),
        ("generate", {"prompt": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ("generate", {"prompt": "x", "temperature": -1}, "temperature"),
        ("generate", {"prompt": "x", "top_p": 0}, "top_p"),
        ("generate", {"prompt": "x", "top_k": -2}, "top_k"),
        ("generate", {"prompt": "x", "do_sample": "yes"}, "do_sample"),
        ("batch_generate", {"prompts": []}, "prompts"),
        ("batch_generate", {"prompts": ["a", 5]}, "prompts.1"),
        ("batch_generate", {"prompts": ["a"] * 257}, "prompts"),
    ],
)
def test_bad_body_is_422_with_the_field(client, counters, route, body, field):
    error = error_of(client.post(route, json=body), 422)
    assert error["field"] == field
    assert counters.reads == counters.resets == 0


def test_body_that_is_no_json_is_422(client):
    answer = client.post("expert_stats", content=b"{", headers={"Content-Type": "application/json"})
    assert error_of(answer, 422)["field"] == "body"


def test_parameters_of_a_post_are_never_ignored(client, counters):
    answer = client.post("export_expert_stats?format=csv")
    assert answer.headers["content-type"].startswith("text/csv")
    assert client.post("expert_stats?minutes=0.5").status_code == 200
    assert counters.asked == [None, 0.5]
    error = error_of(client.post("export_expert_stats?reset=true", json={"format": "csv"}), 422)
    assert error["field"] == "reset"
    assert error_of(client.post("reset_expert_stats?minutes=1"), 422)["field"] == "minutes"
    assert counters.resets == 0


def test_json_without_its_content_type_is_told(client):
    error = error_of(client.post("export_expert_stats", content=b'{"format": "csv"}'), 422)
    assert error["message"].endswith("sent with Content-Type: application/json")


def test_errors_do_not_repeat_what_was_sent(client):
    error = error_of(
        client.post("expert_stats", json={f"k{i}": "x" * 1000 for i in range(50)}), 422
    )
    assert len(error["message"]) < 500
    assert error["message"].endswith("and 45 more")


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (StatsUnavailableError("no layer counts; start with counters"), 503, "no layer counts"),
        (TimeoutError("no answer within 10 s"), 504, "no answer within 10 s"),
        (asyncio.TimeoutError(), 504, "did not answer in time"),
        (EngineDeadError(), 503, "engine has died"),
        (RuntimeError("a path of this machine"), 500, "the server's log says why"),
    ],
)
def test_failures_of_the_engine_are_told(client, counters, raised, status, says):
    counters.error = raised
    for answer in (client.get("expert_stats"), client.post("reset_expert_stats")):
        message = error_of(answer, status)["message"]
        assert says in message
        assert "path of this machine" not in message
    counters.error = None
    assert client.get("expert_stats").status_code == 200


def test_a_server_without_an_engine_says_so(counters):
    app = make_app(counters)
    app.state.mixprec = None  # as vLLM's render server leaves it
    client = TestClient(app, base_url=f"http://test{PREFIX}")
    for path in ("expert_stats", "model_info", "health"):
        assert "no engine" in error_of(client.get(path), 503)["message"]
    answer = client.post("generate", json={"prompt": "x"})
    assert "no engine" in error_of(answer, 503)["message"]


def test_reset_begins_a_window_and_tells_of_the_one_before(client, counters):
    assert client.post("reset_expert_stats").json()["ended"]["tokens"] == 8
    assert client.get("expert_stats").json()["summary"]["tokens"] == 0
    counters.work(ONE_EACH)
    assert client.get("expert_stats").json()["summary"]["tokens"] == 8


def test_export_is_a_snapshot_to_save(client, tmp_path):
    for body in (None, {}, {"format": "json"}, {"format": "snapshot"}):
        answer = client.post("export_expert_stats", json=body)
        disposition = answer.headers["content-disposition"]
        assert re.fullmatch(r'attachment; filename="expert-stats-[\w.-]+\.json"', disposition)
        file = tmp_path / "s.json"
        file.write_bytes(answer.content)
        assert ExpertSnapshot.load(file).tokens == 8


def test_export_as_csv_has_a_row_an_expert(client):
    answer = client.post("export_expert_stats", json={"format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert len(rows) == 64
    assert {row["count"] for row in rows} == {"1"}


def test_export_with_reset_hands_out_each_activation_once(client, counters):
    taken = []
    for i in range(5):
        counters.work((i + 1) * ONE_EACH)
        answer = client.post("export_expert_stats", json={"format": "snapshot", "reset": True})
        taken.append(ExpertSnapshot.from_dict(answer.json()).counts)
    assert (sum(taken) == counters.total[0]).all()


def test_changes_are_403_whatever_is_sent(client, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    for route in ("reload_weights", "update_weight_mapping"):
        for content in (b"", b"{", b'{"weight_mapping": {}}'):
            error = error_of(client.post(route, content=content), 403)
            assert f"{VARIABLE}=1" in error["message"]


def test_changing_the_plan_is_not_in_this_release(client, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    answer = client.post("update_weight_mapping", json={"weight_mapping": {"a": "fp8"}})
    assert "vllm-mixprec compose" in error_of(answer, 501)["message"]
    error = error_of(client.post("update_weight_mapping", json={"weight_mapping": 3}), 422)
    assert error["field"] == "weight_mapping"


def test_the_page_is_whole_and_its_scripts_are_hashed(client):
    answer = client.get("dashboard")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert not re.search(
        r"""(src|href)=["'](?!data:)""", answer.text
    )  # no other host, no other file
    assert not re.search(r"\sstyle=", answer.text)  # the policy would drop it


def test_without_the_key_only_the_bare_page_comes(counters):
    client = TestClient(make_app(counters, key="right"), base_url=f"http://test{PREFIX}")
    for method, path in (("GET", "expert_stats"), ("GET", "model_info"), ("POST", "generate")):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
    answer = client.get("dashboard")
    assert answer.status_code == 401
    assert answer.headers["content-type"].startswith("text/html")
    assert "hand-made" not in answer.text and 'data-locked="true"' in answer.text
    wrong = client.get("dashboard", headers={"Authorization": "Bearer wrong"})
    assert (wrong.status_code, wrong.json()) == (401, {"error": "Unauthorized"})
    right = client.get("dashboard", headers={"Authorization": "Bearer right"})
    assert right.status_code == 200 and "data-locked=" not in right.text


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_two_hundred_simultaneous_polls_are_one_reading():
    counters = Counters()
    counters.work(ONE_EACH)
    counters.delay_s = 3  # all have asked by then, however slow the machine

    async def poll() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(counters))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(
                *(client.get(f"{PREFIX}/expert_stats") for _ in range(200)),
                *(client.get(f"{PREFIX}/expert_stats", params={"minutes": 5}) for _ in range(9)),
            )

    answers = run(poll())
    assert {answer.status_code for answer in answers} == {200}
    assert sorted(counters.asked, key=str) == [5.0, None]


def test_readings_keep_their_pace_and_are_never_older_than_the_question():
    counters = Counters()

    async def poll() -> None:
        statistics = Statistics(counters.collect, counters.reset, pace_s=0.1)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for i in range(4):
            counters.work(ONE_EACH)
            assert (await statistics.read())[0].tokens == 8 * (i + 1)
        assert loop.time() - begun >= 0.3

    run(poll())
    assert counters.reads == 4


def test_a_reading_from_before_a_reset_is_not_shared_after_it():
    counters = Counters()
    counters.work(ONE_EACH)
    counters.delay_s = 0.2

    async def poll() -> tuple[int, int]:
        statistics = Statistics(counters.collect, counters.reset, pace_s=0)
        early = asyncio.create_task(statistics.read())
        await asyncio.sleep(0.05)
        await statistics.reset()
        late = await statistics.read()
        return (await early)[0].tokens, late[0].tokens

    assert run(poll()) == (8, 0)


def test_a_client_that_leaves_does_not_take_the_others_answer():
    counters = Counters()
    counters.work(ONE_EACH)
    counters.delay_s = 0.2

    async def poll() -> int:
        statistics = Statistics(counters.collect, counters.reset, pace_s=0)
        first, second = (asyncio.create_task(statistics.read()) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        tokens = (await second)[0].tokens
        assert first.cancelled()
        return tokens

    assert run(poll()) == 8
    assert counters.reads == 1


def test_clients_that_never_read_hold_up_nobody():
    counters = Counters(60, 256)
    with serve(make_app(counters)) as url:
        host, port = url.removeprefix("http://").split(":")
        deaf = [socket.create_connection((host, int(port))) for _ in range(20)]
        for connection in deaf:  # each is owed a megabyte
            connection.sendall(f"GET {PREFIX}/expert_stats HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        for _ in range(3):
            answer = httpx.get(f"{url}{PREFIX}/expert_stats", timeout=10)
            assert len(answer.json()["layers"]) == 60
        assert len(answer.content) > 900_000
        for connection in deaf:
            connection.close()
