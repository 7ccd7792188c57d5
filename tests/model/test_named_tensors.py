"""Names and patterns of parameters and buffers."""

import pytest
import torch
from torch import nn

from lightning_flatness.model.named_tensors import NamedTensors
from lightning_flatness.model.names import choose_parameters


@pytest.mark.parametrize("patterns", ["_orig_mod.0", "0", "w[[]0]", "w[0]"])
def test_patterns_of_frozen_and_of_chosen_parameters_are_read_alike(patterns):
    model = nn.ParameterDict({"w[0]": torch.ones(2), "w": torch.ones(2)})
    if patterns.endswith("0"):
        model = torch.compile(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    assert NamedTensors(model).frozen([patterns]) == set(choose_parameters(model, patterns))
