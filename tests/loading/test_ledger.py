# SPDX-License-Identifier: Apache-2.0
"""The ledger on small modules that vLLM's own AutoWeightsLoader fills, and on its MoE layers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models.utils import AutoWeightsLoader

from tests.loading.indexers import FORMATS, write_source
from tests.loading.serving import MTP, Serving, moe_layers, read_route, serve, write_base
from vllm_mixprec.errors import RouteError
from vllm_mixprec.loading.ledger import Ledger
from vllm_mixprec.quant.experts import load_expert
from vllm_mixprec.routing.fused import parse_expert


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 2, bias=False)

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights)


WEIGHTS = {
    "first.weight": torch.ones(3, 2),
    "first.bias": torch.full((3,), 2.0),
    "second.weight": torch.full((2, 3), 3.0),
}


def load(weights, model=None):
    model = model or Model()
    ledger = Ledger(model)
    model.load_weights(ledger.feed(weights))
    ledger.close()
    return model


def test_a_complete_load_passes_and_fills():
    model = load(WEIGHTS.items())
    assert torch.equal(model.second.weight, WEIGHTS["second.weight"])


def test_the_loaders_are_put_back():
    model = load(WEIGHTS.items())
    assert not hasattr(model.first.weight, "weight_loader")
    load(WEIGHTS.items(), model)


def test_a_parameter_nobody_filled_is_named():
    weights = [item for item in WEIGHTS.items() if item[0] != "second.weight"]
    with pytest.raises(RouteError, match=r"second\.weight: no source's tensor filled it"):
        load(weights)


def test_a_tensor_the_model_ignores_is_named():
    class Ignoring(Model):
        def load_weights(self, weights):
            loader = AutoWeightsLoader(self, ignore_unexpected_suffixes=[".weight_scale"])
            return loader.load_weights(weights)

    extra = [*WEIGHTS.items(), ("second.weight_scale", torch.ones(1))]
    with pytest.raises(RouteError, match=r"second\.weight_scale: routed .* loaded it nowhere"):
        load(extra, Ignoring())


def test_a_tensor_fed_twice_is_an_error():
    with pytest.raises(RouteError, match=r"first\.bias: fed to the model twice"):
        load([*WEIGHTS.items(), ("first.bias", torch.zeros(3))])


def test_a_parameter_filled_from_two_tensors_is_an_error():
    class Renaming(Model):
        def load_weights(self, weights):
            renamed = ((name.replace("copy", "first"), tensor) for name, tensor in weights)
            return AutoWeightsLoader(self).load_weights(renamed)

    weights = [*WEIGHTS.items(), ("copy.bias", torch.zeros(3))]
    with pytest.raises(RouteError, match=r"copy\.bias: loaded into first\.bias, which first\.bias"):
        load(weights, Renaming())


# Routed experts, of one format and of two.

EXPERTS = 4


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Experts 0 and 1 of the last MoE layer, and its shared experts, come from an FP8 source."""
    folder = tmp_path_factory.mktemp("ledger")
    base = write_base(folder / "base")
    layer = moe_layers(base)[-1]
    experts = [f"model.layers.{layer}.mlp.experts.{expert}" for expert in (0, 1)]
    stored = {
        f"{expert}.{leaf}_proj": FORMATS["fp8-128x128"]((128, 128))
        for expert in experts
        for leaf in ("gate", "up", "down")
    }
    sources = {"fp8": write_source(folder / "fp8", base, stored)}
    with serve(folder, base, sources, dict.fromkeys(experts, "fp8")) as made:
        yield made


class Layer:
    """One MoE layer, and what it is fed: two formats in the target, one in the draft."""

    def __init__(self, serving: Serving, is_mixed: bool) -> None:
        layers = serving.build(is_draft=not is_mixed).model.model.layers
        number = moe_layers(serving.base)[-1] if is_mixed else MTP
        self.mlp = layers[number].mlp if is_mixed else layers[str(MTP)].mtp_block.mlp
        self.experts: RoutedExperts = self.mlp.experts.routed_experts
        self.name = f"model.layers.{number}.mlp.experts"
        self.tensors: dict[str, torch.Tensor] = {}
        for module, route in serving.config.quant_config.table.routes.items():
            if module.startswith(f"{self.name}."):
                self.tensors |= read_route(route)

    def holder(self, expert: int) -> RoutedExperts:
        return getattr(self.experts, "holders", {}).get(expert, self.experts)


Way = Callable[[Layer, int, str, str, torch.Tensor], None]


def our_way(layer: Layer, expert: int, leaf: str, suffix: str, tensor: torch.Tensor) -> None:
    load_expert(layer.experts, expert, leaf, suffix, tensor)


SHARDS = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}


def engines_way(layer: Layer, expert: int, leaf: str, suffix: str, tensor: torch.Tensor) -> None:
    """As the loops over experts of vLLM's models call it (deepseek_v2.py, qwen3_moe.py)."""
    stem, shard = SHARDS[leaf]
    name = f"{stem}_{suffix}"
    parameter = getattr(layer.holder(expert), name)
    assert parameter.weight_loader(
        parameter,
        tensor,
        f"{layer.name}.{name}",
        shard_id=shard,
        expert_id=expert,
        return_success=True,
    )


@pytest.fixture(params=[True, False], ids=["two-formats", "one-format"])
def layer(serving: Serving, request: pytest.FixtureRequest) -> Layer:
    made = Layer(serving, request.param)
    if request.param and not hasattr(made.experts, "holders"):
        pytest.skip("this machine widens FP8 experts, so that the layer has one format")
    return made


both_ways = pytest.mark.parametrize("way", [our_way, engines_way])


def watch(layer: Layer) -> Ledger:
    """Watch the experts; the router's bias, which is a parameter of theirs too, is filled."""
    ledger, bias = Ledger(layer.experts), layer.experts.e_score_correction_bias
    for _, tensor in ledger.feed([("gate.e_score_correction_bias", bias.detach().clone())]):
        bias.weight_loader(bias, tensor)
    return ledger


def feed(layer: Layer, way: Way, tensors: dict[str, torch.Tensor]) -> Ledger:
    ledger = watch(layer)
    for name, tensor in ledger.feed(tensors.items()):
        module, _, suffix = name.removeprefix("copy.").rpartition(".")
        expert = parse_expert(module)
        way(layer, expert.expert, expert.projection, suffix, tensor)
    return ledger


def without(layer: Layer, *parts: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in layer.tensors.items() if not any(f".{p}." in k for p in parts)}


@both_ways
def test_experts_that_all_come_pass_and_fill(layer: Layer, way: Way) -> None:
    for parameter in layer.experts.parameters():
        parameter.data.zero_()
    feed(layer, way, layer.tensors).close()
    gate = layer.tensors[f"{layer.name}.3.gate_proj.weight"]
    holder = layer.holder(3)
    slot = holder.expert_map_manager.map_global_to_local(3)
    assert torch.equal(holder.w13_weight[slot, : len(gate)], gate)


@both_ways
@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj", "down_proj"])
def test_expert_loaded_twice_is_an_error(layer: Layer, way: Way, leaf: str) -> None:
    name = f"{layer.name}.2.{leaf}.weight"
    tensors = layer.tensors | {f"copy.{name}": layer.tensors[name]}
    match = rf"^copy\.{name}: loaded into .*{SHARDS[leaf][0]}_weight, which {name} has filled"
    with pytest.raises(RouteError, match=match):
        feed(layer, way, tensors)


@both_ways
def test_expert_missing_is_named_by_its_parameters(layer: Layer, way: Way) -> None:
    ledger = feed(layer, way, without(layer, "experts.3"))
    held = EXPERTS if layer.holder(0) is layer.holder(3) else EXPERTS // 2
    w13 = rf"w13_weight \({2 * held - 2} of {2 * held} parts\)"
    w2 = rf"w2_weight \({held - 1} of {held} parts\)"
    with pytest.raises(RouteError, match=rf"{w13}, .*{w2}: no source's tensor filled it"):
        ledger.close()


@both_ways
@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj"])
def test_half_of_a_fused_expert_missing_is_an_error(layer: Layer, way: Way, leaf: str) -> None:
    ledger = feed(layer, way, without(layer, f"2.{leaf}"))
    held = EXPERTS if layer.holder(0) is layer.holder(3) else EXPERTS // 2
    with pytest.raises(RouteError, match=rf"w13_weight \({2 * held - 1} of {2 * held} parts\): no"):
        ledger.close()


@both_ways
def test_scale_of_an_expert_missing_is_an_error(serving: Serving, way: Way) -> None:
    layer = Layer(serving, is_mixed=True)
    if not hasattr(layer.experts, "holders"):
        pytest.skip("this machine widens FP8 experts")
    scale = f"{layer.name}.1.down_proj.weight_scale_inv"
    ledger = feed(layer, way, {k: v for k, v in layer.tensors.items() if k != scale})
    match = r"^group0\.w2_weight_scale_inv \(1 of 2 parts\): no source's tensor"
    with pytest.raises(RouteError, match=match):
        ledger.close()


def test_expert_that_its_group_turns_away_is_an_error(serving: Serving) -> None:
    """A parameter of experts 0 and 1 takes none of expert 3, and says so."""
    layer = Layer(serving, is_mixed=True)
    if not hasattr(layer.experts, "holders"):
        pytest.skip("this machine widens FP8 experts")
    name, parameter = f"{layer.name}.3.down_proj.weight", layer.holder(0).w2_weight
    ledger = Ledger(layer.experts)
    for _, tensor in ledger.feed([(name, layer.tensors[name])]):
        assert not parameter.weight_loader(
            parameter, tensor, "w2_weight", shard_id="w2", expert_id=3, return_success=True
        )
    with pytest.raises(RouteError, match=rf"^{name}: routed .* loaded it nowhere"):
        ledger.close()


def test_experts_in_one_tensor_fill_every_part(serving: Serving) -> None:
    """As models load that store all experts of a layer stacked (mllama4.py)."""
    layer = Layer(serving, is_mixed=False)
    ledger = watch(layer)
    w13 = {"gate": ("w13_weight", "w1"), "up": ("w13_weight", "w3")}
    for leaf, (name, shard) in (w13 | {"down": ("w2_weight", "w2")}).items():
        stacked = torch.stack(
            [layer.tensors[f"{layer.name}.{n}.{leaf}_proj.weight"] for n in range(EXPERTS)]
        )
        parameter = getattr(layer.experts, name)
        for _, tensor in ledger.feed([(f"{layer.name}.{leaf}", stacked)]):
            parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=0)
    ledger.close()
    down = layer.tensors[f"{layer.name}.{EXPERTS - 1}.down_proj.weight"]
    assert torch.equal(layer.experts.w2_weight[EXPERTS - 1], down)


def test_experts_in_one_tensor_that_is_half_the_layer_are_an_error(serving: Serving) -> None:
    layer = Layer(serving, is_mixed=False)
    ledger, parameter = watch(layer), layer.experts.w13_weight
    stacked = torch.stack(
        [layer.tensors[f"{layer.name}.{n}.gate_proj.weight"] for n in range(EXPERTS)]
    )
    for _, tensor in ledger.feed([(f"{layer.name}.gate", stacked)]):
        parameter.weight_loader(parameter, tensor, "w13_weight", shard_id="w1", expert_id=0)
    with pytest.raises(RouteError, match=r"w13_weight \(4 of 8 parts\)"):
        ledger.close()


# Fused linears, loaded as the models' loops over stacked parameters do.


def fill(module: nn.Module, *calls: tuple[str, str, torch.Tensor, int | None]) -> Ledger:
    ledger = Ledger(module)
    tensors = {fed: (name, tensor, shard) for fed, name, tensor, shard in calls}
    for fed, _ in ledger.feed((fed, tensor) for fed, (_, tensor, _) in tensors.items()):
        name, tensor, shard = tensors[fed]
        parameter = module.get_parameter(name)
        parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    return ledger


def test_part_of_a_fused_linear_missing_is_an_error(serving: Serving) -> None:
    shared = Layer(serving, is_mixed=True).mlp.shared_experts
    half, down = shared.gate_up_proj.weight.chunk(2)[0], shared.down_proj.weight
    whole = [("down_proj", "down_proj.weight", down.clone(), None)]
    gate = ("gate_proj", "gate_up_proj.weight", half.clone(), 0)
    up = ("up_proj", "gate_up_proj.weight", half.clone(), 1)
    with pytest.raises(RouteError, match=r"^gate_up_proj\.weight \(1 of 2 parts\): no source"):
        fill(shared, gate, *whole).close()
    fill(shared, gate, up, *whole).close()


def test_part_of_a_fused_linear_loaded_twice_is_an_error(serving: Serving) -> None:
    shared = Layer(serving, is_mixed=True).mlp.shared_experts
    half = shared.gate_up_proj.weight.chunk(2)[0].clone()
    first, second = (
        (f"{name}.gate_proj", "gate_up_proj.weight", half, 0) for name in ("mlp", "other")
    )
    match = r"^other\.gate_proj: loaded into gate_up_proj\.weight, which mlp\.gate_proj has filled"
    with pytest.raises(RouteError, match=match):
        fill(shared, first, second)


def test_several_parts_of_a_fused_linear_in_one_tensor(serving: Serving) -> None:
    """As Qwen3.5 loads q, k and v of its linear attention, and its gate by itself."""
    owner = nn.Module()
    owner.qkvz = MergedColumnParallelLinear(8, [8, 8, 16, 16], bias=False)
    weight = torch.randn(48, 8)
    parameter = owner.qkvz.weight

    def load(*parts: tuple[tuple[int, ...] | int, torch.Tensor]) -> Ledger:
        ledger = Ledger(owner)
        named = {f"part{number}": part for number, part in enumerate(parts)}
        for name, _ in ledger.feed((name, tensor) for name, (_, tensor) in named.items()):
            shard, tensor = named[name]
            parameter.weight_loader(parameter, tensor, shard)
        return ledger

    load(((0, 1, 2), weight[:32]), (3, weight[32:])).close()
    assert torch.equal(parameter.float(), weight.to(parameter.dtype).float())
    with pytest.raises(RouteError, match=r"weight \(3 of 4 parts\): no source's tensor"):
        load(((0, 1, 2), weight[:32])).close()
    with pytest.raises(RouteError, match=r"^part1: loaded into qkvz.weight, which part0 has"):
        load(((0, 1, 2), weight[:32]), (1, weight[8:16]))


@pytest.mark.parametrize("again", [0, None])
def test_part_that_comes_again_is_not_loaded(serving: Serving, again: int | None) -> None:
    """The layer may be packed by then, so that a loader finds nothing to copy it to."""
    owner = Layer(serving, is_mixed=True).mlp.shared_experts
    parameter = owner.gate_up_proj.weight
    whole, half = parameter.data.clone(), parameter.data.chunk(2)[0].clone()
    ledger = Ledger(owner)
    fed = ledger.feed([("first", half), ("second", half if again == 0 else whole)])
    next(fed)
    parameter.weight_loader(parameter, half, 0)
    next(fed)
    parameter.data = torch.empty(0)
    with pytest.raises(RouteError, match=r"^second: loaded into .*, which first has filled"):
        parameter.weight_loader(parameter, *((half, 0) if again == 0 else (whole,)))
    ledger.release()


def test_watch_is_off_after_closing(serving: Serving) -> None:
    layer = Layer(serving, is_mixed=False)

    def loaders() -> dict[str, object]:
        named = layer.experts.named_parameters()
        return {name: getattr(parameter, "weight_loader", None) for name, parameter in named}

    before = loaders()
    for _ in range(2):
        feed(layer, our_way, layer.tensors).close()
    assert loaders() == before


# Who is told what is loaded.


def told_by(
    model: nn.Module, feed: Callable[[Ledger], None]
) -> list[tuple[nn.Module, int | None, bool]]:
    told: list[tuple[nn.Module, int | None, bool]] = []
    ledger = Ledger(model, on_loaded=lambda *given: told.append(given))
    feed(ledger)
    ledger.release()
    return told


def test_a_layer_is_told_of_when_its_last_parameter_is_filled():
    model = Model()

    def feed(ledger: Ledger) -> None:
        model.load_weights(ledger.feed(reversed(WEIGHTS.items())))

    assert told_by(model, feed) == [(model.second, None, True), (model.first, None, True)]


def test_it_is_told_of_only_after_its_taker_asked_for_the_next():
    model, told = Model(), []
    ledger = Ledger(model, on_loaded=lambda layer, *rest: told.append(layer))
    names = ["second.weight", "first.weight"]
    for name, tensor in ledger.feed((name, WEIGHTS[name]) for name in names):
        parameter = model.get_parameter(name)
        parameter.weight_loader(parameter, tensor)
        assert told == ([] if name == "second.weight" else [model.second])
    assert told == [model.second]  # of the first the bias never came


def test_part_of_a_fused_linear_is_not_told_of(serving: Serving):
    shared = Layer(serving, is_mixed=True).mlp.shared_experts
    linear, half = shared.gate_up_proj, shared.gate_up_proj.weight.chunk(2)[0].clone()

    def feed(ledger: Ledger, shards: tuple[int, ...]) -> None:
        for shard in shards:
            for _, tensor in ledger.feed([(f"part{shard}", half)]):
                linear.weight.weight_loader(linear.weight, tensor, shard)

    assert told_by(linear, lambda ledger: feed(ledger, (0,))) == []
    assert told_by(linear, lambda ledger: feed(ledger, (1, 0))) == [(linear, None, True)]


def test_experts_are_told_of_one_by_one(serving: Serving):
    layer = Layer(serving, is_mixed=False)
    name = f"{layer.name}.2.down_proj.weight"
    order = sorted(layer.tensors, key=lambda each: each == name)  # this one last

    def feed(ledger: Ledger) -> None:
        for each, tensor in ledger.feed((each, layer.tensors[each]) for each in order):
            module, _, suffix = each.rpartition(".")
            expert = parse_expert(module)
            our_way(layer, expert.expert, expert.projection, suffix, tensor)

    told = told_by(layer.experts, feed)
    assert {expert for _, expert, _ in told} == set(range(EXPERTS)) and len(told) == EXPERTS
    assert [expert for _, expert, is_last in told if is_last] == [2] and told[-1][1] == 2
