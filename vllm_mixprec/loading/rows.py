# SPDX-License-Identifier: Apache-2.0
"""Which rows of each stored tensor a tensor-parallel rank will ask for, and for what."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from vllm_mixprec.checkpoint import TensorSpec
from vllm_mixprec.checkpoint.stored import DTYPES
from vllm_mixprec.routing import Route, RouteTable
from vllm_mixprec.routing.fused import leaf_name, parse_expert
from vllm_mixprec.routing.parallel import Shard, shard_weight
from vllm_mixprec.routing.structure import ModelDims

# Below this a slice saves no read: its neighbours come with it in one.
_SMALLEST_BYTES = 64 << 10

# GPTQ and AWQ store (K, N); every other format (N, K).
_K_FIRST = frozenset({"qweight", "scales"})
_WHOLE = frozenset({"g_idx", "qzeros"})  # compared with the config's promise, and small
_WEIGHTS = frozenset({"weight", "qweight"})


def rank_rows(
    routes: Iterable[Route], table: RouteTable, tp_rank: int, dp_rank: int = 0
) -> dict[TensorSpec, range]:
    """Return the rows, along the first stored dimension, of tensors that are cut along it.

    What is cut along its columns, widened, laid out anew, small or a part of a fused tensor is read
    whole. This only says what to read ahead; a :class:`StoredTensor` gives other rows as well.

    Reading a rank's columns row by row would save nothing. Of DeepSeek-V3's FP8 experts (down_proj
    7168 x 2048) one of 8 ranks holds 256 bytes a row: every page of 4 KiB has some, so the device
    delivers all of them either way. Of o_proj (7168 x 16384) it holds 2 KiB, in every fourth page:
    7168 reads of a page, eight at a time at 0.1 ms each, take 0.09 s; all 117 MB at 3 GB/s take
    0.04 s. And ranks of one machine share the page cache, which asks the device for a page once.
    """
    layout = table.layout
    rows: dict[TensorSpec, range] = {}
    if layout.expert_ranks == 1:
        return rows
    for route, is_expert, shard in _as_stored(routes, table):
        ranks, rank = layout.tensor_parallel_size, tp_rank
        if is_expert:  # cut over the ranks of all replicas
            ranks, rank = layout.expert_ranks, dp_rank * layout.tensor_parallel_size + tp_rank
        for suffix, spec in route.tensors.items():
            if spec.nbytes < _SMALLEST_BYTES or suffix in _WHOLE or spec.view is not None:
                continue
            k_first = suffix in _K_FIRST
            if not (shard.columns_cut if k_first else shard.rows_cut):
                continue
            held = shard.columns if k_first else shard.rows
            found = _cut(spec.shape[0], held, route.shape[int(k_first)], ranks, rank)
            if found is not None:
                rows[spec] = found
    return rows


def shared_tensors(
    routes: Iterable[Route], table: RouteTable, rows: Mapping[TensorSpec, range]
) -> set[TensorSpec]:
    """Return the tensors of which other ranks read the same bytes; ``rows`` has what is cut.

    Ranks may be on other machines: then these are read as if they were not. Not known here, and
    taken for one's own: replicas of a dense model, which vLLM runs as engines that know of no
    others, and embeddings of the last pipeline stage.
    """
    layout = table.layout
    shared = set()
    for route in routes:
        is_expert = parse_expert(route.module) is not None
        if is_expert and layout.expert_parallel:
            continue
        # Replicas share one set of experts, and have the rest each.
        ranks = layout.expert_ranks if is_expert else layout.tensor_parallel_size
        replicas = 1 if is_expert else layout.data_parallel_size
        for spec in route.tensors.values():
            stored = spec.shape[0] if spec.shape else 1
            read = len(rows[spec]) if spec in rows else stored
            # A padded vocabulary is a little more than what is stored.
            if replicas > 1 or read * ranks >= 2 * stored:
                shared.add(spec)
    return shared


def copied_tensors(
    routes: Iterable[Route], table: RouteTable, dtype: torch.dtype
) -> set[TensorSpec]:
    """Return the weights that loading copies to their place as they are stored, whole or by rows.

    Args:
        dtype: of the model's unquantised weights.
    """
    copied = set()
    for route, _, shard in _as_stored(routes, table):
        for suffix, spec in route.tensors.items():
            is_cut_across = shard.rows_cut if suffix in _K_FIRST else shard.columns_cut
            is_as_stored = route.stored.is_quantized or DTYPES[spec.dtype] == dtype
            is_matrix = len(spec.shape) == 2 and spec.nbytes > 0 and spec.view is None
            if suffix in _WEIGHTS and is_matrix and is_as_stored and not is_cut_across:
                copied.add(spec)
    return copied


def _as_stored(routes: Iterable[Route], table: RouteTable) -> Iterator[tuple[Route, bool, Shard]]:
    """Yield each route that is served as it is stored, if it is an expert's, and a rank's shard."""
    dims = ModelDims.from_config(table.base_config)
    for route in routes:
        if not (route.widened or route.relaid):
            is_expert = parse_expert(route.module) is not None
            leaf = leaf_name(route.module)
            yield route, is_expert, shard_weight(leaf, route.shape, is_expert, table.layout, dims)


def _cut(stored: int, held: int, whole: int, ranks: int, rank: int) -> range | None:
    """Scale what a rank holds, ``held`` of a weight's ``whole`` rows, to the ``stored`` rows."""
    copies = max(ranks * held // whole, 1)  # ranks that share a key-value head
    start = min(rank // copies * held, whole)
    stop = min(start + held, whole)
    if start * stored % whole or stop * stored % whole:
        return None
    return range(start * stored // whole, stop * stored // whole)
