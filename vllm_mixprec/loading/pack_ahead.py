# SPDX-License-Identifier: Apache-2.0
"""Has weights packed for their kernels on a thread while the next are being read.

On a CPU packing takes as much time as reading, of other cores; vLLM begins it when all weights are
loaded. Layers that take long are packed as soon as they are whole, experts a few at a time.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch.nn import Module
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from vllm_mixprec.checkpoint.stored import unpin
from vllm_mixprec.quant.cpu import CpuInPlaceExpertsMethod
from vllm_mixprec.quant.cpu_linear import CpuFp8ChannelLinearMethod, CpuFp8LinearMethod

# Methods that only look at their own layer, which vLLM asks for nothing else after loading.
_WHOLE = (
    UnquantizedLinearMethod,
    UnquantizedEmbeddingMethod,
    CpuFp8LinearMethod,
    CpuFp8ChannelLinearMethod,
)
_TOGETHER_BYTES = 64 << 20  # of experts, so that few turns are taken for Python's lock


class PackAhead:
    """Told of each layer, or expert of one, that is loaded, has it packed.

    What was begun goes on after loading: vLLM's own call waits for it, and does itself what was
    not. Layers of other methods are left to vLLM.
    """

    is_on: ClassVar[bool] = True  # off, weights keep their checkpoint's layout until vLLM's call

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "mixprec-pack", initializer=unpin)
        self._ready: dict[Module, list[int]] = defaultdict(list)
        self._begun: dict[Module, list[tuple[Future[None], Callable[[], None]]]] = {}
        self._filling: list[Future[None]] = []
        self._lock = threading.Lock()

    def wait_for(self, filling: Future[None]) -> None:
        """Have all that is packed from now on wait for places that are being filled."""
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
        if not self.is_on or not current_platform.is_cpu():
            return
        if isinstance(method, CpuInPlaceExpertsMethod) and expert is not None:
            ready = self._ready[layer]
            ready.append(layer.expert_map_manager.map_global_to_local(expert))
            expert_bytes = sum(weight[0].nbytes for weight in method.tensors(layer))
            if is_last or len(ready) * expert_bytes >= _TOGETHER_BYTES:
                slots = self._ready.pop(layer)
                self._begin(layer, lambda: method.pack_slots(layer, slots))
        elif isinstance(method, _WHOLE):
            self._begin(layer, lambda: self._pack_whole(layer))

    def _begin(self, layer: Module, pack: Callable[[], None]) -> None:
        filling = list(self._filling)

        def job() -> None:
            for places in filling:
                places.result()
            pack()

        if layer not in self._begun:
            self._begun[layer] = []
            method = layer.quant_method
            # Of this layer alone: vLLM calls it once after loading, and again at a reload.
            method.process_weights_after_loading = self._finish
        self._begun[layer].append((self._pool.submit(job), job))

    def _finish(self, layer: Module) -> None:
        """Stand in once for the method's own ``process_weights_after_loading``."""
        method = layer.quant_method
        del method.process_weights_after_loading
        begun = self._begun.pop(layer)
        for future, job in reversed(begun):  # the other thread goes through them from the first
            if future.cancel():
                job()
        for future, _ in begun:
            if not future.cancelled():
                future.result()
        if not isinstance(method, _WHOLE):
            method.process_weights_after_loading(layer)

    def _pack_whole(self, layer: Module) -> None:
        before = dict(layer.named_parameters(recurse=False))
        with self._lock:  # oneDNN's stream is one for all
            type(layer.quant_method).process_weights_after_loading(layer.quant_method, layer)
        # The model's own loader keeps a list of all parameters until it is done.
        for name, parameter in before.items():
            if layer._parameters.get(name) is not parameter:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device="cpu")

    def __enter__(self) -> "PackAhead":
        return self

    def __exit__(self, failure: type[BaseException] | None, *rest: Any) -> None:
        self._pool.shutdown(wait=False, cancel_futures=failure is not None)
