"""What is said where the targets of a batch are not found."""

import pytest
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from tests.callbacks.flatness_runs import fit, flatness_callback, warnings_of
from tests.callbacks.lightning_modules import CLASSES, Classifier, loaders
from tests.guarding import guards


class OfTwo(Classifier):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["a"], batch_idx)


@guards("callbacks/running.py", "if samples[1] is None and asked.why_no_targets", "if False", ids="False")
@pytest.mark.parametrize("says", [False, True])
def test_that_no_targets_are_found_is_told_once(tmp_path, says):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    train, val = loaders()
    data = train, CombinedLoader({"a": val, "b": val}, "min_size")
    callback = flatness_callback(batch_fn=(lambda batch: (None, batch["a"][1])) if says else None)
    with warnings_of("finds no targets") as told:
        fit(tmp_path, callback, module=OfTwo(net), data=data, max_epochs=2)
    assert ["batch_fn=lambda batch: (None, targets)" in line for line in told] == [True] * (not says)
    assert [record["loss"] is None for record in callback.history] == [not says] * 2
