# SPDX-License-Identifier: Apache-2.0
"""The two spellings that plans had before ``version: 1``, read as what they are in it.

    mixed_precision:                          model:
      base_model_path: /models/FP8              name: Qwen3-235B-A22B
      fp16_path: /models/BF16                   base_path: /models/FP8
      fp8_path: /models/FP8                     mixed_precision:
      gptq_int4_path: /models/GPTQ                fp16_path: /models/BF16
      weight_mapping:                             int4_path: /models/GPTQ
        "...down_proj.weight": gptq_int4          weight_mapping: {...}
                                              inference: {...}
                                              server: {...}

``NAME_path`` is a source of that name. The mappings were written from tensor names, so that a
module may stand there once for each of its tensors.
"""

from collections.abc import Mapping
from typing import Any

from vllm_mixprec.errors import PlanError
from vllm_mixprec.plan.problems import Where, choices, join, show
from vllm_mixprec.plan.yaml_file import Location

_BLOCK = "mixed_precision"
_MAPPING = "weight_mapping"
_PATH = "_path"
_BASE_KEYS = ("base_model_path", "base_path")
"""Of the first spelling, and of the second."""

_SETTINGS = ("inference", "server")
"""What the program of those plans read, and vLLM has options for."""

# What a module's tensors are called below it (DESIGN: the unit of routing).
_SUFFIXES = frozenset(
    "weight bias weight_scale_inv weight_scale input_scale qweight qzeros scales g_idx "
    "weight_packed weight_shape weight_zero_point".split()
)


def read_older(data: Mapping[str, Any], where: Where) -> tuple[dict[str, Any], list[str]] | None:
    """Turn an older spelling into the same plan in today's.

    Args:
        where: gets to know where each part of the plan was written.

    Returns:
        The plan, with a ``weight_mapping``, and the keys of the file that are no part of it; None
        if ``data`` is in no older spelling.

    Raises:
        PlanError: a key is not known, or missing, or a module is sent to two sources.
    """
    model = data.get("model")
    if _BLOCK in data:
        at: Location = (_BLOCK,)
        base_key = _BASE_KEYS[0]
        _refuse_unknown(data, (_BLOCK, *_SETTINGS), (), where)
        outer = block = data[_BLOCK]
    elif isinstance(model, Mapping) and _BLOCK in model:
        at = ("model", _BLOCK)
        base_key = _BASE_KEYS[1]
        _refuse_unknown(data, ("model", *_SETTINGS), (), where)
        _refuse_unknown(model, ("name", base_key, _BLOCK), ("model",), where)
        outer, block = model, model[_BLOCK]
    else:
        return None
    if not isinstance(block, Mapping):
        raise PlanError(
            f"{where(at)}: found {show(block)}, expected a mapping with NAME_path. Correct it."
        )
    own = {_MAPPING, base_key} if outer is block else {_MAPPING}
    paths = [
        key for key in block if isinstance(key, str) and key.endswith(_PATH) and key not in own
    ]
    _refuse_unknown(block, (*sorted(own), *(paths or ["fp8_path"])), at, where)
    given = [key for key in paths if block[key] not in ("", None)]
    sources = {key.removesuffix(_PATH): block[key] for key in given}
    origins: dict[Location, Location] = {
        ("sources", name): (*at, f"{name}{_PATH}") for name in sources
    }
    base, base_at = outer.get(base_key), (*(at if outer is block else at[:-1]), base_key)
    origins[("base",)] = base_at
    if not isinstance(base, str) or not base:
        _refuse_misplaced_base(block, at, base_at, where)
        raise PlanError(
            f"{where(base_at)}: found {show(base)}, expected the path of the checkpoint that gives "
            f"config.json, tokenizer and all that {_MAPPING} does not name. Add it."
        )
    base_name = next((name for name, path in sources.items() if path == base), None)
    if base_name is None:
        if sources.setdefault("base", base) != base:
            raise PlanError(
                f"{where((*at, 'base_path'))}: found beside {base_key} with another path, "
                "expected one base. Rename the source."
            )
        origins["sources", "base"] = base_at
    plan = {
        "version": 1,
        "base": base_name or "base",
        "sources": {name: {"path": path} for name, path in sources.items()},
        _MAPPING: _read_mapping(block.get(_MAPPING), (*at, _MAPPING), sources, origins, where),
    }
    where.origins = origins
    dropped = [key for key in _SETTINGS if key in data]
    dropped += ["model.name"] if outer is not block and "name" in outer else []
    dropped += [".".join(map(str, (*at, key))) for key in paths if key not in given]
    return plan, dropped


def _refuse_misplaced_base(
    block: Mapping[Any, Any], at: Location, base_at: Location, where: Where
) -> None:
    """Name the base's path where it stands as in the other spelling, and would be a source."""
    for key in _BASE_KEYS:
        if block.get(key) and (*at, key) != base_at:
            raise PlanError(
                f"{where((*at, key))}: found the base's path here, expected it as "
                f"{'.'.join(map(str, base_at))}. Move it there."
            )


def _refuse_unknown(
    found: Mapping[Any, Any], known: tuple[str, ...], at: Location, where: Where
) -> None:
    problems = join(
        f"{where((*at, key))}: unknown key, expected {choices(key, known)}"
        for key in found
        if key not in known
    )
    if problems:
        raise PlanError(problems)


def _read_mapping(
    mapping: Any,
    at: Location,
    sources: Mapping[str, Any],
    origins: dict[Location, Location],
    where: Where,
) -> Any:
    """Return module -> source, each module once, and note where it was."""
    origins[(_MAPPING,)] = at
    if not isinstance(mapping, Mapping):  # which is a problem like any other plan's
        return {} if mapping is None else mapping
    names = {name.lower(): name for name in sources}
    first: dict[str, str] = {}
    read: dict[Any, Any] = {}
    problems = []
    for tensor, source in mapping.items():
        module = tensor
        if isinstance(tensor, str) and not tensor.startswith("re:"):
            parent, _, suffix = tensor.rpartition(".")
            module = parent if parent and suffix in _SUFFIXES else tensor
        name = names.get(source.lower(), source) if isinstance(source, str) else source
        if read.setdefault(module, name) != name:
            problems.append(
                f"{where((*at, tensor))}: found {show(source)}, expected {read[module]}, as of "
                f"{first[module]}: the tensors of a module come from one source. Correct one."
            )
        if module not in first:
            first[module] = tensor
            origins[_MAPPING, module] = (*at, tensor)
    if problems:
        raise PlanError(join(iter(problems)))
    return read
