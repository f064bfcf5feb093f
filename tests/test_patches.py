# SPDX-License-Identifier: Apache-2.0
"""Every patch says whether this vLLM needs it, and does what it says; vLLM is left as it was."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedConfig
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.models import deepseek_v2
from vllm.sequence import IntermediateTensors
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.version import __version_tuple__

from tests.loading.serving import Serving, make_plan, needs_cpu, serve, write_base
from vllm_mixprec import compose, plugin
from vllm_mixprec.cli import main
from vllm_mixprec.errors import CheckpointError, UnsupportedError
from vllm_mixprec.patches import (
    amx_permission,
    apply_patches,
    config_size,
    cpu_rotary,
    cpu_stages,
    deepseek_mha_names,
    draft_stages,
    indexer_wk,
    patches,
    reload_end,
    tied_head,
)
from vllm_mixprec.quant.config import MixPrecConfig

RANDOM = Path(__file__).parent / "fixtures" / "random-moe"
ATTENTION = "model.layers.0.self_attn"
SYNC = "sync_and_gather_intermediate_tensors"


@pytest.fixture(autouse=True)
def stock_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without patches, and take off afterwards what a test applied."""
    monkeypatch.setattr(deepseek_v2, "DeepseekAttention", deepseek_mha_names._STOCK)
    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", cpu_rotary._STOCK)
    monkeypatch.setattr(CPUModelRunner, SYNC, cpu_stages._STOCK)
    monkeypatch.setattr(layerwise, "finalize_layerwise_processing", reload_end._STOCK)
    monkeypatch.setattr(layerwise, "_place_kernel_tensors", tied_head._STOCK)
    monkeypatch.setattr(GPUModelRunner, "drafter", None, raising=False)
    monkeypatch.delattr(GPUModelRunner, "drafter")
    for owner, stock in config_size._STOCK.items():
        monkeypatch.setattr(owner, config_size._METHOD, stock)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Four heads of 64, as a DeepSeek v1 of that size has, in GPTQ."""
    folder = tmp_path_factory.mktemp("patches")
    rules, sources = {f"{ATTENTION}.*_proj": "int4"}, {"int4": RANDOM / "gptq"}
    with serve(folder, RANDOM / "bf16", sources, rules, has_draft=False) as made:
        yield made


# The list.


def test_every_probe_answers() -> None:
    needed = {patch.name: patch.needed() for patch in patches()}
    assert len(needed) == len(patches())
    assert {type(answer) for answer in needed.values()} == {bool}


def test_every_patch_is_described() -> None:
    for patch in patches():
        assert patch.broken and patch.mended and patch.remove_when, patch.name
        assert all("#" in issue for issue in patch.issues), patch.name


def test_doctor_lists_every_patch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    main(["doctor", "--json"])
    found = {patch["name"]: patch for patch in json.loads(capsys.readouterr().out)["patches"]}
    assert list(found) == [patch.name for patch in patches()]
    for patch in patches():
        listed = found[patch.name]
        assert listed["state"] == ("mended" if patch.needed() else "not needed by this vLLM")
        assert listed["issues"] == list(patch.issues)
        assert (listed["broken"], listed["mended"]) == (patch.broken, patch.mended)


# How stock vLLM loads wk.


def test_what_stock_vllm_does_with_wk() -> None:
    if __version_tuple__[:2] != (0, 32):
        pytest.skip("the answers were read off vLLM 0.32")
    answers = {patch.name: patch.needed() for patch in patches()}
    assert {name: answer for name, answer in answers.items() if name.startswith("indexer_wk")} == {
        "indexer_wk_stages": False,
        "indexer_wk_calls": True,
        "indexer_wk_formats": True,
    }


def test_probes_of_wk_tell_a_vllm_that_lacks_the_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of ours in vLLM's place: each answer follows what the function does."""

    def read_packed(name, tensor, waiting, params, loaded, missing):
        if not missing and name.endswith("scale"):
            fused = next(iter(params.values()))
            fused.weight_loader(fused, torch.ones(128, 512), 0)

    monkeypatch.setattr(deepseek_v2, "_try_load_fp8_indexer_wk", read_packed)
    assert not indexer_wk.FORMATS.needed()

    def ignore_stages(name, tensor, waiting, params, loaded, missing):
        return params["model.layers.0.self_attn.indexer.wk_weights_proj.weight"]

    monkeypatch.setattr(deepseek_v2, "_try_load_fp8_indexer_wk", ignore_stages)
    assert indexer_wk.STAGES.needed()
    assert indexer_wk.FORMATS.needed()


# DeepSeek v1's names.


def build_attention(serving: Serving, quant_config: MixPrecConfig) -> Module:
    config = serving.config
    config.compilation_config.static_forward_context.clear()
    hf_config = config.model_config.hf_config
    heads = hf_config.num_attention_heads
    return deepseek_v2.DeepseekAttention(
        config, hf_config, hf_config.hidden_size, heads, quant_config=quant_config, prefix=ATTENTION
    )


def test_stock_attention_has_no_names(serving: Serving) -> None:
    if not deepseek_mha_names.PATCH.needed():
        pytest.skip("this vLLM names its linears")
    with pytest.raises(UnsupportedError, match=r"^this model builds a QKVParallelLinear without"):
        build_attention(serving, serving.config.quant_config)


@pytest.mark.parametrize("times", [1, 2])
def test_attention_is_served_as_its_names_are_routed(serving: Serving, times: int) -> None:
    for _ in range(times):
        apply_patches(serving.config, ["DeepseekForCausalLM"])
    attention = build_attention(serving, serving.config.quant_config)
    assert isinstance(attention, deepseek_mha_names._STOCK)
    if serving.config.quant_config.table.platform.name == "cpu-avx512":
        schemes = [layer.quant_method.scheme for layer in (attention.qkv_proj, attention.o_proj)]
        assert [scheme.format for scheme in schemes] == ["gptq", "gptq"]


class Asked(MixPrecConfig):
    """Serves everything unquantised, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes: list[str] = []

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        self.prefixes.append(prefix)
        return UnquantizedLinearMethod() if prefix.endswith("_proj") else None


def test_attention_asks_by_its_full_names(serving: Serving) -> None:
    apply_patches(serving.config, ["DeepseekForCausalLM"])
    asked = Asked()
    build_attention(serving, asked)
    linears = [prefix for prefix in asked.prefixes if prefix.endswith("_proj")]
    assert linears == [f"{ATTENTION}.qkv_proj", f"{ATTENTION}.o_proj"]
    assert "" not in asked.prefixes


def test_other_models_and_configs_are_left_alone(serving: Serving) -> None:
    apply_patches(serving.config, ["DeepseekV3ForCausalLM", "GlmMoeDsaForCausalLM"])
    assert deepseek_v2.DeepseekAttention is deepseek_mha_names._STOCK
    apply_patches(serving.config, ["DeepseekForCausalLM"])
    attention = build_attention(serving, None)
    assert isinstance(attention.qkv_proj.quant_method, UnquantizedLinearMethod)


# Rotary embeddings.

TOKENS, HEADS, SIZE = 5, 3, 64


@needs_cpu
def test_stock_kernel_turns_several_heads_wrongly() -> None:
    if __version_tuple__[:2] != (0, 32):
        pytest.skip("the answer was read off vLLM 0.32")
    assert cpu_rotary.PATCH.needed()
    cpu_rotary.PATCH.apply()
    assert cpu_rotary.PATCH.needed(), "what is asked is stock vLLM, patched or not"


def build_rope(is_neox: bool, rotary_dim: int = SIZE) -> RotaryEmbedding:
    with set_current_vllm_config(VllmConfig()):
        return RotaryEmbedding(SIZE, rotary_dim, 128, 10000.0, is_neox, torch.float32)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


QUERIES = {
    "flat": lambda: random(TOKENS, HEADS * SIZE),
    "flat-cut": lambda: random(TOKENS, HEADS * SIZE + 32)[:, 32:],
    "heads": lambda: random(TOKENS, HEADS, SIZE),
    "heads-cut": lambda: random(TOKENS, HEADS, 128 + SIZE)[..., 128:],  # MLA's q_pe
}
KEYS = {
    "none": lambda: None,
    "flat": lambda: random(TOKENS, SIZE),
    "flat-cut": lambda: random(TOKENS, 128 + SIZE)[:, 128:],
    "head-cut": lambda: random(TOKENS, 128 + SIZE)[:, 128:].unsqueeze(1),  # MLA's k_pe
    "flat-heads": lambda: random(TOKENS, HEADS * SIZE),
}
STOCK_KEYS = ("none", "flat", "flat-heads")
"""Keys that are contiguous, beside which a flat query takes the stock kernel."""
POSITIONS = torch.tensor([0, 7, 3, 100, 127])


@needs_cpu
@pytest.mark.parametrize("rotary_dim", [SIZE, SIZE // 2])
@pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("query", QUERIES)
def test_patched_rope_is_the_definition(
    query: str, key: str, is_neox: bool, rotary_dim: int
) -> None:
    for _ in range(2):
        cpu_rotary.PATCH.apply()
    rope = build_rope(is_neox, rotary_dim)
    given, expected = (
        QUERIES[query](),
        rope.forward_native(POSITIONS, QUERIES[query](), KEYS[key]()),
    )
    found = rope.forward_cpu(POSITIONS, given, KEYS[key]())
    # The kernel works in place, the definition makes a new tensor.
    assert (found[0] is given) is (query == "flat" and key in STOCK_KEYS)
    for got, want in zip(found, expected, strict=True):
        if want is None:
            assert got is None
        else:
            assert got.shape == want.shape
            # Both compute in float32: products and sums of two terms, in another order.
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@needs_cpu
def test_only_latent_attention_gets_the_rotary_patch(serving: Serving) -> None:
    assert not serving.config.model_config.use_mla
    apply_patches(serving.config, ["Qwen3MoeForCausalLM"])
    assert RotaryEmbedding.forward_cpu is cpu_rotary._STOCK
    latent = RANDOM.parent / "architectures" / "glm_moe_dsa" / "bf16"
    config = EngineArgs(str(latent), skip_tokenizer_init=True).create_engine_config()
    for _ in range(2):
        apply_patches(config, ["GlmMoeDsaForCausalLM"])
    assert RotaryEmbedding.forward_cpu is cpu_rotary._forward_cpu


# Reloads; tests/loading/test_intake.py runs them.


def test_end_of_a_reload_is_watched_whatever_the_model(serving: Serving) -> None:
    for _ in range(2):
        apply_patches(serving.config, ["Qwen3MoeForCausalLM"])
    assert layerwise.finalize_layerwise_processing is reload_end._finalize_layerwise_processing


# Pipeline stages.


def stages_config(stages: int) -> VllmConfig:
    return VllmConfig(parallel_config=ParallelConfig(pipeline_parallel_size=stages))


def test_one_stage_needs_no_patch(serving: Serving) -> None:
    apply_patches(serving.config, ["GlmMoeDsaForCausalLM"])
    assert getattr(CPUModelRunner, SYNC) is cpu_stages._STOCK
    assert not hasattr(GPUModelRunner, "drafter")


@needs_cpu
def test_stages_on_the_cpu_get_room_once() -> None:
    config = stages_config(2)
    for _ in range(2):
        apply_patches(config, ["GlmMoeDsaForCausalLM"])
    patched = getattr(CPUModelRunner, SYNC)
    assert patched is cpu_stages._sync_and_gather_intermediate_tensors
    assert not hasattr(GPUModelRunner, "drafter"), "there is no draft"


def bare_runner(serving: Serving) -> CPUModelRunner:
    """A runner as it is before any step: built by hand, since its constructor wants an engine."""
    runner = object.__new__(CPUModelRunner)
    runner.model = serving.build().model
    runner.model_config = serving.config.model_config
    runner.max_num_tokens, runner.device = 8, torch.device("cpu")
    runner.intermediate_tensors = None
    return runner


def received(serving: Serving, value: float) -> IntermediateTensors:
    shape = (3, serving.config.model_config.hf_config.hidden_size)
    names = ("hidden_states", "residual")
    return IntermediateTensors({name: torch.full(shape, value).bfloat16() for name in names})


def test_stage_that_never_ran_takes_what_it_receives(serving: Serving) -> None:
    runner = bare_runner(serving)
    with pytest.raises(AssertionError, match=r"^$"):
        getattr(runner, SYNC)(3, received(serving, 1.0), True)
    apply_patches(stages_config(2), [])
    for value in (2.0, 3.0):
        found = getattr(runner, SYNC)(3, received(serving, value), True)
        room = runner.intermediate_tensors["residual"]
        assert room.shape[0] == 8
        assert found["residual"].data_ptr() == room.data_ptr()
        assert (found["hidden_states"] == value).all() and (found["residual"] == value).all()


def test_stage_without_a_draft_has_one_that_does_nothing() -> None:
    for _ in range(2):
        draft_stages.PATCH.apply()
    runner = object.__new__(GPUModelRunner)
    draft = runner.drafter
    assert isinstance(draft, EagleProposer)  # what the runner asks before it uses one
    assert draft.load_model(None) is None
    assert draft.initialize_attn_backend(None, []) is None
    assert draft.initialize_cudagraph_keys(None) is None
    assert draft.dummy_run(1) is None
    assert draft.validate_same_kv_cache_group(None) is None
    assert list(draft.draft_attn_groups) == []


def test_draft_of_the_last_stage_hides_the_one_that_does_nothing() -> None:
    draft_stages.PATCH.apply()
    runner = object.__new__(GPUModelRunner)
    own = runner.drafter = object()
    assert runner.drafter is own


@needs_cpu
def test_draft_under_stages_gets_both_patches(tmp_path: Path) -> None:
    compose(make_plan(write_base(tmp_path / "base"), {}, {}), tmp_path / "mixed")
    config = EngineArgs(
        str(tmp_path / "mixed"),
        skip_tokenizer_init=True,
        max_model_len=64,
        pipeline_parallel_size=2,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    ).create_engine_config()
    apply_patches(config, ["GlmMoeDsaForCausalLM"])
    assert isinstance(GPUModelRunner.drafter, EagleProposer)
    assert getattr(CPUModelRunner, SYNC) is not cpu_stages._STOCK


# What transformers reads.


@pytest.mark.parametrize("owner", [PreTrainedConfig, GenerationConfig])
def test_config_of_gigabytes_is_refused_unread(tmp_path: Path, owner: type) -> None:
    plugin._bound_configs()
    plugin._bound_configs()
    name = "generation_config.json" if owner is GenerationConfig else "config.json"
    file = tmp_path / name
    file.write_text('{"num_beams": 3}')
    owner.from_pretrained(tmp_path)
    os.truncate(file, 1 << 40)
    with pytest.raises(CheckpointError, match=f"{name}: 1099511627776 bytes, expected at most"):
        owner.from_pretrained(tmp_path)


# AMX.

# A process tells with arch_prctl(ARCH_GET_XCOMP_PERM) what it may use, of which bit 18 are tiles.
ASK = """
import ctypes, torch
from vllm_mixprec.patches import amx_permission
allowed = ctypes.c_uint64()
def ask():
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(allowed)) == 0
    return allowed.value >> 18 & 1
before = ask()
amx_permission.PATCH.apply()
amx_permission.PATCH.apply()
print(before, ask(), torch.cpu._init_amx())
"""


@pytest.mark.skipif(not amx_permission.PATCH.needed(), reason="this CPU has no AMX")
def test_a_process_asks_for_amx() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, check=True, timeout=300
    )
    before, after, is_given = done.stdout.split()[-3:]
    if is_given == "False":
        pytest.skip("Linux refuses AMX to processes here")
    assert (before, after) == ("0", "1")


def test_refused_amx_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(amx_permission.logger, "warning", said.append)
    monkeypatch.setattr(amx_permission, "needed", lambda: True)
    for is_given in (True, False):
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda is_given=is_given: is_given)
        amx_permission.PATCH.apply()
    assert [line.partition(",")[0] for line in said] == ["the CPU has AMX"]
