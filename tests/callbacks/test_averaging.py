"""Other weights at the end of the fit: the final result is that of the weights that are left, in any order."""

import warnings

import lightning as L
import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_flatness.callbacks.averaging import have_changed, weights_sample
from tests.callbacks.epoch_end_runs import KINDS, epochs, fit, kinds
from tests.callbacks.flatness_runs import flatness_callback
from tests.callbacks.lightning_modules import Classifier, dataset
from tests.callbacks.training_runs import HAS_WEIGHT_AVERAGING, averaged_weights
from tests.guarding import guards

needs_averaging = pytest.mark.skipif(not HAS_WEIGHT_AVERAGING, reason="this Lightning has no WeightAveraging")
needs_ema = pytest.mark.skipif(
    not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="this Lightning has no EMAWeightAveraging"
)


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class OwnAverages(L.Callback):
    """What users write: averages of the network's weights, swapped in when training ends."""

    def on_train_start(self, trainer, pl_module):
        self.averages = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, tensor in pl_module.state_dict().items():
            self.averages[name] = 0.7 * self.averages[name] + 0.3 * tensor

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.averages)


AVERAGING = {
    "stochastic": lambda: lightning_callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1),
    "WeightAveraging": pytest.param(averaged_weights, marks=needs_averaging),
    "own": OwnAverages,
}
averaging = pytest.mark.parametrize("averages", AVERAGING.values(), ids=AVERAGING)


def measured_loss(callback, kind):
    return callback.result.loss if kind == "spectrum" else callback.results["kept"].origin_loss


def loss_of(module, batch):
    with torch.no_grad():
        return F.cross_entropy(module.eval()(batch[0]), batch[1]).item()


@guards("callbacks.averaging:call_again_after_others", returns=False, ids="plain-last-None-landscape-own")
@guards(
    "callbacks/epoch_end.py",
    "gather(self._have_changed(pl_module), sync=True)",
    "[False]",
    ids="plain-first-1-spectrum-own",
)
@averaging
@pytest.mark.parametrize(("every", "kind"), [(None, "landscape"), (1, "spectrum"), (2, "spectrum")])
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "BatchNorm"])
def test_the_final_result_is_of_the_weights_that_are_left(tmp_path, kind, averages, every, order, norms):
    batch = dataset(8, seed=3)[:]
    module = Classifier(None if norms else plain_network(), lr=0.2)
    callback = KINDS[kind](data=[batch], every_n_epochs=every, figures=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The final result of")
        others = [averages()]
        trainer = fit(
            tmp_path, *([*others, callback] if order == "first" else [callback, *others]), module=module, max_epochs=4
        )
    assert measured_loss(callback, kind) == pytest.approx(loss_of(module, batch), rel=1e-5)
    assert [one for one in trainer.callbacks if one is callback] == [callback]


@averaging
def test_two_callbacks_before_the_averaging(tmp_path, averages):
    batch = dataset(8, seed=3)[:]
    module, others = Classifier(plain_network(), lr=0.2), averages()
    both = {kind: make(data=[batch], figures=False) for kind, make in KINDS.items()}
    trainer = fit(tmp_path, *both.values(), others, module=module)
    for kind, callback in both.items():
        assert measured_loss(callback, kind) == pytest.approx(loss_of(module, batch), rel=1e-5)
        assert epochs(callback) == [2]
    assert [one for one in trainer.callbacks if one in (*both.values(), others)] == [*both.values(), others]


@pytest.mark.slow
def test_files_of_the_same_step_have_names_of_their_own(tmp_path):
    callback = KINDS["spectrum"](every_n_epochs=1, figures=False)
    fit(tmp_path, callback, OwnAverages())
    names = sorted(path.name for path in (tmp_path / "lightning_logs" / "version_0" / "spectrum").iterdir())
    assert names[-2:] == ["epoch=2-step=12-final.npz", "epoch=2-step=12.npz"]
    assert epochs(callback) == [0, 1, 2, 2]


def shift(module):
    with torch.no_grad():
        module.net.fc.bias += 1


class ChangesItself(Classifier):
    """Changes its weights in one of its last hooks."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, lambda: shift(self))


class ChangesAtLast(L.Callback):
    def on_fit_end(self, trainer, pl_module):
        shift(pl_module)


@guards("callbacks.epoch_end:EpochEndCallback._warn_of_late_changes", body="pass")
@kinds
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_weights_that_the_module_changes_still_later_are_warned_of(tmp_path, kind, hook):
    with pytest.warns(UserWarning, match="The final result of .*Callback does not belong to the final weights"):
        fit(tmp_path, KINDS[kind](), module=ChangesItself(hook))


@kinds
@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_weights_that_a_callback_changes_still_later_are_warned_of(tmp_path, kind, order):
    with pytest.warns(UserWarning, match="The final result of .*Callback does not belong to the final weights"):
        fit(tmp_path, *[ChangesAtLast(), KINDS[kind]()][::order])


class Fails(L.Callback):
    def on_train_end(self, trainer, pl_module):
        raise ArithmeticError("something else")


@guards(
    "callbacks/epoch_end.py",
    """        super().on_exception(trainer, pl_module, exception)
        call_once(trainer, self)
""",
    """        super().on_exception(trainer, pl_module, exception)
""",
)
def test_the_list_of_callbacks_is_as_it_was_after_an_error(tmp_path):
    callback = KINDS["spectrum"](figures=False)
    seen = []

    class Sees(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append(trainer)

    with pytest.raises(ArithmeticError):
        fit(tmp_path, callback, Fails(), Sees())
    assert [one for one in seen[0].callbacks if one is callback] == [callback]
    assert not callback.history


@needs_ema
@pytest.mark.parametrize("begins", [0, 100])
@pytest.mark.parametrize("make", [flatness_callback, *KINDS.values()], ids=["flatness", *KINDS])
def test_averages_that_were_never_updated_are_warned_of(tmp_path, make, begins):
    ema = lightning_callbacks.EMAWeightAveraging(decay=0.5, update_starting_at_step=begins)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, make(), ema, max_epochs=2)
    told = [str(warning.message) for warning in caught if "has not updated its averages yet" in str(warning.message)]
    assert bool(told) == (begins == 100)
    assert all("EMAWeightAveraging" in text and "21724" in text for text in told)


@guards("callbacks/averaging.py", '.to("cpu", torch.float64, copy=True)', ".cpu().double()", ids="dtype0")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_of_weights_does_not_change_with_the_weights(dtype):
    network = nn.Linear(2, 3).to(dtype)
    sample = weights_sample(network)
    assert not have_changed(sample, network)
    with torch.no_grad():
        network.weight += 1
    assert have_changed(sample, network)
