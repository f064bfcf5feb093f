# SPDX-License-Identifier: Apache-2.0
"""The indexer's fused ``wk_weights_proj`` on vLLM's real models, from any source in any order."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP

from tests.loading.indexers import FORMATS, Stored, write_source
from tests.loading.serving import (
    FULL,
    MTP,
    SHARED,
    Built,
    Serving,
    Tensors,
    indexer,
    read_base,
    read_route,
    serve,
    write_base,
)
from tests.routing.models import CPU
from tests.routing.models import make_plan as make_random_plan
from vllm_mixprec.errors import CheckpointError, RouteError, UnsupportedError
from vllm_mixprec.loading.intake import Intake
from vllm_mixprec.loading.loader import MixPrecLoader
from vllm_mixprec.routing import RouteTable, load_route_table

SENTINEL = 7.0
WK_FORMATS = {0: "fp8-64x32", 1: "gptq-asym", MTP: "mx-packed"}
"""What is served by the composed directory that the models are built for."""


def store_wk(base: Path, name: str) -> Stored:
    return FORMATS[name](tuple(read_base(base)[f"{indexer(0)}.wk.weight"].shape))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("intake")
    base = write_base(folder / "base")
    sources, rules = {}, {}
    for layer, name in WK_FORMATS.items():
        wk = f"{indexer(layer)}.wk"
        sources[name] = write_source(folder / name, base, {wk: store_wk(base, name)})
        rules[wk] = name
    with serve(folder, base, sources, rules) as made:
        yield made


@pytest.fixture(scope="module")
def target(serving: Serving) -> Built:
    return serving.build()


@pytest.fixture(scope="module")
def draft(serving: Serving, target: Built) -> Built:
    return serving.build(is_draft=True)


@dataclass(frozen=True)
class Feed:
    """What a plan has for one indexer: its tensors as stored, and what they must become."""

    table: RouteTable
    layer: int
    wk: Tensors
    others: Tensors
    expected: torch.Tensor

    @property
    def tensors(self) -> Tensors:
        return self.wk | self.others


def make_feed(
    serving: Serving, folder: Path, layer: int, wk: Stored, weights_proj: Stored | None = None
) -> Feed:
    """Write wk, and maybe weights_proj, to checkpoints of their own, and plan to take them."""
    name, base = indexer(layer), read_base(serving.base)
    stored = {f"{name}.wk": wk}
    if weights_proj is not None:
        stored[f"{name}.weights_proj"] = weights_proj
    sources = {
        f"source{number}": write_source(folder / f"source{number}", serving.base, {module: weight})
        for number, (module, weight) in enumerate(stored.items())
    }
    table = serving.table(sources, dict(zip(stored, sources, strict=True)))
    others: Tensors = {}
    for leaf in ("weights_proj", "k_norm", "wq_b"):
        others |= read_route(table.routes[f"{name}.{leaf}"])
    lower = base[f"{name}.weights_proj.weight"] if weights_proj is None else weights_proj.weight
    expected = torch.cat([wk.weight.bfloat16(), lower.bfloat16()])
    return Feed(table, layer, read_route(table.routes[f"{name}.wk"]), others, expected)


class Fills:
    """Counts what vLLM's loader writes into a fused parameter, which it also blanks."""

    def __init__(self, parameter: torch.nn.Parameter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parameter = parameter
        self.shards: list[int] = []
        stock = parameter.weight_loader

        def counted(param: Any, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.shards.append(args[0])
            return stock(param, weight, *args, **kwargs)

        monkeypatch.setattr(parameter, "_weight_loader", counted)

    def blank(self) -> None:
        self.shards.clear()
        self.parameter.data.fill_(float("nan"))


def orders(feed: Feed) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Every order of up to five tensors, wk's and weights_proj's first of all; the rest follows."""
    items = list(feed.tensors.items())
    moved, rest = items[:5], items[5:]
    for number, order in enumerate(permutations(moved)):
        cut = number % (len(order) + 1)
        yield [*order[:cut], *rest, *order[cut:]]


def once(order: list[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    return [order]


def singly(order: list[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    return [[item] for item in order]


def load_all(intake: Intake, calls: Iterable[Iterable[tuple[str, torch.Tensor]]]) -> None:
    for call in calls:
        intake.load_weights(iter(call))
    intake.close()


def check_all_orders(built: Built, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor a call in every order, and in every fifth also all of them in one call."""
    fills = Fills(built.fused(feed.layer), monkeypatch)
    intake = built.intake(feed.table)
    for number, order in enumerate(orders(feed)):
        for split in (singly,) if number % 5 else (singly, once):
            fills.blank()
            load_all(intake, split(order))
            names = [name for name, _ in order]
            assert sorted(fills.shards) == [0, 1], names
            assert torch.equal(fills.parameter, feed.expected), names


@pytest.mark.parametrize("name", FORMATS)
def test_wk_of_any_format_in_any_order(
    serving: Serving, target: Built, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each order is also a reload of the one before: the intake is the same."""
    feed = make_feed(serving, tmp_path, 0, store_wk(serving.base, name))
    assert not feed.expected.isnan().any()
    check_all_orders(target, feed, monkeypatch)


@pytest.mark.parametrize("name", ["fp8-128x128", "mx-packed", "gptq-act-order", "ct-int4-asym"])
def test_wk_of_the_draft_in_any_order(
    serving: Serving, draft: Built, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = make_feed(serving, tmp_path, MTP, store_wk(serving.base, name))
    check_all_orders(draft, feed, monkeypatch)


@pytest.mark.parametrize(
    "weights_proj",
    ["bf16", "fp32", "fp8-tensor", "ct-int4", "ct-int4-asym", "ct-fp8-channel"],
)
@pytest.mark.parametrize("name", ["bf16", "mx", "awq-g32"])
def test_weights_proj_comes_from_another_source(
    serving: Serving, target: Built, name: str, weights_proj: str, tmp_path, monkeypatch
) -> None:
    shape = read_base(serving.base)[f"{indexer(1)}.weights_proj.weight"].shape
    wk = store_wk(serving.base, name)
    feed = make_feed(serving, tmp_path, 1, wk, FORMATS[weights_proj](tuple(shape)))
    check_all_orders(target, feed, monkeypatch)


def test_indexers_of_two_layers_may_be_mingled(
    serving: Serving, target: Built, tmp_path: Path
) -> None:
    """Tensors of one suffix after the other, as files written by suffix hold them."""
    wk = {0: store_wk(serving.base, "fp8-channel"), 1: store_wk(serving.base, "ct-int4")}
    sources = {
        f"layer{layer}": write_source(
            tmp_path / str(layer), serving.base, {f"{indexer(layer)}.wk": wk[layer]}
        )
        for layer in FULL
    }
    table = serving.table(sources, {f"{indexer(n)}.wk": f"layer{n}" for n in FULL})
    tensors: Tensors = {}
    for layer in FULL:
        for leaf in ("wk", "weights_proj"):
            tensors |= read_route(table.routes[f"{indexer(layer)}.{leaf}"])
    by_suffix = sorted(tensors.items(), key=lambda item: item[0].rpartition(".")[2])
    for layer in FULL:
        target.fused(layer).data.fill_(float("nan"))
    load_all(target.intake(table), singly(by_suffix))
    base = read_base(serving.base)
    for layer in FULL:
        lower = base[f"{indexer(layer)}.weights_proj.weight"]
        expected = torch.cat([wk[layer].weight.bfloat16(), lower])
        assert torch.equal(target.fused(layer), expected)


# What never comes, and what comes twice.


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("bf16", "fp16", "fp32")])
def test_what_never_comes_is_an_error_with_its_name(
    serving: Serving, target: Built, name: str, tmp_path: Path
) -> None:
    feed = make_feed(serving, tmp_path, 0, store_wk(serving.base, name))
    parameter, rows = target.fused(0), len(store_wk(serving.base, name).weight)
    for missing in feed.wk:
        parameter.data.fill_(SENTINEL)
        intake = target.intake(feed.table)
        intake.load_weights((k, v) for k, v in feed.tensors.items() if k != missing)
        module, _, suffix = missing.rpartition(".")
        came = ", ".join(sorted(k.rpartition(".")[2] for k in feed.wk if k != missing))
        with pytest.raises(RouteError, match=rf"^{module}: {came} came, but {suffix} never did"):
            intake.close()
        assert (parameter[:rows] == SENTINEL).all()
        assert torch.equal(parameter[rows:], feed.expected[rows:])


def test_intake_can_be_used_again_after_what_never_came(
    serving: Serving, target: Built, tmp_path: Path
) -> None:
    feed = make_feed(serving, tmp_path, 0, store_wk(serving.base, "fp8-128x128"))
    intake = target.intake(feed.table)
    intake.load_weights([next(iter(feed.wk.items()))])
    with pytest.raises(RouteError, match=r"wk: weight_scale_inv came, but weight never did"):
        intake.close()
    load_all(intake, [feed.tensors.items()])
    assert torch.equal(target.fused(0), feed.expected)


@pytest.mark.parametrize("name", ["fp8-128x128", "gptq-g128", "awq-g32", "ct-int4"])
def test_what_comes_twice_is_an_error(
    serving: Serving, target: Built, name: str, tmp_path: Path
) -> None:
    feed = make_feed(serving, tmp_path, 0, store_wk(serving.base, name))
    for twice, tensor in feed.wk.items():
        again = [(twice, tensor)]
        for calls, when in ((again * 2,), "in one call"), ((again, again), "before the rest"):
            with pytest.raises(RouteError, match=rf"^{twice}: came twice {when}"):
                load_all(target.intake(feed.table), calls)


def test_module_that_comes_again_whole_is_a_trainers_next_step(
    serving: Serving, target: Built, tmp_path: Path
) -> None:
    feed = make_feed(serving, tmp_path, 0, store_wk(serving.base, "fp8-128x128"))
    intake = target.intake(feed.table)
    for _ in range(2):
        intake.load_weights(feed.tensors.items())
    assert torch.equal(target.fused(0), feed.expected)


def test_call_that_failed_leaves_nothing_behind(
    serving: Serving, target: Built, tmp_path: Path
) -> None:
    feed = make_feed(serving, tmp_path, 0, store_wk(serving.base, "fp8-128x128"))
    intake = target.intake(feed.table)
    first = next(iter(feed.wk.items()))

    def cut_short() -> Iterator[tuple[str, torch.Tensor]]:
        yield first
        raise OSError("the trainer is gone")

    with pytest.raises(OSError, match="the trainer is gone"):
        intake.load_weights(cut_short())
    load_all(intake, [feed.tensors.items()])
    assert torch.equal(target.fused(0), feed.expected)


def test_tensor_of_another_form_of_the_module_is_an_error(
    serving: Serving, target: Built, tmp_path: Path
) -> None:
    feed = make_feed(serving, tmp_path, 0, store_wk(serving.base, "gptq-g128"))
    name = f"{indexer(0)}.wk.weight_scale_inv"
    match = rf"^{name}: no tensor of source 'source0', which holds .*qweight"
    with pytest.raises(RouteError, match=match):
        target.intake(feed.table).load_weights([(name, torch.ones(1, 1))])


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.indexer.wv.weight", "layers.0.self_attn.indexer.wk.weight"],
)
def test_tensor_that_the_base_does_not_have_is_an_error(target: Built, name: str) -> None:
    with pytest.raises(RouteError, match=rf"^{name}: the base has no such tensor"):
        target.model.mixprec_intake.load_weights([(name, torch.ones(1, 1))])


# What is served packed, and what cannot be dequantised: random-moe's own routes.

EXPERT = "model.layers.0.mlp.experts.0.up_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"
FP8_LINEAR, GPTQ_EXPERT, WIDENED = (
    ("**.self_attn.*_proj", "fp8"),
    ("**.experts", "gptq"),
    ("**.self_attn.q_proj", "gptq"),
)


def random_intake(*rules: tuple[str, str]) -> tuple[Intake, RouteTable, set[str]]:
    """An intake before a loader that takes everything; the names that it took."""
    table, took = load_route_table(make_random_plan(*rules), None, CPU), set()

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        took.update(name for name, _ in weights)
        return took

    intake = Intake(load, table.routes, table.routes, {}, torch.bfloat16)
    return intake, table, took


@pytest.mark.parametrize(
    ("rule", "module", "missing"),
    [
        (FP8_LINEAR, Q_PROJ, "weight_scale_inv"),
        (FP8_LINEAR, Q_PROJ, "weight"),
        (GPTQ_EXPERT, EXPERT, "scales"),
        (GPTQ_EXPERT, EXPERT, "qweight"),
        (GPTQ_EXPERT, EXPERT, "qzeros"),
        (GPTQ_EXPERT, EXPERT, "g_idx"),
    ],
)
def test_packed_module_that_lacks_a_part_is_an_error(
    rule: tuple[str, str], module: str, missing: str
) -> None:
    """What came went on to the layers at once, so that nothing waits for the missing tensor."""
    intake, table, took = random_intake(rule)
    route = table.routes[module]
    assert route.served.is_quantized and not route.widened
    tensors = read_route(route)
    intake.load_weights((k, v) for k, v in tensors.items() if k != f"{module}.{missing}")
    assert took == tensors.keys() - {f"{module}.{missing}", f"{module}.g_idx"}
    came = ", ".join(sorted(route.tensors.keys() - {missing}))
    match = rf"^{module}: {came} came, but {missing} never did; .*\(so 1 modules\)"
    with pytest.raises(RouteError, match=match):
        intake.close()
    load_all(intake, [tensors.items()])


def test_packed_module_may_come_in_several_calls_or_not_at_all() -> None:
    intake, table, took = random_intake(FP8_LINEAR)
    tensors = read_route(table.routes[Q_PROJ])
    load_all(intake, singly(list(tensors.items())))
    assert took == tensors.keys()


def test_scales_of_another_call_than_the_last_do_not_count() -> None:
    """``close`` begins anew: a second update brings each module whole again."""
    intake, table, _ = random_intake(FP8_LINEAR)
    tensors = read_route(table.routes[Q_PROJ])
    load_all(intake, [tensors.items()])
    weight = f"{Q_PROJ}.weight"
    with pytest.raises(RouteError, match=rf"^{Q_PROJ}: weight came, but weight_scale_inv never"):
        load_all(intake, [[(weight, tensors[weight])]])


@pytest.mark.parametrize(
    ("suffix", "change", "said"),
    [
        ("g_idx", lambda tensor: tensor + 1000, r"g_idx: values 1000 to 1001, expected 0 to 1"),
        ("scales", lambda tensor: tensor[:, 1:], r"scales: shape \[2, 255\], expected \[2, 256\]"),
    ],
)
def test_what_cannot_be_dequantised_names_module_and_source(
    suffix: str, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    intake, table, _ = random_intake(WIDENED)
    assert table.routes[Q_PROJ].widened
    tensors = read_route(table.routes[Q_PROJ])
    tensors[f"{Q_PROJ}.{suffix}"] = change(tensors[f"{Q_PROJ}.{suffix}"])
    with pytest.raises(CheckpointError, match=rf"^{Q_PROJ} of source 'gptq': {said}"):
        intake.load_weights(tensors.items())


# What is passed over.


class Reached:
    """In a ledger's place: notes the names that come through to the model."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def feed(self, stream: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for name, tensor in stream:
            self.names.add(name)
            yield name, tensor


def feed_base(serving: Serving, built: Built) -> tuple[set[str], set[str]]:
    """Feed a model every tensor of the base; return their names, and those that reached it."""
    tensors = read_base(serving.base)
    reached = Reached()
    intake = built.intake(serving.table({}, {}))
    intake.load_weights(
        ((name, tensor) for name, tensor in tensors.items() if ".mlp.experts." not in name),
        reached,
    )
    intake.close()
    return {name for name in tensors if ".mlp.experts." not in name}, reached.names


def test_target_passes_over_shared_indexers_and_mtp_layers_only(
    serving: Serving, target: Built
) -> None:
    given, reached = feed_base(serving, target)
    passed_over = {
        name for name in given if name.startswith((f"{indexer(SHARED)}.", f"model.layers.{MTP}."))
    }
    assert len([name for name in passed_over if ".indexer." in name]) == 10
    assert reached == given - passed_over


def test_draft_passes_over_all_layers_of_the_target(serving: Serving, draft: Built) -> None:
    given, reached = feed_base(serving, draft)
    layers = tuple(f"model.layers.{layer}." for layer in (*FULL, SHARED))
    assert not [name for name in reached if name.startswith(layers)]
    own = {name for name in given if name.startswith(f"model.layers.{MTP}.")}
    lent = {f"model.layers.{MTP}.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
    assert own - lent <= reached


# The loader itself: files, ledger, reload.


@pytest.mark.parametrize("is_draft", [False, True], ids=["target", "draft"])
def test_loader_fills_the_models_from_files(serving: Serving, is_draft: bool) -> None:
    """Of each wk the scales lie in one file, the weight in another behind it."""
    built = serving.build(is_draft)
    serving.loader.load_weights(built.model, built.model_config)
    check_composed(serving, {n: built.fused(n) for n in ((MTP,) if is_draft else FULL)})


def check_composed(serving: Serving, found: Mapping[int, torch.Tensor], factor: float = 1) -> None:
    base = read_base(serving.base)
    for layer, weight in found.items():
        wk = store_wk(serving.base, WK_FORMATS[layer]).weight * factor
        lower = base[f"{indexer(layer)}.weights_proj.weight"]
        assert torch.equal(weight, torch.cat([wk.bfloat16(), lower])), layer


def computed(built: Built) -> dict[int, torch.Tensor]:
    """Read the weights back from what the layers compute of a unit matrix."""
    found = {}
    for layer in FULL:
        fused = built.model.model.layers[layer].self_attn.indexer.wk_weights_proj
        unit = torch.eye(fused.input_size, dtype=torch.bfloat16)
        found[layer] = fused(unit)[0].t()
    return found


def test_reload_through_vllm_replaces_the_weights(serving: Serving) -> None:
    """First with scales doubled, as a trainer would send them, then from the files again."""
    built = serving.build()
    model, config = built.model, built.model_config
    serving.loader.load_weights(model, config)
    process_weights_after_loading(model, config, torch.device("cpu"))
    check_composed(serving, computed(built))
    doubled = [
        (name, tensor * 2 if ".indexer.wk." in name and "scale" in name else tensor.clone())
        for name, tensor in serving.loader.get_all_weights(config, model)
    ]
    reload_weights(serving.config, model, reversed(doubled), None, True)
    check_composed(serving, computed(built), factor=2)
    reload_weights(serving.config, model, None, None, True)
    check_composed(serving, computed(built))


@pytest.mark.parametrize(
    ("left_out", "match"),
    [
        ("0.wk.weight_scale", r"^{0}\.wk: weight came, but weight_scale never did"),
        ("0.wk.weight", r"^{0}\.wk: weight_scale came, but weight never did"),
        ("1.wk.scales", r"^{1}\.wk: g_idx, qweight, qzeros came, but scales never did"),
    ],
)
def test_reload_that_lacks_a_part_is_an_error(serving: Serving, left_out: str, match: str) -> None:
    """And what came of it does not mingle with the next reload, which mends the model."""
    built = serving.build()
    model, config = built.model, built.model_config
    serving.loader.load_weights(model, config)
    process_weights_after_loading(model, config, torch.device("cpu"))
    layer, _, rest = left_out.partition(".")
    missing = f"{indexer(int(layer))}.{rest}"
    lacking = [
        (name, torch.zeros_like(tensor) if ".indexer." in name else tensor.clone())
        for name, tensor in serving.loader.get_all_weights(config, model)
        if name != missing
    ]
    with pytest.raises(RouteError, match=match.format(indexer(0), indexer(1))):
        reload_weights(serving.config, model, lacking, None, True)
    reload_weights(serving.config, model, None, None, True)
    check_composed(serving, computed(built))


@pytest.mark.parametrize("is_draft", [False, True], ids=["target", "draft"])
def test_weights_of_another_directory_are_refused(
    serving: Serving, is_draft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = serving.build(is_draft)
    served = built.model_config.model
    monkeypatch.setattr(built.model_config, "model", str(serving.base))
    match = rf"^weights of {serving.base} for a model served from {served}; expected the same"
    with pytest.raises(UnsupportedError, match=match):
        list(serving.loader.get_all_weights(built.model_config, built.model))


def test_reload_from_another_directory_is_refused(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = serving.build()
    for key in ("model", "model_weights", "revision"):  # which vLLM sets
        monkeypatch.setattr(built.model_config, key, getattr(built.model_config, key))
    with pytest.raises(UnsupportedError, match=rf"^weights of {serving.base} for a model served"):
        reload_weights(serving.config, built.model, None, str(serving.base), True)


def leaving_out(serving: Serving, *names: str) -> MixPrecLoader:
    class Loader(MixPrecLoader):
        def get_all_weights(self, *args: Any) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().get_all_weights(*args):
                if name not in names:
                    yield name, tensor

    return Loader(serving.loader.load_config)


@pytest.mark.parametrize(
    ("left_out", "match"),
    [
        ("0.wk.weight_scale", r"^{0}\.wk: weight came, but weight_scale never did"),
        ("0.wk.weight", r"^{0}\.wk: weight_scale came, but weight never did"),
        ("1.wk.qzeros", r"^{1}\.wk: g_idx, qweight, scales came, but qzeros never did"),
        ("0.weights_proj.weight", r"^{0}\.wk_weights_proj\.weight \(1 of 2 parts\): no source"),
        ("1.k_norm.bias", r"^{1}\.k_norm: weight came, but bias never did"),
        ("1.wq_b.weight", r"^{1}\.wq_b\.weight: no source's tensor filled it"),
    ],
)
def test_loader_names_what_never_came(serving: Serving, left_out: str, match: str) -> None:
    built = serving.build()
    layer, _, rest = left_out.partition(".")
    loader = leaving_out(serving, f"{indexer(int(layer))}.{rest}")
    with pytest.raises(RouteError, match=match.format(indexer(0), indexer(1))):
        loader.load_weights(built.model, built.model_config)


def test_loader_names_an_indexer_that_never_came(serving: Serving) -> None:
    built = serving.build()
    names = [name for name in read_route_names(serving, 1) if ".wk." in name]
    loader = leaving_out(serving, *names, f"{indexer(1)}.weights_proj.weight")
    match = rf"^{indexer(1)}\.wk_weights_proj\.weight: no source's tensor filled it"
    with pytest.raises(RouteError, match=match):
        loader.load_weights(built.model, built.model_config)


def read_route_names(serving: Serving, layer: int) -> list[str]:
    route = serving.config.quant_config.table.routes[f"{indexer(layer)}.wk"]
    return list(read_route(route))


# Stock vLLM, for comparison.


@pytest.mark.parametrize("is_split", [False, True], ids=["one-call", "two-calls"])
def test_stock_draft_needs_wk_and_its_scale_in_one_call(
    serving: Serving, draft: Built, is_split: bool, tmp_path: Path
) -> None:
    """vllm#46168. The same two calls through the intake fill the parameter."""
    from vllm_mixprec.patches.indexer_wk import CALLS

    if not CALLS.needed():
        pytest.skip("this vLLM's MTP model keeps what waits between calls")
    feed = make_feed(serving, tmp_path, MTP, store_wk(serving.base, "fp8-128x128"))
    parameter = draft.fused(MTP)
    parts = [(suffix, feed.wk[suffix]) for suffix in feed.wk]
    rest = list(feed.others.items())
    calls = [[*parts[:1], *rest], parts[1:]] if is_split else [[*parts, *rest]]
    others = [
        (name, tensor)
        for name, tensor in read_base(serving.base).items()
        if name.startswith(f"model.layers.{MTP}.") and ".indexer." not in name
    ]
    parameter.data.fill_(float("nan"))
    for call in calls:
        DeepSeekMTP.load_weights(draft.model, iter([*call, *others]))
    assert parameter.isnan().any().item() is is_split
    parameter.data.fill_(float("nan"))
    load_all(draft.intake(feed.table), calls)
    assert torch.equal(parameter, feed.expected)


@pytest.mark.parametrize("name", ["gptq-g128", "awq-g128", "ct-int4"])
def test_stock_models_know_no_int4_wk(
    serving: Serving, target: Built, draft: Built, name: str, tmp_path: Path
) -> None:
    """So that ``wk`` of another source cannot be left to them."""
    for built, layer in ((target, 0), (draft, MTP)):
        feed = make_feed(serving, tmp_path / str(layer), layer, store_wk(serving.base, name))
        with pytest.raises(KeyError, match=r"wk_weights_proj\.\w+"):
            type(built.model).load_weights(built.model, iter(feed.tensors.items()))
