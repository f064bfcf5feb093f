# SPDX-License-Identifier: Apache-2.0
"""Real servers: ``vllm serve`` on the demo model, mixed as in the example's plan."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.engine.mixes import ROOT
from vllm_mixprec import Plan, compose

KEY = "a-key-of-the-tests"
START_LIMIT_S = 300
TOP_K, LAYERS, EXPERTS = 2, 3, 16  # of the demo model

ENVIRONMENT = {
    "VLLM_PLUGINS": "mixprec,mixprec_metrics,mixprec_endpoints",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Any

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A running server and its key."""

    def __init__(self, url: str, process: subprocess.Popen, folder: Path) -> None:
        self.url, self.process, self.folder = url, process, folder

    def ask(
        self,
        path: str,
        body: Any = None,
        key: str | None = KEY,
        method: str | None = None,
        engine: int | None = None,
    ) -> Answer:
        """Ask, with a POST if there is a body; ``path`` below ``/v1/mixprec`` unless it begins
        with a slash; ``engine`` is the data-parallel one that shall answer, None for any."""
        url = self.url + (path if path.startswith("/") else f"/v1/mixprec/{path}")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        request.method = method or request.get_method()
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        if engine is not None:
            request.add_header("X-data-parallel-rank", str(engine))
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read(), error.headers)

    def complete(self, prompt: str, tokens: int) -> dict:
        """Continue a prompt greedily through vLLM's own route; returns its answer."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        answer = self.ask("/v1/completions", body)
        assert answer.status == 200, answer.body
        return answer.json()

    def stats(self, query: str = "") -> dict:
        answer = self.ask(f"expert_stats{query}")
        assert answer.status == 200, answer.body
        return answer.json()


def routed(usage: dict) -> int:
    """Tokens that a request runs through the layers: the last one sampled is not fed back."""
    return usage["prompt_tokens"] + usage["completion_tokens"] - 1


@contextmanager
def serve(folder: Path, *arguments: str, environment: dict | None = None) -> Iterator[Server]:
    """Compose the demo into ``folder`` and serve it; every process it starts ends with it."""
    shutil.copytree(ROOT / "examples" / "demo-moe", folder / "demo-moe")
    shutil.copy(ROOT / "examples" / "demo-plan.yaml", folder / "plan.yaml")
    compose(Plan.from_yaml(folder / "plan.yaml"), folder / "mixed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(folder / "mixed")]
    command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "512", "--enforce-eager", "--api-key", KEY, *arguments]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, folder)
    try:
        _wait(server, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _wait(server: Server, log: Path) -> None:
    begun = time.monotonic()
    while True:
        try:
            if server.ask("/health").status == 200:
                return
        except OSError:
            pass
        late = time.monotonic() - begun > START_LIMIT_S
        if late or server.process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise AssertionError(f"the server did not start within {START_LIMIT_S} s:\n{tail}")
        time.sleep(0.3)


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """One server for the modules that do not change its model."""
    with serve(tmp_path_factory.mktemp("server")) as running:
        yield running
