# SPDX-License-Identifier: Apache-2.0
"""Tells what kind of machine this is, without importing vLLM or torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vllm_mixprec.errors import UnsupportedError

PLATFORM_VARIABLE = "VLLM_MIXPREC_PLATFORM"

_PLATFORM_NAME = re.compile(r"cpu-avx512|cpu-other|cuda-\d{2,3}|other")
_CPU_FLAGS = frozenset({"avx512f", "avx512_bf16", "avx512_vnni"})
# With these vLLM loads a library that has cpu_gemm_wna16 (platforms/cpu.py import_kernels; 0.32's
# _C_AVX2 has no such operator).
_AVX512_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})

_AMX_FLAGS = frozenset({"amx_tile", "amx_bf16"})
_DISPATCHED_FLAGS = _CPU_FLAGS | _AVX512_FLAGS | _AMX_FLAGS | {"avx2", "amx_fp16", "amx_int8"}

INT4_W16 = "cpu_gemm_wna16"
"""Name of the kernel for int4 linears that needs AVX512F only."""
AMX_EXPERTS = "cpu_fused_moe"
"""Name of the kernel for bf16 experts that needs AMX."""


@dataclass(frozen=True, slots=True)
class Platform:
    """A kind of machine: ``cpu-avx512``, ``cpu-other``, ``cuda-90`` (compute 9.0), ``other``.

    ``broken`` maps a format and one of its kernels to why that is not used here, though the kind of
    machine has it. With ``has_amx`` a ``cpu-avx512`` runs bf16 experts in AMX.
    """

    name: str
    broken: tuple[tuple[tuple[str, str], str], ...] = ()
    has_amx: bool = False

    def without(self, broken: Mapping[tuple[str, str], str]) -> Platform:
        """Return this platform less some kernels: (format, kernel's name) -> reason."""
        has_amx = self.has_amx and ("bf16", AMX_EXPERTS) not in broken
        return Platform(self.name, tuple(sorted(broken.items())), has_amx)

    @property
    def label(self) -> str:
        """The name, and what it leaves open."""
        return f"{self.name} with AMX" if self.has_amx else self.name

    @property
    def family(self) -> str:
        """The part that selects kernels: ``cuda`` for every CUDA device, else the name."""
        return "cuda" if self.name.startswith("cuda-") else self.name

    @property
    def compute_capability(self) -> int:
        """CUDA compute capability times ten, 0 on other platforms."""
        return int(self.name[len("cuda-") :]) if self.family == "cuda" else 0


def detect_platform() -> Platform:
    """Name the platform of this machine without importing vLLM or torch.

    ``VLLM_MIXPREC_PLATFORM`` overrides what is found. A CUDA context is never created: vLLM's
    front end forks after it asked us.

    Raises:
        UnsupportedError: the variable holds no platform's name.
    """
    override = os.environ.get(PLATFORM_VARIABLE)
    if override:
        if not _PLATFORM_NAME.fullmatch(override):
            raise UnsupportedError(
                f"{PLATFORM_VARIABLE} is {override!r}; expected cpu-avx512, cpu-other, "
                "cuda-<compute capability> such as cuda-90, or other. Correct or unset it."
            )
        return Platform(override)
    return _detect()


@lru_cache(maxsize=1)
def _detect() -> Platform:
    capability = _cuda_capability()
    if capability is not None:
        return Platform(f"cuda-{capability}")
    if Path("/dev/kfd").exists() or not Path("/proc/cpuinfo").is_file():
        return Platform("other")
    flags = _cpu_flags()
    if flags >= _CPU_FLAGS:
        return Platform("cpu-avx512", has_amx=flags >= _AMX_FLAGS)
    platform = Platform("cpu-other")
    if flags >= _AVX512_FLAGS:
        return platform
    why = "vLLM has it for x86 CPUs with AVX512F, which this one lacks"
    return platform.without({("gptq", INT4_W16): why, ("awq", INT4_W16): why})


def dispatched_flags() -> tuple[str, ...]:
    """Return those of an x86 CPU's features by which vLLM chooses kernels as it loads and traces.

    Two machines of one :class:`Platform` may differ in them (AMX).
    """
    return tuple(sorted(_cpu_flags() & _DISPATCHED_FLAGS))


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except FileNotFoundError:  # no Linux
        flags = ""
    return frozenset(flags.partition(":")[2].split())


def _cuda_capability() -> int | None:
    """Lowest compute capability (times ten) of the GPUs, None without one that torch can use."""
    smi = shutil.which("nvidia-smi")
    if smi is None or not _torch_has_cuda():
        return None
    try:
        answer = subprocess.run(
            [smi, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.findall(r"^\s*(\d+)\.(\d+)\s*$", answer.stdout, re.MULTILINE)
    return min((int(major) * 10 + int(minor) for major, minor in found), default=None)


def _torch_has_cuda() -> bool:
    """Read from torch's version.py, unimported, whether it was built for CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True  # no torch to serve with here: describe the machine by its devices
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return True
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None
