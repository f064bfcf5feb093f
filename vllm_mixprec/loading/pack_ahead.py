# SPDX-License-Identifier: Apache-2.0
"""Has a layer's experts packed for their kernel on a thread while the next layer is being read.

Packing takes as much time as reading, of other cores; vLLM begins it when all weights are loaded.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts

from vllm_mixprec.checkpoint.stored import unpin
from vllm_mixprec.quant.cpu import CpuExpertsMethod
from vllm_mixprec.quant.experts import holder_of
from vllm_mixprec.routing.fused import parse_expert


class PackAhead:
    """Told of each module that came whole, begins with a layer, or a group of it, after its last.

    Layers of methods that do not pack ahead are left to vLLM.
    """

    def __init__(self, modules: Iterable[str], experts: Mapping[str, RoutedExperts]) -> None:
        """``modules`` are all that will come, ``experts`` the layers by the base's name."""
        self._holders: dict[str, RoutedExperts] = {}
        for module in modules:
            expert = parse_expert(module)
            layer = experts.get(expert.layer) if expert is not None else None
            if expert is not None and layer is not None:
                holder = holder_of(layer, expert.expert)
                method = holder.quant_method
                if isinstance(method, CpuExpertsMethod) and method.packs_ahead:
                    self._holders[module] = holder
        self._to_come = Counter(self._holders.values())
        self._pool = ThreadPoolExecutor(1, "mixprec-pack", initializer=unpin)

    def came(self, module: str) -> None:
        """Note that every tensor of a module is loaded."""
        holder = self._holders.get(module)
        if holder is None:
            return
        self._to_come[holder] -= 1
        if not self._to_come[holder]:
            holder.quant_method.pack_ahead(holder, self._pool)

    def __enter__(self) -> "PackAhead":
        return self

    def __exit__(self, failure: type[BaseException] | None, *rest: Any) -> None:
        # What was begun goes on, and vLLM's own call waits for it; after a failure nobody asks.
        self._pool.shutdown(wait=False, cancel_futures=failure is not None)
