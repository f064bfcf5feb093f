# SPDX-License-Identifier: Apache-2.0
"""Names the modules that a pattern may have meant which matches none."""

import difflib
import re
from collections.abc import Iterable, Mapping

from vllm_mixprec.routing.findings import generalise

_NEAREST = 3
_NEAREST_CUTOFF = 0.6
_COMPONENT_CUTOFF = 0.4  # of single words such as attention and self_attn


def example_names(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return every kind of name, parents too: ``model.layers.*`` -> its first and last one."""
    examples: dict[str, tuple[str, str]] = {}
    for module in modules:
        kind, name = generalise(module), module
        while kind:
            first, _ = examples.get(kind, (name, name))
            examples[kind] = (first, name)
            kind, name = kind.rpartition(".")[0], name.rpartition(".")[0]
    return dict(sorted(examples.items()))


def suggest(match: str, examples: Mapping[str, tuple[str, str]]) -> str:
    """Name the modules that a pattern without a match may have meant."""
    wanted = _plain_words(match)
    if wanted in examples:
        first, last = examples[wanted]
        remedy = "Correct the numbers"
        if match.startswith("re:"):
            remedy += r", or let it match whole names: modules below a parent need \..* at the end"
        return f"The base has {wanted} from {first} to {last}. {remedy}."
    nearest = difflib.get_close_matches(wanted, examples, _NEAREST, _NEAREST_CUTOFF)
    if not nearest:
        nearest = _containers_like(wanted.rpartition(".")[2], examples)
    if not nearest:
        nearest = [kind for kind in examples if kind.count(".") < 2][:_NEAREST]
    return f"Nearest: {', '.join(nearest)}."


def _containers_like(word: str, kinds: Iterable[str]) -> list[str]:
    """Return what holds modules in a layer and is called nearly so: ``self_attn`` for attention."""
    containers: dict[str, str] = {}
    for kind in kinds:
        container = kind.rpartition(".")[0]
        component = container.rpartition(".")[2]
        if component != "*" and container.count(".") > 1:
            containers.setdefault(component, container)
    nearest = difflib.get_close_matches(word, containers, _NEAREST, _COMPONENT_CUTOFF)
    return [containers[component] for component in nearest]


def _plain_words(match: str) -> str:
    """Spell a pattern as ``generalise`` spells names, to compare it with them."""
    if match.startswith("re:"):
        return re.sub(r"\[[^]]*\][*+]?|\([^)]*\)|\\d\+?|\.\*", "*", match[3:]).replace("\\", "")
    words = re.sub(r"\{([^{}]*)\}", lambda m: m[1].split(",")[0], match)
    words = re.sub(r"(?<=\.)\d+(-\d+)?(?=\.|$)", "*", words)
    return words.removesuffix(".weight")
