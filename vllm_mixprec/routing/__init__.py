# SPDX-License-Identifier: Apache-2.0
"""Plan and headers meet here: which tensors each module is served from, and in which scheme.

Neither vLLM nor torch is imported.
"""

from vllm_mixprec.routing.check import Report, check
from vllm_mixprec.routing.findings import Finding
from vllm_mixprec.routing.kernels import missing_kernel
from vllm_mixprec.routing.platform import Platform, detect_platform
from vllm_mixprec.routing.route import ExpertGroup, Layout, Route
from vllm_mixprec.routing.table import RouteTable, load_route_table, resolve

__all__ = [
    "ExpertGroup",
    "Finding",
    "Layout",
    "Platform",
    "Report",
    "Route",
    "RouteTable",
    "check",
    "detect_platform",
    "load_route_table",
    "missing_kernel",
    "resolve",
]
