# SPDX-License-Identifier: Apache-2.0
"""What the repository shows its users: plans, configs, the notebook."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.routing.headers import GLM_5, glm_header, write_checkpoint
from vllm_mixprec import Plan, check
from vllm_mixprec.cli import main
from vllm_mixprec.routing.platform import Platform

ROOT = Path(__file__).parents[1]
EXAMPLES, CONFIGS = ROOT / "examples", ROOT / "configs"
DEMO = EXAMPLES / "demo-moe"
DEMO_PLAN = EXAMPLES / "demo-plan.yaml"
PLANS = sorted([*EXAMPLES.glob("*.yaml"), *CONFIGS.glob("*.yaml")])
GIB = 2**30


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_plan_parses(file):
    plan = Plan.from_yaml(file)
    assert plan.base == "bf16" and plan.rules
    assert {rule.source for rule in plan.rules} | {plan.base} == set(plan.sources)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_demo_plan_checks_clean(stages):
    report = check(
        Plan.from_yaml(DEMO_PLAN), pipeline_parallel_size=stages, platform=Platform("cpu-avx512")
    )
    assert report.findings == ()
    groups = report.table.expert_groups("model.layers.1.mlp.experts")
    assert {group.scheme.format for group in groups} == {"bf16", "fp8_block", "gptq"}


def test_demo_plan_is_what_quickstart_writes(tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import demo
    finally:
        sys.path.pop(0)
    named = [text for name in demo.SOURCES for text in ("--source", f"{name}={DEMO / name}")]
    written = tmp_path / "plan.yaml"
    assert main(["plan", *named, *demo.PLAN_OPTIONS, "-o", str(written)]) == 0
    committed = yaml.safe_load(DEMO_PLAN.read_text())
    assert yaml.safe_load(written.read_text())["rules"] == committed["rules"]


def test_readme_shows_the_demo_plan():
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert yaml.safe_load(DEMO_PLAN.read_text()) in [yaml.safe_load(block) for block in shown]


@pytest.mark.parametrize("file", [ROOT / "README.md", *PLANS], ids=lambda file: file.name)
def test_no_path_of_the_author_s_machine(file):
    assert not re.search(r"/(work|home|root|tmp)/", file.read_text())


# --- configs: held against checkpoints that have the real models' headers and no data -------------

QWEN3_30B = dict(layers=48, hidden=2048, inner=768, heads=32, kv_heads=4)
QWEN3_235B = dict(layers=94, hidden=4096, inner=1536, heads=64, kv_heads=4)
EXPERTS, HEAD_DIM, VOCAB = 128, 128, 151936
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4}
QUANTIZATION = {
    "bf16": None,
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "int4": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
}
TP4_EP = {"tensor_parallel_size": 4, "expert_parallel": True}
Tensors = Iterator[tuple[str, str, list[int]]]


def _linear(module: str, rows: int, columns: int, form: str) -> Tensors:
    if form == "bf16":
        yield f"{module}.weight", "BF16", [rows, columns]
    elif form == "fp8":
        yield f"{module}.weight", "F8_E4M3", [rows, columns]
        yield f"{module}.weight_scale_inv", "BF16", [-(-rows // 128), -(-columns // 128)]
    else:
        yield f"{module}.qweight", "I32", [columns // 8, rows]
        yield f"{module}.qzeros", "I32", [columns // 128, rows // 8]
        yield f"{module}.scales", "F16", [columns // 128, rows]
        yield f"{module}.g_idx", "I32", [columns]


def _qwen3_moe(
    form: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int
) -> Tensors:
    yield "model.embed_tokens.weight", "BF16", [VOCAB, hidden]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", "BF16", [hidden]
        for norm in ("q_norm", "k_norm"):
            yield f"{prefix}.self_attn.{norm}.weight", "BF16", [HEAD_DIM]
        for part, rows, columns in (
            ("q_proj", heads * HEAD_DIM, hidden),
            ("k_proj", kv_heads * HEAD_DIM, hidden),
            ("v_proj", kv_heads * HEAD_DIM, hidden),
            ("o_proj", hidden, heads * HEAD_DIM),
        ):
            yield from _linear(f"{prefix}.self_attn.{part}", rows, columns, form)
        yield f"{prefix}.mlp.gate.weight", "BF16", [EXPERTS, hidden]
        for expert in range(EXPERTS):
            for part in ("gate_proj", "up_proj"):
                yield from _linear(f"{prefix}.mlp.experts.{expert}.{part}", inner, hidden, form)
            down = f"{prefix}.mlp.experts.{expert}.down_proj"
            yield from _linear(down, hidden, inner, form)
    yield "model.norm.weight", "BF16", [hidden]
    yield "lm_head.weight", "BF16", [VOCAB, hidden]


def _write_headers(folder: Path, form: str, model: dict[str, int]) -> None:
    """Write a checkpoint whose data is a hole in the file: zeros that take no disk."""
    header, end = {}, 0
    for name, dtype, shape in _qwen3_moe(form, **model):
        start, size = end, ITEMSIZE[dtype]
        for length in shape:
            size *= length
        end = start + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": model["layers"],
        "hidden_size": model["hidden"],
        "moe_intermediate_size": model["inner"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if QUANTIZATION[form] is not None:
        config["quantization_config"] = QUANTIZATION[form]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    for model, sizes in {"Qwen3-30B-A3B": QWEN3_30B, "Qwen3-235B-A22B": QWEN3_235B}.items():
        for form, end in (("bf16", ""), ("fp8", "-FP8"), ("int4", "-GPTQ-Int4")):
            _write_headers(folder / "Qwen" / f"{model}{end}", form, sizes)
    return folder


def _check(file: Path, headers: Path, platform: str, **sizes):
    plan = yaml.safe_load(file.read_text())
    for source in plan["sources"].values():
        source["path"] = str(headers / source["path"])
    return check(Plan.from_dict(plan), platform=Platform(platform), **sizes)


@pytest.mark.parametrize(
    "name, platform, sizes, gib_a_rank",
    [
        ("qwen3-30b-a3b_cpu", "cpu-avx512", {}, 16.2),
        ("qwen3-30b-a3b_cpu", "cpu-avx512", {"tensor_parallel_size": 2}, 8.1),
        ("qwen3-30b-a3b_cpu", "cpu-avx512", TP4_EP, 4.1),
        ("qwen3-30b-a3b_1x24gb", "cuda-86", {}, 17.2),
        ("qwen3-30b-a3b_1x24gb", "cuda-89", {}, 17.2),
        ("qwen3-235b-a22b_4x80gb", "cuda-90", {"tensor_parallel_size": 4}, 47.3),
    ],
)
def test_config_resolves_and_takes_what_its_comment_says(
    name, platform, sizes, gib_a_rank, headers
):
    file = CONFIGS / f"{name}.yaml"
    report = _check(file, headers, platform, **sizes)
    assert report.findings == ()
    assert max(report.bytes_per_rank) / GIB == pytest.approx(gib_a_rank, abs=0.05)
    assert f"{gib_a_rank:g} GiB" in file.read_text()


def test_glm_config_takes_what_its_comment_says(tmp_path):
    for form, name in (("bf16", "GLM-5.1"), ("fp8", "GLM-5.1-FP8")):
        write_checkpoint(tmp_path / "zai-org" / name, GLM_5, glm_header(GLM_5, form == "fp8"), 8)
    file = CONFIGS / "glm-5.1_8x141gb.yaml"
    report = _check(file, tmp_path, "cuda-90", pipeline_parallel_size=8, draft=True)
    assert {finding.code for finding in report.findings} == {"layer-unquantized"}
    first, *others = (size / GIB for size in report.bytes_per_rank)
    assert (first, min(others), max(others)) == pytest.approx((58.3, 92.4, 97.5), abs=0.05)


# --- the notebook ---------------------------------------------------------------------------------


@pytest.mark.engine
def test_notebook_runs(tmp_path):
    for item in ("quickstart.ipynb", "demo-plan.yaml"):
        shutil.copy(EXAMPLES / item, tmp_path / item)
    (tmp_path / "demo-moe").symlink_to(DEMO)
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    subprocess.run([*command, str(tmp_path / "quickstart.ipynb")], check=True, timeout=900)
    cells = json.loads((tmp_path / "quickstart.ipynb").read_text())["cells"]
    assert not [
        output
        for cell in cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
