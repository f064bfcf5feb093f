# SPDX-License-Identifier: Apache-2.0
"""A CPU worker does not start where numba was imported before it.

To find copies of Triton kernels, ``_rebind_kernels`` (triton_utils/dispatcher.py, vLLM 0.32) reads
the ``__dict__`` of whatever any module holds. llvmlite's library has none, and says of every name
that it is a C function: "'_lib_fn_wrapper' object has no attribute 'get'". Numba comes with what
packs weights here, and with much that notebooks import.
"""

import inspect
import sys

from vllm.triton_utils import dispatcher

from vllm_mixprec.patches import Patch


def needed() -> bool:
    """Whether vLLM has the function, and it reads any object's ``__dict__``."""
    return "vars(value)" in inspect.getsource(dispatcher)


def apply() -> None:
    """Give llvmlite's library an empty ``__dict__``, if it is imported."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        getattr(ffi.lib, "_fntab", {})["__dict__"] = {}


PATCH = Patch(
    name="numba_imported",
    issues=(),
    broken="a CPU worker that starts where numba was imported fails: '_lib_fn_wrapper' object has "
    "no attribute 'get'",
    mended="llvmlite's library has an empty __dict__",
    needed=needed,
    apply=apply,
    remove_when="the search for kernels leaves objects that are no kernels' owners alone",
)
