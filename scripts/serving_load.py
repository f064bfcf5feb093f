# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` under clients that stream, scrape, or never read; for the benchmarks."""

import asyncio
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthetic import Shape

MAX_MODEL_LEN = 1024
PROMPT = 16
_KV_BYTES = 1 << 30
_READY_S = 120.0
_VARIABLE = "VLLM_MIXPREC_EXPERT_METRICS"
_PLUGINS = "mixprec,mixprec_metrics,mixprec_endpoints"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Server:
    """One ``vllm serve``."""

    port: int
    process: subprocess.Popen

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def serve(
    model: Path, log: Path, *, counters: bool, arguments: Sequence[str] = ()
) -> Iterator[Server]:
    """Start a server, wait until it answers, and stop it in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "VLLM_PLUGINS": _PLUGINS if counters else "mixprec",
        _VARIABLE: "auto" if counters else "off",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "model": str(model),
        "served-model-name": "bench",
        "port": str(port),
        "host": "127.0.0.1",
        "max-model-len": str(MAX_MODEL_LEN),
        "max-num-seqs": "64",
        "kv-cache-memory-bytes": str(_KV_BYTES),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--skip-tokenizer-init"]
    for name, value in options.items():
        command += [f"--{name}", value]
    begun = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Server(port, process)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}; see {log}")
            try:
                urllib.request.urlopen(server.url("/health"), timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        say(f"{log.stem}: started in {time.perf_counter() - begun:.0f} s")
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Gaps:
    """What streaming clients see.

    Attributes:
        times: monotonic clock, when each token but a request's first came.
        seconds: since the token before it.
    """

    times: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def stream(server: Server, clients: int, seen: Gaps, until: float, seed: int) -> None:
    """Have clients stream completions, one after the other, until a moment of the clock."""
    import aiohttp

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        generator = random.Random(f"client {seed} {number}")
        while time.monotonic() < until:
            body = {
                "model": "bench",
                "prompt": [generator.randrange(Shape().vocab) for _ in range(PROMPT)],
                "max_tokens": MAX_MODEL_LEN - PROMPT - 1,
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": True,
                "detokenize": False,
                "return_token_ids": True,
            }
            last = None
            async with session.post(server.url("/v1/completions"), json=body) as answer:
                if answer.status != 200:
                    raise SystemExit(f"/v1/completions: {answer.status}: {await answer.text()}")
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.monotonic()
                    if now > until:  # leaving closes the connection, which aborts the request
                        return
                    if last is not None:
                        seen.times.append(now)
                        seen.seconds.append(now - last)
                    last = now

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(*(client(session, number) for number in range(clients)))


class Scrapers:
    """A process of scrapers that ask each URL every so often, while they are switched on.

    Attributes:
        on: whether they ask; may be changed at any time.
    """

    def __init__(self, urls: Sequence[str], every_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._on = context.Value("b", 0)
        self._counts = context.Array("q", 3)  # answered, failed, bytes
        ready = context.Event()
        self._process = context.Process(
            target=_scrape, args=(list(urls), every_s, self._on, self._counts, ready), daemon=True
        )
        self._process.start()
        if not ready.wait(_READY_S):
            raise SystemExit(f"the scrapers' process did not begin within {_READY_S:.0f} s")

    @property
    def on(self) -> bool:
        return bool(self._on.value)

    @on.setter
    def on(self, on: bool) -> None:
        self._on.value = on

    def stop(self) -> dict[str, int]:
        """End, and say how many were answered, how many not, and how many bytes came."""
        self._process.terminate()
        self._process.join()  # nothing to a process that has ended
        return dict(zip(("scrapes", "failed", "bytes"), self._counts, strict=True))


def _scrape(urls: list[str], every_s: float, on: Any, counts: Any, ready: Any) -> None:
    async def run() -> None:
        import aiohttp

        ready.set()

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one(url: str, delay_s: float) -> None:
                await asyncio.sleep(delay_s)
                while True:
                    begun = time.monotonic()
                    if on.value:
                        size = 0
                        try:
                            async with session.get(url) as answer:
                                size = len(await answer.read())
                                failed = answer.status != 200
                        except aiohttp.ClientError:
                            failed = True
                        with counts.get_lock():
                            counts[int(failed)] += 1
                            counts[2] += size
                    await asyncio.sleep(max(0.0, every_s - (time.monotonic() - begun)))

            await asyncio.gather(
                *(one(url, every_s * number / len(urls)) for number, url in enumerate(urls))
            )

    asyncio.run(run())


@contextmanager
def serve_bytes(nbytes: int) -> Iterator[int]:
    """A process that answers whatever is asked with so many bytes at once; yields its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_bytes, args=(nbytes, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(_READY_S):
            raise SystemExit(f"the process that answers did not begin within {_READY_S:.0f} s")
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve_bytes(nbytes: int, told: Any) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {nbytes}\r\n\r\n".encode()
    answer = head + bytes(nbytes)

    class Answering(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = transport

        def data_received(self, data: bytes) -> None:
            # Of a client that never reads, not all of its questions in one go.
            if not self._transport.is_closing() and not self._transport.get_write_buffer_size():
                self._transport.write(answer)

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def never_reading(port: int, paths: Sequence[str]) -> Iterator[None]:
    """Hold a connection a path that asks again and again and takes no answer."""
    with ExitStack() as stack:
        for path in paths:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            stack.callback(connection.close)
            request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
            connection.setblocking(False)
            for _ in range(100):
                try:
                    connection.send(request)
                except BlockingIOError:
                    break
        yield
