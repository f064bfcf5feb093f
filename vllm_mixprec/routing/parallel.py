# SPDX-License-Identifier: Apache-2.0
"""How vLLM cuts modules over tensor-parallel ranks and layers over pipeline stages."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from vllm_mixprec.errors import RouteError
from vllm_mixprec.routing.alike import Alike
from vllm_mixprec.routing.fused import leaf_name
from vllm_mixprec.routing.route import Layout, Route
from vllm_mixprec.routing.structure import (
    ModelDims,
    is_mtp_module,
    is_tower_module,
    layer_index,
    text_config,
)

__all__ = [
    "ModelDims",
    "Placement",
    "Shard",
    "shard_weight",
    "split_experts",
    "split_layers",
    "text_config",
]

PP_PARTITION_VARIABLE = "VLLM_PP_LAYER_PARTITION"

# Leaf names whose rows (N) are cut, and whose columns (K) are; every other module is replicated.
COLUMN_PARALLEL = frozenset(
    "q_proj k_proj v_proj gate_proj up_proj w1 w3 q_b_proj kv_b_proj lm_head embed_tokens "
    "in_proj_qkv in_proj_z in_proj_qkvz in_proj_b in_proj_a in_proj_ba b_proj g_proj "
    "qkv_proj gate_up_proj".split()
)
ROW_PARALLEL = frozenset("o_proj down_proj w2 out_proj".split())

# Cut by whole heads; key and value heads are copied when there are fewer of them than ranks.
_BY_HEADS = frozenset("q_proj q_b_proj kv_b_proj o_proj".split())
_BY_KV_HEADS = frozenset("k_proj v_proj".split())
# Padded to this many rows, and then to a multiple of the ranks (vLLM VocabParallelEmbedding).
_VOCABULARY = frozenset("lm_head embed_tokens".split())
_VOCABULARY_PADDING = 64
_FINAL_NORMS = frozenset("norm final_layernorm norm_f".split())


@dataclass(frozen=True, slots=True)
class Shard:
    """What one tensor-parallel rank holds of a weight (N, K).

    ``problem`` says why the weight cannot be cut at all; the sizes are then the whole weight's.
    """

    rows: int
    columns: int
    rows_cut: bool = False
    columns_cut: bool = False
    problem: str | None = None


def shard_weight(
    leaf: str, shape: tuple[int, ...], is_expert: bool, layout: Layout, dims: ModelDims
) -> Shard:
    """Cut one weight for tensor parallelism as vLLM's parallel linears and routed experts do."""
    rows = shape[0] if shape else 1
    columns = shape[1] if len(shape) > 1 else 1
    whole = Shard(rows, columns)
    tp_size = layout.expert_ranks if is_expert else layout.tensor_parallel_size
    if tp_size == 1 or (is_expert and layout.expert_parallel) or len(shape) != 2:
        return whole
    if leaf in _VOCABULARY:
        return _cut_vocabulary(rows, columns, tp_size)
    if leaf in _BY_HEADS and dims.num_heads and dims.num_heads % tp_size:
        return _uncut(whole, f"{dims.num_heads} attention heads", tp_size)
    if leaf in _BY_KV_HEADS and dims.num_kv_heads:
        return _cut_kv_heads(whole, dims.num_kv_heads, tp_size)
    if leaf == "qkv_proj" and dims.num_kv_heads and dims.num_kv_heads % tp_size:
        return whole  # its heads are copied, and its rows are not those of config.json's heads
    if leaf in COLUMN_PARALLEL:
        if rows % tp_size:
            return _uncut(whole, f"{rows} rows", tp_size)
        return Shard(rows // tp_size, columns, rows_cut=True)
    if leaf in ROW_PARALLEL:
        if columns % tp_size:
            return _uncut(whole, f"{columns} columns", tp_size)
        return Shard(rows, columns // tp_size, columns_cut=True)
    return whole


def _uncut(whole: Shard, what: str, tp_size: int) -> Shard:
    return Shard(
        whole.rows,
        whole.columns,
        problem=f"{what} cannot be cut into {tp_size} equal parts",
    )


def _cut_vocabulary(rows: int, columns: int, tp_size: int) -> Shard:
    padded = -(-rows // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    if padded % tp_size:
        return _uncut(Shard(rows, columns), f"a vocabulary padded to {padded}", tp_size)
    return Shard(padded // tp_size, columns, rows_cut=True)


def _cut_kv_heads(whole: Shard, num_kv_heads: int, tp_size: int) -> Shard:
    if num_kv_heads % tp_size and tp_size % num_kv_heads:
        return _uncut(whole, f"{num_kv_heads} key-value heads", tp_size)
    parts = min(num_kv_heads, tp_size)
    if whole.rows % parts:
        return _uncut(whole, f"{whole.rows} rows", tp_size)
    return Shard(whole.rows // parts, whole.columns, rows_cut=parts > 1)


def split_layers(num_layers: int, pp_size: int) -> tuple[int, ...]:
    """Return how many decoder layers each pipeline stage holds.

    As vllm/distributed/utils.py get_pp_indices: the remainder goes to the stages before the
    last, from the back, so that with more than two stages the first gets one last of all.

    Raises:
        RouteError: VLLM_PP_LAYER_PARTITION does not fit, or there are fewer layers than stages.
    """
    override = os.environ.get(PP_PARTITION_VARIABLE)
    # Of one stage it can only be meant for another run: compose and check are given no layout.
    if override is not None and pp_size > 1:
        try:
            stages = tuple(int(part) for part in override.split(","))
        except ValueError:
            stages = ()
        if len(stages) != pp_size or sum(stages) != num_layers or min(stages) < 0:
            raise RouteError(
                f"{PP_PARTITION_VARIABLE} is {override!r}; expected {pp_size} comma-separated "
                f"layer counts that add up to {num_layers}. Correct or unset it."
            )
        return stages
    if num_layers < pp_size:
        raise RouteError(
            f"pipeline parallel size {pp_size} is more than the model's {num_layers} layers; "
            f"expected at most {num_layers}. Use fewer stages."
        )
    counts = [num_layers // pp_size] * pp_size
    for back in range(2, num_layers % pp_size + 2):
        counts[-back] += 1
    return tuple(counts)


def split_experts(num_experts: int, ep_size: int) -> tuple[int, ...]:
    """Return the first expert of each rank, and ``num_experts`` at the end.

    As vLLM's determine_expert_map with linear placement: the first ranks hold one more.
    """
    base, remainder = divmod(num_experts, ep_size)
    return tuple(rank * base + min(rank, remainder) for rank in range(ep_size + 1))


@dataclass(frozen=True)
class Placement:
    """Says which pipeline stages hold a module, and adds up the weight bytes of every rank.

    Ranks are numbered as :class:`Layout` says.
    """

    layout: Layout
    dims: ModelDims

    @cached_property
    def _stage_of_layer(self) -> tuple[int, ...]:
        counts = split_layers(self.dims.num_layers or 1, self.layout.pipeline_parallel_size)
        return tuple(stage for stage, count in enumerate(counts) for _ in range(count))

    def stages(self, module: str) -> tuple[int, ...]:
        """Return the pipeline stages that load a module: none, one, or two for embeddings.

        The draft is on the last stage. There it has embeddings of its own; with a single stage
        vLLM gives it the model's (v1/spec_decode/llm_base_proposer.py _maybe_share_embeddings).

        Raises:
            RouteError: the layers cannot be split over that many stages.
        """
        last = self.layout.pipeline_parallel_size - 1
        if not self.dims.is_loaded(module, self.layout.draft):
            return ()
        if is_mtp_module(module):
            return (last,)
        index, num_layers = layer_index(module), self.dims.num_layers
        if index is not None and num_layers is not None:
            return (self._stage_of_layer[index],) if index < num_layers else (last,)
        if index is not None or is_tower_module(module):
            return (0,)
        leaf = leaf_name(module)
        if leaf == "lm_head":
            return () if self.dims.tied_embeddings else (last,)
        if leaf == "embed_tokens":
            is_on_last = self.dims.tied_embeddings or self.layout.draft
            return (0, last) if is_on_last and last else (0,)
        return (last,) if leaf in _FINAL_NORMS else (0,)

    def bytes_per_rank(self, gathered: Collection[Alike]) -> tuple[int, ...]:
        """Return what the weights take in each rank's memory, as they are served."""
        tp_size, pp_size = self.layout.tensor_parallel_size, self.layout.pipeline_parallel_size
        expert_ranks = self.layout.expert_ranks
        num_experts = max((max(alike.experts, default=-1) + 1 for alike in gathered), default=0)
        rank_of_expert = _rank_of_expert(split_experts(num_experts, expert_ranks))
        held: Counter[tuple[tuple[int, ...], int | None]] = Counter()  # stages, rank or all
        for alike in gathered:
            route, is_expert = alike.example, alike.layer is not None
            stages = self.stages(route.module)
            leaf = leaf_name(route.module)
            shard = shard_weight(leaf, route.shape, is_expert, self.layout, self.dims)
            size_bytes = _bytes_on_rank(route, shard)
            if is_expert and self.layout.expert_parallel:
                for expert in alike.experts:
                    held[stages, rank_of_expert[expert]] += size_bytes
            else:
                held[stages, None] += alike.num_routes * size_bytes
        totals = [0] * (expert_ranks * pp_size)
        for (stages, owner), size_bytes in held.items():
            for stage, rank in product(stages, range(expert_ranks) if owner is None else (owner,)):
                dp_rank, tp_rank = divmod(rank, tp_size)
                totals[(dp_rank * pp_size + stage) * tp_size + tp_rank] += size_bytes
        return tuple(totals)


def _rank_of_expert(starts: tuple[int, ...]) -> list[int]:
    pairs = zip(starts, starts[1:], strict=False)
    return [rank for rank, (start, end) in enumerate(pairs) for _ in range(start, end)]


def _bytes_on_rank(route: Route, shard: Shard) -> int:
    """Bytes of a route's tensors on one rank: scales follow their weight's cut."""
    if not (shard.rows_cut or shard.columns_cut):
        return route.served_bytes
    rows, columns = route.shape
    total = 0
    for suffix, size_bytes in route.served_tensors():
        if suffix != "g_idx":  # one entry a column of the weight
            size_bytes = size_bytes * shard.rows // rows
        # Of a row whatever its length: a bias, a scale a row.
        if suffix != "bias" and not (route.served.format == "fp8_channel" and "scale" in suffix):
            size_bytes = size_bytes * shard.columns // columns
        total += size_bytes
    return total
