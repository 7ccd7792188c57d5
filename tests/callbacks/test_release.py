"""Nothing of a run is kept after it, also where it fails."""

import gc
import weakref

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_flatness as lf
from tests.callbacks.compare import num_hooks
from tests.callbacks.flatness_runs import fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, dataset, loaders
from tests.guarding import guards


class Failing(Classifier):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if batch_idx == 1 and not self.trainer.sanity_checking:
            raise RuntimeError("the user's own")


def test_failing_validation_step_leaves_no_trace(tmp_path):
    module, callback = Failing(), flatness_callback()
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(tmp_path, callback, module=module)
    assert num_hooks(module) == 0
    assert callback.history == []
    fit(tmp_path, callback)
    assert len(callback.history) == 2


@guards("callbacks.base:MeasuringCallback.on_exception", body="pass", ids="val-Failing")
@pytest.mark.parametrize("module", [Classifier, Failing])
@pytest.mark.parametrize("data", ["val", "train"])
def test_data_and_model_are_let_go(tmp_path, module, data):
    callback, network, (train, val) = flatness_callback(data=data), module(), loaders()
    kept = {"model": network.net, "training data": train.dataset, "validation data": val.dataset}
    kept = {name: weakref.ref(thing) for name, thing in kept.items()}
    try:
        fit(tmp_path, callback, module=network, data=(train, val))
    except RuntimeError:
        assert module is Failing
    for name in ("log", "log_dict"):  # Lightning gives every callback these methods of the module
        vars(callback).pop(name)
    del network, train, val
    gc.collect()
    assert [name for name, thing in kept.items() if thing() is not None] == []


def test_failing_measurement_leaves_no_trace(tmp_path):
    broken = dataset(22, seed=1)
    broken.tensors[0][12] = torch.nan
    module = Classifier()
    with pytest.raises(lf.BatchError, match="NaN"):
        fit(tmp_path, flatness_callback(), module=module, data=(loaders()[0], DataLoader(broken, batch_size=8)))
    assert num_hooks(module) == 0
    assert all(parameter.requires_grad for parameter in module.parameters())
