# SPDX-License-Identifier: Apache-2.0
"""Moves parameters by a few bytes, so that a device can read their tensors straight into them.

A device delivers sectors of a file to multiples of some address: of 4 bytes most NVMe, of a whole
sector others. A safetensors file begins its tensors anywhere, but those of experts, each some whole
sectors long, all at one place of a sector. There the parameter that they make up is to begin, too;
where a layer's experts lie in two files, at that of the file that has most of them.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_mixprec.checkpoint import TensorSpec
from vllm_mixprec.checkpoint.stored import StoredTensor
from vllm_mixprec.routing import Route
from vllm_mixprec.routing.fused import parse_expert

_ROOM_BYTES = 4096  # no device asks for multiples of more
_SMALLEST_BYTES = 1 << 20
# Packing views what it packs in such: int4 words (quant/int4_blocks.py), and all else.
_WORDS_BYTES, _OTHER_BYTES = 16, 8
_STOCK = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


class Placement:
    """Gives a new model's large parameters room, and moves each when its first tensor comes.

    Only such on the CPU that their methods leave as ``torch.empty`` made them, and that nothing is
    loaded into yet: their values are lost.

    Args:
        routes: of what is loaded.
    """

    def __init__(self, model: Module, routes: Iterable[Route]) -> None:
        self._examples = _most_alike(routes)
        self._rooms: dict[Parameter, torch.Tensor] = {}
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, _STOCK) or type(method).__module__.startswith("vllm_mixprec."):
                for parameter in module.parameters(recurse=False):
                    if parameter.is_cpu and parameter.nbytes >= _SMALLEST_BYTES:
                        self._give_room(parameter)

    def suit(self, parameter: Parameter, first: torch.Tensor) -> None:
        """Move a parameter to where the first tensor that it takes can be read straight into it."""
        room = self._rooms.pop(parameter, None)
        filling = first.filling if isinstance(first, StoredTensor) else None
        if room is None or filling is None or not filling.is_past:
            return
        alignment = filling.file.alignment
        if alignment is None:
            return
        spec = first.spec
        start = self._examples.get(spec, spec).start + first.start - spec.start
        moved = (start - room.data_ptr()) % alignment.memory
        unit = _WORDS_BYTES if parameter.dtype == torch.int32 else _OTHER_BYTES
        if moved % unit == 0 and moved <= _ROOM_BYTES:
            _lay(parameter, room, moved)

    def _give_room(self, parameter: Parameter) -> None:
        if parameter not in self._rooms:  # a tied head
            nbytes = parameter.untyped_storage().nbytes() + _ROOM_BYTES
            room = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            self._rooms[parameter] = room
            _lay(parameter, room, 0)


def _most_alike(routes: Iterable[Route]) -> dict[TensorSpec, TensorSpec]:
    """Return for each tensor of an expert one from the file that holds most of its kind."""
    kinds: dict[tuple[str, ...], dict[Path, list[TensorSpec]]] = {}
    for route in routes:
        expert = parse_expert(route.module)
        if expert is not None:
            for suffix, spec in route.tensors.items():
                files = kinds.setdefault((expert.layer, route.source, suffix), {})
                files.setdefault(spec.file, []).append(spec)
    examples: dict[TensorSpec, TensorSpec] = {}
    for files in kinds.values():
        [example, *_] = max(files.values(), key=len)
        for specs in files.values():
            examples |= dict.fromkeys(specs, example)
    return examples


def _lay(parameter: Parameter, room: torch.Tensor, place: int) -> None:
    """Have a parameter's memory begin at a byte of its room, its shape and strides as they are."""
    laid = torch.empty(0, dtype=parameter.dtype, device="cpu")
    begin = place // parameter.itemsize
    laid.set_(room.untyped_storage(), begin, parameter.shape, parameter.stride())
    parameter.data = laid
