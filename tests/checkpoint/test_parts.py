# SPDX-License-Identifier: Apache-2.0
"""Fused tensors taken apart are, bit for bit, the modules that were fused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.loading.indexers import FORMATS, Stored
from tests.spellings import (
    MIXTRAL,
    RANDOM,
    Respell,
    gate_up,
    nested,
    qkv,
    read_all,
    respell,
    stack,
    write,
)
from vllm_mixprec.checkpoint import Checkpoint, Module, open_checkpoint
from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import CheckpointError, UnsupportedError

ATTENTION = "model.layers.0.self_attn"
EXPERTS = "model.layers.0.mlp.experts"
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
QKV = {"q_proj": slice(0, 128), "k_proj": slice(128, 192), "v_proj": slice(192, 256)}
GATE_UP = {"gate_proj": slice(0, 256), "up_proj": slice(256, 512)}


def read_module(module: Module) -> dict[str, torch.Tensor]:
    suffixes = {spec: suffix for suffix, spec in module.tensors.items()}
    return {suffixes[spec]: tensor for spec, tensor in read_tensors(module.tensors.values())}


def read_modules(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    specs = [spec for module in checkpoint.modules.values() for spec in module.tensors.values()]
    return {spec.name: tensor for spec, tensor in read_tensors(specs)}


def open_stored(folder: Path, tensors: dict[str, torch.Tensor], stored: Stored) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    config: dict[str, Any] = {**SIZES, "quantization_config": stored.config}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return open_checkpoint(folder)


# Against the spelling that the tools wrote.


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("bf16", (stack(),)),
        ("bf16", (stack(is_dotted=True),)),
        ("bf16", (stack(is_transposed=True),)),
        ("bf16", (qkv,)),
        ("bf16", (stack(), qkv)),
        ("fp8", (stack(), qkv)),
        ("fp8", (stack(is_dotted=True),)),
        ("fp8", (stack(is_transposed=True), qkv)),
        ("gptq", (stack(is_dotted=True), qkv)),
        ("gptq-asym", (stack(is_dotted=True), qkv)),
    ],
)
def test_parts_are_what_was_fused(tmp_path: Path, source: str, how: tuple[Respell, ...]) -> None:
    origin = RANDOM / source
    checkpoint = open_checkpoint(respell(tmp_path / "fused", origin, *how))
    apart = open_checkpoint(origin)
    assert len(checkpoint.tensors) < len(apart.tensors)
    assert {n: (m.scheme, m.shape, m.problems) for n, m in checkpoint.modules.items()} == {
        n: (m.scheme, m.shape, m.problems) for n, m in apart.modules.items()
    }
    found, expected = read_modules(checkpoint), read_all(origin)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].is_contiguous(), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_parts_know_the_name_that_the_files_have(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(respell(tmp_path / "fused", RANDOM / "bf16", stack(), qkv))
    fused = {name: module.fused for name, module in checkpoint.modules.items()}
    assert fused[f"{EXPERTS}.3.gate_proj"] == f"{EXPERTS}.gate_up_proj"
    assert fused[f"{EXPERTS}.3.down_proj"] == f"{EXPERTS}.down_proj"
    assert fused[f"{ATTENTION}.k_proj"] == f"{ATTENTION}.qkv_proj"
    assert fused[f"{ATTENTION}.o_proj"] is None
    assert list(fused.values()).count(None) == 3 + 2 * 6


def test_a_nested_config_tells_the_sizes(tmp_path: Path) -> None:
    text = json.loads((RANDOM / "bf16" / "config.json").read_text())
    folder = respell(tmp_path / "nested", RANDOM / "bf16", stack(), qkv, nested)
    (folder / "config.json").write_text(json.dumps({"text_config": text}))
    modules = open_checkpoint(folder).modules
    layer = "model.language_model.layers.1"
    assert modules[f"{layer}.self_attn.v_proj"].shape == (256, 256)
    assert modules[f"{layer}.mlp.experts.7.up_proj"].shape == (128, 256)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_transformers_own_parameters_are_what_it_saves(tmp_path: Path, name: str) -> None:
    """transformers 5 holds experts stacked, and saves them apart under the published names."""
    import transformers

    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "vocab_size": 32, "num_local_experts": 4}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "saved")
    held = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert f"{EXPERTS}.gate_up_proj" in held
    saved = open_checkpoint(tmp_path / "saved")
    stacked = open_checkpoint(write(tmp_path / "held", tmp_path / "saved", held))
    assert {m.fused for m in saved.modules.values()} == {None}
    assert saved.by_key.keys() == stacked.by_key.keys()
    for module in saved.modules.values():
        found = stacked.find(module.name)
        assert found is not None
        one, other = read_module(module), read_module(found)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[suffix], other[suffix]) for suffix in one), module.name


def test_gate_up_of_a_dense_and_of_a_shared_mlp(tmp_path: Path) -> None:
    origin = MIXTRAL.parent / "glm4_moe" / "fp8"
    checkpoint = open_checkpoint(respell(tmp_path / "fused", origin, gate_up))
    found, expected = read_modules(checkpoint), read_all(origin)
    fused = {m.fused for m in checkpoint.modules.values()} - {None}
    for mlp in ("model.layers.0.mlp", "model.layers.1.mlp.shared_experts"):
        assert f"{mlp}.gate_up_proj" in fused
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


# Every format that is read.

FUSIBLE = [name for name in FORMATS if name not in ("fp8-48x40-bf16", "awq-auto-round")]
AUTO_ROUND = [name for name in FUSIBLE if "auto-round" in name]


@pytest.mark.parametrize("name", [name for name in FUSIBLE if name not in AUTO_ROUND])
def test_qkv_of_any_format(name: str, tmp_path: Path) -> None:
    """The tool read the fused weight back: its rows are the parts'."""
    stored = FORMATS[name]((256, 256))
    tensors = {f"{ATTENTION}.qkv_proj.{suffix}": t for suffix, t in stored.tensors.items()}
    modules = open_stored(tmp_path, tensors, stored).modules
    assert list(modules) == [f"{ATTENTION}.{part}" for part in QKV]
    for part, rows in QKV.items():
        module = modules[f"{ATTENTION}.{part}"]
        assert module.problems == () and module.shape == (rows.stop - rows.start, 256)
        weight = dequantize(module.scheme, read_module(module), torch.float32)
        assert torch.equal(weight, stored.weight[rows].float()), part


@pytest.mark.parametrize("name", AUTO_ROUND)
def test_gate_up_as_auto_round_packs_it(name: str, tmp_path: Path) -> None:
    stored = FORMATS[name]((128, 256))
    tensors = {f"model.layers.0.mlp.gate_up_proj.{s}": t for s, t in stored.tensors.items()}
    modules = open_stored(tmp_path, tensors, stored).modules
    for part, rows in {"gate_proj": slice(0, 64), "up_proj": slice(64, 128)}.items():
        module = modules[f"model.layers.0.mlp.{part}"]
        weight = dequantize(module.scheme, read_module(module), torch.float32)
        assert torch.equal(weight, stored.weight[rows].float()), part


@pytest.mark.parametrize("name", [name for name in FUSIBLE if name not in AUTO_ROUND])
def test_stacked_experts_of_any_format(name: str, tmp_path: Path) -> None:
    """Two experts, the second with its scales doubled where they are numbers."""
    stored = FORMATS[name]((512, 256))
    factors = [1.0, 1.0]
    experts = [stored.tensors, dict(stored.tensors)]
    for suffix in ("weight_scale", "weight_scale_inv", "scales"):
        scale = stored.tensors.get(suffix)
        if scale is not None and scale.is_floating_point() and scale.dtype.itemsize > 1:
            experts[1][suffix], factors[1] = scale * 2, 2.0
    tensors = {
        f"{EXPERTS}.gate_up_proj.{suffix}": torch.stack([expert[suffix] for expert in experts])
        for suffix in stored.tensors
    }
    modules = open_stored(tmp_path, tensors, stored).modules
    assert len(modules) == 4
    for expert, factor in enumerate(factors):
        for part, rows in GATE_UP.items():
            module = modules[f"{EXPERTS}.{expert}.{part}"]
            assert module.problems == () and module.shape == (256, 256)
            weight = dequantize(module.scheme, read_module(module), torch.float32)
            assert torch.equal(weight, stored.weight[rows].float() * factor), (expert, part)


def test_a_scale_a_row_of_transposed_experts_may_stand_upright(tmp_path: Path) -> None:
    """transformers, integrations/fbgemm_fp8.py: (E, 1, N) of gate and up, (E, N, 1) of down."""
    stored = {
        "gate_up_proj": FORMATS["fp8-channel"]((512, 256)),
        "down_proj": FORMATS["fp8-channel"]((256, 256)),
    }
    tensors = {}
    for name, one in stored.items():
        weight, scale = (one.tensors[suffix] for suffix in ("weight", "weight_scale"))
        tensors[f"{EXPERTS}.{name}"] = torch.stack([weight.t()] * 2)
        tensors[f"{EXPERTS}.{name}_scale"] = torch.stack(
            [factor * (scale.t() if name == "gate_up_proj" else scale) for factor in (1, 2)]
        )
    modules = open_stored(tmp_path, tensors, stored["down_proj"]).modules
    for part, rows in {**GATE_UP, "down_proj": slice(0, 256)}.items():
        expected = stored["gate_up_proj" if part in GATE_UP else part].weight[rows].float()
        for expert in range(2):
            module = modules[f"{EXPERTS}.{expert}.{part}"]
            assert (module.scheme.label, module.problems) == ("fp8_channel", ())
            weight = dequantize(module.scheme, read_module(module), torch.float32)
            assert torch.equal(weight, expected * (expert + 1)), (part, expert)


def test_one_scale_of_all_experts_is_repeated(tmp_path: Path) -> None:
    stored = FORMATS["fp8-tensor"]((512, 256))
    tensors = {
        f"{EXPERTS}.gate_up_proj": torch.stack([stored.tensors["weight"]] * 2),
        f"{EXPERTS}.gate_up_proj_scale": stored.tensors["weight_scale"],
    }
    modules = open_stored(tmp_path, tensors, stored).modules
    up = modules[f"{EXPERTS}.1.up_proj"]
    weight = dequantize(up.scheme, read_module(up), torch.float32)
    assert torch.equal(weight, stored.weight[256:].float())


# What cannot be told apart.


def test_a_block_that_two_parts_share_is_exact_unless_the_second_spans_more(
    tmp_path: Path,
) -> None:
    """Blocks of 48: of 128, 64 and 64 rows, k begins inside one and ends in another."""
    stored = FORMATS["fp8-48x40-bf16"]((256, 256))
    tensors = {f"{ATTENTION}.qkv_proj.{suffix}": t for suffix, t in stored.tensors.items()}
    modules = open_stored(tmp_path, tensors, stored).modules
    query, key = modules[f"{ATTENTION}.q_proj"], modules[f"{ATTENTION}.k_proj"]
    weight = dequantize(query.scheme, read_module(query), torch.float32)
    assert torch.equal(weight, stored.weight[:128].float())
    assert query.problems == ()
    assert key.problems == (
        f"{ATTENTION}.qkv_proj.weight_scale_inv: rows 128 to 191 of 256 are k_proj, but 48 rows "
        "share an entry of [6, 7]; expected each part to begin with one. Choose a source that "
        "stores the parts apart.",
    )


def test_packed_zero_points_are_cut_at_whole_words(tmp_path: Path) -> None:
    stored = FORMATS["gptq-g128"]((24, 256))
    tensors = {f"model.layers.0.mlp.gate_up_proj.{s}": t for s, t in stored.tensors.items()}
    modules = open_stored(tmp_path, tensors, stored).modules
    (problem,) = modules["model.layers.0.mlp.up_proj"].problems
    assert "qzeros: rows 12 to 23 of 24 are up_proj, but 8 rows share an entry" in problem


def test_a_fault_of_a_fused_module_is_a_fault_of_its_parts(tmp_path: Path) -> None:
    stored = FORMATS["fp8-128x128"]((512, 256))
    tensors = {f"{EXPERTS}.gate_up_proj": torch.stack([stored.tensors["weight"]] * 2)}
    modules = open_stored(tmp_path, tensors, stored).modules
    problems = {module.problems for module in modules.values()}
    (problem,) = problems.pop()
    assert not problems
    assert problem.startswith(f"{EXPERTS}.gate_up_proj.weight_scale_inv: missing")


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        # 256 rows are not a whole number of heads of 48.
        (f"{ATTENTION}.qkv_proj.weight", (256, 256), {"head_dim": 48}),
        (f"{ATTENTION}.qkv_proj.weight", (250, 256), {}),
        ("visual.layers.0.attn.qkv_proj.weight", (256, 256), {}),
        ("model.layers.0.mlp.gate_up_proj.weight", (255, 256), {}),
        # 256 = hidden size = gate and up of 128: rows or columns, nothing tells.
        (f"{EXPERTS}.gate_up_proj", (2, 256, 256), {}),
        (f"{EXPERTS}.gate_up_proj", (2, 128, 64), {}),
        (f"{EXPERTS}.gate_up_proj", (2, 512, 256), {"model_type": "gpt_oss"}),
    ],
)
def test_what_nothing_tells_apart_stays_whole(
    tmp_path: Path, name: str, shape: tuple[int, ...], config: dict[str, Any]
) -> None:
    save_file({name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SIZES | config))
    (module,) = open_checkpoint(tmp_path).modules.values()
    assert module.fused is None and module.shape == shape


@pytest.mark.parametrize("is_transposed", [False, True])
def test_gate_up_and_down_tell_each_other_apart(tmp_path: Path, is_transposed: bool) -> None:
    """gate_up_proj is square, as above: down_proj decides."""
    gate_up_proj, down_proj = torch.rand(2, 256, 256), torch.rand(2, 256, 128)
    stored = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
    if is_transposed:
        stored = {name: tensor.transpose(1, 2).contiguous() for name, tensor in stored.items()}
    save_file({f"{EXPERTS}.{k}": v for k, v in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = read_modules(open_checkpoint(tmp_path))
    assert torch.equal(found[f"{EXPERTS}.1.up_proj.weight"], gate_up_proj[1, 128:])
    assert torch.equal(found[f"{EXPERTS}.1.down_proj.weight"], down_proj[1])


def test_fp8_experts_that_cannot_be_told_apart_are_refused_by_name(tmp_path: Path) -> None:
    stored = FORMATS["fp8-128x128"]((256, 256))
    tensors = {f"{EXPERTS}.gate_up_proj.weight": torch.stack([stored.tensors["weight"]] * 2)}
    with pytest.raises(UnsupportedError, match=rf"{EXPERTS}.gate_up_proj: FP8 of 3 dimensions"):
        open_stored(tmp_path, tensors, stored)


def test_experts_both_as_a_parameter_and_as_a_module_are_refused(tmp_path: Path) -> None:
    tensors = read_all(RANDOM / "bf16")
    both = stack()(tensors) | stack(is_dotted=True)(tensors)
    folder = write(tmp_path / "both", RANDOM / "bf16", both)
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}.down_proj: stored both as a parameter"):
        open_checkpoint(folder)


def test_what_is_unknown_beside_experts_is_not_lost(tmp_path: Path) -> None:
    tensors = stack(is_dotted=True)(read_all(RANDOM / "bf16")) | {f"{EXPERTS}.sinks": torch.ones(3)}
    checkpoint = open_checkpoint(write(tmp_path / "more", RANDOM / "bf16", tensors))
    assert f"{EXPERTS}.3.gate_proj" in checkpoint.modules
    assert list(checkpoint.modules[EXPERTS].tensors) == ["sinks"]


def test_columns_of_one_tensor_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_mixprec.checkpoint import stream

    read = []
    real = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        count: int = real(descriptor, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    monkeypatch.setattr(stream, "READ_BYTES", 1)  # nothing is joined that need not be
    folder = respell(tmp_path / "fused", RANDOM / "bf16", stack(is_transposed=True))
    checkpoint = open_checkpoint(folder)
    read_modules(checkpoint)
    assert sum(read) == sum(spec.nbytes for spec in checkpoint.tensors.values())
