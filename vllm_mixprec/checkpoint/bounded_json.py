# SPDX-License-Identifier: Apache-2.0
"""Parses JSON that a stranger wrote, in memory that stays a small multiple of its size."""

import json
from functools import partial
from typing import Any, NoReturn

BYTES_A_CONTAINER = 12
"""Of a checkpoint's JSON at least so many bytes come on each list or object.

``[[],[],[]]`` takes twenty times its size in memory; a tensor's entry has 50 bytes for three.
"""


def parse_json(raw: bytes) -> Any:
    """Parse UTF-8 JSON as its standard has it: no key twice, no NaN, no half of a surrogate pair.

    Raises:
        ValueError: it is not, or holds far more lists and objects than a checkpoint's would.
    """
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > 1000 and containers * BYTES_A_CONTAINER > len(raw):
        raise ValueError(
            f"{containers} lists and objects in {len(raw)} bytes, expected one in "
            f"{BYTES_A_CONTAINER} bytes at most"
        )
    try:
        text = raw.decode("utf-8")
        load = partial(
            json.loads,
            text,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer if b"-0" in raw else None,
        )
        parsed = load()
        if not _has_every_key(parsed, raw):
            parsed = load(object_pairs_hook=_unique_keys)
        if b"\\" in raw:  # only an escape spells half a pair, which no file or terminal takes
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return parsed


def _has_every_key(parsed: Any, raw: bytes) -> bool:
    """Whether there are as many keys, one level deep, as colons, so that none occurred twice.

    Counting is a third of the price of a hook for each object. Colons in names, and whatever is no
    object of objects, make it False, and the hook decide.
    """
    if not isinstance(parsed, dict) or not all(type(entry) is dict for entry in parsed.values()):
        return False
    return len(parsed) + sum(map(len, parsed.values())) == raw.count(b":")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a key that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} occurs twice")
            seen.add(key)
    return result


def _parse_integer(text: str) -> int | float:
    """Parse an integer; ``-0`` is a float to the safetensors library, and to Python an int."""
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
