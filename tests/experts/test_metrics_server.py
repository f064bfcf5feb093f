# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus (Debian: prometheus) scrapes a real ``vllm serve``, and both count the same.

The independent count: a request of P prompt tokens that generates G sends P + G - 1 tokens through
the model, for its last token is never fed back.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.harness import compose_plan
from tests.test_monitoring_configs import METRICS, RULES, dashboard_targets, fill_in, rules

pytestmark = pytest.mark.engine

DEMO = Path(__file__).parents[2] / "examples" / "demo-moe"
LAYERS, EXPERTS, EXPERTS_PER_TOKEN = 3, 16, 2
ACTIVATIONS = "mixprec_expert_activations_total"
TOKENS = "mixprec_routed_tokens_total"
PLUGINS = "mixprec,mixprec_metrics,mixprec_endpoints"
START_LIMIT_S = 300
REST_LIMIT_S = 20

Series = dict[frozenset[tuple[str, str]], float]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.loads(answer.read() or b"{}")
        return found


def wait_until(holds: Callable[[], bool], limit_s: float) -> bool:
    """Ask twice a second; say whether it held within ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.5)
    return False


class Process:
    """A server as a process group of its own, its output in a file."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, url: str) -> None:
        def answers() -> bool:
            assert self._process.poll() is None, self.tail()
            try:
                get(url)
            except OSError:
                return False
            return True

        assert wait_until(answers, START_LIMIT_S), self.tail()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # none is left
        self._process.wait()


class Server(Process):
    """``vllm serve`` of a demo model, which keeps its own account of the tokens it was sent."""

    def __init__(
        self, model: Path, folder: Path, *options: str, plugins: str | None = None
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.address = f"127.0.0.1:{port}"
        self.tokens = 0
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        for name in ("VLLM_PLUGINS", "VLLM_MIXPREC_EXPERT_METRICS", "PROMETHEUS_MULTIPROC_DIR"):
            environment.pop(name, None)
        if plugins is not None:
            environment["VLLM_PLUGINS"] = plugins
        command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
        # Cached prefixes are not computed again, which is what the account here would not know.
        command += ["--max-model-len", "512", "--enforce-eager", "--no-enable-prefix-caching"]
        super().__init__(command + list(options), environment, folder / "server.log")

    def send(self, requests: int) -> None:
        """Have ``requests`` different prompts continued, eight at a time."""
        text = (DEMO / "heldout.txt").read_bytes()

        def one(number: int) -> int:
            prompt = list(text[97 * number : 97 * number + 20 + number])
            body = {"model": "demo", "prompt": prompt, "max_tokens": 5 + number % 7}
            answer = post(f"{self.url}/v1/completions", body | {"ignore_eos": True})
            usage = answer["usage"]
            assert usage["prompt_tokens"] == len(prompt)
            assert usage["completion_tokens"] == body["max_tokens"]
            return int(usage["prompt_tokens"] + usage["completion_tokens"] - 1)

        with ThreadPoolExecutor(8) as pool:
            self.tokens += sum(pool.map(one, range(requests)))

    def scrape(self) -> dict[str, Series]:
        """Return metric -> labels -> value of one scrape."""
        found: dict[str, Series] = {}
        for family in text_string_to_metric_families(get(f"{self.url}/metrics")):
            for sample in family.samples:
                found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return found

    def come_to_rest(self) -> dict[str, Series]:
        """Scrape until all tokens that were sent are counted."""
        total = 0.0

        def counted() -> bool:
            nonlocal total
            total = sum(self.scrape().get(TOKENS, {}).values())
            return total >= self.tokens

        assert wait_until(counted, REST_LIMIT_S), (total, self.tokens, self.tail())
        time.sleep(2.5)  # two more polls, that could count too much
        return self.scrape()


def sums_by_layer(series: Series) -> dict[str, float]:
    sums: dict[str, float] = {}
    for labels, value in series.items():
        layer = dict(labels)["layer"]
        sums[layer] = sums.get(layer, 0) + value
    return sums


def assert_exact(found: dict[str, Series], tokens: int) -> None:
    assert found[TOKENS] == {frozenset({("model_name", "demo"), ("engine", "0")}): tokens}
    assert sums_by_layer(found[ACTIVATIONS]) == {
        str(layer): tokens * EXPERTS_PER_TOKEN for layer in range(LAYERS)
    }
    assert len(found[ACTIVATIONS]) == LAYERS * EXPERTS


class Prometheus(Process):
    """A Prometheus that scrapes one server each second and evaluates our rules."""

    def __init__(self, target: str, folder: Path) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            pytest.fail("prometheus is not installed; on Debian: apt-get install prometheus")
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
        }
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [binary, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        super().__init__(command, dict(os.environ), folder / "prometheus.log")

    def ask(self, path: str, **parameters: str) -> dict[str, Any]:
        answer = json.loads(get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        found: dict[str, Any] = answer["data"]
        return found

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        found = self.ask("query", query=expression)
        assert found["resultType"] == "vector"
        return [(sample["metric"], float(sample["value"][1])) for sample in found["result"]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A mixed model, the package installed and nothing else said."""
    folder = tmp_path_factory.mktemp("metrics")
    plan = {
        "version": 1,
        "base": "bf16",
        "sources": {name: {"path": str(DEMO / name)} for name in ("bf16", "fp8", "int4")},
        "rules": [
            {"match": "model.layers.*.self_attn.*_proj", "source": "fp8"},
            {"match": "model.layers.*.mlp.experts.{4-15}", "source": "int4"},
        ],
    }
    started = Server(compose_plan(folder / "mixed", plan), folder)
    try:
        started.wait_for(f"{started.url}/health")
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def scraped(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, from before the first request until after the last."""
    started = Prometheus(server.address, tmp_path_factory.mktemp("prometheus"))
    try:
        started.wait_for(f"{started.url}/-/ready")
        assert wait_until(lambda: started.query(ACTIVATIONS) != [], 30), server.tail()
        server.send(40)
        server.come_to_rest()
        server.send(24)
        server.come_to_rest()
        time.sleep(3)  # the scrape and the evaluation after
        yield started
    finally:
        started.stop()


def test_metrics_are_exact_with_no_flag_and_no_variable(
    server: Server, scraped: Prometheus
) -> None:
    assert server.tokens > 2000
    assert_exact(server.scrape(), server.tokens)


def test_metrics_are_the_documented_ones(server: Server, scraped: Prometheus) -> None:
    found = server.scrape()
    assert {name for name in found if name.startswith("mixprec_")} == {
        name for name in METRICS if name.startswith("mixprec_")
    }
    for name, series in found.items():
        if name in METRICS:
            assert {frozenset(dict(labels)) for labels in series} == {frozenset(METRICS[name])}, (
                name
            )
    text = get(f"{server.url}/metrics")
    assert f"# TYPE {ACTIVATIONS} counter" in text or (
        f"# TYPE {ACTIVATIONS.removesuffix('_total')} counter" in text
    )
    assert "# TYPE mixprec_layer_imbalance_ratio gauge" in text


def test_imbalance_and_plan_make_sense(server: Server, scraped: Prometheus) -> None:
    found = server.scrape()
    ratios = found["mixprec_layer_imbalance_ratio"]
    assert len(ratios) == LAYERS
    assert all(1 <= ratio <= EXPERTS / EXPERTS_PER_TOKEN for ratio in ratios.values())
    weights = {
        dict(k)["source"]: (dict(k)["format"], v) for k, v in found["mixprec_weight_bytes"].items()
    }
    assert {source: stored for source, (stored, _) in weights.items()} == {
        "bf16": "bf16",
        "fp8": "fp8_block",
        "int4": "gptq",
    }
    assert all(size_bytes > 0 for _, size_bytes in weights.values())
    assert list(found["mixprec_plan_info"].values()) == [1.0]


def test_prometheus_counts_what_the_server_counts(server: Server, scraped: Prometheus) -> None:
    sums = {labels["layer"]: v for labels, v in scraped.query(f"sum by (layer) ({ACTIVATIONS})")}
    expected = server.tokens * EXPERTS_PER_TOKEN
    assert sums == {str(layer): expected for layer in range(LAYERS)}
    stored = {
        frozenset((k, v) for k, v in labels.items() if k not in ("__name__", "job", "instance")): n
        for labels, n in scraped.query(ACTIVATIONS)
    }
    assert stored == server.scrape()[ACTIVATIONS]


def test_no_counter_ever_went_down(scraped: Prometheus) -> None:
    resets = scraped.query(f"resets({{__name__=~'{ACTIVATIONS}|{TOKENS}'}}[1h])")
    assert len(resets) == LAYERS * EXPERTS + 1
    assert {value for _, value in resets} == {0.0}
    # Else the scrapes could all have come after the traffic.
    assert scraped.query(f"max(changes({TOKENS}[1h]))")[0][1] >= 2


def test_rules_are_healthy_and_compute(scraped: Prometheus) -> None:
    loaded = [rule for group in scraped.ask("rules")["groups"] for rule in group["rules"]]
    assert len(loaded) == len(rules())
    assert {rule["health"] for rule in loaded} == {"ok"}, loaded
    shares = scraped.query("sum without (expert) (layer_expert:mixprec_expert_activations:share5m)")
    assert [value for _, value in shares] == pytest.approx([1.0] * LAYERS)
    for name in ("layer:mixprec_imbalance:ratio5m", "layer:mixprec_idle_experts:count1h"):
        assert len(scraped.query(name)) == LAYERS, name
    assert not [alert for alert in scraped.ask("alerts")["alerts"] if alert["state"] == "firing"]


def test_every_panel_of_the_dashboard_has_data(server: Server, scraped: Prometheus) -> None:
    for title, target in dashboard_targets():
        found = scraped.query(fill_in(target["expr"], "demo"))
        assert found, (title, target["expr"])
        assert all(value == value for _, value in found), (title, "NaN")


def test_dashboard_matrix_is_in_the_order_of_ids(scraped: Prometheus) -> None:
    (target,) = [t for title, t in dashboard_targets() if title.startswith("Activations, layer")]
    labels = {(m["layer"], m["expert"]) for m, _ in scraped.query(fill_in(target["expr"], "demo"))}
    assert labels == {(f"{layer:03}", f"{e:03}") for layer in range(LAYERS) for e in range(EXPERTS)}


def test_several_api_servers_tell_one_truth(tmp_path: Path) -> None:
    """Of a model without a plan, with a reset of the other views in between."""
    server = Server(DEMO / "bf16", tmp_path, "--api-server-count", "2", plugins=PLUGINS)
    try:
        server.wait_for(f"{server.url}/health")
        before: Series = {}

        def scrape_on() -> None:
            """Either API server may answer: none may tell less than another told before."""
            nonlocal before
            found = server.scrape().get(ACTIVATIONS, {})
            assert all(found.get(labels, -1) >= value for labels, value in before.items())
            before = found

        with ThreadPoolExecutor(1) as pool:
            for _ in range(2):
                sent = pool.submit(server.send, 40)
                while not sent.done():
                    scrape_on()
                    time.sleep(0.1)
                sent.result()
                assert_exact(server.come_to_rest(), server.tokens)
                post(f"{server.url}/v1/mixprec/reset_expert_stats", {})
        for _ in range(20):
            scrape_on()
            assert_exact(server.scrape(), server.tokens)
        assert "mixprec_plan_info" not in server.scrape()
    finally:
        server.stop()


def test_disabled_statistics_stay_disabled(tmp_path: Path) -> None:
    server = Server(DEMO / "bf16", tmp_path, "--disable-log-stats")
    try:
        server.wait_for(f"{server.url}/health")
        server.send(2)
        time.sleep(3)
        found = server.scrape()
        # vLLM's own would come back with ours, if ours turned statistics on.
        assert [name for name in found if name.startswith(("mixprec_", "vllm:"))] == []
    finally:
        server.stop()
