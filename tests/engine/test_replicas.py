# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --data-parallel-size 2``: two engines that share the experts of a mixed model.

While one engine works alone the other runs idle steps, in which its experts serve the first.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from tests.engine import reference
from tests.engine.conftest import dequantised, prompts
from tests.engine.mixes import ROUNDED_ACTIVATIONS, SOURCES, attention, expert
from tests.serving.conftest import LAYERS, TOP_K, Server, routed, serve

pytestmark = pytest.mark.engine

# Engine -> tokens to generate for each of its requests. The last ones of engine 1 run alone.
REQUESTS = {0: (1, 3), 1: (1, 5, 24)}


def example_plan(name: str) -> str:
    """What examples/demo-plan.yaml says of a tensor."""
    if attention(name):
        return "fp8"
    return "bf16" if expert(name) < 4 else "fp8" if expert(name) < 10 else "int4"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("replicas")
    arguments = ["--data-parallel-size", "2", "--api-server-count", "1"]
    with serve(folder, *arguments, environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server) -> dict[tuple[int, int], dict]:
    """Send all requests at once; (engine, number) -> the completion."""

    def send(engine: int, number: int) -> dict:
        body = {
            "model": "demo",
            "prompt": prompt(engine, number),
            "max_tokens": REQUESTS[engine][number],
            "ignore_eos": True,
            "prompt_logprobs": 0,
        }
        answer = server.ask("/v1/completions", body, engine=engine)
        assert answer.status == 200, answer.body
        return answer.json()

    asked = [
        (engine, number) for engine, tokens in REQUESTS.items() for number in range(len(tokens))
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        return dict(zip(asked, pool.map(lambda key: send(*key), asked), strict=True))


def prompt(engine: int, number: int) -> list[int]:
    """One of four texts, each begun elsewhere, so that no prefix is cached."""
    return prompts("demo")[engine + number][7 * engine :]


def test_each_engine_gives_transformers_log_probs(answers):
    weights = reference.mix(dequantised("demo"), "bf16", example_plan)
    expected = reference.log_probs(
        SOURCES["demo"]["bf16"], weights, [prompt(*key) for key in answers]
    ).split([len(prompt(*key)) - 1 for key in answers])
    for (key, answer), wanted in zip(answers.items(), expected, strict=True):
        (choice,) = answer["choices"]
        found = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]
        difference = (torch.tensor(found) - wanted).abs().mean().item()
        print(f"engine {key[0]}, request {key[1]}: {difference:.4f} nats a token")
        assert difference <= ROUNDED_ACTIVATIONS


def tokens_by_engine(server: Server) -> dict[int, float]:
    """Return mixprec_routed_tokens_total of a scrape."""
    text = server.ask("/metrics").body.decode()
    return {
        int(sample.labels["engine"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "mixprec_routed_tokens_total"
    }


def test_each_engine_counts_its_own_tokens_and_no_idle_step(server, answers):
    expected = dict.fromkeys(REQUESTS, 0)
    for (engine, _), answer in answers.items():
        expected[engine] += routed(answer["usage"])
    assert expected[1] > expected[0] > 0
    stats = server.stats()
    assert stats["summary"]["tokens"] == sum(expected.values())
    assert stats["summary"]["requests"] == len(answers)
    counts = [sum(expert["count"] for expert in layer["detail"]) for layer in stats["layers"]]
    assert counts == [sum(expected.values()) * TOP_K] * LAYERS
    deadline = time.monotonic() + 20  # the exporter polls
    while (found := tokens_by_engine(server)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found == expected
