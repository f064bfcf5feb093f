# SPDX-License-Identifier: Apache-2.0
"""The series' own text says what ``prometheus_client`` would have, on vLLM's own route."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_mixprec.experts.exposition import CounterFamily, published_text, unregister_metrics
from vllm_mixprec.patches import metrics_route

NAME = "mixprec_test_activations"
LABELS = ("model_name", "engine", "expert")
ODD = 'a "quoted"\\ name,\nof {two} lines é'


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


def make_family(*registry: CollectorRegistry) -> CounterFamily:
    family = CounterFamily(NAME, "About: tokens.", LABELS, *registry)
    family.begin()
    for model in ("m", ODD):
        for expert in range(3):
            family.series(model, 0, expert).inc(expert * 10**12)
    family.publish()
    return family


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
    assert samples(family.text().decode()) == samples(generate_latest(registry).decode())
    assert b"# TYPE mixprec_test_activations_total counter\n" in family.text()


def test_a_scrape_has_every_series_once(server):
    family = make_family()
    patched, stock = samples(server()), samples(server(metrics_route._STOCK))
    assert patched == stock
    assert [patched[sample] for sample in patched if "mixprec_test" in sample[0]] == [1] * 6
    assert server().endswith(family.text().decode())


def test_what_vllm_exports_is_still_there(server):
    make_family()
    before = Gauge("stock_gauge", "Of vLLM's.", registry=REGISTRY)
    try:
        assert "\nstock_gauge 0.0\n" in server()
    finally:
        REGISTRY.unregister(before)


def test_a_scraper_that_could_take_it_compressed_gets_it_whole(server):
    family = make_family()
    assert server(**{"accept-encoding": "gzip"}).endswith(family.text().decode())


def test_a_scrape_formats_no_series(server, monkeypatch):
    family = make_family()
    monkeypatch.setattr(family._counter, "collect", None)
    published = family.text()
    assert server().endswith(published.decode())
    assert family.text() is published


def test_a_scrape_between_two_writes_sees_neither(server):
    family = make_family()
    before = server()
    family.begin()
    family.series("m", 0, 1).inc(5)
    assert samples(server()) == samples(before)
    family.publish()
    assert samples(server()) != samples(before)


def test_a_series_that_ended_is_gone(server):
    family = make_family()
    family.remove("m", 0, 2)
    family.publish()
    assert 'expert="2",model_name="m"' not in server()
    family.series("m", 0, 2).inc(7)
    family.publish()
    assert 'expert="2",model_name="m"} 7\n' in server()


def test_several_processes_export_through_files(monkeypatch, tmp_path):
    make_family()
    assert published_text()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert not published_text()


def test_without_series_the_answer_is_vllms(server):
    assert samples(server()) == samples(server(metrics_route._STOCK))


def test_other_routes_are_left_alone():
    make_family()
    app = FastAPI()
    metrics_route._attach_router(app)
    client = TestClient(app)
    assert client.get("/nowhere").status_code == 404
    # vLLM answers these from a second route of its own.
    for answer in (client.post("/metrics"), client.get("/metrics/")):
        found = samples(answer.text)
        assert [found[sample] for sample in found if "mixprec_test" in sample[0]] == [1] * 6
