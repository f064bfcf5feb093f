# SPDX-License-Identifier: Apache-2.0
"""Write one random Qwen3-MoE three times, for the benchmarks: BF16, FP8 block and GPTQ int4.

    python scripts/synthetic.py                       # runs/synthetic: 1.4, 0.8 and 0.4 GB
    python scripts/synthetic.py --layers 2 -o runs/tiny

The layout is that of Hugging Face's files: one tensor an expert projection, shards, an
index. Quantisation is plain round-to-nearest: speed, bytes and memory do not depend on how good
the codes are. Nothing here is meant for tests of numbers. One shard of each format is in memory at
a time. A model that is there already, with the same shape, is left alone.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "runs" / "synthetic"
FORMATS = ("bf16", "fp8", "int4")
_BLOCK = 128  # FP8 block (N, K)
_GROUP = 128  # int4 group along K
_DONE = "synthetic.json"  # written last, holds the shape


@dataclass(frozen=True)
class Shape:
    """What decides the model's tensors. ``hidden`` and ``inner`` are multiples of 128."""

    layers: int = 12
    experts: int = 32
    top_k: int = 4
    hidden: int = 1024
    inner: int = 512  # of one expert
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 8192
    shard_bytes: int = 300_000_000
    seed: int = 0


LARGE_FOLDER = ROOT / "runs" / "synthetic-large"
LARGE = Shape(
    layers=4,
    experts=128,
    top_k=8,
    hidden=2048,
    inner=768,
    heads=32,
    kv_heads=4,
    head_dim=128,
    shard_bytes=4_000_000_000,
)
"""Layers of Qwen3-30B-A3B's size: 4.9 GB in BF16, 2.5 in FP8, 1.3 in int4; shards as it has."""


def write_models(
    folder: Path = DEFAULT, shape: Shape | None = None, formats: tuple[str, ...] = FORMATS
) -> dict[str, Path]:
    """Write ``folder``/bf16, /fp8 and /int4 unless they are there; return their paths by format."""
    shape = shape or Shape()
    paths = {name: folder / name for name in formats}
    if all(_is_done(path, shape) for path in paths.values()):
        return paths
    writers = {name: _Writer(path, shape) for name, path in paths.items()}
    for module, weight, quantized in _weights(shape):
        for name, writer in writers.items():
            convert = _CONVERT.get(name) if quantized else None
            writer.add(convert(module, weight) if convert else {f"{module}.weight": weight})
    for name, writer in writers.items():
        writer.close(_config(shape, name))
    return paths


def _is_done(path: Path, shape: Shape) -> bool:
    done = path / _DONE
    return done.exists() and json.loads(done.read_text()) == asdict(shape)


def _weights(shape: Shape) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (module, bf16 weight (N, K), whether quantised checkpoints quantise it)."""
    generator = torch.Generator().manual_seed(shape.seed)

    def linear(rows: int, columns: int, std: float | None = None) -> torch.Tensor:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        return weight.normal_(0, std or columns**-0.5, generator=generator)

    def norm(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    yield "model.embed_tokens", linear(shape.vocab, shape.hidden, 1.0), False
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        yield f"{layer}.input_layernorm", norm(shape.hidden), False
        yield f"{layer}.self_attn.q_proj", linear(query, shape.hidden), True
        yield f"{layer}.self_attn.k_proj", linear(key, shape.hidden), True
        yield f"{layer}.self_attn.v_proj", linear(key, shape.hidden), True
        yield f"{layer}.self_attn.o_proj", linear(shape.hidden, query), True
        yield f"{layer}.self_attn.q_norm", norm(shape.head_dim), False
        yield f"{layer}.self_attn.k_norm", norm(shape.head_dim), False
        yield f"{layer}.post_attention_layernorm", norm(shape.hidden), False
        yield f"{layer}.mlp.gate", linear(shape.experts, shape.hidden), False
        for expert in range(shape.experts):
            prefix = f"{layer}.mlp.experts.{expert}"
            yield f"{prefix}.gate_proj", linear(shape.inner, shape.hidden), True
            yield f"{prefix}.up_proj", linear(shape.inner, shape.hidden), True
            yield f"{prefix}.down_proj", linear(shape.hidden, shape.inner), True
    yield "model.norm", norm(shape.hidden), False
    # Small, so that sampled tokens differ and every step routes to other experts.
    yield "lm_head", linear(shape.vocab, shape.hidden, 0.02), False


def _to_fp8(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """E4M3 weight (N, K) and float32 scales (N / 128, K / 128)."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    return {
        f"{module}.weight": (blocks / scale).view(rows, columns).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_inv": scale.view(rows // _BLOCK, columns // _BLOCK),
    }


def _to_int4(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """GPTQ v1, symmetric: int32 qweight (K / 8, N), float16 scales (K / 128, N), zero point 8."""
    rows, columns = weight.shape
    groups = columns // _GROUP
    grouped = weight.float().T.reshape(groups, _GROUP, rows)
    scale = grouped.abs().amax(1, keepdim=True) / 7
    codes = (grouped / scale).round().clamp(-8, 7).int().add(8).view(columns // 8, 8, rows)
    words = torch.zeros(columns // 8, rows, dtype=torch.int32)
    for place in range(8):
        words |= codes[:, place] << (4 * place)
    return {
        f"{module}.g_idx": torch.arange(columns, dtype=torch.int32) // _GROUP,
        f"{module}.qweight": words,
        f"{module}.qzeros": torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32),
        f"{module}.scales": scale.view(groups, rows).half(),
    }


_CONVERT = {"fp8": _to_fp8, "int4": _to_int4}


def _config(shape: Shape, name: str) -> dict:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.inner,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab,
    }
    gates = [f"model.layers.{number}.mlp.gate" for number in range(shape.layers)]
    if name == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [_BLOCK, _BLOCK],
            "modules_to_not_convert": [*gates, "lm_head"],
        }
    elif name == "int4":
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": _GROUP,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "dynamic": {f"-:.*{gate}.*".replace(".mlp", r"\.mlp"): {} for gate in gates},
        }
    return config


class _Writer:
    """Collects tensors into shards of about ``shape.shard_bytes``, then writes the index."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self._path, self._shape = path, shape
        path.mkdir(parents=True, exist_ok=True)
        for old in path.iterdir():
            old.unlink()
        self._tensors: dict[str, torch.Tensor] = {}
        self._waiting_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take one module's tensors; they stay in one shard."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and self._waiting_bytes + nbytes > self._shape.shard_bytes:
            self._flush()
        self._tensors |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._waiting_bytes += nbytes
        self._total_bytes += nbytes

    def _flush(self) -> None:
        self._shards.append(sorted(self._tensors))
        save_file(self._tensors, self._part(len(self._shards)), metadata={"format": "pt"})
        self._tensors, self._waiting_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._path / f"part-{number}.safetensors"

    def close(self, config: dict) -> None:
        self._flush()
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05}-of-{len(self._shards):05}.safetensors"
            self._part(number).rename(self._path / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        for file, content in (
            ("config.json", config),
            ("model.safetensors.index.json", index),
            (_DONE, asdict(self._shape)),
        ):
            (self._path / file).write_text(json.dumps(content, indent=2) + "\n")


def compose_mix(
    folder: Path, paths: dict[str, Path], experts: tuple[str, ...], dense: str = "bf16"
) -> Path:
    """Compose a plan over :func:`write_models`' output and return the directory to serve.

    Expert e of every layer comes from ``experts[e % len(experts)]``, so that no format gets the
    experts which a router happens to like; attention comes from ``dense``; router, norms,
    embeddings and head are BF16 everywhere.
    """
    from vllm_mixprec import Plan, compose

    shape = json.loads((paths["bf16"] / _DONE).read_text())
    if math.remainder(shape["experts"], len(experts)) and len(experts) != 3:
        raise SystemExit(f"{shape['experts']} experts cannot be split into {len(experts)} groups")
    rules = [{"match": "model.layers.*.self_attn.*_proj", "source": dense}]
    for place, source in enumerate(experts):
        chosen = ",".join(str(e) for e in range(place, shape["experts"], len(experts)))
        braces = f"{{{chosen}}}" if "," in chosen else chosen
        rules.append({"match": f"model.layers.*.mlp.experts.{braces}.*_proj", "source": source})
    used = {rule["source"] for rule in rules} | {"bf16"}
    plan = {
        "version": 1,
        "base": "bf16",
        "sources": {name: {"path": str(paths[name])} for name in FORMATS if name in used},
        "rules": [rule for rule in rules if rule["source"] != "bf16"],
    }
    compose(Plan.from_dict(plan), folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--experts", type=int, default=Shape.experts)
    options = parser.parse_args()
    shape = Shape(layers=options.layers, experts=options.experts)
    for name, path in write_models(options.output, shape).items():
        total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        print(f"{name}: {path}, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
