# SPDX-License-Identifier: Apache-2.0
"""The mixes that are served and compared, each said twice: as rules, and as a plain function.

The function names the source of a tensor for the reference, so that a mistake in the package's
patterns or precedence cannot cancel out.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo-moe"
RANDOM = ROOT / "tests" / "fixtures" / "random-moe"
ARCHITECTURES = ROOT / "tests" / "fixtures" / "architectures"

SOURCES = {
    "demo": {name: DEMO / name for name in ("bf16", "fp8", "int4")},
    "random": {name: RANDOM / name for name in ("bf16", "fp8", "gptq", "gptq-asym")},
} | {
    folder.name: {name: folder / name for name in ("bf16", "fp8", "int4")}
    for folder in ARCHITECTURES.iterdir()
}

# Mean absolute difference, nats a token. bf16 arithmetic alone costs 0.008 on the random model;
# the int4 kernels also round activations to int8.
WEIGHTS_ONLY, ROUNDED_ACTIVATIONS = 0.02, 0.03


@dataclass(frozen=True)
class Mix:
    name: str
    model: str
    rules: tuple[tuple[str, str], ...]
    choose: Callable[[str], str]
    bound: float

    def plan(self) -> dict:
        return {
            "version": 1,
            "base": "bf16",
            "sources": {name: {"path": str(path)} for name, path in SOURCES[self.model].items()},
            "rules": [{"match": match, "source": source} for match, source in self.rules],
        }


def expert(name: str) -> int:
    """Number of the expert that a tensor belongs to, -1 for none."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else -1


def layer(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def attention(name: str) -> bool:
    return "_proj." in name and ".self_attn." in name


def _three_ways(name: str) -> str:
    if attention(name):
        return "fp8"
    if expert(name) < 0:
        return "bf16"
    return "int4" if expert(name) <= 6 else "fp8" if expert(name) <= 11 else "bf16"


def _layers_apart(name: str) -> str:
    if not attention(name) and expert(name) < 0:
        return "bf16"
    return {0: "fp8", 1: "int4"}.get(layer(name), "bf16")


def _fused_apart(name: str) -> str:
    if attention(name):
        return {"q_proj": "fp8", "k_proj": "int4"}.get(name.split(".")[4], "bf16")
    if expert(name) >= 0 and expert(name) % 2 == 0:
        return "int4" if "gate_proj" in name else "fp8" if "up_proj" in name else "bf16"
    return "bf16"


def _odd_groups(name: str) -> str:
    return {0: "fp8", 1: "fp8", 2: "fp8", 3: "gptq", 4: "fp8"}.get(expert(name), "bf16")


def _four_groups(name: str) -> str:
    if expert(name) < 0:
        return "gptq-asym" if attention(name) else "bf16"
    return ("gptq", "gptq-asym", "fp8", "bf16")[expert(name) // 2]


MIXES = [
    Mix("bf16", "random", (), lambda name: "bf16", WEIGHTS_ONLY),
    Mix(
        "two-groups",
        "random",
        (("model.layers.*.mlp.experts.{0-4}", "fp8"),),
        lambda name: "fp8" if 0 <= expert(name) <= 4 else "bf16",
        WEIGHTS_ONLY,
    ),
    Mix(
        "four-groups",
        "random",
        (
            ("model.layers.*.mlp.experts.{0,1}", "gptq"),
            ("model.layers.*.mlp.experts.{2,3}.*.weight", "gptq-asym"),
            (r"re:model\.layers\.\d+\.mlp\.experts\.[45]\..*", "fp8"),
            ("**.self_attn.*_proj", "gptq-asym"),
        ),
        _four_groups,
        ROUNDED_ACTIVATIONS,
    ),
    Mix(
        "fp8",
        "demo",
        (("**.experts", "fp8"), ("model.layers.{0-2}.self_attn.{q,k,v,o}_proj", "fp8")),
        lambda name: "fp8" if attention(name) or expert(name) >= 0 else "bf16",
        WEIGHTS_ONLY,
    ),
    Mix(
        "experts-three-ways",
        "demo",
        (
            ("model.layers.*.self_attn.*_proj", "fp8"),
            ("model.layers.*.mlp.experts.{0-6}", "int4"),
            ("model.layers.*.mlp.experts.{0-11}", "fp8"),
        ),
        _three_ways,
        ROUNDED_ACTIVATIONS,
    ),
    Mix(
        "layers-apart",
        "demo",
        (
            ("model.layers.0.mlp.experts.*", "fp8"),
            ("model.layers.0.self_attn.*_proj", "fp8"),
            ("model.layers.1.mlp.experts.*", "int4"),
            ("model.layers.1.self_attn.*_proj", "int4"),
        ),
        _layers_apart,
        ROUNDED_ACTIVATIONS,
    ),
    Mix(
        "fused-apart",
        "demo",
        (
            ("**.self_attn.q_proj", "fp8"),
            ("**.self_attn.k_proj", "int4"),
            ("**.experts.{0,2,4,6,8,10,12,14}.gate_proj", "int4"),
            ("**.experts.{0,2,4,6,8,10,12,14}.up_proj", "fp8"),
        ),
        _fused_apart,
        WEIGHTS_ONLY,
    ),
]

# Of two expert-parallel ranks the first has no BF16 expert, the second none in int4, and the FP8
# ones are three and one; of four-groups' ranks, each has all experts of two formats.
ODD_GROUPS = Mix(
    "odd-groups",
    "random",
    (
        ("**.experts.3", "gptq"),
        ("**.experts.{0-4}", "fp8"),
    ),
    _odd_groups,
    ROUNDED_ACTIVATIONS,
)
