"""Whether passes of our own run the network as the user's call did."""

import pytest
import torch
from torch import nn

import lightning_flatness as lf
from lightning_flatness.model.answer import Answer


class Scales(nn.Linear):
    """Its call changes what its forward returns."""

    def __call__(self, x):
        return 3 * super().__call__(x)


@pytest.mark.parametrize(("make", "is_named"), [(Scales, True), (nn.Linear, False), (torch.compile, False)])
def test_other_logits_name_a_call_that_is_overridden(make, is_named):
    network = make(nn.Linear(2, 3)) if make is torch.compile else make(2, 3)
    answer = Answer(network, torch.ones(4, 3))  # what is heard of a call is its forward
    with pytest.raises(lf.BatchError, match="other logits within the validation step") as error:
        answer.certify_logits(3 * torch.ones(4, 3), 0)
    assert ("Scales overrides __call__" in str(error.value)) == is_named
