# SPDX-License-Identifier: Apache-2.0
"""The routes without an engine: a FastAPI app over snapshots that a test holds in its hand."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Thread

import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_mixprec.experts.snapshot import ExpertSnapshot
from vllm_mixprec.serving.page import KeyPrompt
from vllm_mixprec.serving.report import encode
from vllm_mixprec.serving.routes import PREFIX, Service, router
from vllm_mixprec.serving.statistics import Statistics
from vllm_mixprec.serving.updates import Reloader


class Counters:
    """What workers would hold: counts that a test raises, and windows that a reset begins."""

    def __init__(self, layers: int = 4, experts: int = 16, top_k: int = 2, engines: int = 1):
        self.top_k = top_k
        self.total = np.zeros((engines, layers, experts), np.int64)
        self.base = self.total.copy()
        self.draft: ExpertSnapshot | None = None
        self.reads = self.resets = 0
        self.began_s = 1_700_000_000.0
        self.seconds = 10.0
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.asked: list[float | None] = []

    def work(self, counts: np.ndarray, engine: int = 0) -> None:
        """Add activations, [layers, experts]."""
        self.total[engine] += counts

    def snapshots(self) -> dict[int, ExpertSnapshot]:
        return {engine: self._snapshot(engine) for engine in range(len(self.total))}

    def _snapshot(self, engine: int) -> ExpertSnapshot:
        counts = self.total[engine] - self.base[engine]
        return ExpertSnapshot(
            model="hand-made",
            layers=tuple(str(layer) for layer in range(counts.shape[0])),
            experts_per_token=self.top_k,
            counts=counts,
            tokens=int(counts[0].sum()) // self.top_k,
            requests=3,
            started_s=self.began_s,
            seconds=self.seconds,
            last_activation_s=np.where(self.total[engine] > 0, self.began_s + 5, np.nan),
            draft=self.draft,
        )

    async def collect(self, minutes: float | None) -> Mapping[int, ExpertSnapshot]:
        self.reads += 1
        self.asked.append(minutes)
        before = self.snapshots()
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return before

    async def reset(self) -> Mapping[int, ExpertSnapshot]:
        self.resets += 1
        if self.error is not None:
            raise self.error
        ended = self.snapshots()
        self.base = self.total.copy()
        return ended


def describe_precisions(layers: int, experts: int) -> dict:
    """A model_info of three formats, in the shape of the real one."""
    thirds = [0, experts // 4, 5 * experts // 8, experts]
    formats = (("bf16", "bf16", 16), ("fp8_block 128x128", "fp8_block", 8))
    formats += (("gptq int4 g128", "gptq", 4),)
    groups = [
        {
            "source": source,
            "stored": label,
            "served": label,
            "format": format,
            "bits": bits,
            "experts": [[first, last - 1]],
        }
        for source, (label, format, bits), first, last in zip(
            ("bf16", "fp8", "int4"), formats, thirds, thirds[1:], strict=False
        )
    ]
    return {
        "model": "hand-made",
        "path": "/models/mixed",
        "architecture": "Qwen3MoeForCausalLM",
        "quantization": "mixprec",
        "dtype": "bfloat16",
        "layout": {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "expert_parallel": False,
        },
        "platform": {"device": "cpu", "kernels": "cpu-avx512", "broken_kernels": {}},
        "versions": {"vllm": "0.32.0", "vllm_mixprec": "0.1.0"},
        "plan": {"path": "/models/mixed/mixprec_plan.yaml", "sha256": "ab" * 32, "base": "bf16"},
        "sources": [
            {"source": name, "path": f"/models/{name}", "revision": None}
            for name in ("bf16", "fp8", "int4")
        ],
        "bytes": [
            {"source": "bf16", "format": "bf16", "bytes": 9_876_543_210},
            {"source": "fp8", "format": "fp8_block", "bytes": 7_654_321_000},
            {"source": "int4", "format": "gptq", "bytes": 4_321_000_000},
        ],
        "widened": [{"reason": "no kernel", "modules": ["a", "b"], "extra_bytes": 1 << 20}],
        "notes": [],
        "expert_layers": [
            {
                "layer": str(layer),
                "name": f"model.layers.{layer}.mlp.experts",
                "draft": False,
                "experts": experts,
                "groups": groups,
            }
            for layer in range(layers)
        ],
    }


def make_app(
    counters: Counters, key: str | None = None, info: dict | None = None, pace_s: float = 0.0
) -> FastAPI:
    """Wire the routes as vLLM's server does: the key's middleware inside, the page's outside."""
    app = FastAPI()
    app.include_router(router)
    app.state.mixprec = Service(
        client=None,  # what these routes need of an engine is in ``counters``
        statistics=Statistics(counters.collect, counters.reset, pace_s),
        reloader=Reloader(None),
        started_at=time.monotonic(),
        model_info=encode(info or describe_precisions(*counters.total.shape[1:])),
    )
    if key is not None:
        app.add_middleware(AuthenticationMiddleware, tokens=[key])
    app.user_middleware.insert(0, Middleware(KeyPrompt, path=f"{PREFIX}/dashboard"))
    return app


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Serve on a free port of this machine; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
