# SPDX-License-Identifier: Apache-2.0
"""A ``config.json`` of any size is read into memory whole, before a plug-in sees the model.

transformers (5.19, ``_dict_from_json_file``) reads the file, decodes it and parses that. A sparse
file of gigabytes, which takes no place on the disk, ends the server for want of memory.
"""

import functools
import inspect
import os
from typing import Any

import transformers

from vllm_mixprec.checkpoint.json_files import refuse_large_json
from vllm_mixprec.patches import Patch

_METHOD = "_dict_from_json_file"
_STOCK = {
    owner: vars(owner)[_METHOD]
    for name in ("PreTrainedConfig", "GenerationConfig")
    if isinstance(vars(owner := getattr(transformers, name, object)).get(_METHOD), classmethod)
}


def needed() -> bool:
    """Whether transformers has such methods, and one of them reads whatever is there."""
    return any(".read()" in inspect.getsource(stock.__func__) for stock in _STOCK.values())


def apply() -> None:
    """Have both look at the file's size first."""
    for owner, stock in _STOCK.items():
        setattr(owner, _METHOD, classmethod(_bounded(stock.__func__)))


def _bounded(stock: Any) -> Any:
    @functools.wraps(stock)
    def read(cls: type, json_file: str | os.PathLike[str]) -> Any:
        refuse_large_json(json_file, os.stat(json_file).st_size)
        return stock(cls, json_file)

    return read


PATCH = Patch(
    name="config_size",
    issues=(),
    broken="a config.json or generation_config.json of any size is read into memory whole",
    mended="one over 64 MiB is refused",
    needed=needed,
    apply=apply,
    remove_when="transformers bounds what it reads",
)
