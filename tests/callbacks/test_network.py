"""Finding the network in a LightningModule."""

import pytest
from torch import nn

import lightning_flatness as lf
from tests.callbacks.flatness_runs import Recorder, expected, fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, WithoutForward, loaders


def test_network_of_a_module_without_forward(tmp_path):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(model="net")
    fit(tmp_path, callback, recorder, module=WithoutForward(), data=(train, val))
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], val), rel=1e-6)
    assert list(callback.report.layers) == ["conv2"]


def test_nested_network(tmp_path):
    class Deep(WithoutForward):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"student": self.net})

    callback = flatness_callback(model="parts.student")
    fit(tmp_path, callback, module=Deep())
    assert list(callback.report.layers) == ["conv2"]


@pytest.mark.parametrize("model", ["nett", "lr", "net.nothing"])
def test_model_that_is_not_there_is_refused_by_name(tmp_path, model):
    module = Classifier()
    with pytest.raises(lf.FlatnessError, match=f"model='{model}'.*Classifier has no such module; there are: 'net'"):
        fit(tmp_path, flatness_callback(model=model), module=module)
    assert module.training_steps == 0


def test_missing_forward_is_refused_by_name(tmp_path):
    module = WithoutForward()
    with pytest.raises(lf.FlatnessError, match=r"WithoutForward has no forward\(\).*model=.*there are: 'net'"):
        fit(tmp_path, flatness_callback(), module=module)
    assert module.training_steps == 0
