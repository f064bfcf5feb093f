# SPDX-License-Identifier: Apache-2.0
"""What a start leaves in a mixed model's ``VllmConfig``; tests/engine starts engines."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.loading.indexers import FIXTURES
from tests.loading.serving import make_plan, needs_cpu, read_base, write_base
from vllm_mixprec import compose, start
from vllm_mixprec.composition import PLAN_FILE
from vllm_mixprec.errors import CheckpointError, PlanError
from vllm_mixprec.plan import Plan
from vllm_mixprec.plan.plan import Options
from vllm_mixprec.quant.config import LOAD_FORMAT, METHOD, layout_of
from vllm_mixprec.routing import Layout
from vllm_mixprec.serving.model_info import describe_model

pytestmark = needs_cpu

SAID = "draft_load_config is not used: the plan routes the MTP layers too"


def engine_config(folder: Path, **options: Any) -> VllmConfig:
    return EngineArgs(
        str(folder), skip_tokenizer_init=True, max_model_len=64, **options
    ).create_engine_config()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of; vLLM's logger passes nothing on once vLLM has set it up."""
    lines: list[str] = []
    monkeypatch.setattr(start.logger, "warning", lambda text, *args: lines.append(text % args))
    return lines


def draft(folder: Path, **options: Any) -> VllmConfig:
    compose(make_plan(write_base(folder / "base"), {}, {}), folder / "mixed")
    speculative = {"method": "mtp", "num_speculative_tokens": 1, **options}
    return engine_config(folder / "mixed", speculative_config=speculative)


def test_own_draft_loads_through_the_plan(tmp_path: Path, warnings: list[str]) -> None:
    config = draft(tmp_path)
    assert config.load_config.load_format == LOAD_FORMAT
    assert config.speculative_config.draft_load_config is None
    assert config.speculative_config.draft_model_config.quantization == METHOD
    assert not any(SAID in line for line in warnings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_latent_attention_has_a_backend_that_computes_in_its_dtype(
    tmp_path: Path, dtype: str
) -> None:
    """With AMX vLLM takes one that knows bfloat16 only, whatever the dtype."""
    latent = FIXTURES / "architectures" / "deepseek_v2"
    compose(make_plan(latent / "bf16", {}, {}), tmp_path / "mixed")
    chosen = engine_config(tmp_path / "mixed", dtype=dtype).attention_config.backend
    assert chosen is (None if dtype == "bfloat16" else AttentionBackendEnum.CPU_MLA)


def test_log_says_what_each_layer_is_served_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(start.logger, "info", lambda text, *args: lines.append(text % args))
    draft(tmp_path)
    shown = [line.partition(": ")[0] for line in lines if " bf16 of base, vLLM's own" in line]
    assert shown == ["layers 0-1", "layer 2", "layer 3 (MTP)", "outside of the layers"]


def test_load_config_beside_an_own_draft_is_dropped_with_a_warning(
    tmp_path: Path, warnings: list[str]
) -> None:
    config = draft(tmp_path, draft_load_config={"load_format": "dummy"})
    assert config.speculative_config.draft_load_config is None
    assert sum(SAID in line for line in warnings) == 1


def test_compiled_code_is_kept_apart_by_the_features_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older one the kernels are others, and a directory of compiled code may be shared."""
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    keys = []
    for flags in (("avx2",), ("amx_tile", "avx2"), ("avx2",)):
        monkeypatch.setattr(start, "dispatched_flags", lambda flags=flags: flags)
        keys.append(engine_config(tmp_path / "mixed").compute_hash())
    assert keys[0] == keys[2] != keys[1]


def test_replicas_share_experts_in_the_layout_that_is_checked(tmp_path: Path) -> None:
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    config = engine_config(tmp_path / "mixed", data_parallel_size=2)
    assert config.load_config.load_format == LOAD_FORMAT
    assert layout_of(config) == Layout(data_parallel_size=2)


def fold(folder: Path, base: Path) -> Path:
    """Write a base's copy whose up_proj has factors in its rows that down_proj takes back."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    generator = torch.Generator().manual_seed(0)
    tensors = read_base(base)
    for name, up in tensors.items():
        if ".experts." in name and "up_proj" in name:
            factors = torch.empty(len(up)).log_normal_(generator=generator)
            down = name.replace("up_proj", "down_proj")
            tensors[name] = (up.float() * factors[:, None]).to(up.dtype)
            tensors[down] = (tensors[down].float() / factors).to(up.dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_half_of_what_was_folded_is_refused(tmp_path: Path) -> None:
    """No header and no norm tells of factors that go from one projection to the next."""
    base = write_base(tmp_path / "base")
    sources = {"folded": fold(tmp_path / "folded", base)}
    experts = "model.layers.{1-3}.mlp.experts.*"
    compose(make_plan(base, sources, {f"{experts}.down_proj": "folded"}), tmp_path / "half")
    match = r"experts\.\d+\.down_proj: .* a factor for each of its columns.* elsewhere"
    with pytest.raises(PlanError, match=match):
        engine_config(tmp_path / "half")
    compose(make_plan(base, sources, {experts: "folded"}), tmp_path / "whole")
    assert engine_config(tmp_path / "whole").load_config.load_format == LOAD_FORMAT


def test_experts_in_another_order_are_refused(tmp_path: Path) -> None:
    """No header tells of it either, and no router: each is sound."""
    base = write_base(tmp_path / "base")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    before = read_base(base)
    tensors = {name: before[name.replace(".experts.0.", ".experts.1.")] for name in before}
    save_file({name: t.clone() for name, t in tensors.items()}, other / "model.safetensors")
    rules = {"model.layers.{1-3}.mlp.experts.*": "other"}
    compose(make_plan(base, {"other": other}, rules), tmp_path / "mixed")
    match = r"experts\.0\.\w+: source 'other' holds weights of .*experts\.1\."
    with pytest.raises(PlanError, match=match):
        engine_config(tmp_path / "mixed")


def replace_attention(folder: Path, values: Callable[[torch.Tensor], torch.Tensor]) -> Plan:
    """Plan a base with ``o_proj`` from a copy of it that holds other values there."""
    base = write_base(folder / "base")
    other = Path(shutil.copytree(base, folder / "other"))
    tensors = read_base(base)
    for name, tensor in tensors.items():
        if ".self_attn.o_proj." in name:
            tensors[name] = values(tensor.float()).to(tensor.dtype)
    save_file(tensors, other / "model.safetensors")
    return make_plan(base, {"other": other}, {"model.layers.*.self_attn.o_proj": "other"})


def test_weights_of_another_model_are_warned_of(tmp_path: Path, warnings: list[str]) -> None:
    compose(replace_attention(tmp_path, torch.randn_like), tmp_path / "mixed")
    threads = torch.get_num_threads()
    engine_config(tmp_path / "mixed")
    assert torch.get_num_threads() == threads
    [line] = [line for line in warnings if "differs from base" in line]
    assert line.endswith("looked at: see check --deep.")


def test_weights_of_another_model_are_refused_where_the_plan_says_so(tmp_path: Path) -> None:
    plan = replace_attention(tmp_path, torch.randn_like)
    strict = Options(weights_differ="error")
    compose(plan.model_copy(update={"options": strict}), tmp_path / "mixed")
    with pytest.raises(
        PlanError, match=r"o_proj: source 'other': differs .*weights_differ to warn in"
    ):
        engine_config(tmp_path / "mixed")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    compose(replace_attention(tmp_path, lambda weight: weight.log()), tmp_path / "mixed")
    with pytest.raises(PlanError, match=r"o_proj: source 'other': holds NaN or infinite weights"):
        engine_config(tmp_path / "mixed")


@pytest.mark.parametrize("factor", [0.0, math.nan])
def test_broken_scales_are_refused_and_empty_ones_warned_of(
    tmp_path: Path, warnings: list[str], factor: float
) -> None:
    latent = FIXTURES / "architectures" / "deepseek_v2"
    other = Path(shutil.copytree(latent / "fp8", tmp_path / "other"))
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(".kv_b_proj.weight_scale_inv"):
                tensor.view(-1)[0] *= factor
        save_file(tensors, file)
    rules = {"model.layers.*.self_attn.kv_b_proj": "other"}
    compose(make_plan(latent / "bf16", {"other": other}, rules), tmp_path / "mixed")
    where = "kv_b_proj.weight_scale_inv: "
    if factor == 0.0:
        engine_config(tmp_path / "mixed")
        assert any(where in line and "are zero" in line for line in warnings)
        return
    with pytest.raises(PlanError, match=f"{where}.*NaN or infinite scales"):
        engine_config(tmp_path / "mixed")


def test_damage_of_the_base_alone_is_warned_of(tmp_path: Path, warnings: list[str]) -> None:
    base = write_base(tmp_path / "base")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = read_base(base)
    damaged = {
        name: tensor * math.nan if ".self_attn.o_proj." in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(damaged, base / "model.safetensors")
    rules = {"model.layers.*.self_attn.o_proj": "other"}
    compose(make_plan(base, {"other": other}, rules), tmp_path / "mixed")
    engine_config(tmp_path / "mixed")
    assert any("base 'base' holds NaN" in line for line in warnings)


def test_a_composed_plan_that_was_changed_is_refused(tmp_path: Path) -> None:
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    file = tmp_path / "mixed" / PLAN_FILE
    text = file.read_text()
    file.write_text(text + "# a comment\n")
    assert engine_config(tmp_path / "mixed").load_config.load_format == LOAD_FORMAT
    file.write_text(text.replace("mixed_fused: widen", "mixed_fused: error"))
    with pytest.raises(PlanError, match=r"it was edited or cut short\. Compose the directory"):
        engine_config(tmp_path / "mixed")


# The config that is served, beside the base's.

FOLDERS = sorted(FIXTURES.glob("architectures/*/bf16")) + sorted(FIXTURES.glob("*/bf16"))


@pytest.mark.parametrize("base", FOLDERS, ids=lambda folder: folder.parent.name)
def test_a_config_as_it_was_is_not_warned_of(
    tmp_path: Path, warnings: list[str], base: Path
) -> None:
    compose(make_plan(base, {}, {}), tmp_path / "mixed")
    engine_config(tmp_path / "mixed", trust_remote_code=True)  # DeepSeek v1's config is code
    assert not [line for line in warnings if "computes otherwise" in line]


def test_a_config_that_computes_otherwise_is_warned_of(tmp_path: Path, warnings: list[str]) -> None:
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    file = tmp_path / "mixed" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    engine_config(tmp_path / "mixed")
    [line] = [line for line in warnings if "computes otherwise" in line]
    assert f"rms_norm_eps is 0.25, not {config['rms_norm_eps']}" in line


def test_a_plan_over_another_directory_than_is_served_is_warned_of(
    tmp_path: Path, warnings: list[str]
) -> None:
    base = write_base(tmp_path / "base")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    plan = tmp_path / "plan.yaml"
    plan.write_text(make_plan(base, {}, {}).to_yaml())
    overrides = {"mixprec_plan": str(plan)}
    for folder, count in ((base, 0), (other, 1)):
        engine_config(folder, quantization="mixprec", hf_overrides=overrides)
        assert len([line for line in warnings if "gives config and tokenizer" in line]) == count


# Between the check in the front end and the load in a worker.


def resolve_as_worker(config: VllmConfig) -> None:
    with set_current_vllm_config(pickle.loads(pickle.dumps(config))):
        assert get_current_vllm_config().quant_config.table.routes


def test_a_worker_resolves_what_was_checked(tmp_path: Path) -> None:
    """In another process, where sets have another order."""
    (tmp_path / "config").write_bytes(pickle.dumps(draft(tmp_path)))
    code = """
import pickle, sys
from vllm.config import set_current_vllm_config
config = pickle.load(open(sys.argv[1], "rb"))
with set_current_vllm_config(config):
    table = config.quant_config.table
checked = config.load_config.model_loader_extra_config["mixprec_checked"]
assert checked.files and checked.digests == table.digests()
"""
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "config"],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
        timeout=300,
    )


def test_a_plan_that_is_edited_before_the_workers_read_it_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    sources = {"other": Path(shutil.copytree(base, tmp_path / "other"))}
    compose(make_plan(base, sources, {"model.layers.0.**": "other"}), tmp_path / "mixed")
    config = engine_config(tmp_path / "mixed")
    resolve_as_worker(config)
    file = tmp_path / "mixed" / PLAN_FILE
    file.write_text(file.read_text().replace("layers.0", "layers.1"))
    with pytest.raises(PlanError, match=r"what source 'base' gives is not what was checked at the"):
        resolve_as_worker(config)
    with pytest.raises(PlanError, match="is not what was checked"):
        describe_model(config)


def test_a_shard_that_is_written_to_before_the_workers_read_it_is_refused(tmp_path: Path) -> None:
    config = draft(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    shutil.copy(file, tmp_path / "again")
    (tmp_path / "again").replace(file)
    describe_model(config)  # served is what was loaded, whose layout this has, too
    with pytest.raises(CheckpointError, match="not the file that was checked at the start"):
        resolve_as_worker(config)


def test_files_of_workers_on_other_machines_may_be_others(tmp_path: Path) -> None:
    """Not their layout."""
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    config = engine_config(tmp_path / "mixed", nnodes=2, pipeline_parallel_size=2)
    file = tmp_path / "base" / "model.safetensors"
    shutil.copy(file, tmp_path / "again")
    (tmp_path / "again").replace(file)
    resolve_as_worker(config)
    save_file(load_file(file), file, metadata={"written": "with another header"})
    with pytest.raises(PlanError, match="is not what was checked"):
        resolve_as_worker(config)
