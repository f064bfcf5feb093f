# SPDX-License-Identifier: Apache-2.0
"""The model loader that vLLM finds under load format ``mixprec``."""

import re
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch.nn import Module
from tqdm import tqdm
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer
from vllm.platforms import current_platform

from vllm_mixprec.checkpoint import TensorSpec
from vllm_mixprec.checkpoint.hub import fetch
from vllm_mixprec.checkpoint.ranges import RangeReader
from vllm_mixprec.checkpoint.spelling import class_name
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.errors import PlanError, UnsupportedError
from vllm_mixprec.loading.fresh_pages import made_ahead
from vllm_mixprec.loading.intake import Intake
from vllm_mixprec.loading.ledger import Ledger
from vllm_mixprec.loading.pack_ahead import PackAhead
from vllm_mixprec.loading.placement import Placement
from vllm_mixprec.loading.reload import as_sources_are
from vllm_mixprec.loading.rows import copied_tensors, rank_rows, shared_tensors
from vllm_mixprec.models import PREPARE
from vllm_mixprec.patches import apply_patches
from vllm_mixprec.quant.config import LOAD_FORMAT, MixPrecConfig, dtype_of
from vllm_mixprec.routing import Route, load_route_table
from vllm_mixprec.routing.fused import parse_expert
from vllm_mixprec.routing.structure import ModelDims, layer_index

logger = init_logger("vllm.mixprec")

_BAR_STEP_BYTES = 16 << 20
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")


class MixPrecLoader(BaseModelLoader):
    """Loads the modules that the plan routes and this rank holds, each from its own source."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: each rank downloads the shards that it reads."""

    def create_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> Module:
        """Build the model, and put an :class:`Intake` before its ``load_weights``.

        Raises:
            PlanError: the model is not served through a plan.
        """
        config = _plan_config(vllm_config)
        config.begin_model()
        apply_patches(vllm_config, model_config.architectures)
        model = super().create_model(vllm_config, model_config, prefix)
        prepare = PREPARE.get(type(model).__name__)
        if prepare is not None:
            prepare(model)
        dims = ModelDims.from_config(config.table.base_config)
        runners = [module for module in model.modules() if isinstance(module, MoERunner)]
        model.mixprec_intake = Intake(
            load=model.load_weights,
            known=config.table.routes,
            unserved=lambda module: dims.is_known(module) and not dims.is_loaded(module),
            held={route.module: route for route in rank_routes(model, config)},
            experts={
                layer: runner.routed_experts
                for runner in runners
                if (layer := config.base_prefix(runner.layer_name)) in config.table.expert_layers
            },
            dtype=model_config.dtype,
            spell=partial(class_name, config=config.table.base_config),
        )
        routes = model.mixprec_intake.held.values()
        dp_rank = vllm_config.parallel_config.data_parallel_rank
        rows = rank_rows(routes, config.table, get_tensor_model_parallel_rank(), dp_rank)
        model.mixprec_rows = rows
        model.mixprec_shared = shared_tensors(routes, config.table, rows)
        model.mixprec_copied = set()
        if current_platform.is_cpu():
            model.mixprec_copied = copied_tensors(routes, config.table, model_config.dtype)
        model.load_weights = model.mixprec_intake.load_weights
        model.mixprec_served = model_config.model
        model.mixprec_asked = False
        model.mixprec_resolve = partial(
            load_route_table,
            config.table.plan,
            config.table.layout,
            config.table.platform,
            dtype_of(vllm_config),
        )
        return model

    def load_weights(self, model: Module, model_config: ModelConfig) -> None:
        """Fill the model, and make sure that every tensor and every parameter is accounted for.

        Raises:
            CheckpointError: a file changed since its header was read.
            RouteError: a tensor was loaded nowhere or twice, or a parameter not at all.
        """
        begun = time.perf_counter()
        config = _plan_config(get_current_vllm_config())
        ahead = PackAhead()
        on_loaded = ahead.loaded if current_platform.is_cpu() else None
        on_first = None
        # A reload finds the parameters where kernels know them to be.
        if model.mixprec_copied and not model.mixprec_asked:
            on_first = Placement(model, model.mixprec_intake.held.values()).suit
        ledger = Ledger(model, lent_parameters(model, config), on_loaded, on_first)
        try:
            # Closed also by an error that keeps the generator alive: who packs waits for reading.
            with ahead, closing(self.get_all_weights(model_config, model)) as weights:
                with made_ahead(parameter.data for parameter in model.parameters()):
                    model.load_weights(weights, ledger, ahead.wait_for)
                model.mixprec_intake.close()
                ledger.close()
        finally:
            ledger.release()
        logger.info("mixprec weights loaded in %.2f s", time.perf_counter() - begun)

    def get_all_weights(
        self, model_config: ModelConfig, model: Module
    ) -> Generator[tuple[str, torch.Tensor]]:
        """Yield (base name, tensor as stored) for everything this rank holds, in file order.

        Raises:
            UnsupportedError: vLLM asks for the weights of another directory, as its
                ``reload_weights`` with a path does.
            CheckpointError: of a reload, a file holds other tensors by now.
        """
        if model_config.model != model.mixprec_served:
            asked, model_config.model = model_config.model, model.mixprec_served
            raise UnsupportedError(
                f"weights of {asked} for a model served from {model.mixprec_served}; expected the "
                "same, whose plan says where each tensor comes from. Compose another directory and "
                "serve that"
            )
        routes = list(model.mixprec_intake.held.values())
        names = {
            (spec.file, spec.name): f"{route.module}.{suffix}"
            for route in routes
            for suffix, spec in route.tensors.items()
        }
        specs = [spec for route in routes for spec in route.tensors.values()]
        rows, shared, copied = model.mixprec_rows, model.mixprec_shared, model.mixprec_copied
        if model.mixprec_asked:  # a reload, which is to read what the sources hold by now
            now = as_sources_are(routes, model.mixprec_resolve)
            specs = list(now.values())
            rows = {now[spec]: part for spec, part in rows.items()}
            shared, copied = ({now[spec] for spec in some} for some in (shared, copied))
        model.mixprec_asked = True
        read = partial(read_tensors, specs, rows, shared=shared, copied=copied)
        return self._read(routes, names, specs, read)

    def _read(
        self,
        routes: list[Route],
        names: dict[tuple[Path, str], str],
        specs: list[TensorSpec],
        read: Callable[..., Generator[tuple[TensorSpec, torch.Tensor]]],
    ) -> Generator[tuple[str, torch.Tensor]]:
        for line in summarise(routes):
            logger.info("%s", line)
        fetch(spec.file for spec in specs)
        shown = self.load_config.use_tqdm_on_load and get_tensor_model_parallel_rank() == 0
        bar = tqdm(
            total=sum(spec.nbytes for spec in specs),
            desc="Loading mixprec weights",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not shown,
        )
        reader = RangeReader(may_pass=True)
        with bar, closing(read(reader=reader)) as tensors:
            shown_bytes = read_bytes = 0
            for spec, tensor in tensors:
                yield names[spec.file, spec.name], tensor
                read_bytes += spec.nbytes
                if read_bytes - shown_bytes >= _BAR_STEP_BYTES:
                    bar.update(read_bytes - shown_bytes)
                    shown_bytes = read_bytes
            bar.update(read_bytes - shown_bytes)
        if (report := reader.report()) is not None:
            logger.info("%s", report)


def _plan_config(vllm_config: VllmConfig) -> MixPrecConfig:
    config = vllm_config.quant_config
    if not isinstance(config, MixPrecConfig):
        raise PlanError(
            f"--load-format {LOAD_FORMAT} for a model without a plan; expected a directory made by "
            "`vllm-mixprec compose`. Leave the flag out"
        )
    return config


def rank_routes(model: Module, config: MixPrecConfig) -> list[Route]:
    """Return the routes of the modules that this rank's part of ``model`` holds."""
    held = _held(model, config)
    routes = config.table.routes
    return [routes[module] for name, module in config.base_names.items() if held(name)]


def _held(model: Module, config: MixPrecConfig) -> Callable[[str], bool]:
    """Return whether this rank holds a module, by its vLLM name.

    Not held: what pipeline parallelism put on other stages, what expert parallelism put on other
    ranks, the next-token predictors (or, for a draft, everything else), indexers of layers that
    share another's selection, and an output head tied to the embeddings. A layer that the model
    lacks for no such reason counts as held, so that the ledger finds it.
    """
    dims = ModelDims.from_config(config.table.base_config)
    modules = dict(model.named_modules())
    missing = tuple(
        f"{name}."
        for name, module in modules.items()
        if isinstance(module, (PPMissingLayer, StageMissingLayer))
    )
    maps = {
        module.layer_name: module.expert_map_manager
        for module in modules.values()
        if isinstance(module, MoERunner)
    }
    layers = _layers(modules)
    draft = _is_draft(model, config)
    lent = lent_parameters(model, config)
    tied = getattr(model.config, "tie_word_embeddings", False)

    def held(name: str) -> bool:
        if f"{name}.".startswith(missing) or (tied and name.endswith("lm_head")):
            return False
        if not dims.is_loaded(name, draft):
            return False
        layer = layer_index(name)
        if draft and (name not in modules if layer is None else layer not in layers):
            return False
        if f"{name}.weight" in lent:
            return False
        expert = parse_expert(name)
        if expert is None or expert.layer not in maps:
            return True
        return bool(maps[expert.layer].is_local_expert(expert.expert))

    return held


def _layers(modules: Iterable[str]) -> set[int]:
    """Numbers of the decoder or MTP layers among a model's modules."""
    return {int(found[1]) for name in modules if (found := _LAYER.search(name))}


def _is_draft(model: Module, config: MixPrecConfig) -> bool:
    """Whether a model is the base's next-token predictors, built as a draft."""
    dims = ModelDims.from_config(config.table.base_config)
    layers = _layers(name for name, _ in model.named_modules())
    return bool(layers) and all(dims.is_mtp_layer(layer) for layer in layers)


def lent_parameters(model: Module, config: MixPrecConfig) -> set[str]:
    """Parameters of a draft that vLLM replaces by the target's when both are loaded.

    v1/spec_decode/llm_base_proposer.py ``_maybe_share_lm_head`` and ``_maybe_share_embeddings``,
    v1/worker/gpu/spec_decode/eagle/utils.py (0.32): the head of every predictor, and on a single
    pipeline stage the embeddings. What a checkpoint repeats of them need not be read.
    """
    if not _is_draft(model, config):
        return set()
    lent = ("shared_head.head.weight",)
    if get_pp_group().world_size == 1:
        lent += ("embed_tokens.weight",)
    return {name for name, _ in model.named_parameters() if name.endswith(lent)}


def summarise(routes: Iterable[Route]) -> list[str]:
    """One line for each source and format of this rank, and one for what is widened."""
    totals: dict[tuple[str, str], list[int]] = {}
    widened: dict[str, list[int]] = {}
    for route in routes:
        label = route.stored.label + (f" as {route.served.label}" if route.relaid else "")
        entry = totals.setdefault((route.source, label), [0, 0])
        entry[0] += 1
        entry[1] += route.stored_bytes
        if route.widened:
            why = widened.setdefault(route.reason or "", [0, 0])
            why[0] += 1
            why[1] += route.served_bytes - route.stored_bytes
    lines = [
        f"from {source}: {count} modules {label}, {nbytes / 2**20:.1f} MiB"
        for (source, label), (count, nbytes) in sorted(totals.items())
    ]
    lines += [
        f"widened: {count} modules, {more / 2**20:+.1f} MiB in memory: {reason}"
        for reason, (count, more) in sorted(widened.items())
    ]
    return lines
