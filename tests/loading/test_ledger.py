# SPDX-License-Identifier: Apache-2.0
"""The ledger on small modules loaded by vLLM's own AutoWeightsLoader."""

import pytest
import torch
from torch import nn
from vllm.model_executor.models.utils import AutoWeightsLoader

from vllm_mixprec.errors import RouteError
from vllm_mixprec.loading.ledger import Ledger


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 2, bias=False)

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights)


WEIGHTS = {
    "first.weight": torch.ones(3, 2),
    "first.bias": torch.full((3,), 2.0),
    "second.weight": torch.full((2, 3), 3.0),
}


def load(weights, model=None):
    model = model or Model()
    ledger = Ledger(model)
    model.load_weights(ledger.feed(weights))
    ledger.close()
    return model


def test_a_complete_load_passes_and_fills():
    model = load(WEIGHTS.items())
    assert torch.equal(model.second.weight, WEIGHTS["second.weight"])


def test_the_loaders_are_put_back():
    model = load(WEIGHTS.items())
    assert not hasattr(model.first.weight, "weight_loader")
    load(WEIGHTS.items(), model)


def test_a_parameter_nobody_filled_is_named():
    weights = [item for item in WEIGHTS.items() if item[0] != "second.weight"]
    with pytest.raises(RouteError, match=r"second\.weight: no source's tensor filled it"):
        load(weights)


def test_a_tensor_the_model_ignores_is_named():
    class Ignoring(Model):
        def load_weights(self, weights):
            loader = AutoWeightsLoader(self, ignore_unexpected_suffixes=[".weight_scale"])
            return loader.load_weights(weights)

    extra = [*WEIGHTS.items(), ("second.weight_scale", torch.ones(1))]
    with pytest.raises(RouteError, match=r"second\.weight_scale: routed .* loaded it nowhere"):
        load(extra, Ignoring())


def test_a_tensor_fed_twice_is_an_error():
    with pytest.raises(RouteError, match=r"first\.bias: fed to the model twice"):
        load([*WEIGHTS.items(), ("first.bias", torch.zeros(3))])


def test_a_parameter_filled_from_two_tensors_is_an_error():
    class Renaming(Model):
        def load_weights(self, weights):
            renamed = ((name.replace("copy", "first"), tensor) for name, tensor in weights)
            return AutoWeightsLoader(self).load_weights(renamed)

    weights = [*WEIGHTS.items(), ("copy.bias", torch.zeros(3))]
    with pytest.raises(RouteError, match=r"copy\.bias: loaded into first\.bias, which first\.bias"):
        load(weights, Renaming())
