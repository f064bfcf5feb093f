# SPDX-License-Identifier: Apache-2.0
"""Headers and indexes as the libraries write them, decoded straight into what is needed of them.

A typed decoder makes no dict and no list for a tensor, of which a checkpoint can have 300,000. It
accepts less than ``bounded_json`` does, and what it accepts means the same there. For all else,
damaged or only unusual, the answer is None: ``bounded_json`` then decides, and words the error.
"""

import re
from typing import TypeVar

import msgspec

# JSON's own white space, of which ``\s`` has more.
_METADATA = re.compile(
    rb"""[ \t\n\r]*\{[ \t\n\r]*"__metadata__"[ \t\n\r]*:[ \t\n\r]*(\{[^{}]*\})[ \t\n\r]*,"""
)

_T = TypeVar("_T")


class Entry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """What a header says of one tensor; ``data_offsets`` are start and end within the data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    weight_map: dict[str, str]
    metadata: dict[str, str | int | float | bool | None] | msgspec.UnsetType = msgspec.UNSET


_ENTRIES = msgspec.json.Decoder(dict[str, Entry])
_STRINGS = msgspec.json.Decoder(dict[str, str])
_INDEX = msgspec.json.Decoder(_Index)


def decode_entries(text: bytes) -> dict[str, Entry] | None:
    """Decode a header whose metadata, if any, stand first; None for an unusual one."""
    # A float to the safetensors library, and to this decoder 0; to look for one byte is faster.
    if b"-" in text and b"-0" in text:
        return None
    keys = 0
    tensors = text
    found = _METADATA.match(text)
    if found is not None:
        metadata = _decode(_STRINGS, found[1])
        if metadata is None:
            return None
        keys = 1 + len(metadata)
        tensors = b"{" + text[found.end() :]
    entries = _decode(_ENTRIES, tensors)
    # Without a tensor there may be a comma too many behind the metadata.
    if not entries or "__metadata__" in entries:
        return None
    keys += len(entries) * (1 + len(Entry.__struct_fields__))
    return entries if _has_keys(text, keys) else None


def decode_weight_map(text: bytes) -> dict[str, str] | None:
    """Decode an index, of which only ``weight_map`` matters; None for an unusual one."""
    index = _decode(_INDEX, text)
    if index is None:
        return None
    keys = 1 + len(index.weight_map)
    if index.metadata is not msgspec.UNSET:
        keys += 1 + len(index.metadata)
    return index.weight_map if _has_keys(text, keys) else None


def _has_keys(text: bytes, count: int) -> bool:
    """Whether there are that many keys, so that none occurred twice.

    Colons and escapes in names, and whatever is not ASCII, make it False too.
    """
    return text.count(b":") == count and b"\\" not in text and text.isascii()


def _decode(decoder: msgspec.json.Decoder[_T], text: bytes) -> _T | None:
    try:
        return decoder.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
