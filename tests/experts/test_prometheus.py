# SPDX-License-Identifier: Apache-2.0
"""Snapshots become series: exact, monotone, in one process or several; no engine is started."""

import asyncio
import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_mixprec import Plan, compose
from vllm_mixprec.errors import StatsUnavailableError
from vllm_mixprec.experts import prometheus
from vllm_mixprec.experts.prometheus import (
    ExpertPoller,
    ExpertStatLogger,
    export_plan,
    unregister_metrics,
)
from vllm_mixprec.experts.series import ExpertSeries
from vllm_mixprec.experts.snapshot import ExpertSnapshot

ROOT = Path(__file__).parents[2]
RANDOM = ROOT / "tests" / "fixtures" / "random-moe"
ACTIVATIONS = "mixprec_expert_activations_total"
IMBALANCE = "mixprec_layer_imbalance_ratio"
TOKENS = "mixprec_routed_tokens_total"

Samples = dict[str, dict[tuple[str, ...], float]]


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    """What the package logs; whether vLLM's loggers propagate depends on what ran before."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("vllm.mixprec")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.setLevel(level)
    logger.removeHandler(handler)


def snapshot(
    counts: object, layers: tuple[str, ...] = (), draft: ExpertSnapshot | None = None
) -> ExpertSnapshot:
    array = np.array(counts, np.int64)
    return ExpertSnapshot(
        model="m",
        layers=layers or tuple(str(row) for row in range(len(array))),
        experts_per_token=2,
        counts=array,
        tokens=int(array[0].sum()) // 2,
        requests=0,
        started_s=1.0,
        seconds=1.0,
        last_activation_s=None,
        draft=draft,
    )


def parse(text: str) -> Samples:
    """Return metric -> label values, by label name and without the model's -> value."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(
                value for key, value in sorted(sample.labels.items()) if key != "model_name"
            )
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def scrape(registry: CollectorRegistry) -> Samples:
    return parse(generate_latest(registry).decode())


class Exported:
    """A series writer with a registry of its own."""

    def __init__(self, full: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.series = ExpertSeries("m", full, self.registry)

    def update(self, *engines: ExpertSnapshot) -> Samples:
        self.grew = self.series.update(dict(enumerate(engines)))
        return scrape(self.registry)


# Counts.


def test_every_expert_is_a_series_from_the_start() -> None:
    found = Exported().update(snapshot([[0, 0], [0, 0]]))
    assert found == {
        ACTIVATIONS: {("0", layer, expert): 0.0 for layer in "01" for expert in "01"},
        TOKENS: {("0",): 0.0},
    }


def test_series_follow_the_counts_exactly() -> None:
    exported = Exported()
    exported.update(snapshot([[1, 3, 0], [2, 0, 2]]))
    counts = np.array([[10, 3, 1], [7, 0, 7]])
    found = exported.update(snapshot(counts))
    assert found[ACTIVATIONS] == {
        ("0", str(expert), str(row)): counts[row, expert] for row in range(2) for expert in range(3)
    }
    assert found[TOKENS] == {("0",): 7.0}
    assert exported.grew


def test_nothing_new_is_said_to_be_nothing_new() -> None:
    exported = Exported()
    first = exported.update(snapshot([[1, 3]]))
    assert exported.grew
    assert exported.update(snapshot([[1, 3]])) == first
    assert not exported.grew


def test_model_name_is_a_label() -> None:
    exported = Exported()
    exported.update(snapshot([[2, 0]]))
    text = generate_latest(exported.registry).decode()
    assert f'{ACTIVATIONS}{{engine="0",expert="0",layer="0",model_name="m"}} 2.0' in text


def test_an_engine_of_other_layers_takes_the_place_of_its_series() -> None:
    exported = Exported()
    exported.update(snapshot([[2, 0], [1, 1]]))
    found = exported.update(snapshot([[4, 0]], layers=("9",)))
    assert found[ACTIVATIONS] == {("0", "0", "9"): 4.0, ("0", "1", "9"): 0.0}


def test_engines_have_their_label() -> None:
    found = Exported().update(snapshot([[2, 0]]), snapshot([[1, 5]]))
    assert found[ACTIVATIONS] == {
        ("0", "0", "0"): 2.0,
        ("0", "1", "0"): 0.0,
        ("1", "0", "0"): 1.0,
        ("1", "1", "0"): 5.0,
    }
    assert found[TOKENS] == {("0",): 1.0, ("1",): 3.0}


def test_draft_layers_are_series_and_its_tokens_are_not_the_models() -> None:
    draft = snapshot([[4, 2]], layers=("draft.0",))
    found = Exported().update(snapshot([[1, 1]], draft=draft))
    assert found[ACTIVATIONS]["0", "0", "draft.0"] == 4.0
    assert found[ACTIVATIONS]["0", "0", "0"] == 1.0
    assert found[TOKENS] == {("0",): 1.0}


def test_no_counter_goes_down_when_an_engine_starts_again() -> None:
    exported = Exported()
    exported.update(snapshot([[6, 4]]))
    found = exported.update(snapshot([[1, 3]]))
    assert found[ACTIVATIONS] == {("0", "0", "0"): 7.0, ("0", "1", "0"): 7.0}
    assert found[TOKENS] == {("0",): 7.0}
    assert exported.update(snapshot([[2, 4]]))[ACTIVATIONS]["0", "0", "0"] == 8.0


def test_imbalance_is_that_of_the_last_interval_with_work() -> None:
    exported = Exported()
    exported.update(snapshot([[4, 0, 0, 0], [1, 1, 1, 1]]))
    found = exported.update(snapshot([[4, 2, 2, 0], [1, 1, 1, 1]]))
    assert found[IMBALANCE] == {("0", "0"): 2.0, ("0", "1"): 1.0}


# Many experts.


def ramp(layers: int, experts: int) -> np.ndarray:
    """Counts that fall with the expert's id."""
    return np.tile(np.arange(experts, 0, -1) * 2, (layers, 1))


def test_ten_thousand_series_are_exported_and_more_are_not(
    said: list[logging.LogRecord],
) -> None:
    assert len(Exported().update(snapshot(ramp(50, 200)))[ACTIVATIONS]) == 10_000
    exported = Exported()
    found = exported.update(snapshot(ramp(51, 200)))
    exported.update(snapshot(ramp(51, 200)))
    assert len(found[ACTIVATIONS]) == 51 * 16
    assert {labels[1] for labels in found[ACTIVATIONS]} == {str(expert) for expert in range(16)}
    assert len(said) == 1
    assert "VLLM_MIXPREC_EXPERT_METRICS=full" in said[0].getMessage()


def test_series_of_all_engines_and_drafts_count_towards_the_limit() -> None:
    draft = snapshot(ramp(1, 200), layers=("draft.0",))
    engines = [snapshot(ramp(25, 200), draft=draft), snapshot(ramp(25, 200))]
    assert len(Exported().update(*engines)[ACTIVATIONS]) == 51 * 16


def test_full_exports_all() -> None:
    found = Exported(full=True).update(snapshot(ramp(51, 200)))
    assert len(found[ACTIVATIONS]) == 51 * 200


def test_an_overtaken_series_goes_and_comes_back_at_its_true_count() -> None:
    exported = Exported()
    counts = ramp(51, 200)
    before = exported.update(snapshot(counts))[ACTIVATIONS]
    assert before["0", "15", "0"] == 370.0
    counts[:, 16] += 10
    found = exported.update(snapshot(counts))[ACTIVATIONS]
    assert len(found) == 51 * 16
    assert ("0", "15", "0") not in found
    assert found["0", "16", "0"] == 378.0
    counts[:, 15] += 20
    found = exported.update(snapshot(counts))[ACTIVATIONS]
    assert found["0", "15", "0"] == 390.0
    assert ("0", "16", "0") in found and ("0", "14", "0") not in found


def test_idle_experts_are_not_among_the_busiest() -> None:
    counts = np.zeros((51, 200), np.int64)
    counts[:, 7] = 2
    assert set(Exported().update(snapshot(counts))[ACTIVATIONS]) == {
        ("0", "7", str(layer)) for layer in range(51)
    }


# Several API servers.

PROCESS = """
    import asyncio, json, sys
    import numpy as np
    from vllm_mixprec.experts.exposition import share_text
    from vllm_mixprec.experts.series import ExpertSeries
    from tests.experts.test_prometheus import snapshot
    series = ExpertSeries("m", False)
    for counts in json.loads(sys.stdin.read()):
        series.update({0: snapshot(counts)})
        asyncio.run(share_text())
"""
READER = """
    import asyncio
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    from vllm_mixprec.experts.exposition import PublishedText
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    print((generate_latest(registry) + asyncio.run(PublishedText().read())).decode())
"""


def run_python(code: str, folder: Path, given: str = "") -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=given,
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout


def test_another_process_reads_the_series_of_the_exporting_one(tmp_path: Path) -> None:
    many = ramp(51, 200)
    overtaken = many.copy()
    overtaken[:, 16] += 10
    overtaken[:, 15] += 2
    polls = [many.tolist(), overtaken.tolist()]
    run_python(PROCESS, tmp_path, json.dumps(polls))
    found = parse(run_python(READER, tmp_path))
    counted = {labels[1]: value for labels, value in found[ACTIVATIONS].items() if labels[2] == "3"}
    # An overtaken series ends there as it does in one process.
    assert counted == {str(e): float(overtaken[3, e]) for e in (*range(15), 16)}
    assert found[TOKENS] == {("0",): overtaken[0].sum() // 2}
    assert found[IMBALANCE]["0", "3"] == pytest.approx(10 * 200 / 12)


# The logger that vLLM builds.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = {
        "version": 1,
        "base": "bf16",
        "sources": {name: {"path": str(RANDOM / name)} for name in ("bf16", "fp8", "gptq")},
        "rules": [
            {"match": "model.layers.*.self_attn.*_proj", "source": "fp8"},
            {"match": "model.layers.*.mlp.experts.{0-3}", "source": "gptq"},
        ],
    }
    folder = tmp_path_factory.mktemp("metrics") / "mixed"
    compose(Plan.from_dict(plan), folder)
    return folder


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    yield
    unregister_metrics()


def make_config(model: Path, **options: object):
    arguments = AsyncEngineArgs(
        model=str(model), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, **options
    )
    return arguments.create_engine_config()


def test_plan_and_bytes_are_exported(mixed: Path) -> None:
    registry = CollectorRegistry()
    export_plan(make_config(mixed), registry)
    found = scrape(registry)
    (plan,) = mixed.glob("*.yaml")
    digest = hashlib.sha256(plan.read_bytes()).hexdigest()
    assert found["mixprec_plan_info"] == {(digest,): 1.0}
    weights = found["mixprec_weight_bytes"]
    assert {(source, stored) for stored, source in weights} == {
        ("bf16", "bf16"),
        ("fp8", "fp8_block"),
        ("gptq", "gptq"),
    }
    # Half of the eight experts' weights in 4 bits, with scales, against the same in 16.
    assert 0 < weights["gptq", "gptq"] < weights["bf16", "bf16"] / 2


def test_a_model_without_a_plan_has_none() -> None:
    registry = CollectorRegistry()
    export_plan(make_config(RANDOM / "bf16"), registry)
    assert scrape(registry) == {}


@pytest.mark.parametrize(
    ("value", "rank", "exports"),
    [(None, 0, True), ("full", 0, True), (None, 1, False), ("full", 1, False), ("off", 0, False)],
)
def test_one_process_exports_unless_told_not_to(
    value: str | None, rank: int, exports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("VLLM_MIXPREC_EXPERT_METRICS", value)
    config = make_config(RANDOM / "bf16")
    config.parallel_config._api_process_count = 2
    config.parallel_config._api_process_rank = rank
    assert ExpertStatLogger(config, [0])._exports is exports


def test_another_value_is_told_with_the_accepted_ones(
    monkeypatch: pytest.MonkeyPatch, said: list[logging.LogRecord]
) -> None:
    config = make_config(RANDOM / "bf16")
    monkeypatch.setenv("VLLM_MIXPREC_EXPERT_METRICS", "some")
    assert not ExpertStatLogger(config, [0])._exports
    assert [record.levelname for record in said] == ["ERROR"]
    assert "VLLM_MIXPREC_EXPERT_METRICS=some" in said[0].getMessage()
    assert "auto, full or off" in said[0].getMessage()


def test_a_later_engine_takes_the_place_of_an_earlier_one() -> None:
    registry = CollectorRegistry()
    ExpertSeries("m", False, registry).update({0: snapshot([[2, 0]])})
    ExpertSeries("m", False, registry).update({0: snapshot([[0, 2, 4]])})
    assert scrape(registry)[ACTIVATIONS] == {
        ("0", "0", "0"): 0.0,
        ("0", "1", "0"): 2.0,
        ("0", "2", "0"): 4.0,
    }


# Polling.


class Engine:
    """Answers polls from a list; an error in it is raised, and at its end the engine is dead."""

    def __init__(self, *answers: ExpertSnapshot | Exception) -> None:
        self._answers = list(answers)
        self.polls = 0

    async def read(self) -> dict[int, ExpertSnapshot]:
        self.polls += 1
        if not self._answers:
            raise EngineDeadError
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {0: answer}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "POLL_S", 0.01)
    monkeypatch.setattr(prometheus, "MAX_BACKOFF_S", 0.05)


def run_poller(engine: Engine, **options: bool) -> Samples:
    registry = CollectorRegistry()
    asyncio.run(ExpertPoller("m", False, registry=registry, **options).run(engine.read))
    return scrape(registry)


def test_polling_outlives_errors_and_says_so_once(
    quick: None, said: list[logging.LogRecord]
) -> None:
    late = TimeoutError("the engine did not answer within 10 s")
    engine = Engine(snapshot([[2, 0]]), late, late, late, snapshot([[4, 2]]), snapshot([[4, 4]]))
    found = run_poller(engine)
    assert found[ACTIVATIONS] == {("0", "0", "0"): 4.0, ("0", "1", "0"): 4.0}
    assert [record.levelname for record in said] == ["WARNING", "INFO"]
    assert "did not answer within 10 s" in said[0].getMessage()
    assert "up to date again" in said[1].getMessage()


def test_an_engine_that_counts_nothing_is_asked_once_and_has_no_metrics(
    quick: None, said: list[logging.LogRecord]
) -> None:
    engine = Engine(StatsUnavailableError("no layer counts"))
    assert run_poller(engine) == {}
    assert engine.polls == 1
    assert "no layer counts" in said[0].getMessage()


def test_an_idle_engine_is_asked_ten_times_less(quick: None) -> None:
    """Eight polls of an engine that works take eight waits, of an idle one seventy more."""

    def seconds(*answers: ExpertSnapshot) -> float:
        async def timed() -> float:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            await ExpertPoller("m", False, registry=CollectorRegistry()).run(Engine(*answers).read)
            return loop.time() - begun

        return asyncio.run(timed())

    busy = seconds(*[snapshot([[2 * poll, 0]]) for poll in range(1, 9)])
    idle = seconds(*[snapshot([[0, 0]]) for _ in range(8)])
    assert idle > 0.7 > busy


def test_work_wakes_an_idle_poller(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "IDLE_POLLS", 100_000)
    registry = CollectorRegistry()
    poller = ExpertPoller("m", False, registry=registry)

    async def scenario() -> None:
        engine = Engine(snapshot([[0, 0]]), snapshot([[2, 0]]))
        task = asyncio.create_task(poller.run(engine.read))
        await asyncio.sleep(0.05)
        assert engine.polls == 1
        poller.worked = True
        await asyncio.wait_for(task, 5)

    asyncio.run(scenario())
    assert scrape(registry)[ACTIVATIONS]["0", "0", "0"] == 2.0


def test_one_of_several_api_servers_polls_whether_it_sees_work_or_not(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "IDLE_POLLS", 100_000)
    engine = Engine(snapshot([[0, 0]]), snapshot([[0, 0]]), snapshot([[2, 0]]))
    found = run_poller(engine, sees_all_work=False)
    assert found[ACTIVATIONS]["0", "0", "0"] == 2.0
