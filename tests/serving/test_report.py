# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from tests.engine.mixes import ROOT
from tests.serving.app import Counters
from vllm_mixprec import Plan
from vllm_mixprec.experts.snapshot import ExpertSnapshot
from vllm_mixprec.routing import Layout, Platform, load_route_table
from vllm_mixprec.serving.model_info import describe_table
from vllm_mixprec.serving.report import describe_stats, encode, merge_engines, name_export


def report(counters: Counters, detail="full", top_k=3) -> dict:
    described = describe_stats(counters.snapshots(), top_k=top_k, detail=detail, uptime_s=12.5)
    return json.loads(encode(described))


@pytest.fixture
def counters() -> Counters:
    """One busy expert in layer 0, all alike in layer 1; 40 tokens, top-2."""
    counters = Counters(layers=2, experts=4)
    counters.work(np.array([[50, 30, 0, 0], [20, 20, 20, 20]]))
    return counters


def test_summary_counts_what_the_layers_sum_to(counters):
    summary = report(counters)["summary"]
    window = summary.pop("window")
    assert summary == {
        "activations": 160,
        "tokens": 40,
        "requests": 3,
        "layers": 2,
        "experts": 4,
        "experts_per_token": 2,
        "uptime_s": 12.5,
        "activations_per_s": 16.0,
        "tokens_per_s": 4.0,
    }
    assert window == {"since": "2023-11-14T22:13:20Z", "seconds": 10.0}


def test_layers_carry_their_balance_and_each_expert(counters):
    uneven, even = report(counters)["layers"]
    assert (uneven["busiest_expert"], uneven["busiest_over_mean"]) == (0, 2.5)
    assert (uneven["active_experts"], uneven["total"], uneven["rate_per_s"]) == (2, 80, 8.0)
    assert uneven["jain_fairness"] == pytest.approx(80**2 / (4 * (50**2 + 30**2)), abs=1e-6)
    assert (even["jain_fairness"], even["busiest_over_mean"]) == (1.0, 1.0)
    assert uneven["detail"][1] == {
        "expert": 1,
        "count": 30,
        "share": 0.375,
        "last_activation": "2023-11-14T22:13:25Z",
    }
    assert uneven["detail"][2]["last_activation"] is None


def test_compact_detail_is_the_same_numbers(counters):
    (layer, _) = report(counters, detail="counts")["layers"]
    assert layer["counts"] == [50, 30, 0, 0]
    assert layer["last_activation_s"] == [1_700_000_005, 1_700_000_005, None, None]
    (layer, _) = report(counters, detail="none")["layers"]
    assert "counts" not in layer and "detail" not in layer


def test_busiest_and_idlest_are_bounded_by_top_k(counters):
    described = report(counters, top_k=2)
    assert [(one["layer"], one["expert"], one["count"]) for one in described["busiest"]] == [
        ("0", 0, 50),
        ("0", 1, 30),
    ]
    assert [one["expert"] for one in described["idlest"]] == [2, 3]
    assert len(report(counters, top_k=1000)["busiest"]) == 8


def test_a_window_without_activations_has_null_ratios():
    described = report(Counters(layers=1, experts=4))
    (layer,) = described["layers"]
    assert layer["jain_fairness"] is None
    assert layer["busiest_over_mean"] is None
    assert layer["busiest_expert"] is None
    assert described["summary"]["tokens_per_s"] == 0


def test_data_parallel_engines_are_added_and_listed():
    counters = Counters(layers=1, experts=4, engines=2)
    counters.work(np.array([[4, 0, 0, 0]]), engine=0)
    counters.work(np.array([[0, 0, 2, 4]]), engine=1)
    described = report(counters)
    assert [one["count"] for one in described["layers"][0]["detail"]] == [4, 0, 2, 4]
    assert [(one["engine"], one["tokens"]) for one in described["engines"]] == [(0, 2), (1, 3)]
    assert described["summary"]["tokens"] == 5


def test_draft_layers_stand_apart(counters):
    counters.draft = ExpertSnapshot(
        "hand-made", ("draft.0",), 2, np.array([[6, 0, 0, 4]]), 5, 0, 1.7e9, 10.0
    )
    described = report(counters)
    assert described["summary"]["activations"] == 160
    assert described["draft"]["summary"]["tokens"] == 5
    assert described["draft"]["layers"][0]["detail"][3]["count"] == 4
    assert described["draft"]["busiest"][0]["layer"] == "draft.0"
    assert report(Counters())["draft"] is None


def test_counts_beyond_double_precision_stay_exact():
    counters = Counters(layers=1, experts=2, top_k=1)
    counters.work(np.array([[2**53 + 1, 0]]))
    assert report(counters)["layers"][0]["detail"][0]["count"] == 2**53 + 1
    assert report(counters)["summary"]["tokens"] == 2**53 + 1


def test_encoding_is_plain_json():
    content = {"a": [], "b": {}, "c": [{"x": None}, {"x": [1, "é"]}], "d": [[1], []], "e": 'q"'}
    assert json.loads(encode(content)) == content


def test_encoding_refuses_what_json_has_no_word_for():
    with pytest.raises(ValueError, match="JSON compliant"):
        encode({"rate": float("nan")})


def test_exported_snapshot_is_one_that_loads(counters, tmp_path):
    merged = merge_engines(counters.snapshots())
    file = tmp_path / "s.json"
    file.write_bytes(encode(merged.to_dict()))
    assert ExpertSnapshot.load(file).to_dict() == merged.to_dict()


@pytest.mark.parametrize("model", ["../../etc/x", 'a"; filename="b', "Qwen/Qwen3-30B", "...", "ü"])
def test_file_names_of_exports_are_harmless(model):
    snapshot = ExpertSnapshot(model, ("0",), 1, np.array([[1]]), 1, 0, 1.7e9, 10.0)
    name = name_export(snapshot, "csv")
    assert name.startswith("expert-stats-") and name.endswith("-2023-11-14T221330Z.csv")
    assert not set(name) & set('/\\"; \n') and ".." not in name


@pytest.fixture(scope="module")
def described() -> dict:
    """The demo's plan, as model_info describes it for a CPU with kernels for packed experts."""
    plan = Plan.from_yaml(ROOT / "examples" / "demo-plan.yaml")
    table = load_route_table(plan, layout=Layout(), platform=Platform("cpu-avx512"))
    return json.loads(encode(describe_table(table, {"path": "demo-plan.yaml", "sha256": "00"})))


def test_model_info_names_source_and_format_of_each_expert(described):
    assert [layer["layer"] for layer in described["expert_layers"]] == ["0", "1", "2"]
    for layer in described["expert_layers"]:
        groups = {group["source"]: group for group in layer["groups"]}
        assert {name: group["experts"] for name, group in groups.items()} == {
            "bf16": [[0, 3]],
            "fp8": [[4, 9]],
            "int4": [[10, 15]],
        }
        assert [groups[name]["bits"] for name in ("bf16", "fp8", "int4")] == [16, 8, 4]
        assert groups["int4"]["stored"] == groups["int4"]["served"]
        assert groups["int4"]["served"].startswith("gptq int4")


def test_model_info_has_the_rows_that_inspect_and_the_log_show(described):
    layers, outside = described["layers"]
    assert (layers["layers"], outside["layers"]) == ([0, 1, 2], [])
    kernels = {(part["kind"], part["source"]): part["kernel"] for part in layers["parts"]}
    assert kernels["attention", "fp8"] == "fp8_scaled_mm_cpu"
    assert kernels["routed_experts", "int4"] == "fused_experts_cpu"


def test_model_info_counts_bytes_by_source(described):
    sizes = {(entry["source"], entry["format"]): entry["bytes"] for entry in described["bytes"]}
    assert set(sizes) == {("bf16", "bf16"), ("fp8", "fp8_block"), ("int4", "gptq")}
    # Six experts of 16 in 3 layers, three projections of 128 x 256 at half a byte and more.
    assert sizes["int4", "gptq"] > 6 * 3 * 3 * 128 * 256 // 2


def test_model_info_says_what_is_widened_where_no_kernel_is():
    plan = Plan.from_yaml(ROOT / "examples" / "demo-plan.yaml")
    table = load_route_table(plan, layout=Layout(), platform=Platform("cpu-other"))
    described = describe_table(table, {})
    groups = described["expert_layers"][0]["groups"]
    assert {group["served"] for group in groups} == {"bf16"}
    assert {group["stored"] for group in groups} > {"bf16"}
    modules = [module for entry in described["widened"] for module in entry["modules"]]
    assert "model.layers.0.mlp.experts.15.gate_proj" in modules
    assert all(entry["extra_bytes"] > 0 and entry["reason"] for entry in described["widened"])
