# SPDX-License-Identifier: Apache-2.0
"""A load's memory never exceeds the finished model's by more than 256 MiB."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_mixprec.routing.platform import detect_platform

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench_load import Child  # noqa: E402
from synthetic import Shape, compose_mix, write_models  # noqa: E402

pytestmark = pytest.mark.skipif(
    detect_platform().name != "cpu-avx512", reason="stock vLLM's experts are copied to be packed"
)
CEILING_BYTES = 256 << 20
# 600 MB in BF16, a layer of it 300; one shard.
SHAPE = Shape(layers=2, experts=64, inner=768, vocab=1024, shard_bytes=2_000_000_000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("memory")
    stored = write_models(folder, SHAPE)
    formats = {"BF16": ("bf16",), "three formats": ("int4", "fp8", "bf16")}
    yield {"stock": stored["bf16"]} | {
        name: compose_mix(folder / "mixed" / name, stored, experts)
        for name, experts in formats.items()
    }
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    started = Child()
    yield started
    started.end()


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("name", ["BF16", "three formats"])
def test_peak_is_little_above_the_weights(
    models: dict[str, Path], child: Child, name: str, cold: bool
) -> None:
    found = child.ask("load", models[name], cold, plain=False)
    assert found["weight_bytes"] > CEILING_BYTES  # a second copy would be seen
    assert found["peak_bytes"] - found["weight_bytes"] <= CEILING_BYTES


def test_the_measure_finds_a_load_by_a_memory_map(models: dict[str, Path], child: Child) -> None:
    """Stock vLLM's: the pages of its file stay in the process beside the weights."""
    found = child.ask("load", models["stock"], plain=True)
    assert found["peak_bytes"] - found["weight_bytes"] > CEILING_BYTES
