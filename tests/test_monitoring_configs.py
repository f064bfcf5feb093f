# SPDX-License-Identifier: Apache-2.0
"""The rules and the dashboard fit the metrics; ``promtool`` (Debian: prometheus) reads both.

tests/experts/test_metrics_server.py runs every expression on a real server's metrics.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RULES = ROOT / "configs" / "prometheus" / "rules.yml"
SCRAPE = ROOT / "configs" / "prometheus" / "prometheus.yml"
DASHBOARD = ROOT / "configs" / "grafana" / "expert_activations.json"

METRICS = {
    "mixprec_expert_activations_total": {"model_name", "engine", "layer", "expert"},
    "mixprec_layer_imbalance_ratio": {"model_name", "engine", "layer"},
    "mixprec_routed_tokens_total": {"model_name", "engine"},
    "mixprec_weight_bytes": {"model_name", "source", "format"},
    "mixprec_plan_info": {"model_name", "plan_sha256"},
    "vllm:num_requests_running": {"model_name", "engine"},
}


def promtool(*arguments: object) -> str:
    """Run promtool; return what it says, failing with that if it finds anything wrong."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.fail("promtool is not installed; on Debian: apt-get install prometheus")
    done = subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def dashboard_targets() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (panel's title, query) of every query of the dashboard."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target


def fill_in(expression: str, model_name: str, range_: str = "5m") -> str:
    """Put values where Grafana would put those of its variables."""
    values = {
        "$__rate_interval": "1m",
        "$__range": range_,
        "$model_name": model_name,
        "$engine": ".*",
        "$layer": ".*",
    }
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def used_metrics(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:mixprec_|vllm:|layer:|layer_expert:)[\w:]+", expression))


def used_labels(expression: str) -> set[str]:
    """Return the label names in selectors and in ``by (...)``, ``on (...)``, ``without (...)``."""
    lists = re.findall(r"\b(?:by|on|without|ignoring|group_left)\s*\(([^()]*)\)", expression)
    grouped = {name.strip() for found in lists for name in found.split(",") if name.strip()}
    return grouped | set(re.findall(r"(\w+)\s*=~?\s*\"", expression))


# Rules.


def test_rules_are_valid() -> None:
    assert f"SUCCESS: {len(rules())} rules found" in promtool("check", "rules", RULES)


def test_scrape_example_is_valid_and_loads_the_rules() -> None:
    assert "1 rule files found" in promtool("check", "config", SCRAPE)


def test_rules_compute_and_alert_as_they_say() -> None:
    assert "SUCCESS" in promtool("test", "rules", ROOT / "tests" / "prometheus_rules.yml")


def test_every_alert_and_record_is_unit_tested() -> None:
    tests = yaml.safe_load((ROOT / "tests" / "prometheus_rules.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test.get("alert_rule_test", [])
        if case.get("exp_alerts")
    }
    computed = {case["expr"] for test in tests for case in test.get("promql_expr_test", [])}
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}
    assert computed == {rule["record"] for rule in rules() if "record" in rule}


def test_rules_use_metrics_that_exist() -> None:
    known = METRICS.keys() | {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        assert used_metrics(rule["expr"])
        assert used_metrics(rule["expr"]) <= known, rule
        assert used_labels(rule["expr"]) <= set().union(*METRICS.values()) | {"job", "instance"}


def test_alerts_say_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["for"] and rule["labels"]["severity"] in {"info", "warning", "critical"}
            assert set(rule["annotations"]) == {"summary", "description"}


# Dashboard.


def test_every_query_is_promql(tmp_path: Path) -> None:
    found = [fill_in(target["expr"], "m") for _, target in dashboard_targets()]
    assert len(found) >= 12
    listed = [{"record": f"panel:{number}", "expr": e} for number, e in enumerate(found)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": listed}]}))
    assert f"SUCCESS: {len(found)} rules found" in promtool("check", "rules", file)


def test_queries_use_metrics_and_labels_that_exist() -> None:
    for title, target in dashboard_targets():
        used = used_metrics(target["expr"])
        assert used and used <= METRICS.keys(), title
        labels = set().union(*(METRICS[metric] for metric in used))
        assert used_labels(target["expr"]) <= labels, title
        legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert legend <= labels, title


def test_every_metric_of_ours_is_shown() -> None:
    shown = {metric for _, target in dashboard_targets() for metric in used_metrics(target["expr"])}
    assert shown == METRICS.keys()


def test_variables_are_defined_before_they_are_used() -> None:
    content = dashboard()
    variables = [variable["name"] for variable in content["templating"]["list"]]
    assert variables == ["datasource", "model_name", "engine", "layer"]
    built_in = {"__range", "__rate_interval"}
    for number, variable in enumerate(content["templating"]["list"]):
        used = set(re.findall(r"\$(\w+)", variable.get("definition", "")))
        assert used <= set(variables[:number]), variable["name"]
    for title, target in dashboard_targets():
        # What label_replace calls $1 is none of Grafana's.
        used = set(re.findall(r"\$([a-z_]\w*)", target["expr"]))
        assert used <= {*variables, *built_in}, title
        assert "model_name" in used, title


def test_every_query_asks_the_chosen_data_source() -> None:
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            for asked in (panel, *panel["targets"]):
                assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_have_a_place_of_their_own() -> None:
    taken: dict[tuple[int, int], str] = {}
    content = dashboard()
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])
    for panel in content["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken.get((x, y)))
                taken[x, y] = panel["title"]


def test_dashboard_is_one_that_grafana_10_imports() -> None:
    content = dashboard()
    assert content["schemaVersion"] >= 38
    assert content["uid"] and len(content["uid"]) <= 40
    assert content.get("id") is None, "an id would overwrite another dashboard"
    # Panels and transformations that Grafana 10 has built in.
    assert {panel["type"] for panel in content["panels"]} <= {
        "bargauge",
        "heatmap",
        "row",
        "stat",
        "table",
        "timeseries",
    }
    for panel in content["panels"]:
        assert {step["id"] for step in panel.get("transformations", [])} <= {
            "groupingToMatrix",
            "organize",
            "sortBy",
        }
        refs = [target["refId"] for target in panel.get("targets", [])]
        assert len(refs) == len(set(refs))
