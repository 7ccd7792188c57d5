"""What is made of the samples of a split."""

import pytest

import lightning_flatness as lf
from lightning_flatness.cli.consumers import MeanLoss


def test_a_mean_loss_without_samples_is_refused():
    with pytest.raises(lf.BatchError, match="there is no loss.*are all targets ignored"):
        MeanLoss("cross_entropy").result()
