# SPDX-License-Identifier: Apache-2.0
"""Make the tiny random checkpoints of every architecture that tests/engine serves.

    python scripts/make_test_models.py                      # all of them, some minutes
    python scripts/make_test_models.py mixtral deepseek_v3  # only these

Each architecture gets ``tests/fixtures/architectures/<name>/{bf16,fp8,int4}``, with tensor names
and a config.json as the public checkpoints spell them. transformers' own classes build and write
the BF16 form, auto-round and transformers the quantised ones; none of it is this repository's code.
Runs in the environment that ``train_demo_model.py`` sets up for auto-round.
"""

import argparse
import copy
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from train_demo_model import RANDOM, run_auto_round, tensors  # may start anew

# isort: split
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.engine import deepseek_v1  # noqa: E402, F401  makes "deepseek" known to transformers

TARGET = ROOT / "tests" / "fixtures" / "architectures"
BLOCK = 128
FP8_BLOCKS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
Weights = dict[str, torch.Tensor]

# --- the models ---------------------------------------------------------------------------------

COMMON = {
    "vocab_size": 64,
    "hidden_size": 128,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# vLLM takes latents of 256 + 64 or 512 + 64, and decodes on a CPU with the latter only.
SMALL_MLA = {
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}
FULL_MLA = SMALL_MLA | {"kv_lora_rank": 512}
SIGMOID = {
    "q_lora_rank": 128,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}
INDEXER = {"index_head_dim": 128, "index_n_heads": 1, "index_topk": 64}
ROPE = {"rope_theta": 10000, "rope_scaling": None, "rms_norm_eps": 1e-6}


@dataclass(frozen=True)
class Architecture:
    """``config`` is config.json word for word, but for ``quantization_config``.

    ``building`` overrides it where the multi-token-prediction layer is built as one more of the
    model's. ``fp8_rest`` names modules that auto-round leaves alone in this architecture and the
    public FP8 checkpoints do not: transformers quantises those. ``float_scales`` widens FP8 scales
    to F32, as those checkpoints store them.
    """

    seed: int
    config: dict
    building: dict | None = None
    group_size: int = 128
    fp8_rest: str | None = None
    float_scales: bool = False

    @property
    def mtp_layer(self) -> int | None:
        """Number of the multi-token-prediction layer, None without one."""
        extra = self.config.get("num_nextn_predict_layers", 0)
        return self.config["num_hidden_layers"] if extra else None


ARCHITECTURES = {
    "deepseek_v1": Architecture(
        seed=31,
        config=COMMON
        | ROPE
        | {
            "architectures": ["DeepseekForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
            "model_type": "deepseek",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "pretraining_tp": 1,
        },
    ),
    "deepseek_v2": Architecture(
        seed=32,
        group_size=64,
        config=COMMON
        | ROPE
        | SMALL_MLA
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "num_hidden_layers": 2,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.0,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": Architecture(
        seed=44,
        float_scales=True,
        config=COMMON
        | ROPE
        | FULL_MLA
        | SIGMOID
        | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_hidden_layers": 2,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_nextn_predict_layers": 1,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 1024,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "deepseek_v32": Architecture(
        seed=34,
        float_scales=True,
        group_size=64,
        config=COMMON
        | ROPE
        | SMALL_MLA
        | SIGMOID
        | INDEXER
        | {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "first_k_dense_replace": 2,
            "index_topk_freq": 2,  # layer 2 shares layer 1's selection, and ships an indexer anyway
        },
    ),
    "glm_moe_dsa": Architecture(
        seed=35,
        float_scales=True,
        fp8_rest=r"indexer\.(wk|wq_b)|layers\.[01]\.mlp\.\w+_proj",
        config=COMMON
        | FULL_MLA
        | SIGMOID
        | INDEXER
        | {
            "architectures": ["GlmMoeDsaForCausalLM"],
            "model_type": "glm_moe_dsa",
            "first_k_dense_replace": 2,
            "head_dim": 64,
            "qk_head_dim": 96,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
            "rope_interleave": True,
            "indexer_rope_interleave": True,
            "indexer_types": ["full", "full", "shared"],
            "num_nextn_predict_layers": 1,
        },
        building={"indexer_types": ["full", "full", "shared", "full"]},
    ),
    "mixtral": Architecture(
        seed=36,
        config=COMMON
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "num_local_experts": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
    ),
    "olmoe": Architecture(
        seed=37,
        config=COMMON
        | {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 128,
            "num_experts": 4,
            "norm_topk_prob": False,
            "clip_qkv": None,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
    ),
    "glm4_moe": Architecture(
        seed=38,
        config=COMMON
        | {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "attention_bias": True,
            "head_dim": 32,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
            "num_hidden_layers": 3,  # vLLM refuses a pipeline stage without experts
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 1000000,
        },
    ),
}


# --- the BF16 checkpoints -----------------------------------------------------------------------


def build(architecture: Architecture) -> Weights:
    """Return a random model's tensors under the names that transformers saves, in BF16.

    A multi-token-prediction layer is built as one more layer of the model. DeepSeek's and GLM's
    checkpoints repeat embeddings and head there, and so does this.
    """
    torch.manual_seed(architecture.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**built_config(architecture)))
    parameters = dict([*model.named_parameters(), *model.named_buffers()])
    softmax = not any(name.endswith("correction_bias") for name in parameters)
    for name, parameter in parameters.items():
        if not name.endswith("inv_freq"):
            parameter.data.copy_(random_values(name, parameter, softmax))
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        weights = tensors(Path(folder))
    if architecture.mtp_layer is not None:
        weights |= train_prediction(architecture, weights)
    for name in weights:
        if name.endswith("e_score_correction_bias"):
            weights[name] = weights[name].float()  # as the public checkpoints store it
    return weights


def built_config(architecture: Architecture) -> dict:
    """Return the configuration to build with, the multi-token-prediction layer being one more."""
    config = architecture.config.copy()
    config.pop("auto_map", None)
    if architecture.mtp_layer is not None:
        config["num_hidden_layers"] += config.pop("num_nextn_predict_layers")
    return config | (architecture.building or {})


def random_values(name: str, parameter: torch.Tensor, softmax: bool) -> torch.Tensor:
    """Return values that make every part matter, so that a mistake anywhere is seen in the logits.

    Near-ties between experts, which BF16 may decide the other way, are kept cheap (steep softmax
    routers) or few (large biases where a sigmoid router chooses by them). The head's gain sets how
    far from uniform the next token is, and with it the noise of BF16.
    """
    noise, fan_in = torch.randn_like(parameter), parameter.shape[-1]
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise.clamp(-2, 2)
    if name.endswith("bias"):
        return (0.3 if name.endswith("correction_bias") else 0.1) * noise
    if "embed_tokens" in name:
        return 0.7 * noise
    router = 2.0 if softmax else 1.0
    gains = {
        "lm_head.weight": 0.6,
        "gate.weight": router,
        "down_proj": 1.5,
        "down_proj.weight": 1.5,
    }
    gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
    return noise * gain / fan_in**0.5


class Predictor(torch.nn.Module):
    """A multi-token-prediction layer: a decoder layer over the next token and the hidden state.

    ``body`` is a model of that one layer, whose last norm is the layer's ``shared_head.norm``. As
    vLLM's ``DeepSeekMultiTokenPredictorLayer``, which blanks the embedding at position 0.
    """

    def __init__(self, config: dict, weights: Weights, layer: int) -> None:
        super().__init__()
        one = config | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
        if "indexer_types" in one:
            one["indexer_types"] = ["full"]
        own = f"model.layers.{layer}."
        block = {
            name.replace(own, "model.layers.0."): tensor
            for name, tensor in weights.items()
            if not name.startswith("model.layers.") or name.startswith(own)
        }
        self.body = load(one, block)
        norm, hidden = self.body.model.norm, config["hidden_size"]
        self.enorm, self.hnorm = copy.deepcopy(norm), copy.deepcopy(norm)
        self.eh_proj = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.eh_proj.weight.data = torch.cat([torch.eye(hidden), 0.1 * torch.eye(hidden)], dim=1)
        self.layer = layer

    def forward(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, n - 1, vocabulary) for the token after the next.

        ``tokens`` (batch, n) and ``hidden`` (batch, n, hidden_size), the model's last states.
        """
        embedded = self.body.model.embed_tokens(tokens[:, 1:])
        embedded = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, 1:]], dim=1)
        mixed = torch.cat([self.enorm(embedded), self.hnorm(hidden[:, :-1])], dim=-1)
        return self.body(inputs_embeds=self.eh_proj(mixed)).logits

    def tensors(self) -> Weights:
        """Return the layer's tensors in BF16 as checkpoints name them, embeddings and head too."""
        with tempfile.TemporaryDirectory() as folder:
            self.body.to(torch.bfloat16).save_pretrained(folder)
            block = tensors(Path(folder))
        names = {
            "model.norm.weight": "shared_head.norm.weight",
            "lm_head.weight": "shared_head.head.weight",
            "model.embed_tokens.weight": "embed_tokens.weight",
        }
        found = {
            names.get(name, name.removeprefix("model.layers.0.")): tensor
            for name, tensor in block.items()
        }
        for name in ("enorm", "hnorm", "eh_proj"):
            found[f"{name}.weight"] = getattr(self, name).weight.detach().to(torch.bfloat16)
        return {f"model.layers.{self.layer}.{name}": tensor for name, tensor in found.items()}


def load(config: dict, weights: Weights) -> torch.nn.Module:
    """Return a float32 model of transformers with exactly these weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            experts_implementation="grouped_mm",
            output_loading_info=True,
        )
    if any(report.values()):
        raise SystemExit(f"{config['architectures']}: {report}")
    return model


def train_prediction(architecture: Architecture, weights: Weights, steps: int = 200) -> Weights:
    """Return the multi-token-prediction layer after it has learnt to guess the model's tokens.

    The model itself stays random. A random predictor would have no draft accepted, so that nobody
    would notice if its weights were never loaded.
    """
    config, layer = architecture.config.copy(), architecture.mtp_layer
    assert layer is not None
    of_model = {n: t for n, t in weights.items() if not n.startswith(f"model.layers.{layer}.")}
    model = load(config | {"num_nextn_predict_layers": 0}, of_model)
    predictor = Predictor(config | {"num_nextn_predict_layers": 0}, weights, layer)
    fixed = (predictor.body.lm_head, predictor.body.model.embed_tokens)
    for module in fixed:
        module.requires_grad_(False)
    trained = [p for p in predictor.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        tokens = torch.randint(config["vocab_size"], (32, 32))
        with torch.no_grad():
            hidden = model.model(tokens).last_hidden_state
            wanted = model.lm_head(hidden)[:, 1:].argmax(-1)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20, 2 * (steps - step) / steps)
        logits = predictor(tokens, hidden)
        loss = torch.nn.functional.cross_entropy(8 * logits.flatten(0, 1), wanted.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            right = (logits.argmax(-1) == wanted).float().mean()
            print(f"step {step + 1}: loss {loss.item():.3f}, guesses right {right.item():.3f}")
    return predictor.tensors()


def write(folder: Path, weights: Weights, config: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if "auto_map" in config:
        source = Path(deepseek_v1.__file__).with_name("configuration_deepseek.py")
        shutil.copy(source, folder / source.name)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


# --- the quantised checkpoints ------------------------------------------------------------------


def auto_round(weights: Weights, config: dict, scheme: str, form: str, **options) -> Path:
    """Run auto-round on a checkpoint, by rounding to nearest; returns the folder it wrote."""
    scratch = Path(tempfile.mkdtemp())
    source, target = scratch / "source", scratch / "out"
    target.mkdir()
    write(source, weights, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # it asks for one and reads no text
        shutil.copy(RANDOM / "bf16" / name, source / name)
    with get_context("spawn").Pool(1) as pool:
        # Indexer heads' weights stay as they are in every public checkpoint.
        options |= {"ignore_layers": "weights_proj"}
        pool.apply(run_auto_round, (str(source), str(target), scheme, form, options))
    return next(target.rglob("config.json")).parent


def write_fp8(architecture: Architecture, weights: Weights, folder: Path) -> None:
    """Write FP8 in blocks of 128 x 128, the multi-token-prediction block included."""
    whole = {name for name in weights if not own_prediction_tensor(architecture, name)}
    written = auto_round(
        {name: weights[name] for name in whole}, built_config(architecture), "FP8_BLOCK", "fp8"
    )
    found = {public_name(architecture, name): t for name, t in tensors(written).items()}
    shutil.rmtree(written.parent.parent)
    result = {name: found.get(name, tensor) for name, tensor in weights.items()}
    result |= {name: t for name, t in found.items() if name.endswith(".weight_scale_inv")}
    if architecture.fp8_rest:
        block = SimpleNamespace(weight_block_size=(BLOCK, BLOCK), scale_fmt="float")
        quantiser = Fp8Quantize(SimpleNamespace(quantization_config=block))
        for name in list(weights):
            if re.search(architecture.fp8_rest + r"\.weight$", name):
                result |= quantiser.convert({name: weights[name]})
    for name in result:
        if name.endswith("e_score_correction_bias"):
            result[name] = weights[name]
        elif architecture.float_scales and name.endswith(".weight_scale_inv"):
            result[name] = result[name].float()
    write(folder, result, architecture.config | {"quantization_config": FP8_BLOCKS})


def write_int4(architecture: Architecture, weights: Weights, folder: Path) -> None:
    """Write GPTQ int4, what auto-round makes of the BF16 checkpoint.

    As in most public int4 checkpoints the multi-token-prediction layer is not there: transformers
    does not load it, and auto-round is told not to copy it over as it is.
    """
    os.environ["AR_DISABLE_COPY_MTP_WEIGHTS"] = "1"
    written = auto_round(
        weights,
        architecture.config,
        "W4A16",
        "auto_gptq",
        group_size=architecture.group_size,
    )
    config = json.loads((written / "config.json").read_text())
    result = {}
    for name, tensor in tensors(written).items():
        name = public_name(architecture, name)
        result[name] = weights[name] if name.endswith("e_score_correction_bias") else tensor
    write(
        folder,
        result,
        architecture.config
        | {"torch_dtype": "float16", "quantization_config": config["quantization_config"]},
    )
    shutil.rmtree(written.parent.parent)


def own_prediction_tensor(architecture: Architecture, name: str) -> bool:
    """Whether a tensor is one that only a multi-token-prediction layer has, not a decoder layer."""
    layer = architecture.mtp_layer
    own = r"(enorm|hnorm|eh_proj|embed_tokens|shared_head\..*)\.weight"
    return re.fullmatch(rf"model\.layers\.{layer}\.{own}", name) is not None


def public_name(architecture: Architecture, name: str) -> str:
    """Undo auto-round's naming of Mixtral's experts, which are w1, w2 and w3 everywhere else."""
    if architecture.config["model_type"] == "mixtral":
        for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = re.sub(rf"(\.experts\.\d+\.){theirs}\.", rf"\g<1>{ours}.", name)
    return name


# --- verification -------------------------------------------------------------------------------


def dequantise(stored: Weights) -> Weights:
    """Return float32 weights by the formats' definitions; the last FP8 block may be cut off."""
    result, shifts = {}, torch.arange(0, 32, 4)
    for name, tensor in stored.items():
        module = name.rpartition(".")[0]
        if name.endswith(".qweight"):
            codes = (tensor[:, None, :] >> shifts[None, :, None]) & 15
            zeros = ((stored[module + ".qzeros"][:, :, None] >> shifts) & 15).flatten(1) + 1
            group = stored[module + ".g_idx"].long()
            scales = stored[module + ".scales"].float()[group]
            result[module + ".weight"] = ((codes.flatten(0, 1) - zeros[group]) * scales).T
        elif name == module + ".weight" and module + ".weight_scale_inv" in stored:
            scale = stored[module + ".weight_scale_inv"].float()
            scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            result[name] = tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]
        elif not re.search(r"\.(qzeros|scales|g_idx|weight_scale_inv)$", name):
            result[name] = tensor.float()
    return result


def verify(architecture: Architecture, folder: Path) -> None:
    """Compare the quantised checkpoints in ``folder`` with the ``bf16`` one.

    Raises:
        SystemExit: a tensor is missing or added, quantised though it should not be (or the
            reverse), changed though unquantised, or further off than its precision explains; or a
            file names a path of this machine.
    """
    reference = tensors(folder / "bf16")
    prediction = f"model.layers.{architecture.mtp_layer}."
    for kind, bound in (("fp8", 0.04), ("int4", 0.16)):
        stored = tensors(folder / kind)
        weights, errors = dequantise(stored), []
        expected = {n for n in reference if kind == "fp8" or not n.startswith(prediction)}
        if weights.keys() != expected:
            raise SystemExit(f"{folder / kind}: differs by {sorted(weights.keys() ^ expected)}")
        for name, weight in weights.items():
            module = name.removesuffix(".weight")
            error = (weight - reference[name].float()).norm() / reference[name].float().norm()
            quantised = module + ".qweight" in stored or module + ".weight_scale_inv" in stored
            wanted = re.search(r"(_proj|_proj_with_mqa|\.w[123]|\.wk|\.wq_b)\.weight$", name)
            wanted = wanted and not name.endswith(("weights_proj.weight", "eh_proj.weight"))
            if kind == "int4":
                left = architecture.fp8_rest or "nothing"
                wanted = wanted and not re.search(left, name)
            if quantised != bool(wanted) or error > (bound if wanted else 0):
                raise SystemExit(
                    f"{folder / kind}: {name} {quantised=}, relative error {error:.4f}"
                )
            if quantised:
                errors.append(error)
        print(
            f"{folder.name}/{kind}: {len(errors)} tensors quantised, relative error "
            f"{min(errors):.4f} to {max(errors):.4f}"
        )
    for path in folder.rglob("*"):
        if path.is_file() and re.search(rb"/(work|root|home|tmp)\b", path.read_bytes()):
            raise SystemExit(f"{path} names a path of this machine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ARCHITECTURES))
    names = parser.parse_args().names or list(ARCHITECTURES)
    for name in names:
        architecture, folder = ARCHITECTURES[name], TARGET / name
        weights = build(architecture)
        write(folder / "bf16", weights, architecture.config)
        write_fp8(architecture, weights, folder / "fp8")
        write_int4(architecture, weights, folder / "int4")
        verify(architecture, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
