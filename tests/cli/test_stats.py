# SPDX-License-Identifier: Apache-2.0
"""``stats`` over saved snapshots, and over HTTP from a server that answers as ours does."""

import csv
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.experts.test_snapshot import TIMES, assert_same, make
from vllm_mixprec.cli import stats
from vllm_mixprec.experts import ExpertSnapshot

ROUTE = "/v1/mixprec/export_expert_stats"


@dataclass
class Server:
    """What the local server answers, and what it was asked."""

    url: str = ""
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    asked: list[tuple[str, str, dict[str, Any], str | None]] = field(default_factory=list)

    def refuse(self, status: int, message: str, **fields: str) -> None:
        self.status = status
        self.body = json.dumps({"error": {"type": "x", "message": message, **fields}}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose answer is in ``body``; with ``key`` it wants that key, as vLLM does."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    state = Server(body=json.dumps(make(last_activation_s=TIMES).to_dict()).encode())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer("GET")

        def do_POST(self) -> None:
            self.answer("POST")

        def answer(self, method: str) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.headers.get("Authorization")
            state.asked.append((method, self.path, json.loads(content or b"null"), key))
            status, body = state.status, state.body
            if state.key is not None and key != f"Bearer {state.key}":
                status, body = 401, b'{"error":"Unauthorized"}'
            self.send_response(status)
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{listening.server_port}"
        yield state
        listening.shutdown()
        thread.join()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "saved.json"
    make(last_activation_s=TIMES).save(file)
    return file


def columns_of(line: str) -> list[str]:
    return line.split()


def test_file_is_summarised(run, saved):
    result = run("stats", saved)
    assert result.code == 0 and result.err == ""
    for text in (
        "10.0 s since 2026-02-02T02:40:00Z, 0.2 tokens and 0.8 activations a second",
        "2 routed, 1 request",
        "4 in each of 2 layers, 2 a token",
        "busiest experts",
        "idlest experts",
    ):
        assert text in result.out
    rows = [columns_of(line) for line in result.out.splitlines()]
    assert ["0", "4", "2/4", "0.4", "0.400", "3.00", "0"] in rows
    assert ["1", "4", "4/4", "0.4", "1.000", "1.00", "0"] in rows
    assert ["0", "0", "3", "75.00%", "2026-02-02T02:40:00Z"] in rows
    assert ["0", "2", "0", "0.00%", "-"] in rows


def test_help_shows_examples(run):
    result = run("stats", "--help")
    assert result.code == 0
    assert "vllm-mixprec stats http://localhost:8000 --top 10 --plot heat.png" in result.out


def test_top_chooses_how_many(run, saved):
    found = run("stats", saved, "--top", 3, "--json").json
    assert [(load["layer"], load["expert"]) for load in found["busiest"]] == [
        ("0", 0),
        ("0", 1),
        ("1", 0),
    ]
    assert [(load["layer"], load["expert"]) for load in found["idlest"]] == [
        ("0", 2),
        ("0", 3),
        ("0", 1),
    ]
    assert len(run("stats", saved, "--top", 500, "--json").json["busiest"]) == 8


def test_json_is_one_object(run, saved):
    result = run("stats", saved, "--json")
    assert result.err == ""
    assert result.json["sources"] == [str(saved)]
    assert result.json["summary"] == {
        "activations": 8,
        "tokens": 2,
        "requests": 1,
        "layers": 2,
        "experts": 4,
        "experts_per_token": 2,
        "window": {"since": "2026-02-02T02:40:00Z", "seconds": 10.0},
        "activations_per_s": 0.8,
        "tokens_per_s": 0.2,
    }
    assert result.json["layers"][0] == {
        "layer": "0",
        "total": 4,
        "experts": 4,
        "active_experts": 2,
        "rate_per_s": 0.4,
        "jain_fairness": 0.4,
        "busiest_over_mean": 3.0,
        "busiest_expert": 0,
    }
    assert result.json["busiest"][1] == {
        "layer": "0",
        "expert": 1,
        "count": 1,
        "share": 0.25,
        "last_activation": "2026-02-02T02:40:09Z",
    }
    assert result.json["draft"] is None


def test_nothing_counted_yet_is_said(run, tmp_path):
    make(np.zeros((2, 4)), seconds=0.0).save(tmp_path / "s.json")
    result = run("stats", tmp_path / "s.json")
    assert result.code == 0
    assert "No activations in this window" in result.out and "nan" not in result.out
    layer = run("stats", tmp_path / "s.json", "--json").json["layers"][0]
    assert layer["jain_fairness"] is layer["busiest_over_mean"] is layer["busiest_expert"] is None


def test_draft_is_shown_apart(run, tmp_path):
    make(draft=make(((1, 1),), layers=("draft.0",))).save(tmp_path / "s.json")
    result = run("stats", tmp_path / "s.json")
    assert "draft of m" in result.out and "2 in each of 1 layers" in result.out
    described = run("stats", tmp_path / "s.json", "--json").json
    assert described["summary"]["activations"] == 8
    assert described["draft"]["summary"]["activations"] == 2


def test_files_are_added_up(run, saved, tmp_path):
    other = make(((0, 0, 4, 0), (1, 1, 1, 1)), started_s=1_770_000_100.0)
    other.save(tmp_path / "other.json")
    merged = tmp_path / "merged.json"
    found = run("stats", saved, tmp_path / "other.json", "--json", "--export", merged).json
    assert found["summary"]["activations"] == 16
    assert found["summary"]["window"]["seconds"] == 110.0
    assert found["written"] == [str(merged)]
    assert_same(ExpertSnapshot.load(merged), make(last_activation_s=TIMES) + other)


def test_files_of_two_models_are_not_added_up(run, saved, tmp_path):
    make(model="n").save(tmp_path / "other.json")
    result = run("stats", saved, tmp_path / "other.json")
    assert result.code == 1
    assert result.err.startswith("error: cannot merge snapshots: model 'm' and 'n'")
    assert result.err.count("\n") == 1


def test_export_as_csv_and_plot(run, saved, tmp_path):
    table, picture = tmp_path / "s.csv", tmp_path / "s.png"
    result = run("stats", saved, "--export", table, "--plot", picture)
    assert result.code == 0
    assert f"wrote {table}" in result.out and f"wrote {picture}" in result.out
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [int(row["count"]) for row in rows] == [3, 1, 0, 0, 1, 1, 1, 1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_plot_matplotlib_is_not_imported(saved):
    code = (
        "import sys; from vllm_mixprec.cli import main; main(sys.argv[1:]); "
        "print([m for m in ('matplotlib', 'pandas', 'torch', 'vllm') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, "stats", str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_malformed_file_is_one_line(run, tmp_path):
    (tmp_path / "s.json").write_text('{"format": "x"}')
    result = run("stats", tmp_path / "s.json")
    assert result.code == 1 and result.out == ""
    assert result.err.startswith(f"error: {tmp_path / 's.json'}: format: found 'x', expected")
    assert result.err.count("\n") == 1


def test_address_without_a_scheme_is_corrected(run):
    result = run("stats", "localhost:8000")
    assert result.code == 1
    assert "For a server write http://localhost:8000" in result.err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["a.json", "--export", "b.txt"],
        ["a.json", "--export", "b"],
        ["a.json", "--plot", "b.doc"],
        ["a.json", "--top", "0"],
        ["a.json", "--top", "x"],
        ["a.json", "--top", "9" * 5000],
        ["http://h", "--minutes", "0"],
        ["http://h", "--minutes", "nan"],
        ["http://h", "--minutes", "x"],
        ["a.json", "--minutes", "5"],
        ["http://h", "a.json", "--minutes", "5"],
        ["ftp://h"],
        ["http://"],
        ["http://h:99999"],
        ["http://h:x"],
        ["http://[h"],
        ["http://user:secret@h"],
        ["http://h/a b"],
        ["http://h/\r\nX: y"],
        ["http://h", "--api-key", "a\r\nX: y"],
    ],
)
def test_wrong_usage_exits_with_2(run, argv):
    result = run("stats", *argv)
    assert result.code == 2
    assert "usage: vllm-mixprec stats" in result.err
    assert "secret" not in result.err


# Servers


@pytest.mark.parametrize(
    "suffix",
    ["", "/", "/v1", "/v1/", "/v1/mixprec", "/v1/mixprec/", "/v1/mixprec/dashboard#key=x"],
)
def test_any_base_of_the_server_is_understood(run, server, suffix):
    result = run("stats", server.url + suffix, "--json")
    assert result.code == 0
    assert result.json["sources"] == [server.url]
    assert result.json["summary"]["activations"] == 8
    assert server.asked == [("POST", ROUTE, {"format": "snapshot"}, None)]


def test_a_prefix_before_the_routes_is_kept(run, server):
    assert run("stats", f"{server.url}/proxy/v1").code == 0
    assert server.asked[0][1] == f"/proxy{ROUTE}"


def test_minutes_are_passed_on(run, server):
    assert run("stats", server.url, "--minutes", "2.5").code == 0
    assert server.asked[0][2] == {"format": "snapshot", "minutes": 2.5}


def test_server_and_file_are_added_up(run, server, saved):
    found = run("stats", server.url, saved, "--json").json
    assert found["summary"]["activations"] == 16


def test_api_key_from_option_or_environment(run, server, monkeypatch):
    server.key = "secret"
    assert run("stats", server.url, "--api-key", "secret").code == 0
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert run("stats", server.url).code == 0
    assert run("stats", server.url, "--api-key", "other").code == 1
    keys = [key for *_, key in server.asked]
    assert keys == ["Bearer secret", "Bearer secret", "Bearer other"]


@pytest.mark.parametrize(
    ("key", "found"), [(None, "wants an API key"), ("other", "refused the API key")]
)
def test_401_names_the_option(run, server, key, found):
    server.key = "secret"
    result = run("stats", server.url, *(("--api-key", key) if key else ()))
    assert result.code == 1 and result.out == ""
    assert result.err == (
        f"error: {server.url}: the server {found} (401). "
        "Pass its key with --api-key, or in VLLM_API_KEY.\n"
    )


def test_404_says_how_to_start_the_server(run, server):
    server.status, server.body = 404, b'{"detail":"Not Found"}'
    result = run("stats", server.url)
    assert result.code == 1
    assert "VLLM_PLUGINS=mixprec,mixprec_metrics,mixprec_endpoints" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "message", "fields", "expected"),
    [
        (503, "this engine does not count experts.", {}, "503: this engine does not count experts"),
        (504, "the engine did not answer within 10 s", {}, "504: the engine did not answer within"),
        (422, "at most 60", {"field": "minutes"}, "422: minutes: at most 60. Correct the option."),
        (500, "line\none \x1b[31mred", {}, "500: line one  [31mred. Check that this is the"),
        (503, "x" * 10_000, {}, "503: " + "x" * 500 + ".\n"),
    ],
)
def test_message_of_the_server_is_shown(run, server, status, message, fields, expected):
    server.refuse(status, message, **fields)
    result = run("stats", server.url)
    assert result.code == 1
    assert f"the server answered {expected}" in result.err
    assert result.err.count("\n") == 1 and "\x1b" not in result.err


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'{"error": 5}', b"[" * 50_000, b"\xff"])
def test_failure_without_a_message_has_the_status(run, server, body):
    server.status, server.body = 503, body
    result = run("stats", server.url)
    assert result.code == 1
    assert "the server answered 503: Service Unavailable. Look at the server's log." in result.err


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"<html>hello</html>", "not JSON"),
        (b"", "not JSON"),
        (b"{}", "format: found None"),
        (b'{"format":"vllm-mixprec/expert-snapshot","version":9}', "version: found 9"),
    ],
)
def test_an_answer_that_is_no_snapshot_is_explained(run, server, body, found):
    server.body = body
    result = run("stats", server.url)
    assert result.code == 1
    assert result.err.startswith(f"error: {server.url}: the answer is no snapshot: {found}")
    assert "Check that this is the address of vllm serve" in result.err
    assert result.err.count("\n") == 1


def test_an_answer_without_end_is_cut(run, server, monkeypatch):
    monkeypatch.setattr(stats, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr("vllm_mixprec.experts.snapshot.MAX_FILE_BYTES", 1000)
    server.body = b" " * 5000 + server.body
    result = run("stats", server.url)
    assert result.code == 1
    assert "the answer is no snapshot: size: found over 1000 bytes" in result.err


def test_a_redirect_does_not_get_the_key(run, server):
    server.status, server.headers = 307, {"Location": f"{server.url}/elsewhere"}
    result = run("stats", server.url, "--api-key", "secret")
    assert result.code == 1
    assert f"redirects to {server.url}/elsewhere (307). Write that address" in result.err
    assert [path for _, path, *_ in server.asked] == [ROUTE]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_refused_connection_is_explained(run, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{unused_port()}"
    result = run("stats", url, "--json")
    assert result.code == 1
    assert result.json["error"]["type"] == "ServerError"
    assert result.json["error"]["message"] == (
        f"{url}: connection refused, expected a running server. "
        "Start vllm serve, or correct the address."
    )


@pytest.fixture
def raw_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes | None], str]]:
    """Start servers that answer with the bytes given, or with None hold the line in silence."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    stop = threading.Event()
    threads = []

    def start(answer: bytes | None) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]

        def serve() -> None:
            with listening:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    if answer is None:
                        stop.wait(10)
                    else:
                        connection.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{port}"

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def test_silence_ends_after_the_timeout(run, raw_server, monkeypatch):
    monkeypatch.setattr(stats, "_TIMEOUT_S", 0.2)
    result = run("stats", raw_server(None))
    assert result.code == 1
    assert "no answer within 0.2 s, expected one. Look at the server's log" in result.err


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"]
)
def test_what_is_no_http_is_explained(run, raw_server, answer):
    result = run("stats", raw_server(answer))
    assert result.code == 1
    assert "no answer over HTTP" in result.err or "the answer is no snapshot" in result.err
    assert result.err.count("\n") == 1 and "Traceback" not in result.err


def test_https_to_a_plain_server_is_explained(run, server):
    result = run("stats", server.url.replace("http:", "https:"))
    assert result.code == 1
    assert "no answer over HTTP" in result.err


def test_unknown_host_is_explained(run, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    result = run("stats", "http://nowhere.invalid")
    assert result.code == 1
    assert "unknown host" in result.err and "Correct the address" in result.err


def test_failed_export_is_explained(run, saved, tmp_path):
    result = run("stats", saved, "--export", tmp_path / "absent" / "s.csv")
    assert result.code == 1
    assert "s.csv: cannot be written" in result.err
    assert os.listdir(tmp_path) == ["saved.json"]
