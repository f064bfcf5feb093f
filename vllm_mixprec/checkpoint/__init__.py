# SPDX-License-Identifier: Apache-2.0
"""From the headers of files to modules: where each tensor lies and how it is stored."""

from vllm_mixprec.checkpoint.formats import FORMATS, Module, Scheme, recognise
from vllm_mixprec.checkpoint.header import TensorSpec, read_header
from vllm_mixprec.checkpoint.index import Checkpoint, open_checkpoint, resolve_path

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Module",
    "Scheme",
    "TensorSpec",
    "open_checkpoint",
    "read_header",
    "recognise",
    "resolve_path",
]
