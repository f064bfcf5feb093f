# SPDX-License-Identifier: Apache-2.0
"""Defects of vLLM, and one of transformers, that are mended here, one module each.

:func:`patches` is the whole list. Each says what is broken, how it is mended, how to tell whether
the installed vLLM has it, and when its module can be deleted. ``vllm-mixprec doctor`` prints their
state. What a plan's loader makes impossible needs no patch; it is listed all the same, because
users of whole checkpoints meet it.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.mixprec")


@dataclass(frozen=True, slots=True)
class Patch:
    """One defect of vLLM.

    Attributes:
        name: the module's.
        issues: where users reported it, such as ``vllm#46600``; empty when nobody has.
        broken: the symptom, with file and version.
        mended: how.
        needed: whether the installed vLLM has the defect.
        apply: mends it in this process, idempotent; None where other code of ours never meets it.
        remove_when: what makes the module superfluous.
    """

    name: str
    issues: tuple[str, ...]
    broken: str
    mended: str
    needed: Callable[[], bool]
    apply: Callable[[], object] | None
    remove_when: str


def apply_patches(vllm_config: "VllmConfig", architectures: Iterable[str]) -> None:
    """Mend in this process what a model needs and the installed vLLM does not do."""
    names = ["reload_end"]
    if "DeepseekForCausalLM" in architectures:
        names.append("deepseek_mha_names")
    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    if vllm_config.speculative_config is not None and stages > 1:
        names.append("draft_stages")
    model = vllm_config.model_config
    if current_platform.is_cpu() and model is not None and model.use_mla:
        names += ["amx_latent_attention", "cpu_rotary"]
    if current_platform.is_cpu():
        names += ["numba_imported", "tied_head"]
    if current_platform.is_cpu() and stages > 1:
        names.append("cpu_stages")
    if current_platform.is_cpu() and parallel.data_parallel_size > 1:
        names.append("cpu_data_parallel")
    for name in names:
        patch: Patch = importlib.import_module(f"vllm_mixprec.patches.{name}").PATCH
        if patch.apply is not None and patch.needed():
            logger.info_once("mended in vLLM (%s): %s", patch.name, patch.mended)
            patch.apply()


def patches() -> tuple[Patch, ...]:
    """Return every patch; imports vLLM's models."""
    from vllm_mixprec.patches import (
        amx_latent_attention,
        amx_permission,
        config_size,
        cpu_data_parallel,
        cpu_rotary,
        cpu_stages,
        deepseek_mha_names,
        draft_stages,
        engine_core_wait,
        indexer_types,
        indexer_wk,
        metrics_route,
        numba_imported,
        reload_end,
        stat_logger_client,
        tied_head,
        vocabulary,
        worker_hook,
    )

    return (
        amx_latent_attention.PATCH,
        amx_permission.PATCH,
        config_size.PATCH,
        cpu_data_parallel.PATCH,
        cpu_rotary.PATCH,
        cpu_stages.PATCH,
        deepseek_mha_names.PATCH,
        draft_stages.PATCH,
        engine_core_wait.PATCH,
        indexer_types.PATCH,
        indexer_wk.STAGES,
        indexer_wk.CALLS,
        indexer_wk.FORMATS,
        metrics_route.PATCH,
        numba_imported.PATCH,
        reload_end.PATCH,
        stat_logger_client.PATCH,
        tied_head.PATCH,
        vocabulary.PATCH,
        worker_hook.PATCH,
    )
