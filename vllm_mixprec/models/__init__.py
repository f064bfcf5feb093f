# SPDX-License-Identifier: Apache-2.0
"""What an architecture needs beyond its vLLM class, one module a family.

``PREPARE`` maps a model class to a function that is given the model after vLLM built it and before
a weight is loaded.
"""

from collections.abc import Callable

from torch.nn import Module

from vllm_mixprec.models.vocabulary import drop_vocabulary_of_other_stages

PREPARE: dict[str, Callable[[Module], None]] = {
    "MixtralForCausalLM": drop_vocabulary_of_other_stages,
    "OlmoeForCausalLM": drop_vocabulary_of_other_stages,
    "Qwen2MoeForCausalLM": drop_vocabulary_of_other_stages,
    "Qwen3MoeForCausalLM": drop_vocabulary_of_other_stages,
}
