"""Measurements that fail: an error, or a warning and training that goes on as if the callback were not there."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_flatness as lf
from lightning_flatness.callbacks.rank_errors import RankErrors
from tests.callbacks.compare import assert_same, end_of
from tests.callbacks.flatness_runs import MONITOR, Recorder
from tests.callbacks.lightning_modules import (
    Classifier,
    FailingWhenMeasured,
    WithoutForward,
    dataset,
    loaders,
    quiet_trainer,
)
from tests.guarding import guards


def fit(folder, module, *callbacks, data=None, **options):
    trainer = quiet_trainer(folder, *callbacks, max_epochs=4, num_sanity_val_steps=0, **options)
    trainer.fit(module, *(data or loaders()))
    return trainer


def warned(caught):
    return [str(warning.message) for warning in caught if "FlatnessCallback" in str(warning.message)]


@guards("callbacks/rank_errors.py", "if message != self._last_warning:", "if True:")
@pytest.mark.parametrize("data", ["val", "train"])
def test_training_goes_on_with_a_warning(tmp_path, data):
    torch.manual_seed(0)
    bare = FailingWhenMeasured()
    end = end_of(fit(tmp_path, bare), bare)
    torch.manual_seed(0)
    module, callback = FailingWhenMeasured({1, 2}), lf.FlatnessCallback(data=data, on_error="warn", summary=False)
    with pytest.warns(UserWarning, match="FlatnessCallback") as caught:
        trainer = fit(tmp_path, module, callback)
    assert_same(end_of(trainer, module), end)
    assert [record["epoch"] for record in callback.history] == [0, 3]
    (message,) = warned(caught)  # once, as the same happens in epoch 2
    assert "no flatness for epoch 1; the measurement failed: RuntimeError: something of the model's own" in message
    assert "\n" not in message


class CallsNothing(WithoutForward):
    def validation_step(self, batch, batch_idx):
        pass


@guards("callbacks.rank_errors:RankErrors.start_run", returns=None)
@pytest.mark.parametrize("make", [lambda: FailingWhenMeasured({0, 1, 2, 3}), CallsNothing])
def test_a_new_fit_tells_a_failure_anew(tmp_path, make):
    """The second network fails at the start of training already, so nothing succeeds between the two warnings."""
    callback = lf.FlatnessCallback(data="train", on_error="warn", summary=False)
    for _ in range(2):
        with pytest.warns(UserWarning, match="FlatnessCallback") as caught:
            fit(tmp_path, make(), callback)
        assert len(warned(caught)) == 1


def test_a_failure_after_a_success_is_told_again(tmp_path):
    with pytest.warns(UserWarning, match="FlatnessCallback") as caught:
        fit(tmp_path, FailingWhenMeasured({1, 3}), lf.FlatnessCallback(on_error="warn", summary=False))
    assert ["epoch 1" in warned(caught)[0], "epoch 3" in warned(caught)[1]] == [True, True]


def test_nothing_is_logged_before_a_measurement_has_succeeded(tmp_path):
    class Logged(FailingWhenMeasured):
        def on_validation_epoch_end(self):
            seen.append("flatness/hessian_trace" in self.trainer.callback_metrics)

    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, Logged({0, 1}), lf.FlatnessCallback(on_error="warn"))
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("data", ["val", "train"])
def test_what_cannot_be_measured_at_all_does_not_stop_training(tmp_path, data):
    module = CallsNothing()
    with pytest.warns(UserWarning, match="no flatness for .*CallsNothing has no forward"):
        fit(tmp_path, module, lf.FlatnessCallback(on_error="warn", data=data))
    assert module.training_steps == 16


def test_a_batch_with_nan(tmp_path):
    """The logits of one batch are not finite, in one epoch."""

    class OneNaN(Classifier):
        def validation_step(self, batch, batch_idx):
            if (self.current_epoch, batch_idx) == (1, 1):
                batch[0][0] = torch.nan
            super().validation_step(batch, batch_idx)

    callback = lf.FlatnessCallback(on_error="warn")
    with pytest.warns(UserWarning, match="epoch 1; the measurement failed: The logits contain NaN") as caught:
        fit(tmp_path, OneNaN(), callback, data=(loaders()[0], DataLoader([(x.clone(), y) for x, y in dataset(22)], 8)))
    assert len(warned(caught)) == 1
    with pytest.raises(lf.BatchError, match="The logits contain NaN"):
        fit(tmp_path, OneNaN(), lf.FlatnessCallback())


def test_errors_are_raised_as_they_are(tmp_path):
    error = RuntimeError("something of the model's own")
    with pytest.raises(RuntimeError) as caught:
        fit(tmp_path, FailingWhenMeasured({1}, error), lf.FlatnessCallback())
    assert caught.value is error


def test_ctrl_c_is_no_error_of_the_measurement(tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, FailingWhenMeasured({1}, KeyboardInterrupt()), lf.FlatnessCallback(on_error="warn"))


@pytest.mark.parametrize("data", ["val", "train"])
def test_monitors_read_nan_after_a_measurement_that_failed(tmp_path, data):
    """Otherwise they would file the network under the number of an earlier one."""
    recorder, callback = Recorder(), lf.FlatnessCallback(data=data, layers="all", on_error="warn")
    checkpoint = ModelCheckpoint(tmp_path, monitor=MONITOR, save_top_k=4, filename="{epoch}")
    with pytest.warns(UserWarning, match="no flatness for epoch 1"):
        fit(tmp_path, FailingWhenMeasured({1}), callback, checkpoint, recorder)
    values = {Path(path).stem: float(value) for path, value in checkpoint.best_k_models.items()}
    known = {f"epoch={record['epoch']}": record["relative_flatness"] for record in callback.history}
    assert_close(values, known | {"epoch=1": math.inf})  # ModelCheckpoint takes NaN for the worst value
    flatness = {key: value for key, value in recorder.logged[1].items() if key.startswith("flatness/")}
    assert flatness.keys() == {key for key in recorder.logged[0] if key.startswith("flatness/")}
    assert all(value == 0 if key.endswith("/exact") else math.isnan(value) for key, value in flatness.items())


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_an_error_is_not_kept_for_the_next_run(tmp_path, on_error):
    callback = lf.FlatnessCallback(on_error=on_error, summary=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if on_error == "raise":
            with pytest.raises(RuntimeError):
                fit(tmp_path, FailingWhenMeasured({0}), callback)
        else:
            fit(tmp_path, FailingWhenMeasured({3}), callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatnessCallback")
        fit(tmp_path, FailingWhenMeasured(), callback)
    assert len(callback.history) == 4


@pytest.mark.parametrize(("run", "said"), [("validate", "the validation"), ("test", "the test")])
def test_validation_and_tests_alone(tmp_path, run, said):
    trainer = quiet_trainer(tmp_path, lf.FlatnessCallback(on_error="warn"))
    with pytest.warns(UserWarning, match=f"no flatness for {said}; the measurement failed"):
        getattr(trainer, run)(FailingWhenMeasured({0}), loaders()[1], verbose=False)


def rank_errors(on_error):
    return RankErrors(on_error, "FlatnessCallback", "flatness")


@guards("callbacks/rank_errors.py", "if num_ranks == 1 and", "if False and")
def test_alone_errors_are_raised_at_once():
    with pytest.raises(ValueError, match="as it is"), rank_errors("raise").kept(num_ranks=1):
        raise ValueError("as it is")


@guards("callbacks/rank_errors.py", "sync=True)\n        self.pending = None", "sync=True)")
@guards("callbacks/rank_errors.py", "self.pending or in_one_line", "in_one_line")
@guards("callbacks/rank_errors.py", "if num_ranks == 1 and", "if", ids="raise")
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_the_first_error_is_kept_for_all_ranks(monkeypatch, on_error):
    errors = rank_errors(on_error)
    for message in ("the first", "the second"):
        with errors.kept(num_ranks=2):
            raise ValueError(message)
    assert errors.pending
    monkeypatch.setattr("lightning_flatness.callbacks.rank_errors.gather", lambda own, sync: [None, own])
    if on_error == "raise":
        with pytest.raises(lf.FlatnessError, match="failed at epoch 3 on rank 1: ValueError: the first"):
            errors.settle("epoch 3")
    else:
        with pytest.warns(UserWarning, match="for epoch 3; the measurement failed on rank 1: ValueError: the first"):
            assert not errors.settle("epoch 3")
    assert not errors.pending


@guards("callbacks/rank_errors.py", "gather(self.pending, sync=True)", "[self.pending]")
@guards("callbacks/rank_errors.py", 'if self.on_error == "raise":', "if True:", ids="warn")
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_an_error_of_another_rank_counts(monkeypatch, on_error):
    monkeypatch.setattr("lightning_flatness.callbacks.rank_errors.gather", lambda own, sync: [own, "no memory"])
    if on_error == "raise":
        with pytest.raises(lf.FlatnessError, match="on rank 1: no memory"):
            rank_errors(on_error).settle("epoch 3")
    else:
        with pytest.warns(UserWarning, match="on rank 1: no memory"):
            assert not rank_errors(on_error).settle("epoch 3")
