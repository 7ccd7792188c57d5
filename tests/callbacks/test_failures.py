"""Runs that fail or are stopped leave no trace."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_flatness as lf
from tests.callbacks.compare import assert_same, end_of, global_modes, module_state, random_states
from tests.callbacks.flatness_runs import assert_reports_equal, flatness_callback, seeded_fit
from tests.callbacks.lightning_modules import Classifier, Net, loaders


class UserError(Exception):
    """The user's own."""


FAILURES = {
    "error": UserError("the user's own"),
    "ctrl-c": KeyboardInterrupt(),
    "exit": SystemExit(3),
    "memory": torch.OutOfMemoryError("simulated: out of memory"),
}


class FailingInStep(Classifier):
    def __init__(self, failure, step):
        super().__init__()
        self.failure, self.step = failure, step

    def training_step(self, batch, batch_idx):
        if (self.step, self.current_epoch, batch_idx) == ("training_step", 1, 1):
            raise self.failure
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if (self.step, self.current_epoch, batch_idx) == ("validation_step", 1, 1) and not self.trainer.sanity_checking:
            raise self.failure
        super().validation_step(batch, batch_idx)


def end_of_failure(make, folder, *callbacks):
    """How a run that fails leaves model, process and random states; and the error."""
    module, error = make(), None
    before = global_modes()
    try:
        seeded_fit(folder, *callbacks, module=module)
    except BaseException as raised:
        error = raised
    assert error is not None
    assert_same(global_modes(), before, "modes")
    return {**module_state(module), "random states": random_states(), "error": type(error).__name__}, error


@pytest.mark.usefixtures("sigint_kept")
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("step", ["validation_step", "training_step"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_steps(tmp_path, failure, step, data):
    def make():
        return FailingInStep(FAILURES[failure], step)

    callback = flatness_callback(data=data)
    end, error = end_of_failure(make, tmp_path, callback)
    bare, _ = end_of_failure(make, tmp_path)
    assert_same(end, bare)
    assert error is FAILURES[failure] or isinstance(error, SystemExit)
    assert [record["epoch"] for record in callback.history] == [0]
    assert callback._running is None
    seeded_fit(tmp_path, callback, max_epochs=2)
    assert len(callback.history) == 2


class FailingInMeasurement(Classifier):
    """Its forward, which only the callback calls, draws random numbers and fails in the second epoch."""

    def __init__(self, failure, times=10**9):
        super().__init__()
        self.failure, self.times = failure, times
        self.counter = SimpleNamespace(calls=0)  # attributes of the module are put back as they were

    def forward(self, x):
        torch.rand(3)
        if self._trainer is not None and self.current_epoch == 1 and len(x) > 1:
            self.counter.calls += 1
            if 1 < self.counter.calls <= 1 + self.times:
                raise self.failure
        return self.net(x)


def whole(module):
    return module


# The forward that only the callback calls, on the batch's own inputs.
WHOLE = {"model": whole, "batch_fn": tuple}


class KeepStates(Callback):
    """Random states before the measurement that fails; goes before the callback."""

    def on_validation_batch_start(self, *_, **__):
        self.states = random_states()

    def on_validation_batch_end(self, *_, **__):
        self.states = random_states()


@pytest.mark.usefixtures("sigint_kept")
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_while_measuring(tmp_path, failure, data):
    module, callback, keep = (
        FailingInMeasurement(FAILURES[failure]),
        flatness_callback(data=data, **WHOLE),
        KeepStates(),
    )
    end, error = end_of_failure(lambda: module, tmp_path, keep, callback)
    if failure == "memory":
        assert isinstance(error, lf.BatchError)
        assert "Out of memory while measuring" in str(error)
        assert "smaller batches" in str(error)
    else:
        assert error is FAILURES[failure] or isinstance(error, SystemExit)
    assert_same(end["random states"], keep.states, "random states")
    assert end["hooks"] == 0
    assert not any(end["training flags"].values())  # as validation had set them
    assert all(end["requires_grad"].values())
    assert callback._running is None
    assert [record["epoch"] for record in callback.history] == [0]
    again = Classifier()
    again.net.load_state_dict({key.removeprefix("net."): value for key, value in end["weights"].items()})
    seeded_fit(tmp_path, callback, module=again, max_epochs=2)
    assert len(callback.history) == 2


@pytest.mark.parametrize("data", ["val", "train"])
def test_memory_that_runs_out_once(tmp_path, data):
    def make(times):
        return FailingInMeasurement(torch.OutOfMemoryError("simulated: out of memory"), times)

    module, callback, batches = make(1), flatness_callback(data=data, **WHOLE), loaders()
    end = end_of(seeded_fit(tmp_path, callback, module=module, data=batches, max_epochs=2), module)
    assert module.counter.calls > 1
    bare = make(0)
    assert_same(end, end_of(seeded_fit(tmp_path, module=bare, max_epochs=2), bare))
    assert_reports_equal(callback.report, lf.measure_flatness(module.net, batches[data == "val"]))


@pytest.mark.usefixtures("sigint_kept")
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_in_plain_measure_flatness(failure):
    class Failing(Net):
        calls = 0

        def forward(self, x):
            Failing.calls += 1
            torch.rand(3)
            logits = super().forward(x)
            if Failing.calls > 1:
                raise FAILURES[failure]
            return logits

    net = Failing().train()
    before = {**module_state(net), "modes": global_modes(), "random states": random_states()}
    with pytest.raises((type(FAILURES[failure]), lf.BatchError)):
        lf.measure_flatness(net, loaders()[1])
    after = {**module_state(net), "modes": global_modes()}
    del before["random states"]["torch"]  # the loader draws a seed
    assert_same(after, {key: before[key] for key in after})


def test_a_mode_left_behind_would_be_seen(tmp_path):
    class LeavesGradientsOff(Callback):
        def on_exception(self, *_):
            torch.set_grad_enabled(False)

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, True)
        with pytest.raises(AssertionError, match="modes, gradients"):
            end_of_failure(lambda: FailingInStep(UserError(), "training_step"), tmp_path, LeavesGradientsOff())
