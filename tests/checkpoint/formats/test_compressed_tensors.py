# SPDX-License-Identifier: Apache-2.0
"""What the compressed-tensors library compresses is recognised, and read as it reads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.utils.match import match_targets

from tests.checkpoint.formats.compressed import compress, config_of
from tests.checkpoint.formats.stored import NAME, Tensors, define_fp8, specs, write
from vllm_mixprec.checkpoint import Module, TensorSpec
from vllm_mixprec.checkpoint.dequantize import dequantize
from vllm_mixprec.checkpoint.formats import QuantizationConfig, Scheme, recognise
from vllm_mixprec.errors import CheckpointError, UnsupportedError

PACK, FLOAT, MXFP8 = "pack-quantized", "float-quantized", "mxfp8-quantized"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
ASYM = {"symmetric": False}
CHANNEL = {"strategy": "channel", "group_size": None}


def written(
    path: Path, form: str, shape: tuple[int, int], args: dict[str, Any], **more: Any
) -> tuple[Module, Tensors, torch.Tensor]:
    """Compress and write a module; return it, its tensors, and the library's own reading."""
    stored, read, scheme = compress(form, shape, args, **more)
    module, loaded = write(path, stored, config_of(scheme, form=form))
    return module, loaded, read["weight"]


def groups(*schemes: tuple[list[str], dict[str, Any]], ignore: tuple[str, ...] = ()) -> Any:
    """Make a quantization_config of (targets, weights) a group."""
    made = {f"g{i}": {"targets": t, "weights": w} for i, (t, w) in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "config_groups": made, "ignore": list(ignore)}


def packed_specs(bits: int = 4, group_size: int = 32, **more: Any) -> dict[str, TensorSpec]:
    """Make the specs of a packed (96, 256)."""
    return specs(
        weight_packed=("I32", [96, 256 * bits // 32]),
        weight_scale=("BF16", [96, 256 // group_size]),
        weight_shape=("I64", [2]),
        **more,
    )


# Integers.


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetry", [{}, ASYM])
@pytest.mark.parametrize("grouping", [{}, {"group_size": 128}, CHANNEL])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_are_read_as_the_library_reads_them(
    tmp_path: Path,
    bits: int,
    grouping: dict[str, Any],
    symmetry: dict[str, Any],
    scale_dtype: torch.dtype,
) -> None:
    args = INT4 | {"num_bits": bits} | grouping | symmetry
    module, loaded, expected = written(tmp_path, PACK, (100, 256), args, scale_dtype=scale_dtype)
    assert module.scheme == Scheme(
        "ct_pack", bits, group_size=args["group_size"] or 256, symmetric=not symmetry, zero_offset=0
    )
    assert (module.shape, module.problems) == ((100, 256), ())
    # Both round the product of an exact integer and the scale once, to the scale's dtype.
    assert torch.equal(dequantize(module.scheme, loaded, scale_dtype), expected)


@pytest.mark.parametrize("symmetry", [{}, ASYM])
def test_columns_may_be_ordered_by_activation(tmp_path: Path, symmetry: dict[str, Any]) -> None:
    torch.manual_seed(3)
    g_idx = (torch.arange(256, dtype=torch.int32) // 32)[torch.randperm(256)]
    args = INT4 | symmetry | {"actorder": "group"}
    module, loaded, expected = written(tmp_path, PACK, (96, 256), args, g_idx=g_idx)
    assert module.scheme.desc_act
    assert module.scheme.label.endswith("act-order")
    assert module.problems == ()
    assert torch.equal(dequantize(module.scheme, loaded, torch.float32), expected)


def test_order_that_was_never_set_is_the_columns_own(tmp_path: Path) -> None:
    g_idx = torch.full((256,), -1, dtype=torch.int32)
    stored, read, scheme = compress(PACK, (96, 256), INT4)
    stored["weight_g_idx"] = g_idx
    module, loaded = write(tmp_path, stored, config_of(scheme, form=PACK))
    assert torch.equal(dequantize(module.scheme, loaded, torch.float32), read["weight"])


@pytest.mark.parametrize("chunk", [1, 5000])
@pytest.mark.parametrize("symmetry", [{}, ASYM])
def test_parts_of_a_layer_do_not_show(
    symmetry: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, read, _ = compress(PACK, (100, 256), INT4 | symmetry)
    scheme = Scheme("ct_pack", 4, group_size=32, symmetric=not symmetry, zero_offset=0)
    monkeypatch.setattr("vllm_mixprec.checkpoint.packing.CHUNK_WEIGHTS", chunk)
    assert torch.equal(dequantize(scheme, stored, torch.float32), read["weight"])


def test_stored_shape_that_the_words_do_not_hold_is_an_error(tmp_path: Path) -> None:
    stored, _, _ = compress(PACK, (96, 256), INT4)
    stored["weight_shape"] = torch.tensor([96, 250])
    with pytest.raises(CheckpointError, match=r"weight_shape: \[96, 250\], expected \[96, 256\]"):
        dequantize(Scheme("ct_pack", 4, group_size=32, zero_offset=0), stored, torch.float32)


def test_order_outside_of_the_groups_is_an_error() -> None:
    stored, _, _ = compress(PACK, (96, 256), INT4)
    stored["weight_g_idx"] = torch.full((256,), 8, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"weight_g_idx: values 8 to 8, expected 0 to 7\."):
        dequantize(Scheme("ct_pack", 4, group_size=32, zero_offset=0), stored, torch.float32)


@pytest.mark.parametrize(
    ("suffix", "spec", "expected"),
    [
        ("weight_scale", ("BF16", [96, 2]), "expected F32 or BF16 or F16 [96, 8] (K=256, N=96"),
        ("weight_scale", ("U8", [96, 8]), "U8 [96, 8], expected F32 or BF16 or F16"),
        ("weight_shape", ("I64", [3]), "I64 [3], expected I64 or I32 [2]"),
        ("weight_zero_point", ("I8", [96, 8]), "I8 [96, 8], expected I32 [12, 8]"),
        ("weight_g_idx", ("I32", [255]), "expected I32 [256]"),
    ],
)
def test_companion_that_does_not_fit_is_a_problem(
    suffix: str, spec: tuple[str, list[int]], expected: str
) -> None:
    tensors = packed_specs(weight_zero_point=("I32", [12, 8])) | specs(**{suffix: spec})
    (problem,) = recognise("m", tensors, groups((["Linear"], INT4 | ASYM))).problems
    assert problem.startswith(f"{NAME}.{suffix}: ")
    assert expected in problem


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_companion_that_is_missing_is_a_problem(suffix: str) -> None:
    tensors = packed_specs(weight_zero_point=("I32", [12, 8]))
    del tensors[suffix]
    (problem,) = recognise("m", tensors, groups((["Linear"], INT4 | ASYM))).problems
    assert problem.startswith(f"{NAME}.{suffix}: missing, though weight_packed is I32 [96, 32]")


def test_order_that_the_config_promises_must_be_there() -> None:
    config = groups((["Linear"], INT4 | {"actorder": "group"}))
    (problem,) = recognise("m", packed_specs(), config).problems
    assert problem.startswith(f"{NAME}.weight_g_idx: missing")


@pytest.mark.parametrize("actorder", ["weight", "static", None, False])
def test_order_that_leaves_the_columns_alone_needs_no_indices(actorder: Any) -> None:
    config = groups((["Linear"], INT4 | {"actorder": actorder}))
    module = recognise("m", packed_specs(), config)
    assert (module.scheme.desc_act, module.problems) == (False, ())


def test_zero_points_of_a_symmetric_weight_are_left_over() -> None:
    tensors = packed_specs(weight_zero_point=("I32", [12, 8]))
    (problem,) = recognise("m", tensors, groups((["Linear"], INT4))).problems
    assert problem.startswith(f"{NAME}.weight_zero_point: left over, the config says symmetric")


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"num_bits": 3}, "ct_pack of 3 bits is not supported"),
        ({"strategy": "tensor"}, 'ct_pack of strategy "tensor" is not supported'),
    ],
)
def test_other_integers_are_named_and_refused(weights: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        recognise("m", packed_specs(), groups((["Linear"], INT4 | weights)))


# FP8.


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("args", "label"),
    [
        ({"strategy": "tensor"}, "ct_fp8 tensor"),
        ({"strategy": "channel"}, "ct_fp8 channel"),
        ({"strategy": "group", "group_size": 32}, "ct_fp8 1x32"),
        ({"strategy": "block", "block_structure": [128, 128]}, "ct_fp8 128x128"),
        ({"strategy": "block", "block_structure": [64, 32]}, "ct_fp8 64x32"),
    ],
)
def test_fp8_is_read_as_the_library_reads_it(
    tmp_path: Path, args: dict[str, Any], label: str, scale_dtype: torch.dtype
) -> None:
    module, loaded, expected = written(
        tmp_path, FLOAT, (256, 384), FP8 | args, scale_dtype=scale_dtype
    )
    assert (module.scheme.label, module.shape, module.problems) == (label, (256, 384), ())
    assert torch.equal(dequantize(module.scheme, loaded, scale_dtype), expected)


@pytest.mark.parametrize(
    ("tensors", "usual", "own"),
    [
        (
            specs(weight=("F8_E4M3", [96, 256]), weight_scale=("F32", [96, 1])),
            FP8,
            {"type": "FLOAT", "strategy": "CHANNEL"},
        ),
        (
            specs(weight=("F8_E4M3", [128, 256]), weight_scale=("F32", [2, 8])),
            FP8 | {"strategy": "block", "block_structure": [64, 32]},
            {"strategy": "Block", "block_structure": "64x32"},
        ),
        (
            packed_specs(weight_g_idx=("I32", [256])),
            INT4 | {"actorder": "group"},
            {"type": "Int", "strategy": "Group", "actorder": "Group"},
        ),
        (packed_specs(), INT4, {"actorder": "WEIGHT"}),
    ],
)
def test_spellings_that_the_library_takes_are_read(
    tensors: dict[str, TensorSpec], usual: dict[str, Any], own: dict[str, Any]
) -> None:
    found = recognise("m", tensors, groups((["Linear"], usual | own)))
    assert found == recognise("m", tensors, groups((["Linear"], usual)))
    assert found.problems == ()
    library, settings = QuantizationArgs(**usual | own), QuantizationArgs(**usual)
    assert library.block_structure == settings.block_structure
    assert (library.type, library.strategy) == (settings.type, settings.strategy)


def test_last_blocks_may_be_partial(tmp_path: Path) -> None:
    args = FP8 | {"strategy": "block", "block_structure": [128, 128]}
    # The library's own decompress takes 200 rows in 2 blocks for blocks of 100.
    module, loaded, _ = written(tmp_path, FLOAT, (200, 288), args)
    assert module.problems == ()
    expected = define_fp8(loaded["weight"], loaded["weight_scale"].numpy(), (128, 128))
    assert np.array_equal(dequantize(module.scheme, loaded, torch.float32).numpy(), expected)


def test_mx_scales_are_exponents(tmp_path: Path) -> None:
    args = FP8 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    module, loaded, expected = written(tmp_path, MXFP8, (200, 288), args)
    assert module.scheme == Scheme("ct_fp8", 8, block=(1, 32), scale_format="e8m0")
    assert module.problems == ()
    assert torch.equal(dequantize(module.scheme, loaded, torch.bfloat16), expected)


def test_equal_storage_is_an_equal_scheme() -> None:
    tensors = specs(weight=("F8_E4M3", [96, 256]), weight_scale=("F32", [96, 1]))
    by_group = recognise("m", tensors, groups((["Linear"], FP8)))
    by_header = recognise("m", tensors, groups())
    static = recognise("m", tensors | specs(input_scale=("F32", [1])), groups((["Linear"], FP8)))
    assert by_group.scheme == by_header.scheme == static.scheme
    assert by_group.scheme == Scheme("ct_fp8", 8, granularity="channel")
    assert by_group.problems == by_header.problems == static.problems == ()


@pytest.mark.parametrize(
    ("args", "scale", "expected"),
    [
        ({"strategy": "tensor"}, [96, 1], "[96, 1], expected [] or [1] (N=96, K=256, a scale a te"),
        ({"strategy": "channel"}, [], "[], expected [96, 1] or [96] (N=96, K=256, a scale a chan"),
        (
            {"strategy": "block", "block_structure": [128, 128]},
            [96, 1],
            "[96, 1], expected [1, 2] (N=96, K=256, block 128x128)",
        ),
    ],
)
def test_strategy_that_the_header_contradicts_is_a_problem(
    args: dict[str, Any], scale: list[int], expected: str
) -> None:
    tensors = specs(weight=("F8_E4M3", [96, 256]), weight_scale=("F32", scale))
    (problem,) = recognise("m", tensors, groups((["Linear"], FP8 | args))).problems
    assert problem.startswith(f"{NAME}.weight_scale: ")
    assert expected in problem


def test_missing_scale_is_a_problem() -> None:
    tensors = specs(weight=("F8_E4M3", [96, 256]))
    (problem,) = recognise("m", tensors, groups((["Linear"], FP8))).problems
    assert problem.startswith(f"{NAME}.weight_scale: missing, though weight is F8_E4M3 [96, 256]")


def test_fp8_of_another_strategy_is_named_and_refused() -> None:
    tensors = specs(weight=("F8_E4M3", [96, 256]), weight_scale=("F32", [96, 1]))
    with pytest.raises(UnsupportedError, match='FP8 of strategy "tensor_group" is not supported'):
        recognise("m", tensors, groups((["Linear"], FP8 | {"strategy": "tensor_group"})))


# Groups and their targets.


def test_names_come_before_patterns_and_patterns_before_linear() -> None:
    config = groups(
        (["Linear"], INT4),
        ([r"re:.*\.mlp\..*"], INT4 | {"num_bits": 8}),
        (["model.layers.0.mlp.down_proj"], INT4 | {"num_bits": 8, "group_size": 128}),
    )
    found = {
        name: recognise(name, tensors, config)
        for name, tensors in (
            ("model.layers.0.self_attn.q_proj", packed_specs()),
            ("model.layers.0.mlp.up_proj", packed_specs(bits=8)),
            ("model.layers.0.mlp.down_proj", packed_specs(bits=8, group_size=128)),
        )
    }
    labels = ["ct_pack int4 g32", "ct_pack int8 g32", "ct_pack int8 g128"]
    assert [module.scheme.label for module in found.values()] == labels
    assert [module.problems for module in found.values()] == [(), (), ()]


@pytest.mark.parametrize("name", ["a.q_proj", "a.k_proj", "b.mlp"])
@pytest.mark.parametrize(
    "targets",
    [
        (["re:.*q_proj"], ["re:a.*"]),
        (["re:a.*"], ["re:.*q_proj"]),
        (["re:.*q_proj"], ["a.q_proj"]),
        (["Linear"], ["re:a.*"]),
        (["re:.*", "b.mlp"], ["re:.*"]),
    ],
)
def test_group_that_counts_is_the_librarys(name: str, targets: tuple[list[str], ...]) -> None:
    """The first of ``match_targets``, as quantization/lifecycle/apply.py chooses a scheme."""
    bits = (4, 8)
    by_target = {target: bits[i] for i, group in enumerate(targets) for target in group}
    matched = match_targets(name, torch.nn.Linear(1, 1), by_target)
    config = groups(*((group, INT4 | {"num_bits": bits[i]}) for i, group in enumerate(targets)))
    parsed = QuantizationConfig.parse(config).compressed
    assert parsed is not None
    found = parsed.weights_of(name)
    assert (found and found.bits) == (by_target[matched[0]] if matched else None)


def test_fp8_and_integers_may_be_groups_of_one_checkpoint() -> None:
    config = groups(([r"re:.*self_attn.*"], FP8), (["Linear"], INT4))
    fp8 = specs(weight=("F8_E4M3", [96, 256]), weight_scale=("F32", [96, 1]))
    assert recognise("a.self_attn.q_proj", fp8, config).scheme.label == "ct_fp8 channel"
    assert recognise("a.mlp.up_proj", packed_specs(), config).scheme.label == "ct_pack int4 g32"


def test_group_without_weights_quantises_none() -> None:
    config = groups((["re:.*self_attn$"], {}), (["Linear"], INT4))
    config["config_groups"]["g0"]["weights"] = None
    module = recognise("m", packed_specs(), config)
    assert (module.scheme.label, module.problems) == ("ct_pack int4 g32", ())


@pytest.mark.parametrize("ignore", [NAME, r"re:.*self_attn.*"])
def test_unquantised_module_that_is_ignored_is_plain(ignore: str) -> None:
    config = groups((["Linear"], INT4), ignore=(ignore,))
    module = recognise(NAME, specs(weight=("BF16", [96, 256])), config)
    assert (module.scheme.label, module.problems) == ("bf16", ())


@pytest.mark.parametrize("ignore", [NAME, r"re:.*self_attn.*"])
def test_quantised_module_that_is_ignored_is_a_problem(ignore: str) -> None:
    config = groups((["Linear"], INT4), ignore=(ignore,))
    (problem,) = recognise(NAME, packed_specs(), config).problems
    assert problem.startswith(f"{NAME}.weight_packed: I32 [96, 32], expected an unquantised weight")


def test_packed_module_that_no_group_targets_is_a_problem() -> None:
    config = groups((["model.layers.1.mlp.down_proj"], INT4))
    problems = recognise(NAME, packed_specs(), config).problems
    assert any("expected a group of config_groups that targets the" in line for line in problems)


@pytest.mark.parametrize(
    ("tensors", "weights", "expected"),
    [
        (
            specs(weight=("F8_E4M3", [96, 256]), weight_scale=("F32", [96, 1])),
            INT4,
            "weight: F8_E4M3 [96, 256], expected a weight of type int with 4 bits",
        ),
        (
            packed_specs(),
            FP8,
            "weight_packed: I32 [96, 32], expected a weight of type float with 8 bits",
        ),
    ],
)
def test_group_of_another_type_is_a_problem(
    tensors: dict[str, TensorSpec], weights: dict[str, Any], expected: str
) -> None:
    problems = recognise(NAME, tensors, groups((["Linear"], weights))).problems
    assert any(expected in line for line in problems)
