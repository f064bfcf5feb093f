# SPDX-License-Identifier: Apache-2.0
"""Whether the sources of a plan are checkpoints of one model: architecture, sizes, routers."""

from __future__ import annotations

import array
import os
import struct
import sys
from collections.abc import Mapping
from typing import Any

from vllm_mixprec.checkpoint.files import reopen, require_unchanged
from vllm_mixprec.checkpoint.formats import Module
from vllm_mixprec.checkpoint.formats.base import PLAIN_DTYPES, WEIGHTS
from vllm_mixprec.checkpoint.header import TensorSpec
from vllm_mixprec.checkpoint.hub import is_available, read_range
from vllm_mixprec.checkpoint.index import Checkpoint
from vllm_mixprec.errors import CheckpointError
from vllm_mixprec.plan.plan import Plan
from vllm_mixprec.routing.findings import FindingLog
from vllm_mixprec.routing.fused import leaf_name
from vllm_mixprec.routing.structure import ModelDims, text_config

# Sizes that two checkpoints of one model share; compared when both configs give them. Not
# num_nextn_predict_layers: quantised exports often leave the MTP layers out.
MODEL_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_topk",
    "index_n_heads",
    "index_head_dim",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "vocab_size",
)
ROUTER_NAMES = frozenset({"gate", "router"})
CORRECTION_BIAS = "e_score_correction_bias"
"""Of a router, or bare in the MoE block: what is added to the scores that choose the experts."""

_ROUTER_ENDS = tuple(ROUTER_NAMES)
_DECODED = frozenset(PLAIN_DTYPES.values())
_SAMPLE_BYTES = 64 << 10  # of a router that would be transferred; DeepSeek-V3's 58 have 213 MB
_COMPARED_BYTES = 256 << 10

# Two roundings of one value to 8 bits of mantissa differ by less than this, relatively.
_ROUNDING = 2.0**-7
_SMALLEST = 2.0**-24  # float16's smallest subnormal


def compare_configs(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], log: FindingLog
) -> list[str]:
    """Report sources whose config.json describes another model than the base's; return them."""
    base = checkpoints[plan.base]
    if "architectures" in base.config and not base.config["architectures"]:
        log.add(
            "error",
            "architecture-mismatch",
            str(base.path / "config.json"),
            f"architectures is {base.config['architectures']!r}, expected the name of the model's "
            "class: vLLM would serve another one. Download the file again.",
            noun="sources",
        )
    foreign = []
    for name, checkpoint in checkpoints.items():
        if name == plan.base:
            continue
        differences = config_differences(base.config, checkpoint.config)
        if differences:
            foreign.append(name)
            log.add(
                "error",
                "architecture-mismatch",
                str(checkpoint.path / "config.json"),
                f"source {name!r} is another model than base {plan.base!r}: "
                f"{'; '.join(differences)}. Choose a checkpoint of the same model.",
                noun="sources",
            )
    return foreign


def config_differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Compare two config.json by architecture and sizes.

    Returns lines such as ``hidden_size is 512, expected 256``; none where they agree.
    """
    text, other_text = text_config(base), text_config(other)
    pairs: list[tuple[str, Any, Any]] = []
    # A language model and the multimodal model that it is part of have architectures of their own.
    if (text is base) == (other_text is other):
        pairs.append(("architectures", base.get("architectures"), other.get("architectures")))
    # With MLA head_dim means nothing: transformers overwrites it with qk_rope_head_dim.
    unused = "head_dim" if "kv_lora_rank" in text else None
    pairs += [(key, text.get(key), other_text.get(key)) for key in MODEL_SIZES if key != unused]
    experts, other_experts = (ModelDims.from_config(config).num_experts for config in (base, other))
    pairs.append(("number of experts", experts, other_experts))
    return [
        f"{key} is {found}, expected {expected}"
        for key, expected, found in pairs
        if expected is not None and found is not None and expected != found
    ]


def compare_routers(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], log: FindingLog
) -> tuple[str, ...]:
    """Report routers whose weights or correction bias differ between the base and a source.

    Routers are never quantised, so unlike weights mean another model. These few megabytes are
    the only tensor data that ``check`` reads; where one of the two is on the hub, the first rows
    alone are. A router that cannot be had is in a shard that ``compose`` did not need, and was
    compared before that.

    Returns:
        The sources of whose routers only the first rows were compared.
    """
    sampled: dict[str, None] = {}
    base = checkpoints[plan.base]
    num_experts = ModelDims.from_config(base.config).num_experts
    for module in base.modules.values():
        is_router = _is_router(module, num_experts)
        if not is_router and CORRECTION_BIAS not in module.tensors:
            continue
        for name, checkpoint in checkpoints.items():
            other = checkpoint.find(module.name)
            if name == plan.base or other is None:
                continue
            has_weights = is_router and _are_comparable(plan, name, module, other, log)
            for suffix in ("weight", CORRECTION_BIAS) if has_weights else (CORRECTION_BIAS,):
                pair = module.tensors.get(suffix), other.tensors.get(suffix)
                if pair[0] is None or pair[1] is None:
                    continue
                where = module.name if suffix == "weight" else pair[0].name
                if _compare_values(plan, name, where, pair[0], pair[1], log):
                    sampled[name] = None
    return tuple(sampled)


def _are_comparable(plan: Plan, name: str, module: Module, other: Module, log: FindingLog) -> bool:
    """Whether two routers' weights can be compared; report it where that itself is notable."""
    if WEIGHTS.isdisjoint(other.tensors) or other.problems:  # which are reported if it is used
        return False
    if other.shape != module.shape:
        log.add(
            "error",
            "router-mismatch",
            module.name,
            f"source {name!r} has a router of shape {list(other.shape)}, expected "
            f"{list(module.shape)} as base {plan.base!r}: this is another model. Choose a "
            "checkpoint made from the base.",
        )
        return False
    for source, router, whose in (
        (name, other, "the base's"),
        (plan.base, module, f"that of source {name!r}"),
    ):
        if router.scheme.is_quantized:
            log.add(
                "warning",
                "router-quantized",
                module.name,
                f"source {source!r} stores this router as {router.scheme.label}: it cannot be "
                f"compared with {whose}. Check that both are the same model.",
            )
            return False
    return True


def _compare_values(
    plan: Plan, name: str, where: str, one: TensorSpec, other: TensorSpec, log: FindingLog
) -> bool:
    """Report a router's tensor that differs; return whether only the first rows were compared."""
    what = "router weights differ" if where != one.name else "the router's correction bias differs"
    is_sampled = False
    if one.shape == other.shape:
        if not (is_available(one.file) and is_available(other.file)):
            return False
        rows = _sampled_rows(one, other)
        if rows is not None:
            is_sampled = True
            one, other = one.rows(rows), other.rows(rows)
        try:
            # Of a bias kept in float32 tools round the values, as the model computes in bf16.
            if same_values(one, other) or (where == one.name and _are_near(one, other)):
                return is_sampled
        except CheckpointError as error:
            log.add("error", "source-unreadable", where, str(error))
            return is_sampled
    log.add(
        "error",
        "router-mismatch",
        where,
        f"{what} between source {name!r} and base {plan.base!r}. "
        "Routers are never quantised, so this is another model or a fine-tune of "
        "it: choose a checkpoint made from the base.",
    )
    return is_sampled


def _sampled_rows(one: TensorSpec, other: TensorSpec) -> range | None:
    """Return the first rows of two routers if one of them would be transferred; None for all."""
    row_bytes = max(spec.nbytes for spec in (one, other)) // max(1, one.shape[0])
    rows = max(1, _SAMPLE_BYTES // max(1, row_bytes))
    is_here = os.path.exists(one.file) and os.path.exists(other.file)
    is_cut = one.view is not None or other.view is not None or rows >= one.shape[0]
    return None if is_here or is_cut else range(rows)


def _is_router(module: Module, num_experts: int | None) -> bool:
    return (
        module.name.endswith(_ROUTER_ENDS)
        and leaf_name(module.name) in ROUTER_NAMES
        and not WEIGHTS.isdisjoint(module.tensors)
        and len(module.shape) == 2
        and num_experts in (None, module.shape[0])
    )


def same_values(one: TensorSpec, other: TensorSpec) -> bool:
    """Compare two tensors' values; of unlike dtypes, up to the rounding of the coarser one."""
    if one.dtype == other.dtype:
        return _same_bytes(one, other)
    return _are_near(one, other)


def _are_near(one: TensorSpec, other: TensorSpec) -> bool:
    if not {one.dtype, other.dtype} <= _DECODED:
        return False
    one_data, other_data = _read_data(one), _read_data(other)
    pairs = zip(_decode(one.dtype, one_data), _decode(other.dtype, other_data), strict=True)
    return all(abs(a - b) <= _ROUNDING * max(abs(a), abs(b)) + _SMALLEST for a, b in pairs)


def _same_bytes(one: TensorSpec, other: TensorSpec) -> bool:
    if not (one.file.exists() and other.file.exists()):
        return _read_data(one) == _read_data(other)
    left = one.end - one.start
    if left != other.end - other.start:
        return False
    # Small and used again: to read 58 routers of 4 MB into new memory takes four times as long.
    buffers = bytearray(_COMPARED_BYTES), bytearray(_COMPARED_BYTES)
    with (
        open(reopen(one.file, one.stamp), "rb") as one_stream,
        open(reopen(other.file, other.stamp), "rb") as other_stream,
    ):
        one_stream.seek(one.start)
        other_stream.seek(other.start)
        is_same = True
        while left and is_same:
            if left < len(buffers[0]):
                buffers = bytearray(left), bytearray(left)
            found = one_stream.readinto(buffers[0]), other_stream.readinto(buffers[1])
            is_same = found == (len(buffers[0]),) * 2 and buffers[0] == buffers[1]
            left -= len(buffers[0])
        require_unchanged(one.file, one_stream.fileno(), one.stamp)
        require_unchanged(other.file, other_stream.fileno(), other.stamp)
    return is_same


def _read_data(spec: TensorSpec) -> bytes:
    return read_range(spec.file, spec.start, spec.end, spec.stamp)


def _decode(dtype: str, data: bytes) -> array.array[float] | tuple[float, ...]:
    """Decode little-endian values of a dtype in ``_DECODED``."""
    if dtype == "F16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    if dtype == "BF16":  # the upper half of a float32
        widened = bytearray(2 * len(data))
        widened[2::4], widened[3::4] = data[::2], data[1::2]
        data = bytes(widened)
    values = array.array("f", data)
    if sys.byteorder == "big":
        values.byteswap()
    return values
