# SPDX-License-Identifier: Apache-2.0
"""Account for every tensor that is fed and every parameter that is filled.

vLLM's loaders skip what they do not know by suffix, and leave what nobody filled as it was. Here
both stop the start, with the name.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_mixprec.errors import RouteError

_SHOWN = 5

OnFirst = Callable[[Parameter, torch.Tensor], None]
OnLoaded = Callable[[Module, int | None, bool], None]


class Ledger:
    """Watches the parameters of one model while ``load_weights`` consumes a stream.

    A tensor counts as taken when, between its being handed out and the next one being asked for, a
    weight loader wrote a parameter. The models' loaders consume one tensor at a time.
    """

    def __init__(
        self,
        model: Module,
        lent: Collection[str] = (),
        on_loaded: OnLoaded | None = None,
        on_first: OnFirst | None = None,
    ) -> None:
        """Watch a model.

        Args:
            lent: parameters that are replaced by another model's after loading.
            on_loaded: is called when all of a layer is loaded, with the layer, None and True; of a
                layer of routed experts for each of them, with its logical id and whether it is the
                last; but only after whoever took the last tensor of it has asked for the next.
            on_first: is called before a parameter's first tensor is loaded, with both.
        """
        self._modules = dict(model.named_modules())  # get_submodule walks, for each tensor
        self._lent = lent
        self._on_loaded = on_loaded
        self._on_first = on_first
        self._current = ""
        self._taken: dict[str, int] = {}
        # parameter name -> (shard, expert) -> tensor that filled it
        self._filled: dict[str, dict[tuple[Any, ...], str]] = {}
        self._restore: list[Callable[[], None]] = []
        self._layers: dict[str, list[str]] = defaultdict(list)  # layer -> names of its parameters
        # Layers, and experts of them, that the tensor on its way filled a part of; in order.
        self._touched: dict[tuple[str, int | None], None] = {}
        self._expert_filled: Counter[tuple[str, int | None]] = Counter()
        self._experts_loaded: Counter[str] = Counter()
        self._parts_of_expert = cache(self._count_parts_of_expert)
        for name, parameter in model.named_parameters():
            self._watch_parameter(name, parameter)
            if parameter.numel():
                self._layers[name.rpartition(".")[0]].append(name)

    def release(self) -> None:
        """Take the watch off; more than once does no harm."""
        while self._restore:
            self._restore.pop()()

    def feed(
        self, stream: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass tensors on, noting which one is on its way."""
        for name, tensor in stream:
            self._tell()
            if name in self._taken:
                raise RouteError(f"{name}: fed to the model twice; expected once. Report this plan")
            self._taken[name] = 0
            self._current = name
            yield name, tensor
        self._tell()
        self._current = ""

    def close(self) -> None:
        """Take the watch off and check both sides.

        Raises:
            RouteError: a tensor that nothing took, or a parameter not filled, or only in part.
        """
        self.release()
        lost = [name for name, count in self._taken.items() if count == 0]
        if lost:
            raise RouteError(
                f"{_names(lost)}: routed to this rank and read, but the model loaded it nowhere; "
                "expected a parameter for it. Check that the base's config.json describes its "
                "tensors"
            )
        missing = [self._missing(name) for names in self._layers.values() for name in names]
        found = [each for each in missing if each is not None]
        if found:
            # What nothing filled before what only misses a part.
            found.sort(key=lambda each: " " in each)
            raise RouteError(
                f"{_names(found)}: no source's tensor filled it; expected every "
                "parameter of this rank to be loaded. Check that the base checkpoint is complete"
            )

    def _missing(self, name: str) -> str | None:
        """Name a parameter of which something was not filled, and how much was; None if all was."""
        if self._is_unused(name):
            return None
        filled = self._filled.get(name, {})
        if not filled:
            return name
        expected = self._expected(name)
        if expected is None or (None, None) in filled or len(filled) >= expected:
            return None
        return f"{name} ({len(filled)} of {expected} parts)"

    def _tell(self) -> None:
        """Tell of the layers, and the experts, that the tensor on its way completed."""
        touched, self._touched = self._touched, {}
        if self._on_loaded is None:
            return
        for name, expert in touched:
            layer = self._modules[name]
            if isinstance(layer, RoutedExperts):
                if self._expert_filled[name, expert] == self._parts_of_expert(name):
                    self._experts_loaded[name] += 1
                    is_last = self._experts_loaded[name] == layer.local_num_experts
                    self._on_loaded(layer, expert, is_last)
            elif all(self._missing(each) is None for each in self._layers[name]):
                self._on_loaded(layer, None, True)

    def _count_parts_of_expert(self, layer: str) -> int:
        """How many separate tensors fill what a layer holds of one routed expert."""
        experts = self._modules[layer].local_num_experts
        return sum(
            (self._expected(name) or 0) // experts
            for name in self._layers[layer]
            if name.rpartition(".")[2].startswith(("w13_", "w2_")) and not self._is_unused(name)
        )

    def _is_unused(self, name: str) -> bool:
        """Whether no checkpoint has to hold this parameter.

        vLLM's GPTQ experts register zero biases whether the model has any or not
        (quantization/auto_gptq.py AutoGPTQMoEMethod.create_weights, 0.32).
        """
        if name in self._lent:
            return True
        module = self._modules[name.rpartition(".")[0]]
        is_bias = name.endswith(("w13_bias", "w2_bias"))
        return is_bias and isinstance(module, RoutedExperts) and not module.moe_config.has_bias

    def _expected(self, name: str) -> int | None:
        """How many separate tensors fill a fused parameter; None where one does."""
        module = self._modules[name.rpartition(".")[0]]
        leaf = name.rpartition(".")[2]
        if isinstance(module, RoutedExperts):
            stacked = leaf.startswith("w13_") and module.moe_config.is_act_and_mul
            return module.local_num_experts * (2 if stacked else 1)
        if isinstance(module, QKVParallelLinear):
            return 3
        if isinstance(module, MergedColumnParallelLinear):
            return len(module.output_sizes)
        return None

    def _require_unfilled(self, name: str, key: tuple[Any, ...]) -> None:
        """Make sure of it before a weight is copied: the layer may be packed by then."""
        whole, filled = (None, None), self._filled.get(name, {})
        overlapping = filled if key == whole else filled.keys() & {whole, key}
        for first in {filled[each] for each in overlapping} - {self._current}:
            raise RouteError(
                f"{self._current}: loaded into {name}, which {first} has filled already; expected "
                "each part once. Check the source for the same module under two names"
            )

    def _record(self, name: str, key: tuple[Any, ...]) -> None:
        self._filled.setdefault(name, {})[key] = self._current
        if self._current:
            self._taken[self._current] += 1
        touched = name.rpartition(".")[0], key[1]
        self._touched[touched] = None
        if key[1] is not None:
            self._expert_filled[touched] += 1

    def _watch_parameter(self, name: str, parameter: Parameter) -> None:
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        of_experts = isinstance(self._modules[name.rpartition(".")[0]], RoutedExperts)
        arguments = ("weight_name", "shard_id", "expert_id") if of_experts else ("loaded_shard_id",)

        def watched(
            param: Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            told = dict(zip(arguments, args, strict=False)) | kwargs
            shard = told.get("shard_id", told.get("loaded_shard_id"))
            if shard is None:  # a WeightsMapper marks the tensor
                shard = getattr(loaded_weight, "shard_id", None)
            shards = shard if isinstance(shard, tuple) else (shard,)  # several in one tensor
            experts = [told.get("expert_id")]
            if loaded_weight.dim() == 3 and parameter.dim() == 3:  # all experts in one tensor
                experts = list(range(len(parameter)))
            keys = [(shard, expert) for shard in shards for expert in experts]
            for key in keys:
                self._require_unfilled(name, key)
            if self._on_first is not None and name not in self._filled:
                self._on_first(parameter, loaded_weight)
            result = loader(param, loaded_weight, *args, **kwargs)
            if result is not False:
                for key in keys:
                    self._record(name, key)
            return result

        # vLLM's own parameter classes keep the loader behind a read-only property.
        attribute = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
        present = attribute in parameter.__dict__
        setattr(parameter, attribute, watched)

        def restore() -> None:
            if present:
                setattr(parameter, attribute, loader)
            else:
                delattr(parameter, attribute)

        self._restore.append(restore)


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
