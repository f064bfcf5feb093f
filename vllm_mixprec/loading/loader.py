# SPDX-License-Identifier: Apache-2.0
"""The model loader that vLLM finds under load format ``mixprec``."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn import Module
from tqdm import tqdm
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer

from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.errors import RouteError
from vllm_mixprec.loading.ledger import Ledger
from vllm_mixprec.loading.stream import read_tensors
from vllm_mixprec.models import PREPARE
from vllm_mixprec.quant.config import MixPrecConfig
from vllm_mixprec.routing import Route
from vllm_mixprec.routing.fused import parse_expert

logger = init_logger("vllm.mixprec")


class MixPrecLoader(BaseModelLoader):
    """Loads the modules that the plan routes and this rank holds, each from its own source."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: resolving the plan has brought what it names."""

    def create_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> Module:
        model = super().create_model(vllm_config, model_config, prefix)
        prepare = PREPARE.get(type(model).__name__)
        if prepare is not None:
            prepare(model)
        return model

    def load_weights(self, model: Module, model_config: ModelConfig) -> None:
        """Fill the model, and make sure that every tensor and every parameter is accounted for.

        Raises:
            CheckpointError: a file changed since its header was read.
            RouteError: a tensor was loaded nowhere or twice, or a parameter not at all.
        """
        begun = time.perf_counter()
        ledger = Ledger(model)
        model.load_weights(ledger.feed(self.get_all_weights(model_config, model)))
        ledger.close()
        logger.info("mixprec weights loaded in %.2f s", time.perf_counter() - begun)

    def get_all_weights(
        self, model_config: ModelConfig, model: Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (base name, tensor) for everything this rank holds, as the layers expect it.

        Widened modules come as one ``weight`` in the model's dtype, all others as stored.
        """
        config = get_current_vllm_config().quant_config
        assert isinstance(config, MixPrecConfig)
        routes = rank_routes(model, config)
        wanted = {
            (spec.file, spec.name): (route, suffix)
            for route in routes
            for suffix, spec in route.tensors.items()
        }
        specs = [spec for route in routes for spec in route.tensors.values()]
        total_bytes = sum(spec.nbytes for spec in specs)
        for line in summarise(routes):
            logger.info("%s", line)
        shown = self.load_config.use_tqdm_on_load and get_tensor_model_parallel_rank() == 0
        bar = tqdm(
            total=total_bytes,
            desc="Loading mixprec weights",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not shown,
        )
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        with bar:
            for spec, tensor in read_tensors(specs):
                route, suffix = wanted[spec.file, spec.name]
                if suffix == "g_idx" or (route.widened and suffix != "bias"):
                    parts = waiting.setdefault(route.module, {})
                    parts[suffix] = tensor
                    yield from _whole(route, parts, waiting, model_config.dtype)
                else:
                    if suffix == "qzeros":
                        _check_zeros(route, tensor)
                    yield f"{route.module}.{suffix}", tensor
                bar.update(spec.nbytes)
        if waiting:
            raise RouteError(
                f"{next(iter(waiting))}: {len(waiting)} modules were read in part; expected all of "
                "their companions. Report this plan"
            )


def _whole(
    route: Route,
    parts: dict[str, torch.Tensor],
    waiting: dict[str, dict[str, torch.Tensor]],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's weight once all its companions are here; check an activation order."""
    if not route.widened:
        del waiting[route.module]
        _check_order(route, parts["g_idx"])
        return
    if len(parts) < sum(suffix != "bias" for suffix in route.tensors):
        return
    del waiting[route.module]
    yield f"{route.module}.weight", dequantize(route.stored, parts, dtype)


def _check_order(route: Route, g_idx: torch.Tensor) -> None:
    """Make sure that rows are grouped in order, as the config said and the kernel assumes."""
    group_size = route.stored.group_size
    assert group_size is not None, f"{route.module}: a gptq scheme has a group size"
    expected = torch.arange(g_idx.numel(), dtype=g_idx.dtype).div(group_size, rounding_mode="floor")
    if not torch.equal(g_idx, expected):
        spec = route.tensors["g_idx"]
        raise RouteError(
            f"{spec.name} in {spec.file}: rows are not grouped in order though the checkpoint's "
            f"config.json says desc_act false; expected row k in group k // {group_size}. Set "
            "desc_act to true there, or choose another source"
        )


def _check_zeros(route: Route, qzeros: torch.Tensor) -> None:
    """Make sure that zero points are what the config's ``sym`` promises and kernels assume."""
    if not route.stored.symmetric:
        return
    bits = route.stored.bits
    stored = (1 << (bits - 1)) - route.stored.zero_offset
    word = sum(stored << shift for shift in range(0, 32, bits))
    if bool((qzeros != word - (word >> 31 << 32)).any()):
        spec = route.tensors["qzeros"]
        raise RouteError(
            f"{spec.name} in {spec.file}: zero points vary though the checkpoint's config.json "
            f"says sym true; expected {stored} everywhere. Set sym to false there, or choose "
            "another source"
        )


def rank_routes(model: Module, config: MixPrecConfig) -> list[Route]:
    """Return the routes of the modules that this rank's part of ``model`` holds."""
    held = _held(model)
    routes = config.table.routes
    return [routes[module] for name, module in config.base_names.items() if held(name)]


def _held(model: Module) -> Callable[[str], bool]:
    """Return whether this rank holds a module, by its vLLM name.

    Not held: what pipeline parallelism put on other stages, what expert parallelism put on other
    ranks, and an output head tied to the embeddings.
    """
    missing = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, (PPMissingLayer, StageMissingLayer))
    )
    maps = {
        module.layer_name: module.expert_map_manager
        for module in model.modules()
        if isinstance(module, MoERunner)
    }
    tied = getattr(model.config, "tie_word_embeddings", False)

    def held(name: str) -> bool:
        if f"{name}.".startswith(missing) or (tied and name.endswith("lm_head")):
            return False
        expert = parse_expert(name)
        if expert is None or expert.layer not in maps:
            return True
        return bool(maps[expert.layer].is_local_expert(expert.expert))

    return held


def summarise(routes: Iterable[Route]) -> list[str]:
    """One line for each source and format of this rank, and one for what is widened."""
    totals: dict[tuple[str, str], list[int]] = {}
    widened: dict[str, list[int]] = {}
    for route in routes:
        entry = totals.setdefault((route.source, route.stored.label), [0, 0])
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
