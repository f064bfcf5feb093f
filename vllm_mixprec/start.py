# SPDX-License-Identifier: Apache-2.0
"""What happens in vLLM's front end before a mixed model's engine starts."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from vllm.config import LoadConfig, ModelConfig, SpeculativeConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.composition import plan_change
from vllm_mixprec.couplings import SERVING, find_unfit
from vllm_mixprec.device import refuse_old_driver, refuse_too_little_memory
from vllm_mixprec.errors import PlanError, UnsupportedError
from vllm_mixprec.experts.collect import ENABLED_KEY
from vllm_mixprec.experts.setting import metrics_setting
from vllm_mixprec.models.dsa import (
    ARCHITECTURES_KEY,
    DENSE,
    has_sparse_attention,
    serve_dense,
)
from vllm_mixprec.patches.indexer_types import spell_pattern
from vllm_mixprec.plan import Plan
from vllm_mixprec.quant.checked import note_checked
from vllm_mixprec.quant.config import (
    LOAD_FORMAT,
    METHOD,
    OVERRIDE_KEY,
    dtype_of,
    is_own_draft,
    layout_of,
    plan_path,
)
from vllm_mixprec.quant.methods import usable_platform
from vllm_mixprec.routing import Finding, RouteTable
from vllm_mixprec.routing.arithmetic import arithmetic_differences
from vllm_mixprec.routing.check import examine
from vllm_mixprec.routing.parts import spell_layers
from vllm_mixprec.routing.platform import dispatched_flags
from vllm_mixprec.routing.sampling import MAY_BE_MEANT, compare_samples
from vllm_mixprec.routing.sources import config_differences

logger = init_logger("vllm.mixprec")


def prepare_model(model_config: ModelConfig) -> None:
    """Adapt the config of a DSA model, mixed or not, before an engine's config is made of it.

    Raises:
        UnsupportedError: more context is asked for than can be served here.
    """
    if model_config.architecture not in DENSE:
        return
    spell_pattern(model_config.hf_config)
    if not has_sparse_attention():
        serve_dense(model_config)


def prepare(vllm_config: VllmConfig) -> None:
    """Check the plan for this layout, and have vLLM load through it.

    Raises:
        UnsupportedError: this vLLM is not what the package leans on, or the layout is not known.
        PlanError: the check found errors; they are all in the message.
    """
    _refuse_unfit_vllm()
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    path = plan_path(model_config.model, model_config.hf_config)
    _refuse_parallelism(vllm_config)
    refuse_old_driver()
    plan = Plan.from_yaml(path)
    _refuse_changed_plan(plan, model_config)
    layout = layout_of(vllm_config)
    report, checkpoints = examine(plan, layout, usable_platform(), dtype=dtype_of(vllm_config))
    _refuse_errors(path, report.findings)
    assert report.table is not None
    _compare_config(path, plan, checkpoints[plan.base], model_config)
    for line in spell_layers(report.table):
        logger.info("%s", line)
    for finding in (*report.findings, *_compare_samples(path, report.table, checkpoints)):
        say = logger.warning if finding.level == "warning" else logger.info
        say("%s: %s", finding.where, finding.message)
    if load_config.load_format not in ("auto", LOAD_FORMAT):
        raise PlanError(
            f"--load-format {load_config.load_format} with a mixed model; expected {LOAD_FORMAT}, "
            "which reads each tensor from the source the plan names. Leave the flag out"
        )
    refuse_too_little_memory(vllm_config, report.bytes_per_rank)
    _prepare_draft(vllm_config.speculative_config, load_config, path)
    _choose_attention(vllm_config)
    load_config.load_format = LOAD_FORMAT
    # The formats decide what is compiled, so they belong in the key of vLLM's compile cache; so
    # does a CPU, since machines may share the cache's directory and vLLM's key has only the GPU.
    keys = {"mixprec_routes_sha256": report.table.fingerprint}
    if current_platform.is_cpu():
        keys["mixprec_cpu_flags"] = " ".join(dispatched_flags())
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), **keys}
    # Behind the draft, whose own loader would refuse what it does not know.
    note_checked(vllm_config, report.table)


def prepare_counters(vllm_config: VllmConfig) -> None:
    """Have the workers of an MoE model, mixed or not, count which experts work.

    Raises:
        UnsupportedError: the environment variable for it holds what it cannot.
    """
    if not vllm_config.model_config.is_moe or metrics_setting() == "off":
        return
    additional = vllm_config.additional_config or {}
    if not isinstance(additional, dict):
        logger.warning(
            "expert statistics are off: additional_config is of type %s; expected a dict, in which "
            "the workers are told to count",
            type(additional).__name__,
        )
        return
    vllm_config.additional_config = {**additional, ENABLED_KEY: True}


def prepare_metrics() -> None:
    """Have the metrics' plug-in meet the engine's client, which is still to come.

    Only front ends get here. Any model must start where this cannot be done.
    """
    try:
        from vllm_mixprec.patches import stat_logger_client

        if stat_logger_client.needed():
            stat_logger_client.apply()
    except Exception:
        logger.exception("expert statistics are not exported: this vLLM's AsyncLLM is not known")


def _prepare_draft(
    speculative: SpeculativeConfig | None, load_config: LoadConfig, plan: Path
) -> None:
    """Have a draft load: the model's own MTP layers through the plan, another checkpoint not."""
    if speculative is None or speculative.draft_model_config is None:
        return
    if is_own_draft(speculative):
        draft = speculative.draft_model_config
        draft.quantization = METHOD
        setattr(draft.hf_config, OVERRIDE_KEY, str(plan))
        if speculative.draft_load_config is not None:
            logger.warning("draft_load_config is not used: the plan routes the MTP layers too")
            speculative.draft_load_config = None
    elif speculative.draft_load_config is None:
        speculative.draft_load_config = replace(load_config, load_format="auto")


def _choose_attention(vllm_config: VllmConfig) -> None:
    """Have latent attention on a CPU compute in other dtypes than bfloat16.

    With AMX vLLM 0.32 (platforms/cpu.py) takes a backend for it that has no other.
    """
    model_config, chosen = vllm_config.model_config, vllm_config.attention_config
    if not current_platform.is_cpu() or not model_config.use_mla or chosen.backend is not None:
        return
    if model_config.dtype != torch.bfloat16:
        chosen.backend = AttentionBackendEnum.CPU_MLA


def _refuse_changed_plan(plan: Plan, model_config: ModelConfig) -> None:
    """Refuse the plan of a composed directory that is not the one compose wrote there."""
    if getattr(model_config.hf_config, OVERRIDE_KEY, None) is not None:
        return
    changed = plan_change(plan, model_config.hf_config.quantization_config)
    if changed is not None:
        raise PlanError(f"{plan.path}: {changed}")


def _compare_config(path: Path, plan: Plan, base: Checkpoint, model_config: ModelConfig) -> None:
    """Refuse the config of another model than the plan's base; warn where it computes otherwise.

    ``--hf-overrides`` can name a plan for another model than the one that is served, and change
    what the config says; a composed directory's config.json can be edited.
    """
    config = model_config.hf_config
    served = config.to_dict()
    served["architectures"] = served.get(ARCHITECTURES_KEY, served.get("architectures"))
    differences = config_differences(base.config, served)
    if differences:
        raise PlanError(
            f"{path}: the plan's base is another model than {model_config.model}: "
            f"{'; '.join(differences)}. Serve the directory of source {plan.base!r}"
        )
    differences = arithmetic_differences(base.config, served)
    if differences:
        logger.warning(
            "%s: computes otherwise than base %r, whose weights are served: %s",
            model_config.model,
            plan.base,
            "; ".join(differences),
        )
    if getattr(config, OVERRIDE_KEY, None) is None:  # a composed directory
        return
    is_base = model_config.model == plan.sources[plan.base].path
    if not is_base and Path(model_config.model).resolve() != base.path.resolve():
        logger.warning(
            "%s: gives config and tokenizer, and base %r, %s, the weights; make sure that they "
            "belong together",
            model_config.model,
            plan.base,
            base.path,
        )


def _refuse_errors(path: Path, findings: Iterable[Finding]) -> None:
    errors = [f"{f.where}: {f.message}" for f in findings if f.level == "error"]
    if errors:
        raise PlanError("\n".join([f"{path}: the plan cannot be served:", *errors]))


def _compare_samples(
    path: Path, table: RouteTable, checkpoints: Mapping[str, Checkpoint]
) -> list[Finding]:
    """Refuse what a few weights tell is wrong; warn of what may be meant, as fine-tuned experts.

    Where ``options.weights_differ`` is ``error``, that is refused, too.
    """
    found = compare_samples(table, checkpoints)
    is_strict = table.plan.options.weights_differ == "error"
    remedy = " If this is meant, set options.weights_differ to warn in the plan."
    _refuse_errors(
        path,
        (
            replace(each, message=each.message + remedy) if each.code in MAY_BE_MEANT else each
            for each in found
            if is_strict or each.code not in MAY_BE_MEANT
        ),
    )
    said = "One weight of its kind was looked at: see check --deep."
    return [replace(each, level="warning", message=f"{each.message} {said}") for each in found]


def _refuse_unfit_vllm() -> None:
    """Refuse a vLLM that has moved what loading leans on, before it fails somewhere inside."""
    unfit = find_unfit(usable_platform().family, SERVING)
    if unfit is not None:
        raise UnsupportedError(unfit)


def _refuse_parallelism(vllm_config: VllmConfig) -> None:
    """Refuse the layouts that routing does not know how vLLM cuts."""
    parallel = vllm_config.parallel_config
    parts = parallel.prefill_context_parallel_size
    if parts > 1 and not parallel.enable_expert_parallel:
        raise UnsupportedError(
            f"{parts} prefill-context-parallel ranks cut every expert {parts} times more; "
            "expected 1 for a mixed model. Add --enable-expert-parallel"
        )
    if parallel.enable_eplb:
        raise UnsupportedError(
            "--enable-eplb with a mixed model: its physical experts have no precision of their "
            "own. Leave the flag out"
        )
