# SPDX-License-Identifier: Apache-2.0
"""The counting itself, in vLLM's forward context and under torch.compile.

Layouts that need several GPUs are built by hand, as vLLM hands them to a router; that the layouts
themselves are understood is for test_rows.py.
"""

import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.forward_context import DPMetadata, set_forward_context
from vllm.model_executor.layers.fused_moe.modular_kernel import (
    FusedMoEActivationFormat,
    FusedMoEExpertsMonolithic,
    FusedMoEKernel,
)
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPMonolithic,
)
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.v1.worker import ubatching
from vllm.v1.worker.ubatch_utils import UBatchSlice

from tests.experts.layers import (
    EXPERTS,
    TOP_K,
    Counters,
    bincount,
    forward,
    moe_layer,
    one_rank,
    padding,
    routed,
)
from tests.loading.serving import needs_cpu
from vllm_mixprec.errors import UnsupportedError
from vllm_mixprec.experts.counter import _mark_real_rows, attach, attach_source

pytestmark = needs_cpu


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return VllmConfig()


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    with one_rank(tmp_path_factory.mktemp("rank")) as config:
        yield config


class TestRealRows:
    def test_padding_is_not_counted(self, config: VllmConfig) -> None:
        counters, batch = Counters(), routed(6, seed=1)
        with set_forward_context(None, config, num_tokens=6, is_padding=padding(4, 6)):
            counters.count(*batch)
        assert counters.counts.tolist() == [bincount(ids[:4]) for ids in batch]
        assert counters.tokens.tolist() == [4]

    def test_padding_wins_over_slots(self, config: VllmConfig) -> None:
        """A cached prefix has slots, and a model without attention none."""
        counters, batch = Counters(), routed(3, seed=1)
        slots = {"attention": torch.full((3,), -1)}
        with forward(config, is_padding=padding(2, 3), slot_mapping=slots):
            counters.count(*batch)
        assert counters.tokens.tolist() == [2]

    def test_slots_tell_where_the_runner_does_not(self, config: VllmConfig) -> None:
        """As for a draft model, whose runner gives no mask."""
        counters, batch = Counters(), routed(5, seed=2)
        slots = torch.tensor([0, 17, -1, 4, -1])
        with forward(config, slot_mapping={"model.layers.0.self_attn.attn": slots}):
            counters.count(*batch)
        assert counters.counts.tolist() == [bincount(ids[slots >= 0]) for ids in batch]
        assert counters.tokens.tolist() == [3]

    @pytest.mark.parametrize(
        "said",
        [
            {"is_padding": padding(0, 5)},
            {"slot_mapping": {"attention": torch.full((5,), -1)}},
            {},
            {"slot_mapping": {}},
        ],
        ids=["all padding", "no slots", "nothing said", "no KV cache"],
    )
    def test_dummy_run_counts_nothing(self, said: dict, config: VllmConfig) -> None:
        counters = Counters()
        with forward(config, is_padding=padding(5, 5)):
            counters.count(*routed(5, seed=1))
        before = counters.counts.copy()
        with forward(config, **said):
            counters.count(*routed(5, seed=2))
        assert counters.counts.tolist() == before.tolist()
        assert counters.tokens.tolist() == [5]

    def test_each_batch_is_marked_anew(self, config: VllmConfig) -> None:
        counters = Counters(layers=1)
        expected = torch.zeros(EXPERTS, dtype=torch.int64)
        for seed, (real, rows) in enumerate([(9, 9), (2, 4), (0, 7), (5, 64), (1, 1), (96, 96)]):
            (ids,) = routed(rows, seed, layers=1)
            with forward(config, is_padding=padding(real, rows)):
                counters.count(ids)
            expected += torch.tensor(bincount(ids[:real]))
        assert counters.counts.tolist() == [expected.tolist()]
        assert counters.tokens.tolist() == [9 + 2 + 0 + 5 + 1 + 96]

    def test_ids_outside_the_layer_are_skipped(self, config: VllmConfig) -> None:
        counters = Counters(layers=2)
        ids = torch.tensor([[-1, 0], [EXPERTS, 1], [EXPERTS - 1, 1000], [-7, -1]])
        with forward(config, is_padding=padding(4, 4)):
            counters.count(ids, ids)
        assert counters.counts.tolist() == [[1, 1, 0, 0, 0, 0, 0, 1]] * 2

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint32])
    def test_ids_of_any_integer_type(self, dtype: torch.dtype, config: VllmConfig) -> None:
        counters, batch = Counters(), routed(6, seed=3)
        with forward(config, is_padding=padding(5, 6)):
            counters.count(*(ids.to(dtype) for ids in batch))
        assert counters.counts.tolist() == [bincount(ids[:5]) for ids in batch]

    def test_ids_that_are_a_view(self, config: VllmConfig) -> None:
        counters, batch = Counters(), routed(6, seed=4)
        wide = [torch.cat([ids, ids + 1], dim=1)[:, :TOP_K] for ids in batch]
        with forward(config, is_padding=padding(6, 6)):
            counters.count(*wide)
        assert counters.counts.tolist() == [bincount(ids) for ids in batch]

    def test_unknown_layout_is_said_and_not_counted(
        self, config: VllmConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
        counters = Counters()
        with forward(config, is_padding=padding(5, 5)):
            counters.count(*routed(41, seed=1))
        assert not counters.counts.any() and not counters.tokens.any()
        assert "41 rows for 5 tokens is a layout that is not known" in caplog.text


def shards_of(batch: Tensor, sp_size: int) -> list[Tensor]:
    """As vLLM's ``sequence_parallel_chunk``: rows of zeros are added, which route somewhere too."""
    padded = nn.functional.pad(batch, (0, 0, 0, -len(batch) % sp_size))
    return list(padded.chunk(sp_size)) if len(padded) else [padded] * sp_size


class TestRecordedLayouts:
    """All ranks' counts together are the real tokens' of all data-parallel ranks."""

    # Padded tokens of each data-parallel rank, and how many are real; the third is a dummy run.
    BATCHES = (([5, 7], [5, 6]), ([8, 8], [3, 8]), ([4, 1], [4, 0]), ([1, 1], [1, 1]))

    @pytest.mark.parametrize("dp_tokens, real", BATCHES)
    @pytest.mark.parametrize("is_naive", [True, False], ids=["naive dispatch", "modular"])
    def test_data_parallel(
        self, is_naive: bool, dp_tokens: list[int], real: list[int], config: VllmConfig
    ) -> None:
        batches = [routed(rows, seed) for seed, rows in enumerate(dp_tokens)]
        everything = [torch.cat(layer) for layer in zip(*batches, strict=True)]
        for dp_rank, batch in enumerate(batches):
            counters = Counters(shares=(dp_rank, 0, 1))
            mask = padding(real[dp_rank], dp_tokens[dp_rank])
            with forward(config, dp_tokens, is_padding=mask):
                counters.count(*(everything if is_naive else batch))
            assert counters.counts.tolist() == [bincount(ids[: real[dp_rank]]) for ids in batch]
            assert counters.tokens.tolist() == [real[dp_rank]]

    @pytest.mark.parametrize("dp_tokens, real", [*BATCHES, ([5], [5]), ([1], [1])])
    @pytest.mark.parametrize("is_naive", [True, False], ids=["naive dispatch", "modular"])
    @pytest.mark.parametrize("sp_size", [2, 4])
    def test_sequence_parallel(
        self,
        sp_size: int,
        is_naive: bool,
        dp_tokens: list[int],
        real: list[int],
        config: VllmConfig,
    ) -> None:
        batches = [routed(rows, seed) for seed, rows in enumerate(dp_tokens)]
        shards = [[shards_of(ids, sp_size) for ids in batch] for batch in batches]
        everything = [torch.cat([s for rank in shards for s in rank[layer]]) for layer in range(2)]
        for dp_rank, batch in enumerate(batches):
            mask = padding(real[dp_rank], dp_tokens[dp_rank])
            ranks = [Counters(shares=(dp_rank, sp_rank, sp_size)) for sp_rank in range(sp_size)]
            for sp_rank, counters in enumerate(ranks):
                own = [layer[sp_rank] for layer in shards[dp_rank]]
                with forward(config, dp_tokens, is_padding=mask) as context:
                    metadata: DPMetadata = context.dp_metadata
                    with metadata.sp_local_sizes(sp_size) as sizes:
                        # The batches are what vLLM says they are.
                        assert len(own[0]) == sizes[dp_rank * sp_size + sp_rank]
                        assert len(everything[0]) == sum(sizes)
                        counters.count(*(everything if is_naive else own))
            counts = sum(torch.from_numpy(counters.counts) for counters in ranks)
            assert counts.tolist() == [bincount(ids[: real[dp_rank]]) for ids in batch]
            assert sum(counters.tokens.item() for counters in ranks) == real[dp_rank]

    def test_micro_batches_take_turns(
        self, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two micro-batches pass the layers alternately; the second is part padding."""
        counters = Counters(ubatches=2)
        batches = [routed(4, seed=5), routed(4, seed=6)]
        masks = padding(7, 8).split(4)
        for layer in range(2):
            for ubatch, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
                monkeypatch.setitem(ubatching._THREAD_ID_TO_CONTEXT, threading.get_ident(), ubatch)
                # As vLLM's wrapper makes them: their slices of the mask, their own batch sizes.
                with forward(config, [4, 4], is_padding=mask):
                    counters.layers[layer].count(batch[layer])
        assert counters.tokens.tolist() == [7]
        assert counters.counts.tolist() == [
            bincount(torch.cat([batches[0][layer], batches[1][layer][:3]])) for layer in range(2)
        ]

    def test_whole_batch_of_micro_batches_is_known_by_its_slots(self, config: VllmConfig) -> None:
        slices = [UBatchSlice(slice(0, 1), slice(0, 4)), UBatchSlice(slice(1, 2), slice(4, 8))]
        counters, batch = Counters(), routed(4, seed=5)
        slots = {"attention": torch.tensor([3, 4, 5, -1])}
        with forward(config, is_padding=padding(8, 8), ubatch_slices=slices, slot_mapping=slots):
            counters.count(*batch)
        assert counters.counts.tolist() == [bincount(ids[:3]) for ids in batch]

    def test_draft_counts_into_its_own(self, config: VllmConfig) -> None:
        """Target and draft share counts and mask, each has its tokens and its marking layer."""
        counters = Counters(layers=2)
        draft_tokens = torch.zeros(1, dtype=torch.int64)
        target, draft = counters.layers
        draft.tokens, draft.marks = draft_tokens, True
        (ids,) = routed(6, seed=1, layers=1)
        (draft_ids,) = routed(3, seed=2, layers=1)
        for _ in range(2):
            with forward(config, is_padding=padding(5, 6)):
                target.count(ids)
            with forward(config, slot_mapping={"attention": torch.tensor([1, 2, -1])}):
                draft.count(draft_ids)
        assert (counters.tokens.item(), draft_tokens.item()) == (10, 4)
        assert counters.counts.tolist() == [
            bincount(ids[:5].repeat(2, 1)),
            bincount(draft_ids[:2].repeat(2, 1)),
        ]


class TestCompiled:
    """On a CPU torch.compile traces through the router, and the counting with it."""

    @staticmethod
    def model(counters: Counters) -> nn.Module:
        class TwoLayers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                generator = torch.Generator().manual_seed(0)
                self.gates = nn.ParameterList(
                    torch.randn(16, EXPERTS, generator=generator) for _ in range(2)
                )

            def forward(self, hidden: Tensor) -> Tensor:
                for gate, counter in zip(self.gates, counters.layers, strict=True):
                    weights, ids = (hidden @ gate).topk(TOP_K)
                    counter.count(ids.to(torch.int32))
                    hidden = hidden + weights.sum(1, keepdim=True)
                return hidden

        return TwoLayers().requires_grad_(False)

    def test_graph_counts_as_eager_does(self, config: VllmConfig) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        eager, compiled = Counters(), Counters()
        plain = self.model(eager)
        fast = torch.compile(self.model(compiled), fullgraph=True, dynamic=True)
        generator = torch.Generator().manual_seed(1)
        tokens = 0
        for real, rows in [(4, 4), (3, 8), (16, 16), (0, 5), (61, 64), (4, 4), (3, 8)] * 3:
            hidden = torch.randn(rows, 16, generator=generator)
            for model in (plain, fast):
                with set_forward_context(None, config, rows, is_padding=padding(real, rows)):
                    model(hidden)
            tokens += real
        assert compiled.tokens.tolist() == eager.tokens.tolist() == [tokens]
        assert compiled.counts.tolist() == eager.counts.tolist()
        assert compiled.counts.sum(axis=1).tolist() == [tokens * TOP_K] * 2
        stats = torch._dynamo.utils.counters
        assert stats["stats"]["unique_graphs"] == 1
        assert not stats["graph_break"]

    def test_graph_of_one_row(self, config: VllmConfig) -> None:
        torch._dynamo.reset()
        counters = Counters()
        model = torch.compile(self.model(counters), fullgraph=True, dynamic=True)
        for _ in range(5):
            with forward(config, is_padding=padding(1, 1)):
                model(torch.ones(1, 16))
        assert counters.tokens.tolist() == [5]
        assert counters.counts.sum(axis=1).tolist() == [5 * TOP_K] * 2

    def test_marking_asks_the_context_of_each_run(self, config: VllmConfig) -> None:
        """What the first run's context said is not baked into the graph."""
        torch._dynamo.reset()
        counters = Counters()
        model = torch.compile(self.model(counters), fullgraph=True, dynamic=True)
        hidden = torch.ones(6, 16)
        with forward(config):  # profiling
            model(hidden)
        assert counters.tokens.tolist() == [0]
        with forward(config, is_padding=padding(2, 6)):
            model(hidden)
        assert counters.tokens.tolist() == [2]
        with forward(config, slot_mapping={"attention": torch.arange(6)}):
            model(hidden)
        assert counters.tokens.tolist() == [8]
        assert counters.counts.sum(axis=1).tolist() == [8 * TOP_K] * 2


class TestNoSync:
    """On the meta device there is no value to wait for: reading one raises."""

    def test_reading_a_value_would_be_noticed(self) -> None:
        with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
            torch.zeros(1, device="meta").item()

    @pytest.mark.parametrize("dp_tokens, shares", [(None, (0, 0, 1)), ([6, 4], (0, 0, 1))])
    @pytest.mark.parametrize("is_masked", [True, False])
    def test_marking(
        self,
        is_masked: bool,
        dp_tokens: list[int] | None,
        shares: tuple[int, int, int],
        config: VllmConfig,
    ) -> None:
        counters = Counters(device="meta")
        said = (
            {"is_padding": torch.zeros(6, dtype=torch.bool, device="meta")}
            if is_masked
            else {"slot_mapping": {"attention": torch.zeros(6, dtype=torch.int64, device="meta")}}
        )
        rows = sum(dp_tokens or [6])
        with forward(config, dp_tokens, **said):
            _mark_real_rows(counters.real[0], counters.tokens, rows, *shares)

    def test_counting(self, config: VllmConfig) -> None:
        counters = Counters(device="meta")
        mask = torch.zeros(6, dtype=torch.bool, device="meta")
        with forward(config, is_padding=mask):
            counters.count(*(ids.to("meta") for ids in routed(6, seed=1)))


class Mapped(CPURouter):
    """With load balancing as on a GPU; vLLM's mapping on a CPU leaves the ids as they are."""

    def _apply_eplb_mapping(self, topk_ids: Tensor) -> Tensor:
        assert self.eplb_state is not None
        return self.eplb_state.logical_to_physical_map[:, 0][topk_ids.long()]


class TestAttach:
    def test_router_of_a_layer_counts(self, rank: VllmConfig) -> None:
        layer, counters = moe_layer(10), Counters(layers=1)
        attach(layer, counters.layers[0])
        logits = torch.randn(5, EXPERTS, generator=torch.Generator().manual_seed(0))
        with forward(rank, is_padding=padding(4, 5)):
            layer.router.select_experts(hidden_states=torch.zeros(5, 64), router_logits=logits)
        assert counters.counts.tolist() == [bincount(logits[:4].topk(TOP_K).indices)]

    def test_logical_ids_are_counted_before_load_balancing(self, rank: VllmConfig) -> None:
        physical = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2])
        state = EplbLayerState(
            expert_load_view=torch.zeros(10, dtype=torch.int32),
            logical_to_physical_map=physical[:, None],
            logical_replica_count=torch.ones(EXPERTS, dtype=torch.int64),
            should_record_tensor=torch.ones((), dtype=torch.bool),
            num_unpadded_tokens_tensors=[torch.tensor(5)],
        )
        layer, counters = moe_layer(11), Counters(layers=1)
        layer.router = Mapped(TOP_K, EXPERTS, eplb_state=state)
        attach(layer, counters.layers[0])
        logits = torch.randn(5, EXPERTS, generator=torch.Generator().manual_seed(1))
        logical = logits.topk(TOP_K).indices
        with forward(rank, is_padding=padding(5, 5)):
            _, ids = layer.router.select_experts(
                hidden_states=torch.zeros(5, 64), router_logits=logits
            )
        assert ids.sort().values.tolist() == physical[logical].sort().values.tolist()
        assert counters.counts.tolist() == [bincount(logical)]

    def test_returned_routed_experts_and_counters_both_work(self, rank: VllmConfig) -> None:
        """vLLM's --enable-return-routed-experts binds later, and again after a reload."""
        model, counters = nn.ModuleList([moe_layer(0), moe_layer(1)]), Counters()
        for layer, counter in zip(model, counters.layers, strict=True):
            attach(layer, counter)
        capturer = RoutedExpertsCapturer(64, rank)
        for _ in range(2):
            bind_routed_experts_capturer(model, capturer)
        generator = torch.Generator().manual_seed(2)
        with forward(rank, is_padding=padding(4, 6)):
            for layer in model:
                layer.router.select_experts(
                    hidden_states=torch.zeros(6, 64),
                    router_logits=torch.randn(6, EXPERTS, generator=generator),
                )
        returned = capturer.snapshot_routing_data(4)
        for number in range(2):
            assert counters.counts[number].tolist() == bincount(returned[:, number])
        assert counters.counts.sum() == 2 * 4 * TOP_K

    def test_capture_that_was_there_before_goes_on(self, rank: VllmConfig) -> None:
        layer, counters = moe_layer(12), Counters(layers=1)
        seen: list[Tensor] = []
        layer.router.set_capture_fn(seen.append)
        attach(layer, counters.layers[0])
        with forward(rank, is_padding=padding(3, 3)):
            layer.router.select_experts(
                hidden_states=torch.zeros(3, 64), router_logits=torch.eye(3, EXPERTS)
            )
        assert len(seen) == 1
        assert counters.counts.tolist() == [bincount(seen[0])]
        layer.router.set_capture_fn(None)
        with forward(rank, is_padding=padding(3, 3)):
            layer.router.select_experts(
                hidden_states=torch.zeros(3, 64), router_logits=torch.eye(3, EXPERTS)
            )
        assert len(seen) == 1
        assert counters.counts.sum() == 2 * 3 * TOP_K

    def test_layer_that_tells_by_itself(self, config: VllmConfig) -> None:
        class Source:
            layer_id = 3
            capture_fn = None

        source, counters, seen = Source(), Counters(layers=1), []
        source.capture_fn = seen.append
        attach_source(source, counters.layers[0])
        (ids,) = routed(4, seed=1, layers=1)
        with forward(config, is_padding=padding(4, 4)):
            source.capture_fn(ids)
        assert counters.counts.tolist() == [bincount(ids)]
        assert len(seen) == 1

    def test_zero_experts_are_refused(self, rank: VllmConfig) -> None:
        layer = moe_layer(13)
        layer.router = ZeroExpertRouter(
            TOP_K,
            EXPERTS,
            e_score_correction_bias=torch.zeros(EXPERTS + 2),
            num_logical_experts=EXPERTS,
            zero_expert_type="identity",
        )
        with pytest.raises(UnsupportedError, match="layers.13.*reports zero experts as expert 0"):
            attach(layer, Counters(layers=1).layers[0])

    def test_other_routers_are_refused(self, rank: VllmConfig) -> None:
        layer = moe_layer(14)
        layer.router = nn.Identity()
        with pytest.raises(UnsupportedError, match="a router of type Identity; expected a BaseR"):
            attach(layer, Counters(layers=1).layers[0])


class RoutesByItself(FusedMoEExpertsMonolithic):
    """A monolithic kernel: it gets logits, and returns hidden states. This one only routes."""

    _supports_activation = _supports_current_device = staticmethod(lambda *_: True)
    _supports_no_act_and_mul = _supports_parallel_config = staticmethod(lambda *_: True)
    _supports_quant_scheme = staticmethod(lambda *_: True)

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def apply(self, hidden_states, w1, w2, router_logits, *args, routing_replay_out=None, **kwargs):
        if routing_replay_out is not None:
            routing_replay_out.copy_(router_logits.topk(TOP_K).indices)
        return hidden_states


class TellsWhatItRouted(RoutesByItself):
    def supports_routing_replay_capture(self) -> bool:
        return True


class TestMonolithicKernels:
    def test_reported_routing_is_counted(self, rank: VllmConfig) -> None:
        layer, counters = moe_layer(20), Counters(layers=1)
        use_kernel(layer, TellsWhatItRouted)
        attach(layer, counters.layers[0])
        logits = torch.randn(5, EXPERTS, generator=torch.Generator().manual_seed(0))
        with forward(rank, is_padding=padding(3, 5)):
            layer.routed_experts.forward_monolithic(torch.zeros(5, 64), router_logits=logits)
        assert counters.counts.tolist() == [bincount(logits[:3].topk(TOP_K).indices)]
        assert counters.tokens.tolist() == [3]

    def test_silent_kernel_is_refused(self, rank: VllmConfig) -> None:
        layer = moe_layer(21)
        use_kernel(layer, RoutesByItself)
        with pytest.raises(UnsupportedError, match="RoutesByItself routes by itself and does not"):
            attach(layer, Counters(layers=1).layers[0])
        assert layer.routed_experts.routing_sink is None


def use_kernel(layer, experts_class: type[FusedMoEExpertsMonolithic]) -> None:
    quant_config = layer._quant_method.get_fused_moe_quant_config(layer.routed_experts)
    experts = experts_class(layer.moe_config, quant_config)
    prepare = MoEPrepareAndFinalizeNoDPEPMonolithic()
    layer._quant_method.moe_kernel = FusedMoEKernel(prepare, experts)
    assert layer.is_monolithic
