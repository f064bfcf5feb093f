# SPDX-License-Identifier: Apache-2.0
"""Has weights packed for their kernels on a thread while the next are being read.

On a CPU packing takes as much time as reading, of other cores; vLLM begins it when all weights are
loaded. Here linears and embeddings are packed when all of theirs are, and experts a few at a time.
"""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch.nn import Module
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_mixprec.checkpoint.threads import unpin
from vllm_mixprec.quant.cpu import CpuInPlaceExpertsMethod
from vllm_mixprec.quant.cpu_linear import CpuFp8LinearMethod

# Methods that only look at their own layer, and leave it the parameters' names: a model's loader
# may be going through them meanwhile.
_WHOLE = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, CpuFp8LinearMethod)
_TOGETHER_BYTES = 64 << 20  # of experts, so that few turns are taken for Python's lock


class PackAhead:
    """Told of each layer, or expert of one, that is loaded on a CPU, has it packed.

    Packing of experts that was begun goes on after loading: vLLM's own call waits for it, and does
    itself what was not begun. Layers of other methods are left to vLLM.
    """

    is_on: ClassVar[bool] = True  # off, weights keep their checkpoint's layout until vLLM's call

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "mixprec-pack", initializer=unpin)
        self._whole: dict[Module, Future[None]] = {}
        self._ready: dict[Module, list[int]] = defaultdict(list)
        self._experts: dict[Module, list[tuple[Future[None], Callable[[], None]]]] = {}
        self._filling: list[Future[None]] = []

    def wait_for(self, filling: Future[None]) -> None:
        """Have experts that are packed from now on wait for places that are being filled."""
        self._filling = [each for each in self._filling if not each.done()]
        if filling not in self._filling:
            self._filling.append(filling)

    def loaded(self, layer: Module, expert: int | None, is_last: bool) -> None:
        """Note that every tensor of a layer is loaded, or of an expert of it.

        Args:
            expert: its logical id; None for a whole layer without any.
            is_last: whether nothing else of the layer is to come.
        """
        method = getattr(layer, "quant_method", None)
        if not self.is_on:
            return
        if isinstance(method, CpuInPlaceExpertsMethod) and expert is not None:
            ready = self._ready[layer]
            ready.append(layer.expert_map_manager.map_global_to_local(expert))
            expert_bytes = sum(weight[0].nbytes for weight in method.tensors(layer))
            if is_last or len(ready) * expert_bytes >= _TOGETHER_BYTES:
                self._begin_experts(layer, self._ready.pop(layer))
        elif isinstance(method, _WHOLE):
            self._whole[layer] = self._pool.submit(_pack_whole, layer)

    def _begin_experts(self, layer: Module, slots: list[int]) -> None:
        method, filling = layer.quant_method, list(self._filling)

        def pack() -> None:
            for places in filling:
                places.result()
            method.pack_slots(layer, slots)

        if layer not in self._experts:
            self._experts[layer] = []
            _stand_in(method, self._finish_experts)
        self._experts[layer].append((self._pool.submit(pack), pack))

    def _finish_experts(self, layer: Module) -> None:
        begun = self._experts.pop(layer)
        for future, pack in reversed(begun):  # the other thread goes through them from the first
            if future.cancel():
                pack()
        for future, _ in begun:
            if not future.cancelled():
                future.result()
        layer.quant_method.process_weights_after_loading(layer)

    def __enter__(self) -> "PackAhead":
        return self

    def __exit__(self, failure: type[BaseException] | None, *rest: Any) -> None:
        # What is not begun is vLLM's again, so that oneDNN, whose streams are not made for several
        # threads, never runs in two.
        begun = {layer: future for layer, future in self._whole.items() if not future.cancel()}
        goes_on = False
        try:
            if failure is None:
                for layer, future in begun.items():
                    future.result()
                    _stand_in(layer.quant_method, lambda layer: None)
                goes_on = True
        finally:
            self._pool.shutdown(wait=False, cancel_futures=not goes_on)


def _pack_whole(layer: Module) -> None:
    before = dict(layer.named_parameters(recurse=False))
    layer.quant_method.process_weights_after_loading(layer)
    # The model's own loader keeps a list of all parameters until it is done.
    for name, parameter in before.items():
        if layer._parameters.get(name) is not parameter:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device="cpu")


def _stand_in(method: Any, process: Callable[[Module], None]) -> None:
    """Have ``process`` called in place of a layer's own method, once: as vLLM does after loading.

    A reload calls the method again, and then means it.
    """

    def once(layer: Module) -> None:
        del method.process_weights_after_loading
        process(layer)

    method.process_weights_after_loading = once
