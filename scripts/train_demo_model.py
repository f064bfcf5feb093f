"""Make the checkpoints that the examples and tests serve: a small trained MoE and a random one.

    python scripts/train_demo_model.py --random       # tests/fixtures/random-moe, one minute
    python scripts/train_demo_model.py                # examples/demo-moe: train, quantise, evaluate
    python scripts/train_demo_model.py --evaluate     # only measure what is already there

Both are byte-level ``Qwen3MoeForCausalLM``. The trained one learns the Python standard library's
sources (PSF licence) on two CPU cores. transformers writes the BF16 checkpoints and auto-round the
quantised ones, none of it with this repository's own packing code. Where auto-round is missing, the
script builds ``.venv-quant`` at the repository root and starts itself again in there, because
auto-round and vLLM pin different versions of the same libraries.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo-moe"
RANDOM = ROOT / "tests" / "fixtures" / "random-moe"
VENV = ROOT / ".venv-quant"
# torch first: auto-round alone would let pip choose another build of it.
REQUIREMENTS = (["torch==2.13.0"], ["auto-round==0.15.1", "transformers==5.23.0", "accelerate"])


def ensure_environment() -> None:
    """Continue in ``.venv-quant`` unless auto-round can be imported here; does not return then."""
    if importlib.util.find_spec("auto_round"):
        return
    python = VENV / "bin" / "python"
    if Path(sys.prefix) == VENV:
        raise SystemExit(f"{VENV} has no auto_round; delete the folder and start again")
    if not python.exists():
        print(f"auto-round is not installed here; building {VENV} (once, about a minute)")
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        for packages in REQUIREMENTS:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    os.execv(python, [str(python), *sys.argv])


ensure_environment()

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func  # noqa: E402

END = 256  # the id of <|endoftext|>; ids 0 to 255 are the bytes, 257 to 383 stay unused
VOCAB_SIZE = 384
SHARED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
DIMENSIONS = {
    "demo": dict(hidden=128, moe=256, layers=3, experts=16, top_k=2, kv_heads=2),
    "random": dict(hidden=256, moe=128, layers=2, experts=8, top_k=3, kv_heads=4),
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose token id of a byte is the byte: BPE without merges."""
    vocab = {char: byte for byte, char in sorted(bytes_to_unicode().items())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.save_pretrained(folder)
    # transformers 5 writes its own class name, which transformers 4 does not know.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("is_local", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def build_model(
    hidden: int, moe: int, layers: int, experts: int, top_k: int, kv_heads: int
) -> Qwen3MoeForCausalLM:
    """Return a fresh float32 model of the given sizes; ``moe`` is one expert's inner width."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=moe,  # of dense layers, of which there are none
        moe_intermediate_size=moe,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        router_aux_loss_coef=0.01,
        eos_token_id=END,
        initializer_range=0.06,
    )
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm")


def save_bf16(model: Qwen3MoeForCausalLM, folder: Path, max_shard_size: str = "5GB") -> None:
    """Write the model in BF16, one tensor per expert projection as in Qwen's hub checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
    model.config.output_router_logits = False
    model.config.dtype = "bfloat16"
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=END)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint, whatever its number of shards."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


# --- the random model ---------------------------------------------------------------------------


def write_random(folder: Path) -> None:
    """Write the random-weight checkpoints that the tests compare precisions on."""
    torch.manual_seed(20)
    model = build_model(**DIMENSIONS["random"])
    for name, parameter in model.named_parameters():
        noise, fan_in = torch.randn_like(parameter), parameter.shape[-1]
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise.clamp(-2, 2)
        elif "embed_tokens" in name:
            value = 0.7 * noise
        else:
            # Steep routing: the last chosen expert weighs little, so that a near-tie which falls
            # the other way in another precision changes little. The head's scale sets how far the
            # next-token distribution is from uniform, and in proportion the noise of BF16.
            gain = {"lm_head.weight": 0.8, "gate.weight": 2.0, "experts.down_proj": 1.5}
            factor = next((f for end, f in gain.items() if name.endswith(end)), 1.0)
            value = noise * factor / fan_in**0.5
        parameter.data.copy_(value)
    save_bf16(model, folder / "bf16", max_shard_size="1700KB")
    quantise(folder / "bf16", folder / "fp8", "fp8")
    quantise(folder / "bf16", folder / "gptq", "gptq")
    quantise(folder / "bf16", folder / "gptq-asym", "gptq", sym=False, group_size=64)
    verify(folder)

    tokens = torch.randint(0, 256, (16, 128))
    reference = log_probs(load_dequantised(folder / "bf16"), tokens)
    entropy = -(reference.exp() * reference).sum(-1).mean()
    print(f"next-token entropy {entropy:.2f} nats, uniform {math.log(VOCAB_SIZE):.2f}")
    low = AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.bfloat16)
    for name in ("bf16", "fp8", "gptq", "gptq-asym"):
        other = low if name == "bf16" else load_dequantised(folder / name)
        difference = (log_probs(other, tokens) - reference).abs().mean()
        print(f"{name}: mean |logprob difference| to float32 {difference:.4f} nats")


@torch.no_grad()
def log_probs(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model.eval()(tokens).logits.float().log_softmax(-1)


# --- the trained model --------------------------------------------------------------------------


def read_corpus() -> tuple[torch.Tensor, str]:
    """Return the training bytes, files parted by ``END``, and about 64 KiB of held-out source."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    # Tests and tables are poor prose; the build configuration holds this machine's paths.
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"}
    train, held_out = [], []
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        local = name.parts[0].startswith(("config-", "_sysconfigdata", "sysconfig"))
        data = b"" if local or skipped & set(name.parts) else path.read_bytes()
        if not data:
            continue
        if hashlib.sha1(str(name).encode()).digest()[0] < 8:  # about 3 % of the files
            held_out.append((name, data))
        else:
            train.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int16))
            train.append(torch.tensor([END], dtype=torch.int16))
    text = "# From the Python standard library, (c) Python Software Foundation, PSF licence.\n"
    for name, data in held_out:
        source = data.decode("utf-8", "ignore")
        if 2_000 < len(source) < 30_000 and len(text) + len(source) < 68_000:
            text += f"\n# ---- {name}\n{source}"
    return torch.cat(train), text


def train(folder: Path, work: Path, steps: int, batch: int, context: int, peak_rate: float) -> None:
    """Train on random windows of the corpus; ``work`` keeps a checkpoint to go on from."""
    corpus, text = read_corpus()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heldout.txt").write_text(text)
    print(f"{len(corpus):,} bytes to train on, {steps} steps of {batch} x {context}")

    torch.manual_seed(7)
    model = build_model(**DIMENSIONS["demo"]).train()
    config = model.config
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    checkpoint, start = work / "state.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"going on from step {start} in {checkpoint}")
    offsets, begun, mean = torch.arange(context + 1), time.monotonic(), 0.0
    for step in range(start, steps):
        warm_up = min(1.0, (step + 1) / 100)
        rate = peak_rate * warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(step)  # the same windows when it goes on
        starts = torch.randint(len(corpus) - context - 1, (batch, 1), generator=generator)
        window = corpus[starts + offsets].long()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(window[:, :-1], output_router_logits=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(
            output.logits.float().flatten(0, 1), window[:, 1:].flatten()
        )
        # Layer by layer: transformers' own output.aux_loss pools the layers, and then an expert
        # can stay dead in one layer when its namesakes in the others are busy.
        balance = sum(
            load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
            for logits in output.router_logits
        )
        # The last steps hardly balance, so that experts specialise and some grow busier.
        weight = config.router_aux_loss_coef * (1.0 if step < 0.83 * steps else 0.05)
        (loss + weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balance = balance.item() / config.num_hidden_layers
        mean = loss.item() if step == start else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 49 or step == steps - 1:
            used = expert_shares(output.router_logits, config)
            shares = " ".join(f"{u.min():.3f}-{u.max():.3f}" for u in used)
            elapsed = time.monotonic() - begun
            left = elapsed / (step + 1 - start) * (steps - step - 1)
            print(
                f"step {step + 1}/{steps}  loss {mean:.3f}  balance {balance:.2f}  "
                f"expert shares {shares}  {elapsed:.0f} s, {left:.0f} s left",
                flush=True,
            )
        if step % 250 == 249:
            work.mkdir(parents=True, exist_ok=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint)
    save_bf16(model, folder / "bf16")


def expert_shares(
    router_logits: tuple[torch.Tensor, ...], config: Qwen3MoeConfig
) -> list[torch.Tensor]:
    """Return for each layer which share of the (token, slot) pairs went to each expert."""
    chosen = [logits.topk(config.num_experts_per_tok).indices.flatten() for logits in router_logits]
    return [ids.bincount(minlength=config.num_experts) / len(ids) for ids in chosen]


# --- quantisation -------------------------------------------------------------------------------


def quantise(source: Path, target: Path, kind: str, **overrides: object) -> None:
    """Write ``target`` with auto-round, by rounding to nearest; no calibration data is read.

    ``kind`` "fp8" is E4M3 with one float scale per 128 x 128 block, the form of DeepSeek's and
    Qwen's FP8 checkpoints; "gptq" is 4 bits, symmetric in groups of 128 unless overridden.
    """
    scheme, form = {"fp8": ("FP8_BLOCK", "fp8"), "gptq": ("W4A16", "auto_gptq")}[kind]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch, get_context("spawn").Pool(1) as pool:
        pool.apply(run_auto_round, (str(source), scratch, scheme, form, overrides))
        written = next(Path(scratch).rglob("config.json")).parent  # a folder named after the scheme
        for path in [written / "config.json", *written.glob("*.safetensors*")]:
            shutil.copyfile(path, target / path.name)
    for name in SHARED_FILES:  # the tokenizer's spelling that old and new transformers read
        shutil.copy(source / name, target / name)


def run_auto_round(source: str, target: str, scheme: str, form: str, overrides: dict) -> None:
    """Run auto-round, in a process of its own: it replaces the MoE class inside transformers."""
    os.chdir(target)  # where it keeps its offload files
    rounder = AutoRound(source, scheme=scheme, iters=0, disable_opt_rtn=True, **overrides)
    rounder.quantize_and_save(target, format=form)


def dequantise(folder: Path) -> dict[str, torch.Tensor]:
    """Return float32 weights by the formats' definitions, sharing no code with the quantiser.

    FP8: weight (N, K) float8_e4m3fn times weight_scale_inv (N/128, K/128) of its block.
    GPTQ (auto_gptq v1): qweight (K/8, N) int32 holds 8 rows a word, lowest bits first; qzeros
    (K/g, N/8) holds zero point minus 1; scales (K/g, N), which auto-round makes negative where a
    symmetric group's largest weight is positive; g_idx (K) names each row's group.
    """
    stored, result = tensors(folder), {}
    shifts = torch.arange(0, 32, 4)
    for name, tensor in stored.items():
        layer = name.rpartition(".")[0]
        if name.endswith(".qweight"):
            codes = (tensor[:, None, :] >> shifts[None, :, None]) & 15
            zeros = ((stored[layer + ".qzeros"][:, :, None] >> shifts) & 15).flatten(1) + 1
            group = stored[layer + ".g_idx"].long()
            weight = (codes.flatten(0, 1) - zeros[group]) * stored[layer + ".scales"].float()[group]
            result[layer + ".weight"] = weight.T.contiguous()
        elif layer + ".weight_scale_inv" in stored:
            scale = stored[layer + ".weight_scale_inv"].float()
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            result[layer + ".weight"] = stored[layer + ".weight"].float() * scale
        elif layer + ".qweight" not in stored:
            result[name] = tensor.float()
    return result


def verify(folder: Path) -> None:
    """Compare every quantised checkpoint in ``folder`` with its ``bf16`` neighbour.

    Raises:
        SystemExit: a tensor is missing, added, quantised though it should not be (or the reverse),
            changed though unquantised, or further off than its precision explains; or a file
            names a path of this machine.
    """
    reference = tensors(folder / "bf16")
    for other in (path.parent for path in sorted(folder.glob("*/config.json"))):
        if other.name == "bf16":
            continue
        bound = 0.04 if other.name == "fp8" else 0.15
        weights, stored, errors = dequantise(other), tensors(other), {}
        if weights.keys() != reference.keys():
            differing = sorted(weights.keys() ^ reference.keys())
            raise SystemExit(f"{other}: not the tensors of bf16, which differ by {differing}")
        for name, weight in weights.items():
            expected = reference[name].float()
            layer = name.removesuffix(".weight")
            error = ((weight - expected).norm() / expected.norm()).item()
            quantised = layer + ".qweight" in stored or layer + ".weight_scale_inv" in stored
            wanted = ".experts." in name or layer.endswith(ATTENTION)
            if quantised != wanted or error > (bound if wanted else 0):
                raise SystemExit(
                    f"{other}: {name} quantised={quantised}, relative error {error:.4f}"
                )
            if wanted:
                errors.setdefault("experts" if ".experts." in name else "attention", []).append(
                    error
                )
        for part, values in errors.items():
            print(
                f"{other.name}: {len(values)} {part} tensors, relative error mean "
                f"{sum(values) / len(values):.4f}, {min(values):.4f} to {max(values):.4f}"
            )
    for path in folder.rglob("*"):
        if path.is_file() and any(
            word in path.read_bytes() for word in (b"/work", b"/root", b"/home")
        ):
            raise SystemExit(f"{path} names a path of this machine")


# --- evaluation ---------------------------------------------------------------------------------


def load_dequantised(folder: Path) -> Qwen3MoeForCausalLM:
    """Load a checkpoint of any precision as a float32 transformers model."""
    with tempfile.TemporaryDirectory() as plain:
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        (Path(plain) / "config.json").write_text(json.dumps(config))
        save_file(dequantise(folder), Path(plain) / "model.safetensors", metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()


@torch.no_grad()
def evaluate(folder: Path) -> None:
    """Print every precision's loss per byte of ``heldout.txt``, expert use, and a sample."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "bf16")
    tokens = torch.tensor(tokenizer((folder / "heldout.txt").read_text()).input_ids)
    windows = tokens[: len(tokens) // 512 * 512].view(-1, 512)
    for name in ("bf16", "fp8", "int4"):
        model = load_dequantised(folder / name)
        output = model(windows, output_router_logits=True)
        predicted = output.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(predicted, windows[:, 1:].flatten()).item()
        bits, perplexity = loss / math.log(2), math.exp(loss)
        print(f"{name}: {loss:.4f} nats a byte ({bits:.4f} bits), perplexity {perplexity:.4f}")
        if name != "bf16":
            continue
        for layer, shares in enumerate(expert_shares(output.router_logits, model.config)):
            print(f"  layer {layer}, expert shares in %:", *(f"{100 * x:.1f}" for x in shares))
        torch.manual_seed(0)
        prompt = tokenizer("def ", return_tensors="pt")
        sample = model.generate(**prompt, max_new_tokens=500, do_sample=True, temperature=0.6)
        print("-" * 80, tokenizer.decode(sample[0]), "-" * 80, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--random", action="store_true", help="write only the random test fixtures")
    only.add_argument("--quantise", action="store_true", help="do not train, only what follows")
    only.add_argument("--evaluate", action="store_true", help="only verify and evaluate")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--context", type=int, default=256, help="bytes a window")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    work = Path(tempfile.gettempdir()) / "demo-moe-training"
    parser.add_argument("--work", type=Path, default=work, help="where training can go on from")
    args = parser.parse_args()
    if args.random:
        write_random(RANDOM)
        return
    if not (args.quantise or args.evaluate):
        train(DEMO, args.work, args.steps, args.batch, args.context, args.rate)
    if not args.evaluate:
        quantise(DEMO / "bf16", DEMO / "fp8", "fp8")
        quantise(DEMO / "bf16", DEMO / "int4", "gptq")
    verify(DEMO)
    evaluate(DEMO)


if __name__ == "__main__":
    main()
