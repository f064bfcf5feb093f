# SPDX-License-Identifier: Apache-2.0
"""vLLM's own models of a plan, such as a mixed GLM-5 and its draft, built in this process."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Module
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.loading.indexers import FIXTURES
from vllm_mixprec import Plan, compose
from vllm_mixprec.checkpoint import open_checkpoint
from vllm_mixprec.checkpoint.stream import read_tensors
from vllm_mixprec.loading.intake import Intake
from vllm_mixprec.loading.loader import MixPrecLoader, rank_routes
from vllm_mixprec.loading.pack_ahead import PackAhead
from vllm_mixprec.quant.methods import usable_platform
from vllm_mixprec.routing import Layout, Route, RouteTable, load_route_table

needs_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM does not run on the CPU")
GLM = FIXTURES / "architectures" / "glm_moe_dsa" / "bf16"
FULL, SHARED, MTP = (0, 1), 2, 3
"""Layers with an indexer, without one, and of multi-token prediction."""
Tensors = dict[str, torch.Tensor]


def indexer(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.indexer"


def write_base(folder: Path) -> Path:
    """Copy the BF16 fixture; the layer that shares a selection gets indexer tensors too."""
    folder.mkdir(parents=True)
    tensors = {k: v for file in GLM.glob("*.safetensors") for k, v in load_file(file).items()}
    for name in [name for name in tensors if name.startswith(indexer(0))]:
        tensors[name.replace(indexer(0), indexer(SHARED))] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((GLM / "config.json").read_text())
    config |= {"index_topk_freq": 2, "indexer_types": ["full", "full", "shared"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Built:
    """A model as the loader made it; ``held`` are the base's modules that it loads."""

    model: Module
    model_config: ModelConfig
    held: tuple[str, ...]

    def fused(self, layer: int) -> torch.nn.Parameter:
        """The parameter that wk and weights_proj of a layer are stacked in."""
        block = "mtp_block." if layer == MTP else ""
        name = f"model.layers.{layer}.{block}self_attn.indexer.wk_weights_proj.weight"
        return self.model.get_parameter(name)

    def intake(self, table: RouteTable) -> Intake:
        """An intake of another plan before the model's own ``load_weights``."""
        return Intake(
            load=partial(type(self.model).load_weights, self.model),
            known=table.routes,
            held={module: table.routes[module] for module in self.held},
            experts={},
            dtype=self.model_config.dtype,
        )


@dataclass(frozen=True)
class Serving:
    """One rank that serves a composed directory."""

    base: Path
    config: VllmConfig
    loader: MixPrecLoader

    def build(self, is_draft: bool = False) -> Built:
        config = self.config.model_config
        if is_draft:
            config = self.config.speculative_config.draft_model_config
        self.config.compilation_config.static_forward_context.clear()
        with set_default_torch_dtype(config.dtype):
            model = self.loader.create_model(self.config, config)
        held = rank_routes(model, self.config.quant_config)
        return Built(model, config, tuple(route.module for route in held))

    def table(self, sources: Mapping[str, Path], rules: Mapping[str, str]) -> RouteTable:
        """Resolve another plan over the same base."""
        plan = make_plan(self.base, sources, rules)
        return load_route_table(plan, Layout(draft=True), usable_platform())


def make_plan(base: Path, sources: Mapping[str, Path], rules: Mapping[str, str]) -> Plan:
    paths: dict[str, Any] = {name: {"path": str(path)} for name, path in sources.items()}
    return Plan.from_dict(
        {
            "version": 1,
            "base": "base",
            "sources": {"base": {"path": str(base)}, **paths},
            "rules": [{"match": match, "source": source} for match, source in rules.items()],
        }
    )


@contextmanager
def serve(
    folder: Path,
    base: Path,
    sources: Mapping[str, Path],
    rules: Mapping[str, str],
    has_draft: bool = True,
    packs_ahead: bool = False,
) -> Iterator[Serving]:
    """Compose a plan and make this process the one rank that serves it."""
    plan = make_plan(base, sources, rules)
    with serve_plan(folder, base, plan, has_draft, packs_ahead) as serving:
        yield serving


@contextmanager
def serve_plan(
    folder: Path, base: Path, plan: Plan, has_draft: bool = False, packs_ahead: bool = False
) -> Iterator[Serving]:
    """Compose a plan over ``base`` into ``folder`` and serve it in this process.

    Unless it ``packs_ahead`` a loaded model is in its checkpoint's layout until vLLM has it packed.
    """
    if not current_platform.is_cpu():
        pytest.skip("vLLM does not run on the CPU, for whose models this is")
    compose(plan, folder / "mixed")
    config = EngineArgs(
        str(folder / "mixed"),
        skip_tokenizer_init=True,
        max_model_len=64,
        enforce_eager=True,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1} if has_draft else None,
    ).create_engine_config()
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(config):
        if not packs_ahead:
            patch.setattr(PackAhead, "is_on", False)
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, backend="gloo")
        try:
            initialize_model_parallel(1, 1, backend="gloo")
            yield Serving(base, config, MixPrecLoader(config.load_config))
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def read_base(base: Path) -> Tensors:
    return load_file(base / "model.safetensors")


def read_route(route: Route) -> Tensors:
    """Read a module's tensors from its source's files, by the base's names."""
    names = {spec.name: f"{route.module}.{suffix}" for suffix, spec in route.tensors.items()}
    return {
        names[spec.name]: tensor.clone() for spec, tensor in read_tensors(route.tensors.values())
    }


def moe_layers(base: Path) -> list[int]:
    """Decoder layers of a checkpoint that have routed experts."""
    modules = open_checkpoint(base).modules
    return sorted({int(name.split(".")[2]) for name in modules if ".mlp.experts." in name} - {MTP})
