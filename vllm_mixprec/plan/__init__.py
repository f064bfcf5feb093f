# SPDX-License-Identifier: Apache-2.0
"""The plan: a YAML file that says which checkpoint each module comes from."""

from vllm_mixprec.plan.patterns import compile_pattern
from vllm_mixprec.plan.plan import Options, Plan, Rule, Source

__all__ = ["Options", "Plan", "Rule", "Source", "compile_pattern"]
