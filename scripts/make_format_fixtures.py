# SPDX-License-Identifier: Apache-2.0
"""Make the tiny AWQ checkpoints that tests/checkpoint/formats reads.

    python scripts/make_format_fixtures.py

A one-layer random Qwen3 goes through auto-round into ``tests/fixtures/formats``: ``awq`` with
zero points as AutoAWQ writes it, and ``auto-round-awq``, symmetric, where one module has a group
size of its own. Beside each lies ``expected.safetensors``: two of its weights, float16, as
auto-round's own reader dequantises them. Every other format is made inside the tests, by the
libraries that define it. Runs in the environment that ``train_demo_model.py`` sets up.
"""

import json
import shutil
import tempfile
from multiprocessing import get_context
from pathlib import Path

from train_demo_model import RANDOM, SHARED_FILES, VOCAB_SIZE, run_auto_round  # may start anew

# isort: split
import torch
from auto_round.export.export_to_awq.utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

TARGET = RANDOM.parent / "formats"
EXPECTED = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
OWN_GROUP_SIZE = {EXPECTED[1]: {"group_size": 64}}
# name -> (auto-round's format, its settings)
CHECKPOINTS = {
    "awq": ("auto_awq", {"group_size": 32, "sym": False}),
    "auto-round-awq": (
        "auto_round:auto_awq",
        {"group_size": 32, "sym": True, "layer_config": OWN_GROUP_SIZE},
    ),
}


def write_model(folder: Path) -> None:
    """Write the BF16 model and the tokenizer that auto-round asks for."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in SHARED_FILES:
        shutil.copy(RANDOM / "bf16" / name, folder / name)


def keep(source: Path, target: Path, group_sizes: dict[str, int]) -> None:
    """Keep config and quantised tensors, and add the weights as auto-round reads them."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(shard))
    kept = {name: tensor for name, tensor in tensors.items() if "_proj." in name}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    expected = {}
    for module, group_size in group_sizes.items():
        packed = [tensors[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")]
        expected[module] = dequantize_gemm(*packed, 4, group_size).t().contiguous()
    save_file(expected, target / "expected.safetensors")


def main() -> None:
    for name, (form, settings) in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            source, made = Path(scratch) / "bf16", Path(scratch) / "made"
            source.mkdir()
            made.mkdir()
            write_model(source)
            process = get_context("spawn").Process(
                target=run_auto_round, args=(str(source), str(made), "W4A16", form, settings)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"auto-round failed on {name}")
            own = settings.get("layer_config", {})
            sizes = {m: own.get(m, settings)["group_size"] for m in EXPECTED}
            (folder,) = {shard.parent for shard in made.rglob("*.safetensors")}
            keep(folder, TARGET / name, sizes)
            print(f"{TARGET / name}: made")


if __name__ == "__main__":
    main()
