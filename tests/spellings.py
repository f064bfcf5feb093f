# SPDX-License-Identifier: Apache-2.0
"""Other spellings of checkpoints that tools wrote: tensors are renamed, stacked, transposed."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
RANDOM = FIXTURES / "random-moe"
MIXTRAL = FIXTURES / "architectures" / "mixtral"

Tensors = dict[str, torch.Tensor]
Respell = Callable[[Tensors], Tensors]

_BY_COLUMN = ("qweight", "qzeros", "scales")
_SHARED = ("g_idx",)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.(\w+)")
_BARE = {"weight": "", "weight_scale_inv": "_scale_inv"}


def read_all(folder: Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write(folder: Path, origin: Path, tensors: Tensors, **config: Any) -> Path:
    """Write tensors beside the config.json of ``origin``, some of its keys replaced."""
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    content = json.loads((origin / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def respell(folder: Path, origin: Path, *how: Respell, **config: Any) -> Path:
    """Write a copy of a checkpoint in another spelling."""
    tensors = read_all(origin)
    for change in how:
        tensors = change(tensors)
    return write(folder, origin, tensors, **config)


def join(suffix: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Stack one tensor of several linears along N."""
    if suffix in _SHARED:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    return torch.cat(parts, dim=1 if suffix in _BY_COLUMN else 0)


def fuse(*names: str, into: str) -> Respell:
    """Fuse sibling linears, ``q_proj``, ``k_proj`` and ``v_proj`` into ``qkv_proj``."""

    def change(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, tensor in tensors.items():
            module, _, suffix = name.rpartition(".")
            parent, _, leaf = module.rpartition(".")
            if leaf == names[0] and ".experts." not in name:
                parts = [tensors[f"{parent}.{part}.{suffix}"] for part in names]
                made[f"{parent}.{into}.{suffix}"] = join(suffix, parts)
            elif leaf not in names or ".experts." in name:
                made[name] = tensor
        return made

    return change


qkv = fuse("q_proj", "k_proj", "v_proj", into="qkv_proj")
gate_up = fuse("gate_proj", "up_proj", into="gate_up_proj")


def stack(is_transposed: bool = False, is_dotted: bool = False) -> Respell:
    """Put all experts of a layer in one tensor, gate and up in one.

    Names are transformers' ``experts.gate_up_proj`` and, of FP8, ``gate_up_proj_scale_inv``; with
    ``is_dotted`` those of modules, ``experts.gate_up_proj.weight``.
    """

    def change(tensors: Tensors) -> Tensors:
        made = {name: t for name, t in tensors.items() if not _EXPERT.fullmatch(name)}
        layers: dict[tuple[str, str], dict[str, dict[int, torch.Tensor]]] = {}
        for name, tensor in tensors.items():
            if found := _EXPERT.fullmatch(name):
                layer, expert, leaf, suffix = found.groups()
                leaf = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
                experts = layers.setdefault((layer, suffix), {}).setdefault(leaf, {})
                experts[int(expert)] = tensor
        for (layer, suffix), leaves in layers.items():
            ids = range(len(leaves["down_proj"]))
            whole = {
                "gate_up_proj": [
                    join(suffix, [leaves["gate_proj"][i], leaves["up_proj"][i]]) for i in ids
                ],
                "down_proj": [leaves["down_proj"][i] for i in ids],
            }
            for leaf, each in whole.items():
                stacked = torch.stack(each)
                name = f"{leaf}.{suffix}" if is_dotted else leaf + _BARE[suffix]
                swap = is_transposed and stacked.dim() == 3
                made[f"{layer}.{name}"] = stacked.transpose(1, 2) if swap else stacked
        return made

    return change


def rename(pairs: Mapping[str, str]) -> Respell:
    """Replace regular expressions in names."""

    def change(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, tensor in tensors.items():
            for pattern, new in pairs.items():
                name = re.sub(pattern, new, name)
            assert name not in made
            made[name] = tensor
        return made

    return change


nested = rename({r"^model\.": "model.language_model.", r"^lm_head": "lm_head"})
wrapped = rename({r"^": "language_model."})
as_mlp = rename(
    {
        r"block_sparse_moe": "mlp",
        r"\.w1\.": ".gate_proj.",
        r"\.w3\.": ".up_proj.",
        r"\.w2\.": ".down_proj.",
    }
)
as_auto_round = rename({r"\.w1\.": ".gate_proj.", r"\.w3\.": ".up_proj.", r"\.w2\.": ".down_proj."})
