# SPDX-License-Identifier: Apache-2.0
"""The layers of the language model as a checkpoint's headers have them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from vllm_mixprec.checkpoint.formats import Module
from vllm_mixprec.routing.fused import parse_experts
from vllm_mixprec.routing.structure import layer_index, layer_name


@dataclass(slots=True)
class Layer:
    """One layer as the headers have it.

    ``name`` is ``model.layers.3``, ``modules`` are all but routed experts, by their names below
    it; ``experts`` are the logical ids that a projection is there for, ``expert_shapes`` has the
    first expert's module of each shape of a projection, ``experts_name`` is
    ``model.layers.3.mlp.experts``.
    """

    name: str
    modules: dict[str, Module] = field(default_factory=dict)
    experts: dict[str, set[int]] = field(default_factory=dict)
    expert_shapes: dict[tuple[str, tuple[int, ...]], Module] = field(default_factory=dict)
    experts_name: str = ""

    @property
    def parts(self) -> set[str]:
        """What lies right below the layer: self_attn, mlp, input_layernorm ..."""
        below = {name.partition(".")[0] for name in self.modules}
        return below | ({self.experts_name[len(self.name) + 1 :].partition(".")[0]} - {""})


def gather_layers(modules: Collection[Module]) -> dict[int, Layer]:
    """Collect the modules of each layer of the language model."""
    layers: dict[int, Layer] = {}
    experts = parse_experts(module.name for module in modules)
    layer, last = None, None
    for module, expert in zip(modules, experts, strict=True):
        if expert is None:
            layer = _layer_of(module.name, layers)
            if layer is not None:
                layer.modules[module.name[len(layer.name) + 1 :]] = module
            last = None
            continue
        experts_name, number, projection = expert
        if experts_name != last:
            last, layer = experts_name, _layer_of(module.name, layers)
        if layer is None:
            continue
        ids = layer.experts.get(projection)
        if ids is None:
            ids = layer.experts[projection] = set()
        ids.add(number)
        if (projection, module.shape) not in layer.expert_shapes:
            layer.expert_shapes[projection, module.shape] = module
        layer.experts_name = experts_name
    return layers


def _layer_of(module: str, layers: dict[int, Layer]) -> Layer | None:
    index = layer_index(module)
    if index is None:
        return None
    layer = layers.get(index)
    if layer is None:
        name = layer_name(module)
        assert name is not None, f"{module} is in layer {index}"
        layer = layers[index] = Layer(name)
    return layer
