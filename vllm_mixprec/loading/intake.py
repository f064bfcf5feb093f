# SPDX-License-Identifier: Apache-2.0
"""Stands before a model's own ``load_weights``: stored tensors in, in any order; weights out.

vLLM's models expect a checkpoint of one format whose tensors come in their file's order. Here a
module's weight and its scales may come from different files, in either order, in one call or in
several. A module that is widened is dequantised once, when all its companions are here; experts go
straight to the layer that holds them; the rest goes on to the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import lru_cache

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

from vllm_mixprec.checkpoint.dequantize import dequantize, relayout
from vllm_mixprec.checkpoint.stored import StoredTensor
from vllm_mixprec.errors import MixPrecError, RouteError
from vllm_mixprec.loading.ledger import Ledger
from vllm_mixprec.quant.experts import load_expert
from vllm_mixprec.routing import Route
from vllm_mixprec.routing.fused import parse_expert

Weights = Iterable[tuple[str, torch.Tensor]]

# A tensor that checkpoints spell otherwise than the layers that serve its format.
_LAYERS_NAME = {
    ("fp8_block", "weight_scale"): "weight_scale_inv",
    ("fp8_channel", "weight_scale_inv"): "weight_scale",
}


class Intake:
    """Takes (base name, tensor as stored) for one model and loads what its rank holds.

    Args:
        load: the model's own ``load_weights``.
        known: the modules that are routed; a tensor of another one is an error.
        unserved: whether no rank ever loads a module, so that it need not be routed.
        held: the routes of the modules that this rank holds, by module; others are passed over.
        experts: the base's name of an expert layer -> the layer.
        dtype: of widened weights.
        spell: a base's name -> the one that the model's own ``load_weights`` takes.
    """

    def __init__(
        self,
        load: Callable[[Weights], set[str]],
        known: Mapping[str, Route],
        held: Mapping[str, Route],
        experts: Mapping[str, RoutedExperts],
        dtype: torch.dtype,
        unserved: Callable[[str], bool] = lambda module: False,
        spell: Callable[[str], str] = str,
    ) -> None:
        self._load = load
        self._spell = spell
        self._unserved = unserved
        self._known = known
        self.held = held
        self._experts = experts
        self._dtype = dtype
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._came: dict[str, set[str]] = {}  # module -> suffixes since the last close

    def load_weights(
        self,
        weights: Weights,
        ledger: Ledger | None = None,
        on_late: Callable[[Future[None]], None] | None = None,
    ) -> set[str]:
        """Load tensors; what is incomplete waits for the next call.

        Args:
            ledger: told of each.
            on_late: allows experts that :class:`StoredTensor` stands for to be in place only when
                what this is called with is done. None for experts that are, at once.

        Returns:
            Names of the parameters that the model's own loader filled.

        Raises:
            RouteError: a tensor that the base does not have, or one that came twice in this call or
                while it waits for the rest of its module.
        """
        # A draft's own loader wants a parameter of each layer in every call, and sees no experts.
        with disable_mtp_completeness_check():
            try:
                if ledger is None:
                    return self._load(self._divert(self._assemble(weights)))
                return self._load(self._divert(ledger.feed(self._assemble(weights)), on_late))
            except BaseException:
                self._came, self._waiting = {}, {}  # the next call begins anew
                raise

    def close(self) -> None:
        """Make sure that every module came whole or not at all; what waits is forgotten.

        Raises:
            RouteError: a weight came without its scales, or the reverse.
        """
        came, self._came, self._waiting = self._came, {}, {}
        broken = [module for module, got in came.items() if got != self.held[module].tensors.keys()]
        for module in broken:
            got = came[module]
            missing = sorted(self.held[module].tensors.keys() - got)
            raise RouteError(
                f"{module}: {', '.join(sorted(got))} came, but {', '.join(missing)} never did; "
                f"expected the whole module (so {len(broken)} modules). Feed every tensor of the "
                "module, or route it to a complete source"
            )

    def _assemble(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as the layers expect them; dequantise or lay out what is not so."""
        fed: set[str] = set()
        for name, tensor in weights:
            module, _, suffix = name.rpartition(".")
            route = self.held.get(module)
            if route is None:
                self._require_known(name, module)
                continue
            if suffix not in route.tensors:
                raise RouteError(
                    f"{name}: no tensor of source {route.source!r}, which holds "
                    f"{', '.join(route.tensors)} of this module. Feed the tensors of the source "
                    "that the plan routes the module to"
                )
            came = self._came.setdefault(module, set())
            if name in fed or suffix in self._waiting.get(module, ()):
                when = "in one call" if name in fed else "before the rest of its module"
                raise RouteError(
                    f"{name}: came twice {when}; expected once. Feed each tensor once, and all of "
                    "a module before any of it again"
                )
            fed.add(name)
            came.add(suffix)
            if suffix == "g_idx" or (suffix != "bias" and (route.widened or route.relaid)):
                parts = self._waiting.setdefault(module, {})
                parts[suffix] = tensor
                yield from self._whole(route, parts)
            else:
                if suffix == "qzeros":
                    check_zeros(route, tensor)
                name = _LAYERS_NAME.get((route.served.format, suffix), suffix)
                if (route.served.format, name) == ("fp8_channel", "weight_scale"):
                    tensor = tensor.reshape(-1, 1)  # stored as (N,) or (N, 1)
                yield f"{module}.{name}", tensor

    def _require_known(self, name: str, module: str) -> None:
        if module not in self._known and not self._unserved(module):
            raise RouteError(
                f"{name}: the base has no such tensor; expected its names, such as "
                f"{next(iter(self._known), 'none')}. Rename it"
            )

    def _whole(
        self, route: Route, parts: dict[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a module's weight once all its companions are here; check an activation order."""
        if not (route.widened or route.relaid):
            del self._waiting[route.module]
            check_order(route, parts["g_idx"])
            return
        if len(parts) == len(_companions(route)):
            del self._waiting[route.module]
            for suffix, tensor in self._convert(route, parts).items():
                yield f"{route.module}.{suffix}", tensor

    def _convert(self, route: Route, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            if route.relaid:
                return relayout(route.stored, route.served, parts)
            return {"weight": dequantize(route.stored, parts, self._dtype)}
        except MixPrecError as error:
            raise type(error)(f"{route.module} of source {route.source!r}: {error}") from error

    def _divert(
        self, weights: Weights, on_late: Callable[[Future[None]], None] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Load experts on the way, and yield the rest.

        The models' own loops over experts compare each tensor with a list of all of them, and look
        parameters up by names that a layer of several formats does not have.
        """
        for name, tensor in weights:
            module, _, suffix = name.rpartition(".")
            expert = parse_expert(module)
            layer = self._experts.get(expert.layer) if expert is not None else None
            if expert is None or layer is None:
                yield self._spell(name), tensor
            else:
                if isinstance(tensor, StoredTensor) and on_late is not None:
                    tensor = tensor.late()
                    if tensor.filling is not None:
                        on_late(tensor.filling.done)
                load_expert(layer, expert.expert, expert.projection, suffix, tensor)


def _companions(route: Route) -> set[str]:
    """Suffixes that make up a module's weight."""
    return route.tensors.keys() - {"bias"}


def check_order(route: Route, g_idx: torch.Tensor) -> None:
    """Make sure that rows are grouped in order, as the config said and the kernel assumes.

    Raises:
        RouteError: they are not.
    """
    group_size = route.stored.group_size
    assert group_size is not None, f"{route.module}: a gptq scheme has a group size"
    if not torch.equal(g_idx, _in_order(g_idx.numel(), group_size, g_idx.dtype)):
        spec = route.tensors["g_idx"]
        raise RouteError(
            f"{spec.name} in {spec.file}: rows are not grouped in order though the checkpoint's "
            f"config.json says desc_act false; expected row k in group k // {group_size}. Set "
            "desc_act to true there, or choose another source"
        )


# What tensors are compared with: experts' projections have few shapes, and thousands of tensors.


@lru_cache(maxsize=8)
def _in_order(rows: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(rows, dtype=dtype, device="cpu").div(group_size, rounding_mode="floor")


@lru_cache(maxsize=8)
def _all(word: int, shape: torch.Size) -> torch.Tensor:
    return torch.full(shape, word, dtype=torch.int32, device="cpu")


def check_zeros(route: Route, qzeros: torch.Tensor) -> None:
    """Make sure that zero points are what the config's ``sym`` promises and kernels assume.

    Raises:
        RouteError: they vary.
    """
    if not route.stored.symmetric:
        return
    bits = route.stored.bits
    stored = (1 << (bits - 1)) - route.stored.zero_offset
    word = sum(stored << shift for shift in range(0, 32, bits))
    if not torch.equal(qzeros, _all(word - (word >> 31 << 32), qzeros.shape)):
        spec = route.tensors["qzeros"]
        raise RouteError(
            f"{spec.name} in {spec.file}: zero points vary though the checkpoint's config.json "
            f"says sym true; expected {stored} everywhere. Set sym to false there, or choose "
            "another source"
        )
