# SPDX-License-Identifier: Apache-2.0
"""Each way in which a config.json can contradict the headers, on a tiny GLM-5 without data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.routing.headers import GLM_5, TINY_GLM, Header, glm_header, write_checkpoint
from tests.routing.models import CPU, only
from vllm_mixprec.plan import Plan
from vllm_mixprec.routing import Finding, Platform, Report, check

ARCHITECTURES = Path(__file__).parents[1] / "fixtures" / "architectures"
CUDA = Platform("cuda-90")
LAYER = "model.layers.2"
EXPERTS = f"{LAYER}.mlp.experts"
INDEXER = f"{LAYER}.self_attn.indexer"


def check_base(folder: Path, *rules: tuple[str, str], **options: Any) -> Report:
    plan = Plan.from_dict(
        {
            "version": 1,
            "base": "base",
            "sources": {"base": {"path": str(folder)}},
            "rules": [{"match": match, "source": source} for match, source in rules],
        }
    )
    return check(plan, **{"platform": CPU, **options})


def check_tiny(
    folder: Path,
    edit: Callable[[Header], object] = lambda header: None,
    changes: dict[str, Any] | None = None,
    rules: tuple[tuple[str, str], ...] = (),
    **options: Any,
) -> Report:
    """Check TINY_GLM after ``edit`` changed its header, and ``changes`` its config."""
    header = glm_header(TINY_GLM)
    edit(header)
    config = TINY_GLM | (changes or {})
    config = {key: value for key, value in config.items() if value is not None}
    return check_base(write_checkpoint(folder, config, header), *rules, **options)


def drop(*prefixes: str) -> Callable[[Header], None]:
    """Remove the tensors whose names begin so."""

    def edit(header: Header) -> None:
        for name in [name for name in header if name.startswith(prefixes)]:
            del header[name]

    return edit


def reshape(name: str, *shape: int) -> Callable[[Header], None]:
    def edit(header: Header) -> None:
        header[name] = (header[name][0], shape)

    return edit


def expect_error(report: Report, code: str, where: str, *parts: str) -> Finding:
    finding = only(report, code)
    assert (finding.level, finding.where) == ("error", where)
    for part in parts:
        assert part in finding.message
    assert not report.ok
    return finding


def expect_config_error(report: Report, folder: Path, code: str, *parts: str) -> None:
    expect_error(report, code, str(folder / "config.json"), *parts)


@pytest.mark.parametrize("fp8", [False, True])
def test_sound_checkpoint_agrees(tmp_path: Path, fp8: bool) -> None:
    report = check_base(write_checkpoint(tmp_path, TINY_GLM, glm_header(TINY_GLM, fp8)), draft=True)
    assert {finding.code for finding in report.findings} <= {"layer-unquantized"}


@pytest.mark.parametrize(
    "folder", sorted(ARCHITECTURES.glob("*/*")), ids=lambda f: "-".join(f.parts[-2:])
)
def test_exported_checkpoints_agree(folder: Path) -> None:
    report = check_base(folder)
    assert not any(f.code.startswith(("config-", "experts-")) for f in report.findings)
    assert not any(f.code == "module-missing" for f in report.findings)
    assert report.ok


# Layers.


def test_layers_beyond_the_config_s(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, changes={"num_nextn_predict_layers": None})
    expect_error(report, "config-layers", "model.layers.4", "expected those of num_hidden_layers 4")


def test_layers_that_the_files_lack(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, drop("model.layers.1.", "model.layers.3."))
    finding = expect_error(report, "config-layers", "model.layers.*", "hold nothing of this layer")
    assert "2 layers: model.layers.1, model.layers.3" in finding.message


def test_missing_mtp_layer_is_a_warning_unless_it_is_to_draft(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, drop("model.layers.4."))
    finding = only(report, "mtp-missing")
    assert (finding.level, finding.where) == ("warning", "model.layers.4")
    assert "num_nextn_predict_layers 1" in finding.message
    assert report.ok
    drafting = check_base(tmp_path, draft=True)
    expect_error(drafting, "mtp-missing", "model.layers.4", "Choose a base that has it")


def test_draft_of_a_model_that_promises_none(tmp_path: Path) -> None:
    changes = {"num_nextn_predict_layers": 0}
    report = check_tiny(tmp_path, drop("model.layers.4."), changes, draft=True)
    expect_config_error(report, tmp_path, "mtp-missing", "num_nextn_predict_layers is 0")


def test_incomplete_mtp_layer(tmp_path: Path) -> None:
    edit = drop("model.layers.4.eh_proj", "model.layers.4.self_attn")
    report = check_tiny(tmp_path, edit, changes={"index_topk_freq": 4})
    finding = next(f for f in report.findings if f.code == "mtp-missing")
    assert (finding.level, finding.where) == ("error", "model.layers.4")
    assert "lacks eh_proj, self_attn" in finding.message


def below_mtp(header: Header) -> None:
    """Rename the MTP layer to where Qwen3-Next and others keep theirs."""
    layer = "model.layers.4."
    for name in [name for name in header if name.startswith(layer)]:
        header[f"mtp.layers.0.{name.removeprefix(layer)}"] = header.pop(name)


@pytest.mark.parametrize("promised", [None, 1])
def test_predictors_below_mtp_cannot_draft(tmp_path: Path, promised: int | None) -> None:
    report = check_tiny(tmp_path, below_mtp, {"num_nextn_predict_layers": promised})
    assert report.findings == ()
    drafting = check_base(tmp_path, draft=True)
    said = "keep their next-token predictors below mtp"
    expect_error(
        drafting, "mtp-missing", str(tmp_path / "config.json"), said, "Serve without the draft"
    )


# What every model computes itself.


def add_frequencies(header: Header) -> None:
    for index in range(5):
        header[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = ("F32", (32,))


@pytest.mark.parametrize("draft", [False, True])
def test_rotary_frequencies_take_no_bytes(tmp_path: Path, draft: bool) -> None:
    plain = check_tiny(tmp_path / "plain", draft=draft)
    stored = check_tiny(tmp_path / "stored", add_frequencies, draft=draft)
    assert stored.findings == plain.findings == ()
    assert stored.bytes_per_rank == plain.bytes_per_rank


def test_source_may_lack_rotary_frequencies(tmp_path: Path) -> None:
    header = glm_header(TINY_GLM)
    write_checkpoint(tmp_path / "other", TINY_GLM, header)
    add_frequencies(header)
    write_checkpoint(tmp_path / "base", TINY_GLM, header)
    plan = Plan.from_dict(
        {
            "version": 1,
            "base": "base",
            "sources": {name: {"path": str(tmp_path / name)} for name in ("base", "other")},
            "rules": [{"match": "model.layers.1", "source": "other"}],
        }
    )
    assert check(plan, platform=CPU).findings == ()


# What the base lacks.


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.embed_tokens", "expected as the model's embeddings"),
        ("model.norm", "expected as the norm behind the last layer"),
        ("lm_head", "config.json does not tie the output head"),
        (f"{LAYER}.input_layernorm", "other layers of its kind have it"),
        (f"{LAYER}.self_attn", "other layers of its kind have it"),
        (f"{LAYER}.self_attn.o_proj", "other layers of its kind have it"),
        (f"{LAYER}.mlp.gate", "other layers of its kind have it"),
        (f"{LAYER}.mlp.shared_experts.up_proj", "other layers of its kind have it"),
        (f"{EXPERTS}.*.up_proj", "other layers of its kind have it"),
        # Of the only dense layer.
        ("model.layers.0.self_attn.q_a_proj", "other layers of its kind have it"),
        ("model.layers.0.mlp.up_proj", "as the model's experts have it"),
    ],
)
def test_module_that_the_base_lacks(tmp_path: Path, name: str, said: str) -> None:
    lost = [f"{name.replace('*', str(expert))}." for expert in range(4)]
    report = check_tiny(tmp_path, drop(*lost))
    expect_error(report, "module-missing", name, said, "Download the checkpoint again")
    assert {finding.code for finding in report.findings} <= {"module-missing", "config-indexer"}


def test_router_that_kept_its_bias_alone(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.gate"
    expect_error(check_tiny(tmp_path, drop(f"{name}.weight")), "module-missing", name)


@pytest.mark.parametrize("lacking", [(2, 5), (2, 3, 6, 7)])
def test_module_that_several_layers_lack_is_how_they_are_made(
    tmp_path: Path, lacking: tuple[int, ...]
) -> None:
    """As where layers share keys and values, whatever config.json calls that."""
    config = TINY_GLM | {"num_hidden_layers": 8}
    header = glm_header(config)
    drop(*(f"model.layers.{index}.self_attn.kv_" for index in lacking))(header)
    assert check_base(write_checkpoint(tmp_path, config, header)).findings == ()


@pytest.mark.parametrize(
    "respelt",
    [
        {"embed_tokens": "embedding.word_embeddings", "layers.": "encoder.layers."},
        {"layers.": "layers.layers."},
    ],
    ids=["chatglm", "plamo"],
)
def test_embeddings_and_norm_are_found_wherever_they_stand(
    tmp_path: Path, respelt: dict[str, str]
) -> None:
    header = {}
    for name, value in glm_header(TINY_GLM).items():
        for ours, theirs in respelt.items():
            name = name.replace(f"model.{ours}", f"model.{theirs}")
        header[name] = value
    report = check_base(write_checkpoint(tmp_path, TINY_GLM, header))
    missing = [finding.where for finding in report.findings if finding.code == "module-missing"]
    assert not [where for where in missing if "embed" in where or "norm" in where]


@pytest.mark.parametrize("layers", [4, 5])  # without and with the MTP layer
def test_layers_of_unlike_kinds_are_not_compared(tmp_path: Path, layers: int) -> None:
    kinds = ["sliding", "sliding", "full", "sliding", "sliding"][:layers]
    lost = drop(f"{LAYER}.self_attn.o_proj")
    assert check_tiny(tmp_path, lost, {"layer_types": kinds}).findings == ()


def test_module_that_the_mtp_layer_lacks_matters_only_to_a_draft(tmp_path: Path) -> None:
    name = "model.layers.4.self_attn.o_proj"
    assert check_tiny(tmp_path, drop(name)).findings == ()
    expect_error(check_base(tmp_path, draft=True), "module-missing", name)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": None, "model_type": "lfm2_moe"},
        {"tie_word_embeddings": None, "n_routed_experts": None, "first_k_dense_replace": None},
        {"architectures": ["GlmMoeDsaModel"]},
    ],
)
def test_model_without_a_head_of_its_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    report = check_tiny(tmp_path, drop("lm_head"), changes)
    assert not any(finding.code == "module-missing" for finding in report.findings)


def test_tied_embeddings_are_what_the_family_s_config_says(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, drop("lm_head"), {"tie_word_embeddings": None})
    expect_error(report, "module-missing", "lm_head")


# Experts.


def test_experts_fewer_than_the_config_s(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, drop(f"{EXPERTS}.1."))
    expect_error(
        report, "config-experts", EXPERTS, "3 experts, 1 not among them", "expected 0 to 3"
    )


def test_experts_more_than_the_config_s(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, changes={"n_routed_experts": 3})
    found = [finding for finding in report.findings if finding.code == "config-experts"]
    assert [finding.where for finding in found] == [
        "model.layers.*.mlp.experts",
        "model.layers.*.mlp.gate",
        "model.layers.*.mlp.gate.e_score_correction_bias",
    ]
    assert "4 experts, 3 among them, expected 0 to 2" in found[0].message
    assert "has 4 rows, expected 3" in found[1].message
    assert "has 4 entries, expected 3" in found[2].message


def test_expert_without_one_of_its_projections(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, drop(f"{EXPERTS}.1.down_proj."))
    expect_error(report, "config-experts", f"{EXPERTS}.1", "lacks down_proj")


def test_moe_layer_without_experts(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, drop(EXPERTS))
    expect_error(report, "config-experts", LAYER, "hold no experts here, expected 4")


def test_dense_layer_with_experts(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, changes={"first_k_dense_replace": 3})
    finding = expect_error(
        report, "config-experts", "model.layers.*.mlp.experts", "expected a dense MLP"
    )
    assert "2 layers: model.layers.1.mlp.experts, model.layers.2.mlp.experts" in finding.message


@pytest.mark.parametrize(
    ("projection", "expected"),
    [
        ("up_proj", "[128, 256] (moe_intermediate_size x hidden_size"),
        ("down_proj", "[256, 128] (hidden_size x moe_intermediate_size"),
    ],
)
def test_one_expert_of_another_shape(tmp_path: Path, projection: str, expected: str) -> None:
    name = f"{EXPERTS}.2.{projection}"
    shape = (256, 128) if projection == "up_proj" else (128, 256)
    report = check_tiny(tmp_path, reshape(f"{name}.weight", *shape))
    expect_error(report, "config-experts", name, f"has shape {list(shape)}, expected {expected}")


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_vocabulary_of_another_size(tmp_path: Path, name: str) -> None:
    report = check_tiny(tmp_path, reshape(f"{name}.weight", 512, 256))
    expect_error(report, "config-sizes", name, "has shape [512, 256], expected [256, 256]")


def test_router_of_another_number_of_experts(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, reshape(f"{LAYER}.mlp.gate.weight", 8, 256))
    expect_error(report, "config-experts", f"{LAYER}.mlp.gate", "has 8 rows, expected 4")


def test_correction_bias_of_another_number_of_experts(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.gate.e_score_correction_bias"
    report = check_tiny(tmp_path, reshape(name, 5))
    expect_error(report, "config-experts", name, "has 5 entries, expected 4")


def test_correction_bias_that_vllm_would_not_build(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, changes={"topk_method": None})
    expect_error(
        report,
        "config-experts",
        "model.layers.*.mlp.gate.e_score_correction_bias",
        "topk_method is None in config.json, expected 'noaux_tc'",
    )


def test_correction_bias_that_is_missing(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.gate.e_score_correction_bias"
    expect_error(check_tiny(tmp_path, drop(name)), "config-experts", name, "missing, expected it")


def test_architecture_that_no_plan_can_follow(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, changes={"architectures": ["GptOssForCausalLM"]})
    expect_config_error(report, tmp_path, "architecture-unmixable", "GptOssForCausalLM")


def stack(gate_up_proj: tuple[int, ...], down_proj: tuple[int, ...]) -> Callable[[Header], None]:
    """Put the experts of LAYER into two tensors."""

    def edit(header: Header) -> None:
        drop(EXPERTS)(header)
        header[f"{EXPERTS}.gate_up_proj"] = ("BF16", gate_up_proj)
        header[f"{EXPERTS}.down_proj"] = ("BF16", down_proj)

    return edit


@pytest.mark.parametrize("down_proj", [(4, 256, 128), (4, 128, 256)])
def test_stacked_experts_are_told_apart_where_sizes_fit(
    tmp_path: Path, down_proj: tuple[int, ...]
) -> None:
    """By rows and by columns."""
    assert check_tiny(tmp_path, stack((4, 256, 256), down_proj)).findings == ()


def test_stacked_experts_of_unlike_sizes_are_a_warning(tmp_path: Path) -> None:
    """Where config.json has no size that one of them contradicts."""
    changes = {"moe_intermediate_size": None}
    finding = only(
        check_tiny(tmp_path, stack((4, 256, 256), (4, 128, 128)), changes), "experts-fused"
    )
    assert (finding.level, finding.where) == ("warning", EXPERTS)


@pytest.mark.parametrize(
    ("gate_up_proj", "down_proj", "code", "leaf", "said"),
    [
        ((3, 256, 256), (4, 256, 128), "config-experts", "gate_up_proj", "holds 3 experts, expe"),
        ((4, 256, 256), (5, 256, 128), "config-experts", "down_proj", "5 experts, expected 4"),
        (
            (4, 200, 256),
            (4, 256, 128),
            "config-sizes",
            "gate_up_proj",
            "has shape [4, 200, 256], expected [4, 256, 256], or rows and columns exchanged",
        ),
        (
            (4, 256, 256),
            (4, 128, 128),
            "config-sizes",
            "down_proj",
            "has shape [4, 128, 128], expected [4, 256, 128]",
        ),
    ],
)
def test_stacked_experts_that_the_config_contradicts(
    tmp_path: Path,
    gate_up_proj: tuple[int, ...],
    down_proj: tuple[int, ...],
    code: str,
    leaf: str,
    said: str,
) -> None:
    report = check_tiny(tmp_path, stack(gate_up_proj, down_proj))
    expect_error(report, code, f"{EXPERTS}.{leaf}", said)
    assert [finding.code for finding in report.findings] == [code]


def test_stacked_modules_that_the_config_contradicts(tmp_path: Path) -> None:
    def dotted(header: Header) -> None:
        stack((3, 256, 256), (4, 256, 128))(header)
        for leaf in ("gate_up_proj", "down_proj"):
            header[f"{EXPERTS}.{leaf}.weight"] = header.pop(f"{EXPERTS}.{leaf}")

    report = check_tiny(tmp_path, dotted)
    expect_error(report, "config-experts", f"{EXPERTS}.gate_up_proj.weight", "holds 3 experts")


# Groups of experts.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_group": 3}, "n_group is 3, expected a divisor of 4 experts"),
        ({"n_group": 2, "topk_group": 3}, "topk_group is 3, expected 1 to 2 (n_group)"),
        (
            {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
            "topk_group is 1: groups of 2 experts in all, expected 3 (num_experts_per_tok)",
        ),
        ({"n_group": 4, "topk_group": 2}, "n_group is 4, expected 2 or more experts in each"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, expected 1 to 4"),
    ],
)
def test_groups_that_fit_no_routing(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    expect_config_error(check_tiny(tmp_path, changes=changes), tmp_path, "config-groups", said)


def test_groups_that_fit(tmp_path: Path) -> None:
    assert check_tiny(tmp_path, changes={"n_group": 2, "topk_group": 1}).findings == ()


# Attention and indexers.


@pytest.mark.parametrize(
    ("name", "rows", "code", "said"),
    [
        (
            "self_attn.q_b_proj",
            512,
            "config-attention",
            "expected 256 rows (num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)",
        ),
        ("self_attn.kv_b_proj", 256, "config-attention", "expected 384"),
        ("self_attn.kv_a_proj_with_mqa", 128, "config-attention", "expected 192"),
        ("self_attn.q_a_proj", 256, "config-attention", "expected 128 rows (q_lora_rank"),
        (
            "self_attn.indexer.wq_b",
            128,
            "config-indexer",
            "expected 512 rows (index_n_heads * index_head_dim",
        ),
        ("self_attn.indexer.wk", 64, "config-indexer", "expected 128 rows (index_head_dim"),
        ("self_attn.indexer.weights_proj", 8, "config-indexer", "expected 4 rows (index_n_heads"),
    ],
)
def test_rows_that_the_config_contradicts(
    tmp_path: Path, name: str, rows: int, code: str, said: str
) -> None:
    module = f"{LAYER}.{name}"
    report = check_tiny(tmp_path, reshape(f"{module}.weight", rows, 256))
    expect_error(report, code, module, f"has shape [{rows}, 256], {said}")


def test_indexer_without_index_topk(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, changes={"index_topk": None})
    expect_error(
        report,
        "config-indexer",
        "model.layers.*.self_attn.indexer",
        "config.json has no index_topk",
    )


def test_indexer_that_lacks_a_part(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, drop(f"{INDEXER}.wk.", f"{INDEXER}.k_norm."))
    expect_error(report, "config-indexer", INDEXER, "lacks wk, k_norm")


def test_indexer_that_no_layer_builds_may_be_missing(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, drop(INDEXER), {"index_topk_freq": 2})
    assert report.findings == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"index_topk_freq": 0}, "index_topk_freq is 0, expected 1 or more"),
        ({"index_topk_pattern": 4}, "index_topk_pattern is 4, expected 4 entries, one a layer"),
        ({"indexer_types": []}, "indexer_types has 0 entries, expected 4"),
        ({"index_topk_pattern": "FFF"}, "index_topk_pattern has 3 entries, expected 4"),
        ({"index_topk_pattern": "FXFF"}, "index_topk_pattern holds 'X', expected F or S"),
        ({"index_topk_pattern": "SFFF"}, "begins with 'S', expected a layer with an indexer"),
        ({"indexer_types": ["full"] * 5}, "indexer_types has 5 entries, expected 4"),
        ({"indexer_types": ["full"] * 3 + ["none"]}, "indexer_types holds 'none'"),
        (
            {"index_topk_freq": 2, "indexer_types": ["full"] * 4},
            "indexer_types has layer 2 full, expected shared by index_topk_freq, which vLLM reads",
        ),
        (
            {"index_topk_pattern": "FFSF", "indexer_types": ["full"] * 3 + ["shared"]},
            "indexer_types has layer 2 full, expected shared by index_topk_pattern",
        ),
    ],
)
def test_schedules_of_indexers_that_contradict(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    report = check_tiny(tmp_path, changes=changes)
    expect_config_error(report, tmp_path, "config-indexer", said)


def test_shared_indexers_are_one_note(tmp_path: Path) -> None:
    report = check_tiny(tmp_path, changes={"indexer_types": ["full", "full", "shared", "shared"]})
    finding = only(report, "indexer-shared")
    assert (finding.level, finding.where) == ("note", "model.layers.*.self_attn.indexer")
    one = 2 * (512 * 128 + 128 * 256 + 4 * 256 + 2 * 128)
    assert f"{2 * one / 1024:.1f} KiB in all" in finding.message
    assert "2 indexers" in finding.message
    assert report.table is not None
    sizes = [route.served_bytes for route in report.table.routes.values()]
    mtp = [
        r.served_bytes for m, r in report.table.routes.items() if m.startswith("model.layers.4.")
    ]
    assert report.bytes_per_rank == (sum(sizes) - sum(mtp) - 2 * one,)


def test_stage_that_begins_with_a_shared_selection(tmp_path: Path) -> None:
    changes = {"index_topk_pattern": "FFSF"}
    report = check_tiny(tmp_path, changes=changes, pipeline_parallel_size=2, platform=CUDA)
    expect_error(
        report,
        "indexer-stage",
        "pipeline stage 1",
        "begins with layer 2, which reuses the selection that layer 1 makes",
        "VLLM_PP_LAYER_PARTITION",
    )


def test_stage_boundary_at_a_layer_with_an_indexer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    changes = {"index_topk_pattern": "FFSF"}
    report = check_tiny(tmp_path, changes=changes, pipeline_parallel_size=2, platform=CUDA)
    assert report.ok


def test_dense_attention_needs_no_selection(tmp_path: Path) -> None:
    changes = {"index_topk_pattern": "FFSF"}
    assert check_tiny(tmp_path, changes=changes, pipeline_parallel_size=2).ok


# The draft.


def test_draft_counts_its_layer_and_a_copy_of_the_embeddings_on_the_last_stage(
    tmp_path: Path,
) -> None:
    plain = check_tiny(tmp_path, pipeline_parallel_size=2)
    drafting = check_base(tmp_path, pipeline_parallel_size=2, draft=True)
    assert drafting.table is not None
    routes = drafting.table.routes
    copies = ("model.layers.4.embed_tokens", "model.layers.4.shared_head.head")
    mtp = sum(r.served_bytes for m, r in routes.items() if m.startswith("model.layers.4."))
    mtp -= sum(routes[copy].served_bytes for copy in copies)
    embeddings = routes["model.embed_tokens"].served_bytes
    assert drafting.bytes_per_rank[0] == plain.bytes_per_rank[0]
    assert drafting.bytes_per_rank[1] == plain.bytes_per_rank[1] + mtp + embeddings
    assert drafting.to_dict()["draft"] is True


def test_source_without_the_mtp_layer_matters_only_to_a_draft(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", TINY_GLM, glm_header(TINY_GLM))
    header = glm_header(TINY_GLM, fp8=True)
    drop("model.layers.4.")(header)
    write_checkpoint(tmp_path / "fp8", TINY_GLM | {"num_nextn_predict_layers": 0}, header)
    plan = Plan.from_dict(
        {
            "version": 1,
            "base": "base",
            "sources": {name: {"path": str(base.parent / name)} for name in ("base", "fp8")},
            "rules": [{"match": "**.experts", "source": "fp8"}],
        }
    )
    report = check(plan, platform=CPU)
    finding = only(report, "module-missing")
    assert (finding.level, finding.where) == ("warning", "model.layers.4")
    assert "check --mtp" in finding.message
    assert len(report.bytes_per_rank) == 1
    drafting = check(plan, platform=CPU, draft=True)
    assert {finding.code for finding in drafting.findings} == {"module-missing"}


# Rules.


@pytest.mark.parametrize(
    ("match", "said"),
    [
        (
            "model.layers.*.mlp.experts.{0-20}",
            "{0-20} counts to 20, but the last that it matches is",
        ),
        ("model.layers.{0-5,9}.self_attn", "{0-5,9} counts to 9"),
        ("**.experts.{0-1, 4}.up_proj", "Write no number above 3"),
    ],
)
def test_rule_that_counts_too_far_is_a_warning(tmp_path: Path, match: str, said: str) -> None:
    report = check_tiny(tmp_path, rules=((match, "base"),))
    finding = only(report, "rule-beyond")
    assert (finding.level, finding.where) == ("warning", "rule 1")
    assert said in finding.message
    assert report.ok


@pytest.mark.parametrize(
    "match",
    [
        "model.layers.{0-4}.mlp.experts.{0-3}",
        "model.layers.{0-2}.mlp.{gate,shared_experts.up_proj}",
        r"re:model\.layers\.\d{1,3}\..*",
    ],
)
def test_rule_that_counts_to_the_end_is_fine(tmp_path: Path, match: str) -> None:
    assert check_tiny(tmp_path, rules=((match, "base"),)).findings == ()


def test_glm_5_is_what_transformers_says_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GlmMoeDsaConfig().to_dict()
    ours = {"architectures", "dtype", "num_nextn_predict_layers", "topk_method", "scoring_func"}
    for key in GLM_5.keys() - ours - {"rope_parameters"}:
        assert GLM_5[key] == defaults[key], key
