# SPDX-License-Identifier: Apache-2.0
"""The mixes that every architecture is served in, each said twice as in :mod:`tests.engine.mixes`.

"experts": a MoE layer's experts by number in int4, FP8 and BF16. "parts": the parts of fused layers
in different formats, so that those are widened. "layers": whole layers, shared experts and dense
MLPs apart. Rules give layers by number where int4, which lacks the multi-token-prediction layer,
could not serve it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.engine.mixes import ROUNDED_ACTIVATIONS, WEIGHTS_ONLY, Mix, expert, layer

MAX_MODEL_LEN = 64  # what the prompts need, and index_topk: the DSA models are exact up to there


@dataclass(frozen=True)
class Architecture:
    """What the tests need to know of a fixture beside its config.json.

    ``options`` are for ``LLM``. ``uneven`` is a split of the layers over two stages that vLLM would
    not choose, for ``VLLM_PP_LAYER_PARTITION``. ``without_indexer`` are layers that use another's
    selection, though their checkpoint may ship an indexer.
    """

    options: dict
    uneven: tuple[int, int] | None = None
    without_indexer: tuple[int, ...] = ()


ARCHITECTURES = {
    "deepseek_v1": Architecture({"trust_remote_code": True}),
    "deepseek_v2": Architecture({}),
    "deepseek_v3": Architecture({}),
    "deepseek_v32": Architecture({}, uneven=(1, 2), without_indexer=(2,)),
    "glm_moe_dsa": Architecture({}, uneven=(1, 2), without_indexer=(2,)),
    "mixtral": Architecture({}),
    "olmoe": Architecture({}),
    "glm4_moe": Architecture({}),
}


@dataclass(frozen=True)
class ArchitectureMix(Mix):
    """``widened`` is found in the names of the modules that, stored packed, are served as BF16."""

    widened: str | None = None


def part(name: str) -> str:
    """Name of a tensor's module without its path, such as "q_a_proj"."""
    return name.split(".")[-2]


def attention(name: str) -> bool:
    """Whether a tensor is of a projection of attention, the indexer's apart."""
    return ".self_attn." in name and "_proj" in part(name) and ".indexer." not in name


def dense(name: str) -> bool:
    """Whether a tensor is of a dense MLP, shared experts apart."""
    return (
        ".mlp." in name
        and part(name) in ("gate_proj", "up_proj", "down_proj")
        and (expert(name) < 0 and not shared(name))
    )


def shared(name: str) -> bool:
    return ".shared_experts." in name


# --- experts by number ---------------------------------------------------------------------------

FOUR_EXPERTS = (("**.experts.0", "int4"), ("**.experts.1", "fp8"))


def _four_experts(name: str) -> str:
    return {0: "int4", 1: "fp8"}.get(expert(name), "bf16")


def _four_experts_and_prediction(last: int) -> Callable[[str], str]:
    """As ``_four_experts``; in the layer after ``last`` both of the experts come from FP8."""

    def choose(name: str) -> str:
        source = _four_experts(name)
        return "fp8" if source == "int4" and layer(name) > last else source

    return choose


def _eight_experts(name: str) -> str:
    """Two routing groups of four experts, each in three formats; layer 2 is the prediction's."""
    if expert(name) < 0:
        return "bf16"
    if layer(name) == 2:
        return "fp8"
    return ("int4", "fp8", "bf16", "int4", "fp8", "fp8", "bf16", "int4")[expert(name)]


# --- parts of fused layers -----------------------------------------------------------------------

QKV_PARTS = (
    ("**.self_attn.q_proj", "fp8"),
    ("model.layers.{0,1}.self_attn.k_proj", "int4"),
    ("model.layers.{0,1}.self_attn.o_proj", "int4"),
)


def _qkv_parts(name: str) -> str:
    if part(name) == "q_proj":
        return "fp8"
    return "int4" if part(name) in ("k_proj", "o_proj") and layer(name) < 2 else "bf16"


def _expert_parts(gate: str, up: str) -> Callable[[str], str]:
    """q, k and v apart, and the gate and up projections of expert 2."""

    def choose(name: str) -> str:
        if expert(name) == 2 and layer(name) < 2:
            return {gate: "int4", up: "fp8"}.get(part(name), "bf16")
        return _qkv_parts(name)

    return choose


def _latent_rules(layers: str) -> tuple[tuple[str, str], ...]:
    """Rules of "parts" for latent attention in the layers that int4 has."""
    return (
        ("**.self_attn.{q_proj,q_a_proj,kv_b_proj}", "fp8"),
        (f"model.layers.{layers}.self_attn.{{q_b_proj,kv_a_proj_with_mqa,o_proj}}", "int4"),
    )


def _latent_parts(layers: int) -> Callable[[str], str]:
    """``q_a_proj`` FP8 beside ``kv_a_proj_with_mqa`` int4, and an indexer's ``wk`` FP8."""

    def choose(name: str) -> str:
        if part(name) in ("q_proj", "q_a_proj", "kv_b_proj", "wk", "wq_b"):
            return "fp8"
        int4 = part(name) in ("q_b_proj", "kv_a_proj_with_mqa", "o_proj")
        return "int4" if int4 and layer(name) < layers else "bf16"

    return choose


# --- layers --------------------------------------------------------------------------------------


def _layers(name: str) -> str:
    """Layer 0: attention int4, MLP or experts FP8. Layer 1: attention FP8, experts int4."""
    if layer(name) == 0:
        return "int4" if attention(name) else "fp8" if dense(name) or expert(name) >= 0 else "bf16"
    if layer(name) == 1:
        return "fp8" if attention(name) else "int4" if expert(name) >= 0 else "bf16"
    return "bf16"


def _layers_and_shared(name: str) -> str:
    """The same, with the shared experts of layer 1 int4 and its routed experts FP8."""
    if layer(name) == 1 and expert(name) >= 0:
        return "fp8"
    return "int4" if layer(name) == 1 and shared(name) else _layers(name)


def _three_layers(name: str) -> str:
    """Layer 0 int4, layer 1 FP8, layer 2 int4 but for its routed experts, which are FP8."""
    if layer(name) == 1:
        return "fp8" if attention(name) or dense(name) else "bf16"
    if layer(name) in (0, 2):
        if attention(name) or dense(name) or shared(name) or part(name) == "wk":
            return "int4"
        return "fp8" if expert(name) >= 0 else "bf16"
    return "bf16"


LAYERS = (
    ("model.layers.0.self_attn.*_proj*", "int4"),
    ("model.layers.0.mlp.{gate,up,down}_proj", "fp8"),
    ("model.layers.1.self_attn.*_proj*", "fp8"),
)
SHARED = (
    ("model.layers.1.mlp.shared_experts", "int4"),
    ("model.layers.1.mlp.experts.**", "fp8"),
)
THREE_LAYERS = (
    ("model.layers.{0,2}.self_attn.*_proj*", "int4"),
    ("model.layers.{0,2}.self_attn.indexer.wk", "int4"),
    ("model.layers.{0,2}.mlp.{gate,up,down}_proj", "int4"),
    ("model.layers.2.mlp.shared_experts", "int4"),
    ("model.layers.2.mlp.experts", "fp8"),
    (r"re:model\.layers\.1\.(self_attn\.\w+_proj\w*|mlp\.\w+_proj)", "fp8"),
)

# --- the table -----------------------------------------------------------------------------------


def _mix(
    model: str,
    name: str,
    rules: Iterable[tuple[str, str]],
    choose: Callable[[str], str],
    bound: float = ROUNDED_ACTIVATIONS,
    widened: str | None = None,
) -> ArchitectureMix:
    return ArchitectureMix(f"{model}/{name}", model, tuple(rules), choose, bound, widened)


INDEXER = (("**.indexer.{wk,wq_b}", "fp8"),)
EXPERT_PARTS = (
    ("model.layers.{0,1}.mlp.experts.2.gate_proj", "int4"),
    ("model.layers.{0,1}.mlp.experts.2.up_proj", "fp8"),
)
MIXTRAL_PARTS = (
    ("model.layers.*.block_sparse_moe.experts.2.w1", "int4"),
    ("model.layers.*.block_sparse_moe.experts.2.w3", "fp8"),
)
FUSED_QKV = r"self_attn\.[qk]_proj$|experts\.2\.(gate_proj|up_proj|w1|w3)$"
FUSED_QKV_A = r"\.(q_a_proj|kv_a_proj_with_mqa|wk)$"


def _mixes_of_qkv(model: str, layers: Iterable[tuple[str, str]]) -> Iterable[ArchitectureMix]:
    """Mixes of a model whose attention is q_proj, k_proj and v_proj, and its experts in mlp."""
    yield _mix(
        model,
        "parts",
        (*QKV_PARTS, *EXPERT_PARTS),
        _expert_parts("gate_proj", "up_proj"),
        widened=FUSED_QKV,
    )
    choose = _layers if model == "olmoe" else _layers_and_shared
    yield _mix(model, "layers", layers, choose)


ARCHITECTURE_MIXES = [
    _mix("deepseek_v1", "experts", FOUR_EXPERTS, _four_experts),
    *_mixes_of_qkv("deepseek_v1", (*LAYERS, *SHARED)),
    _mix("deepseek_v2", "experts", FOUR_EXPERTS, _four_experts),
    _mix("deepseek_v2", "parts", _latent_rules("*"), _latent_parts(2)),
    _mix("deepseek_v2", "layers", (*LAYERS, *SHARED), _layers_and_shared),
    _mix(
        "deepseek_v3",
        "experts",
        (
            ("model.layers.1.mlp.experts.{0,3,7}", "int4"),
            ("model.layers.1.mlp.experts.{1,4-5}", "fp8"),
            ("model.layers.2.mlp.experts", "fp8"),
        ),
        _eight_experts,
    ),
    _mix(
        "deepseek_v3",
        "parts",
        _latent_rules("{0,1}"),
        _latent_parts(2),
        widened=FUSED_QKV_A,
    ),
    _mix("deepseek_v3", "layers", (*LAYERS, *SHARED), _layers_and_shared),
    _mix(
        "deepseek_v3",
        "fp8",
        (("**.self_attn.*_proj*", "fp8"), ("**.mlp.**", "fp8")),
        lambda name: "fp8" if ".mlp." in name or attention(name) else "bf16",
        WEIGHTS_ONLY,
    ),
    _mix("deepseek_v32", "experts", FOUR_EXPERTS, _four_experts),
    _mix(
        "deepseek_v32",
        "parts",
        (*_latent_rules("*"), *INDEXER),
        _latent_parts(3),
        widened=FUSED_QKV_A,
    ),
    _mix("deepseek_v32", "layers", THREE_LAYERS, _three_layers, widened=r"\.wk$"),
    _mix(
        "glm_moe_dsa",
        "experts",
        (("model.layers.2.mlp.experts.0", "int4"), ("**.mlp.experts.{0,1}", "fp8")),
        _four_experts_and_prediction(2),
    ),
    _mix(
        "glm_moe_dsa",
        "parts",
        (*_latent_rules("{0-2}"), *INDEXER),
        _latent_parts(3),
        widened=FUSED_QKV_A,
    ),
    _mix("glm_moe_dsa", "layers", THREE_LAYERS, _three_layers, widened=r"\.wk$"),
    _mix("mixtral", "experts", FOUR_EXPERTS, _four_experts),
    _mix(
        "mixtral",
        "parts",
        (*QKV_PARTS, *MIXTRAL_PARTS),
        _expert_parts("w1", "w3"),
        widened=FUSED_QKV,
    ),
    _mix(
        "mixtral",
        "layers",
        (
            *LAYERS[::2],
            ("model.layers.0.block_sparse_moe.experts", "fp8"),
            ("model.layers.1.block_sparse_moe.experts.*.{w1,w2,w3}", "int4"),
        ),
        _layers,
    ),
    _mix("olmoe", "experts", FOUR_EXPERTS, _four_experts),
    *_mixes_of_qkv(
        "olmoe",
        (
            *LAYERS[::2],
            ("model.layers.0.mlp.experts", "fp8"),
            ("model.layers.1.mlp.experts", "int4"),
        ),
    ),
    _mix(
        "glm4_moe",
        "experts",
        (("model.layers.1.mlp.experts.0", "int4"), ("**.mlp.experts.{0,1}", "fp8")),
        _four_experts_and_prediction(1),
    ),
    *_mixes_of_qkv("glm4_moe", (*LAYERS, *SHARED)),
]
BY_NAME = {mix.name: mix for mix in ARCHITECTURE_MIXES}
