# SPDX-License-Identifier: Apache-2.0
"""Plans in the two older spellings are the same plans, and their errors say where they are."""

import re
from pathlib import Path

import pytest

from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan import Plan

TOP = """\
mixed_precision:
  base_model_path: /models/FP8
  fp16_path: /models/BF16
  fp8_path: /models/FP8
  gptq_int4_path: Qwen/GPTQ-Int4
  weight_mapping:
    "model.layers.0.self_attn.q_proj.weight": "fp16"
    "model.layers.*.mlp.experts.{0-7}.down_proj.weight": "gptq_int4"
"""
MODEL = """\
model:
  name: "Qwen3-235B-A22B"
  base_path: /models/Base
  mixed_precision:
    fp16_path: /models/BF16
    fp8_path: ""
    int4_path: /models/GPTQ
    weight_mapping:
      "re:model\\\\.layers\\\\.1\\\\..*": "int4"
inference:
  dtype: "bfloat16"
server:
  port: 8080
"""
SHOWN = re.findall(
    r"```yaml\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "older-plans.md").read_text(),
    re.DOTALL,
)


def read(folder: Path, text: str) -> Plan:
    file = folder / "old.yaml"
    file.write_text(text)
    return Plan.from_yaml(file)


def rules_of(plan: Plan) -> list[tuple[str, str]]:
    return [(rule.match, rule.source) for rule in plan.rules]


def test_mixed_precision_at_the_top(tmp_path: Path) -> None:
    plan = read(tmp_path, TOP)
    assert plan.base == "fp8"  # the source that has the base's path
    assert {name: source.path for name, source in plan.sources.items()} == {
        "fp16": "/models/BF16",
        "fp8": "/models/FP8",
        "gptq_int4": "Qwen/GPTQ-Int4",
    }
    assert rules_of(plan) == [
        ("model.layers.0.self_attn.q_proj", "fp16"),
        ("model.layers.*.mlp.experts.{0-7}.down_proj", "gptq_int4"),
    ]
    assert [rule.line for rule in plan.rules] == [7, 8]
    assert plan.dropped == ()


def test_mixed_precision_in_model(tmp_path: Path) -> None:
    plan = read(tmp_path, MODEL)
    assert plan.base == "base"
    assert {name: source.path for name, source in plan.sources.items()} == {
        "base": "/models/Base",
        "fp16": "/models/BF16",
        "int4": "/models/GPTQ",
    }
    assert rules_of(plan) == [(r"re:model\.layers\.1\..*", "int4")]
    assert plan.dropped == (
        "inference",
        "server",
        "model.name",
        "model.mixed_precision.fp8_path",
    )


@pytest.mark.parametrize("text", [TOP, MODEL, *SHOWN])
def test_it_is_the_plan_that_it_is_rewritten_to(tmp_path: Path, text: str) -> None:
    plan = read(tmp_path, text)
    again = read(tmp_path, plan.to_yaml())
    assert again.sha256 == plan.sha256
    assert rules_of(again) == rules_of(plan)
    assert again.dropped is None


def test_docs_show_both_spellings(tmp_path: Path) -> None:
    first, second = (read(tmp_path, text) for text in SHOWN)
    assert (first.dropped, second.dropped) == ((), ("inference", "server", "model.name"))
    assert (first.base, second.base) == ("base", "base")


def test_all_tensors_of_a_module_are_one_rule(tmp_path: Path) -> None:
    """Such mappings were generated from the index of a quantised checkpoint."""
    names = ("weight", "weight_scale_inv")
    lines = "".join(f'    "model.layers.0.mlp.down_proj.{name}": "FP8"\n' for name in names)
    plan = read(tmp_path, TOP + lines)
    assert rules_of(plan)[2:] == [("model.layers.0.mlp.down_proj", "fp8")]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (TOP + "x: 1\n", "9: x: unknown key, expected one of mixed_precision, inference, server."),
        (TOP + "  fp8: /m\n", "9: mixed_precision.fp8: unknown key, expected one of"),
        (
            TOP.replace("  base_model_path: /models/FP8\n", ""),
            "1: mixed_precision.base_model_path: found None, expected the path",
        ),
        (
            TOP + '    "model.layers.0.self_attn.q_proj.scales": "fp8"\n',
            '9: mixed_precision.weight_mapping.model.layers.0.self_attn.q_proj.scales: found "fp8"',
        ),
        (
            TOP + '    "lm_head": "int8"\n',
            '9: mixed_precision.weight_mapping.lm_head: source "int8" is not among the sources, ',
        ),
        (
            TOP + '    "re:(": "fp8"\n',
            "9: mixed_precision.weight_mapping.re:(: ",
        ),
        (
            TOP.replace("/models/BF16", "3"),
            "3: mixed_precision.fp16_path: found 3, expected a string",
        ),
        (
            TOP.replace("fp16_path", "base_path").replace("_path: /models/FP8", "_path: /m", 1),
            "3: mixed_precision.base_path: found beside base_model_path with another path",
        ),
        (
            TOP.replace("base_model_path", "base_path"),
            "2: mixed_precision.base_path: found the base's path here, expected it as "
            "mixed_precision.base_model_path. Move it there.",
        ),
        (
            MODEL.replace("  base_path: /models/Base\n", "").replace(
                "    fp16_path", "    base_model_path: /models/Base\n    fp16_path"
            ),
            "4: model.mixed_precision.base_model_path: found the base's path here, expected it as "
            "model.base_path. Move it there.",
        ),
        (
            "mixed_precision: 3\n",
            "1: mixed_precision: found 3, expected a mapping with NAME_path. Correct it.",
        ),
        (MODEL + "extra: 1\n", "14: extra: unknown key, expected one of model, inference, server."),
        (
            MODEL.replace("  name:", "  title:"),
            "2: model.title: unknown key, expected one of name, base_path, mixed_precision.",
        ),
        (
            MODEL.replace("  base_path: /models/Base\n", "").replace(" fp16_path", " fp16"),
            "4: model.mixed_precision.fp16: unknown key",
        ),
    ],
)
def test_errors_name_the_place_in_the_file(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(PlanError) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(f"{tmp_path / 'old.yaml'}:{error}")
