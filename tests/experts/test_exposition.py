# SPDX-License-Identifier: Apache-2.0
"""The series' own text says what ``prometheus_client`` would have, on vLLM's own route."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_mixprec.experts.exposition import (
    SLICE_SERIES,
    CounterFamily,
    PublishedText,
    share_text,
    unregister_metrics,
)
from vllm_mixprec.experts.scrapes import SENT_BYTES
from vllm_mixprec.patches import metrics_route

NAME = "mixprec_test_activations"
LABELS = ("model_name", "engine", "expert")
ODD = 'a "quoted"\\ name, 100 %d,\nof {two} lines é'


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    unregister_metrics()
    yield
    unregister_metrics()


def samples(text: str) -> Counter:
    """Return how often each sample, with its labels and value, is in a text.

    Less what moves by itself, as the process's seconds.
    """
    return Counter(
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.startswith(("process_", "python_"))
    )


def put(family: CounterFamily, model: str, **values: int) -> None:
    """Say what experts of one model stand at: ``e1=5``."""
    ids = [int(name[1:]) for name in values]
    family.set((model, "0"), ids, np.array(list(values.values()), np.int64))


def make_family(*registry: CollectorRegistry) -> CounterFamily:
    family = CounterFamily(NAME, "About: tokens.", LABELS, *registry)
    for model in ("m", ODD):
        put(family, model, e0=0, e1=10**12, e2=2 * 10**12)
    family.publish()
    return family


def text_of(family: CounterFamily) -> str:
    return asyncio.run(family.text()).decode()


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """Scrape vLLM's own route, patched or not; checks what HTTP says of the answer."""

    def scrape(attach=metrics_route._attach_router, **headers: str) -> str:
        app = FastAPI()
        attach(app)
        answer = TestClient(app).get("/metrics", headers=headers)
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert answer.headers["content-type"].startswith("text/plain; version=")
        return answer.text

    return scrape


def test_text_is_what_the_client_library_formats():
    registry = CollectorRegistry()
    family = make_family(registry)
    assert samples(text_of(family)) == samples(generate_latest(registry).decode())
    assert "# TYPE mixprec_test_activations_total counter\n" in text_of(family)


def test_a_scrape_has_every_series_once(server):
    family = make_family()
    patched, stock = samples(server()), samples(server(metrics_route._STOCK))
    assert patched == stock
    assert [patched[sample] for sample in patched if "mixprec_test" in sample[0]] == [1] * 6
    assert server().endswith(text_of(family))


def test_what_vllm_exports_is_still_there(server):
    make_family()
    before = Gauge("stock_gauge", "Of vLLM's.", registry=REGISTRY)
    try:
        assert "\nstock_gauge 0.0\n" in server()
    finally:
        REGISTRY.unregister(before)


@pytest.mark.parametrize(
    "header", [{"accept-encoding": "gzip"}, {"accept": "application/openmetrics-text"}]
)
def test_a_scraper_that_could_take_it_otherwise_gets_it_whole(server, header):
    family = make_family()
    assert server(**header).endswith(text_of(family))


def test_a_text_of_several_parts_arrives_whole(server):
    family = CounterFamily(NAME, "Many.", LABELS)
    family.set(("m", "0"), range(4000), np.arange(4000))
    family.publish()
    assert len(text_of(family)) > 2 * SENT_BYTES
    assert server().endswith(text_of(family))


def test_a_scrape_formats_only_what_changed(server):
    family = make_family()
    server()
    before = family._edition.lines
    assert server() and family._edition.lines is before, "a second scrape wrote anew"
    put(family, "m", e0=0, e1=7, e2=0)
    family.publish()
    after = family._edition.lines
    assert after[ODD, "0"] is before[ODD, "0"]
    assert after["m", "0"].form is before["m", "0"].form
    assert 'expert="1",model_name="m"} 7\n' in server()


def test_formatting_lets_the_event_loop_turn():
    """A token that arrives meanwhile waits for one slice, not for all series."""
    family = CounterFamily(NAME, "Many.", LABELS)
    for model in range(40):
        family.set((str(model), "0"), range(256), np.arange(256))
    family.publish()

    async def turns() -> int:
        count = 0
        task = asyncio.create_task(family.text())
        while not task.done():
            await asyncio.sleep(0)
            count += 1
        return count

    assert asyncio.run(turns()) >= 40 * 256 // SLICE_SERIES - 1


def test_a_text_under_way_is_of_one_poll():
    """While a slow scraper's text is written, the next poll comes."""
    family = CounterFamily(NAME, "Many.", LABELS)

    def publish(value: int) -> None:
        for model in range(40):
            family.set((str(model), "0"), range(256), np.full(256, value))
        family.publish()

    async def scrape_while_polled() -> set[str]:
        publish(1)
        task = asyncio.create_task(family.text())
        await asyncio.sleep(0)
        publish(2)
        text = (await task).decode()
        return {line.rpartition(" ")[2] for line in text.splitlines() if line[0] != "#"}

    assert asyncio.run(scrape_while_polled()) == {"1"}
    assert "} 2\n" in text_of(family) and "} 1\n" not in text_of(family)


def test_a_scrape_between_two_writes_sees_neither(server):
    family = make_family()
    before = server()
    put(family, "m", e0=0, e1=5, e2=0)
    assert samples(server()) == samples(before)
    family.publish()
    assert samples(server()) != samples(before)


def test_a_series_that_ended_is_gone(server):
    family = make_family()
    put(family, "m", e0=0, e1=1)
    family.publish()
    assert 'expert="2",model_name="m"' not in server()
    put(family, "m", e0=0, e1=1, e2=7)
    family.publish()
    assert 'expert="2",model_name="m"} 7\n' in server()
    family.end(("m", "0"))
    family.publish()
    assert 'model_name="m"' not in server()


def test_one_of_several_processes_exports_for_all(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    published = PublishedText()
    assert asyncio.run(published.read()) == b""
    family = make_family()
    assert asyncio.run(published.read()) == b"", "it was not shared so far"
    for value in (5, 6):
        put(family, "m", e0=value)
        family.publish()
        asyncio.run(share_text())
        assert asyncio.run(published.read()).decode() == text_of(family)
    unregister_metrics()
    assert asyncio.run(published.read()) == b""


def test_without_series_the_answer_is_vllms(server):
    assert samples(server()) == samples(server(metrics_route._STOCK))


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
def test_one_scrapers_negotiation_is_not_anothers(path):
    """Without series, too: vLLM's second route would compress for one who takes it."""
    app = FastAPI()
    metrics_route._attach_router(app)

    async def scrape_together() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = ({"accept-encoding": "gzip"}, {"accept-encoding": "identity"})
            return await asyncio.gather(*(client.get(path, headers=each) for each in headers))

    for answer in asyncio.run(scrape_together()):
        assert "content-encoding" not in answer.headers
        assert "# TYPE python_info gauge\n" in answer.text


def test_other_routes_are_left_alone():
    make_family()
    app = FastAPI()
    metrics_route._attach_router(app)
    client = TestClient(app)
    assert client.get("/nowhere").status_code == 404
    # vLLM answers these from a second route of its own.
    openmetrics = {"accept": "application/openmetrics-text; version=1.0.0"}
    for answer in (
        client.post("/metrics"),
        client.get("/metrics/", headers=openmetrics),
        client.get("/metrics?format=prometheus"),
        client.get("/metrics/?name[]=mixprec_test_activations_total"),
    ):
        found = samples(answer.text)
        assert [found[sample] for sample in found if "mixprec_test" in sample[0]] == [1] * 6
