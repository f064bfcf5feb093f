# SPDX-License-Identifier: Apache-2.0
"""The configuration of DeepSeek-MoE-16B (``model_type`` "deepseek"), which no library carries.

The public checkpoint brings such a file and names it in ``auto_map``; so does the fixture, of which
this is the original. vLLM reads it with ``trust_remote_code=True``.
"""

from transformers import LlamaConfig


class DeepseekConfig(LlamaConfig):
    """Llama's fields; those of the experts come from config.json as plain attributes."""

    model_type = "deepseek"
