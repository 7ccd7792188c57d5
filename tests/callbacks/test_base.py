"""The history: records, checkpoints, copies."""

import copy
import pickle
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_flatness import measure_flatness
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.flatness_runs import MONITOR, Recorder, fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, Net, WithoutValidation, loaders, quiet_trainer
from tests.guarding import guards


@guards("callbacks/logged.py", "None if value is None else float(value)", "value")
def test_history_is_plain_numbers(tmp_path):
    recorder, callback = Recorder(), flatness_callback()
    fit(tmp_path, callback, recorder, max_epochs=3)
    assert len(callback.history) == 3
    for epoch, (record, logged) in enumerate(zip(callback.history, recorder.logged, strict=True)):
        types = {
            "epoch": int,
            "step": int,
            "accuracy": float,
            "hessian_trace": float,
            "relative_flatness": float,
            "weight_norm": float,
            "exact": bool,
        }
        assert {key: type(record[key]) for key in types} == types
        assert {type(value) for value in record.values()} <= {int, float, bool, str, list, type(None)}
        assert (record["epoch"], record["step"]) == (epoch, 4 * (epoch + 1))
        assert record["accuracy"] == logged["val_acc"]
        for key in ("hessian_trace", "relative_flatness", "weight_norm"):
            assert record[key] == logged[f"flatness/{key}"]


class LateAccuracy(Classifier):
    """Logs one accuracy in training, and that of the validation at the end of its epoch."""

    def training_step(self, batch, batch_idx):
        self.log("acc", 0.125)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def on_validation_epoch_end(self):
        self.log("val/Accuracy", 0.25 * (1 + self.current_epoch))


@pytest.mark.parametrize(
    ("accuracy", "values"), [(None, [0.25, 0.5]), ("acc", [0.125, 0.125]), ("nowhere", [None, None])]
)
def test_history_pairs_flatness_with_accuracy(tmp_path, accuracy, values):
    callback = flatness_callback(accuracy=accuracy)
    fit(tmp_path, callback, module=LateAccuracy())
    assert [record["accuracy"] for record in callback.history] == values


class Late(WithoutValidation):
    """Logs its accuracy at the end of training epochs, after the callbacks."""

    def on_train_epoch_end(self):
        self.log("acc", 0.25 * (1 + self.current_epoch))


@guards("callbacks.flatness_history:FlatnessHistory.on_train_epoch_start", body="pass")
def test_history_without_validation_pairs_flatness_with_accuracy_of_the_epoch(tmp_path):
    callback = flatness_callback(data="train")
    fit(tmp_path, callback, module=Late(), data=loaders()[:1])
    assert [record["accuracy"] for record in callback.history] == [0.25, 0.5]


def test_checkpoints_without_validation_have_the_accuracy_of_the_epoch(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, flatness_callback(data="train"), checkpoint, module=Late(), data=loaders()[:1])
    callback = flatness_callback(data="train")
    trainer = quiet_trainer(tmp_path, callback, max_epochs=4)
    trainer.fit(Late(), loaders()[0], ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [record["accuracy"] for record in callback.history] == [0.25, 0.5, 0.75, 1.0]


def test_history_without_any_accuracy(tmp_path):
    class Silent(Classifier):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    callback = flatness_callback()
    fit(tmp_path, callback, module=Silent())
    assert [record["accuracy"] for record in callback.history] == [None, None]


@pytest.mark.parametrize("data", ["val", "train"])
def test_resume_continues_the_history(tmp_path, data):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first, second = flatness_callback(data=data), flatness_callback(data=data)
    fit(tmp_path, first, checkpoint)
    path = tmp_path / "epoch=1.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["FlatnessCallback[prefix=flatness]"]
    assert state == {"history": first.history}

    quiet_trainer(tmp_path, second, max_epochs=4).fit(Classifier(), *loaders(), ckpt_path=path)
    assert second.history[:2] == first.history
    assert [record["epoch"] for record in second.history] == [0, 1, 2, 3]


def halved(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none") / 2


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (flatness_callback, {"data": "train"}, "data was 'val' and is 'train'; num_samples was 22 and is 32"),
        (flatness_callback, {"layers": "net.conv1"}, r"layers was \['net.conv2'\] and is \['net.conv1'\]"),
        (flatness_callback, {"loss": halved}, "loss_name was 'cross_entropy' and is 'halved'"),
        (flatness_callback, {"max_samples": 8}, "num_samples was 22 and is 8"),
        (KINDS["spectrum"], {"matrix": "gauss_newton"}, "matrix was 'hessian' and is 'gauss_newton'"),
        (KINDS["landscape"], {"max_samples": 8}, "num_samples was 32 and is 8"),
    ],
)
def test_resuming_with_another_measurement_is_warned_of_once(tmp_path, make, options, words):
    fit(tmp_path, make()).save_checkpoint(tmp_path / "two.ckpt")
    trainer = quiet_trainer(tmp_path, make(**options), max_epochs=4)
    with pytest.warns(UserWarning, match=f"from epoch [23] on.*: {words}. .*another prefix=") as caught:
        trainer.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "two.ckpt")
    assert sum("another prefix=" in str(warning.message) for warning in caught) == 1


class Counting:
    """Keeps the number of its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, logits, targets):
        self.calls += 1
        return halved(logits, targets)


def test_a_loss_that_counts_its_calls_is_one_measurement(tmp_path):
    callback = flatness_callback(loss=Counting())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, callback)
    assert [one for one in caught if "another prefix=" in str(one.message)] == []
    assert [record["loss_name"][:10] for record in callback.history] == ["Counting #"] * 2


def test_checkpoint_of_an_epoch_contains_its_measurement(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor=MONITOR, filename="{epoch}", save_top_k=-1)
    callback = flatness_callback(data="train")
    fit(tmp_path, checkpoint, callback)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved["history"] == callback.history[:1]


@guards("callbacks/base.py", "and not (trainer.global_step and self._fitted_by == id(trainer))", "")
@pytest.mark.parametrize("data", ["val", "train"])
def test_a_fit_that_goes_on_continues_the_history(tmp_path, data):
    callback, module = flatness_callback(data=data), Classifier()
    trainer = fit(tmp_path, callback, module=module)
    first = list(callback.history)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, *loaders())
    assert callback.history[:2] == first
    assert [record["epoch"] for record in callback.history] == [0, 1, 2, 3]


@guards("callbacks/base.py", "and self._fitted_by == id(trainer)", "")
def test_another_trainer_starts_a_new_history(tmp_path):
    callback = flatness_callback()
    fit(tmp_path, callback)
    trainer = fit(tmp_path, max_epochs=1)
    trainer.callbacks.append(callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Classifier(), *loaders())
    assert [record["epoch"] for record in callback.history] == [1]


def test_a_checkpoint_without_a_history_starts_a_new_one(tmp_path):
    callback = flatness_callback()
    fit(tmp_path, callback)
    fit(tmp_path).save_checkpoint(tmp_path / "without.ckpt")
    trainer = quiet_trainer(tmp_path, callback, max_epochs=3)
    trainer.fit(Classifier(), *loaders(), ckpt_path=tmp_path / "without.ckpt")
    assert [record["epoch"] for record in callback.history] == [2]


@guards("callbacks/base.py", "if not self._is_restored and", "if False and")
def test_second_fit_starts_a_new_history(tmp_path):
    callback = flatness_callback()
    for epochs in (3, 2):
        fit(tmp_path, callback, max_epochs=epochs)
        assert [record["epoch"] for record in callback.history] == list(range(epochs))
    fit(tmp_path, callback, max_epochs=0)
    assert (callback.history, callback.report, callback.reports) == ([], None, {})


@guards("callbacks/base.py", "self._is_restored, self._fitted_by = False, id(trainer)", "self._fitted_by = id(trainer)")
def test_a_fit_after_a_resumed_one_starts_a_new_history(tmp_path):
    trainer, callback = fit(tmp_path, flatness_callback()), flatness_callback()
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    quiet_trainer(tmp_path, callback, max_epochs=3).fit(Classifier(), *loaders(), ckpt_path=tmp_path / "two.ckpt")
    fit(tmp_path, callback)
    assert [record["epoch"] for record in callback.history] == [0, 1]


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("run", ["validate", "test"])
def test_what_was_measured_before_fit_is_not_in_the_history(tmp_path, run, sanity):
    callback, module, (train, val) = flatness_callback(), Classifier(), loaders()
    trainer = quiet_trainer(tmp_path, callback, num_sanity_val_steps=sanity)
    getattr(trainer, run)(module, val, verbose=False)
    trainer.fit(module, train, val)
    assert [(record["epoch"], record["step"]) for record in callback.history] == [(0, 4), (1, 8)]


@guards("callbacks/base.py", 'if self._stage in (None, "fit"):', "if True:")
def test_validating_a_checkpoint_leaves_the_history(tmp_path):
    callback, module, (train, val) = flatness_callback(), Classifier(), loaders()
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(tmp_path, callback, checkpoint, module=module, data=(train, val))
    history = copy.deepcopy(callback.history)
    for run in (trainer.validate, trainer.test):
        (logged,) = run(module, val, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
        assert logged[MONITOR] == history[0]["relative_flatness"]
        assert callback.history == history
    fit(tmp_path, callback, max_epochs=1)
    assert len(callback.history) == 1


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("data", [None, "val", "train"], ids=["fresh", "val", "train"])
def test_callback_can_be_copied_and_pickled(tmp_path, data, duplicate):
    callback = flatness_callback(data=data or "val", max_samples=9)
    if data:
        fit(tmp_path, callback)
    copied = duplicate(callback)
    assert copied.history == callback.history
    fit(tmp_path, copied)
    assert len(copied.history) == 2


class Halves(Net):
    """Changes its inputs in place."""

    def forward(self, x):
        return super().forward(x.mul_(0.5))


class ReturnsMore(Classifier):
    """Its forward returns no logits, but calls a network that does."""

    def forward(self, x):
        return {"predicted": self.net(x).softmax(1)}

    def validation_step(self, batch, batch_idx):
        self(batch[0])


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("make", [Classifier, ReturnsMore])
def test_a_network_that_changes_its_inputs_is_given_what_the_step_gives(tmp_path, make, data):
    callback, module, both = flatness_callback(data=data), make(Halves()), loaders(val_samples=8)
    fit(tmp_path, callback, module=module, data=both, max_epochs=1, num_sanity_val_steps=int(data == "train"))
    wanted = measure_flatness(module.net, both[data == "val"])
    assert callback.report.loss == pytest.approx(wanted.loss, rel=1e-5)
