"""Other callbacks that put another module in the network's place."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.testing import assert_close

import lightning_flatness as lf
from tests.callbacks.epoch_end_runs import KINDS, kinds
from tests.callbacks.flatness_runs import assert_reports_equal, fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, WithoutForward, loaders
from tests.guarding import guards


class Replacing(Callback):
    """Puts a copy in the network's place in the second epoch, and trains the copy from there."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net = copy.deepcopy(pl_module.net)
            trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), 0.5)]


class Swapping(Callback):
    """Validates with a module of averaged weights, and leaves it as the network."""

    def on_fit_start(self, trainer, pl_module):
        self.average = copy.deepcopy(pl_module.net).eval()

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        for average, weight in zip(self.average.parameters(), pl_module.net.parameters(), strict=True):
            average.data.mul_(0.5).add_(weight.data, alpha=0.5)

    def on_validation_epoch_start(self, trainer, pl_module):
        self.trained = pl_module.net
        pl_module.net = pl_module.net if trainer.sanity_checking else self.average

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.net = self.trained

    def on_train_end(self, trainer, pl_module):
        pl_module.net = self.average


others = pytest.mark.parametrize("other", [Replacing, Swapping])
named = pytest.mark.parametrize("model", [None, "net", lambda module: module.net], ids=["found", "named", "function"])


@others
@named
@pytest.mark.parametrize("data", ["val", "train"])
def test_flatness_is_that_of_the_module_that_is_there_now(tmp_path, other, model, data):
    callback, module, batches = flatness_callback(data=data, model=model), WithoutForward(), loaders()
    fit(tmp_path, other(), callback, module=module, data=batches, max_epochs=3)
    truth = lf.measure_flatness(module.net, batches[data == "val"])
    assert_reports_equal(callback.report, truth, prefix="" if model else "net.")


@others
@named
@kinds
def test_spectrum_and_landscape_are_those_of_the_module_that_is_there_now(tmp_path, other, model, kind):
    callback, module, batches = KINDS[kind](model=model), WithoutForward(), loaders()
    fit(tmp_path, callback, other(), module=module, data=batches)
    truth = lf.measure_flatness(module.net, batches[0]).loss
    assert_close(callback.history[-1]["loss"], truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("data", ["val", "train"])
def test_network_that_is_replaced_within_a_validation_is_refused(tmp_path, data):
    class BetweenBatches(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if not trainer.sanity_checking and batch_idx == 1:
                pl_module.net = copy.deepcopy(pl_module.net)

    train, val = loaders()
    with pytest.raises(lf.FlatnessError, match=r"another module.*on_validation_epoch_start"):
        fit(tmp_path, BetweenBatches(), flatness_callback(data=data), data=(train, [val, val]))


def test_network_whose_place_is_empty_is_refused(tmp_path):
    class Removes(Classifier):
        def on_train_epoch_end(self):
            self.net, self.other = None, self.net

    callback = lf.SpectrumCallback(top_k=1, num_steps=2, num_probes=1)
    with pytest.raises(lf.FlatnessError, match=r"'net'.*model="):
        fit(tmp_path, callback, module=Removes(), max_epochs=1)


@guards("callbacks/flatness.py", "if self._running is not None or self._network is None:", "if True:", ids="val")
@pytest.mark.parametrize("data", ["val", "train"])
def test_network_whose_place_is_empty_while_nothing_is_due(tmp_path, data):
    class Hides(WithoutForward):
        def on_validation_epoch_start(self):
            if self.trainer.current_epoch == 1:
                self.net, self.parts = None, torch.nn.ModuleList([self.net, copy.deepcopy(self.net)])

        def validation_step(self, batch, batch_idx):
            if self.net is None:
                return [part(batch[0]) for part in self.parts]
            return super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            if self.net is None:
                self.net, self.parts = self.parts[0], None

    callback, module, batches = flatness_callback(data=data, every_n_epochs=2), Hides(), loaders()
    fit(tmp_path, callback, module=module, data=batches, max_epochs=3)
    assert [record["epoch"] for record in callback.history] == [0, 2]
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, batches[data == "val"]))


@pytest.mark.parametrize("data", ["val", "train"])
def test_function_that_makes_a_new_module_at_every_call(tmp_path, data):
    class CallsNothing(Classifier):
        def validation_step(self, batch, batch_idx):
            pass

    callback = flatness_callback(data=data, model=lambda module: torch.nn.Sequential(copy.deepcopy(module.net)))
    module, batches = CallsNothing(), loaders()
    with pytest.warns(UserWarning, match="cannot see"):
        fit(tmp_path, Replacing(), callback, module=module, data=batches)
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, batches[data == "val"]), prefix="0.")
