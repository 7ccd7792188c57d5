"""Names and patterns of parameters and buffers."""

import pytest
import torch
from torch import nn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.model.named_tensors import NamedTensors
from lightning_flatness.model.names import choose_parameters


@pytest.mark.parametrize("patterns", ["_orig_mod.0", "0", "w[[]0]", "w[0]"])
def test_patterns_of_frozen_and_of_chosen_parameters_are_read_alike(patterns):
    model = nn.ParameterDict({"w[0]": torch.ones(2), "w": torch.ones(2)})
    if patterns.endswith("0"):
        model = torch.compile(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    assert NamedTensors(model).frozen([patterns]) == set(choose_parameters(model, patterns))


def test_names_that_there_are_not():
    named = NamedTensors(nn.Sequential(*[nn.Linear(1, 1) for _ in range(11)]))
    there = "0.weight, 0.bias, .*9.weight, 9.bias and 2 more"
    with pytest.raises(FlatnessError, match=f"frozen='x' matches no parameter or buffer and no .*There are: {there}"):
        named.frozen(["x"])
    with pytest.raises(FlatnessError, match=f"entry 'x', which is no parameter .*There are: {there}"):
        named.direction({"x": torch.ones(1)}, "direction 1")
    with pytest.raises(FlatnessError, match="call the model once before this measurement"):
        NamedTensors(nn.LazyLinear(3))
