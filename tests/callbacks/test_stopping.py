"""When FlatnessStopping stops, on curves that are written down."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Scripted, quiet_trainer
from tests.guarding import guards

MONITOR = "flatness/relative_flatness"
LOADER = DataLoader(TensorDataset(torch.zeros(1, 1)))
# Up, down, and from epoch 9 on neither gets better.
FLATNESS = [1.0, 20.0, 50.0, 80.0, 60.0, 50.0, 40.0, 30.0, 20.0, 20.0, 21.0, 20.0, 22.0, 20.0, 23.0, 20.0]
ACCURACY = [0.3, 0.5, 0.7, 0.8, 0.8, 0.9, 0.8, 0.9, 0.9, 0.9, 0.8, 0.9, 0.7, 0.9, 0.8, 0.9]


def run(folder, flatness, accuracy, *callbacks, fit=None, **options):
    options = {"max_epochs": len(flatness)} | options
    trainer = quiet_trainer(folder, *callbacks, **options)
    trainer.fit(Scripted({MONITOR: flatness, "val_acc": accuracy}), LOADER, LOADER, **(fit or {}))
    return trainer


def epochs_run(*arguments, **options):
    return run(*arguments, **options).current_epoch


def constant(value, epochs=12):
    return [value] * epochs


# ------------------------------------------------------------------------------------------------------- when it stops


def test_early_stopping_stops_on_the_rise_and_this_one_does_not(tmp_path):
    assert epochs_run(tmp_path, FLATNESS, ACCURACY, EarlyStopping(MONITOR, patience=3)) == 4
    # Epoch 8 has the last improvement, so epochs 9 to 11 are the three without one.
    stopping = lf.FlatnessStopping(burn_in=4, patience=3)
    assert epochs_run(tmp_path, FLATNESS, ACCURACY, stopping) == 12
    assert stopping.stopped_epoch == 11
    assert float(stopping.best_score) == 20.0
    assert float(stopping.best_accuracy) == pytest.approx(0.9)
    assert f"neither {MONITOR} (best 20) nor val_acc (best 0.9)" in stopping.stopping_reason_message


@guards("callbacks/stopping.py", "if trainer.current_epoch < self.burn_in:", "if False:", ids="1")
@pytest.mark.parametrize("burn_in", [0, 1, 5])
def test_burn_in_is_ignored(tmp_path, burn_in):
    # Values of the burn-in that are never reached again, by a margin.
    flatness = [1e-3] * burn_in + constant(5.0)
    accuracy = [1.0] * burn_in + constant(0.5)
    stopping = lf.FlatnessStopping(burn_in=burn_in, patience=2)
    assert epochs_run(tmp_path, flatness, accuracy, stopping) == burn_in + 3
    assert float(stopping.best_score) == 5.0
    assert float(stopping.best_accuracy) == 0.5


@guards("callbacks/stopping.py", "stalled = min(", "stalled = max(")
@pytest.mark.parametrize(
    ("flatness", "accuracy", "epochs"),
    [
        (constant(5.0), constant(0.5), 4),
        ([2.0**-epoch for epoch in range(12)], constant(0.5), 12),
        (constant(5.0), [epoch / 12 for epoch in range(12)], 12),
        ([5.0, 4.0, 3.0, *constant(3.0, 9)], [0.1, 0.2, 0.3, 0.4, 0.5, *constant(0.5, 7)], 8),
        ([5.0, 4.0, 3.0, 2.0, 1.0, *constant(1.0, 7)], [0.1, 0.2, 0.3, *constant(0.3, 9)], 8),
        (
            [5.0, 4.0, *constant(4.0, 3), 3.0, *constant(3.0, 6)],
            [0.1, 0.2, *constant(0.2, 2), 0.3, *constant(0.3, 7)],
            9,
        ),
    ],
    ids=["both", "flatness goes on", "accuracy goes on", "accuracy last", "flatness last", "in turns"],
)
def test_stops_only_when_both_have_stalled(tmp_path, flatness, accuracy, epochs):
    assert epochs_run(tmp_path, flatness, accuracy, lf.FlatnessStopping(burn_in=0, patience=3)) == epochs


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("mode", "sign"), [("min", -1), ("max", 1)])
def test_min_delta_is_a_fraction_of_the_best_value(tmp_path, scale, mode, sign):
    def steps(step):
        return [scale * (1 + sign * step) ** epoch for epoch in range(12)]

    def stopping():
        return lf.FlatnessStopping(burn_in=0, patience=2, min_delta=0.05, mode=mode)

    assert epochs_run(tmp_path, steps(0.06), constant(0.5), stopping()) == 12
    # Steps of 2 %: every third is an improvement, and patience is 2.
    assert epochs_run(tmp_path, steps(0.02), constant(0.5), stopping()) == 3
    assert epochs_run(tmp_path, steps(0.0), constant(0.5), stopping()) == 3
    assert epochs_run(tmp_path, steps(-0.02), constant(0.5), stopping()) == 3


def test_a_little_worse_is_no_improvement(tmp_path):
    stopping = lf.FlatnessStopping(burn_in=0, patience=3, min_delta=0.01)
    assert epochs_run(tmp_path, [10.0 + 0.05 * epoch for epoch in range(12)], constant(0.5), stopping) == 4
    assert float(stopping.best_score) == 10.0


def test_min_delta_of_accuracy_is_absolute(tmp_path):
    accuracy = [0.5 + 0.01 * epoch for epoch in range(12)]
    for delta, epochs in [(0.0, 12), (0.005, 12), (0.05, 4)]:
        stopping = lf.FlatnessStopping(burn_in=0, patience=3, accuracy_min_delta=delta)
        assert epochs_run(tmp_path, constant(5.0), accuracy, stopping) == epochs


def test_a_loss_in_place_of_accuracy(tmp_path):
    loss = [1.0, 0.8, 0.6, 0.5, 0.4, *constant(0.4, 7)]
    stopping = lf.FlatnessStopping(burn_in=0, patience=3, accuracy_mode="min")
    assert epochs_run(tmp_path, constant(5.0), loss, stopping) == 8
    assert float(stopping.best_accuracy) == pytest.approx(0.4)


def test_flatness_to_be_maximised(tmp_path):
    flatness = [1.0, 2.0, 3.0, 4.0, *constant(4.0, 8)]
    assert epochs_run(tmp_path, flatness, constant(0.5), lf.FlatnessStopping(burn_in=0, patience=3, mode="max")) == 7


@guards("callbacks/stopping.py", "self.check_finite and not torch.isfinite(value)", "False", ids="flatness-nan")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["flatness", "accuracy"])
def test_values_that_are_not_finite_stop_at_once(tmp_path, which, value):
    flatness, accuracy = [2.0**-epoch for epoch in range(12)], constant(0.5)
    (flatness if which == "flatness" else accuracy)[3] = value
    stopping = lf.FlatnessStopping(burn_in=1, patience=5)
    assert epochs_run(tmp_path, flatness, accuracy, stopping) == 4
    assert f"is {value}" in stopping.stopping_reason_message

    tolerant = lf.FlatnessStopping(burn_in=1, patience=5, check_finite=False)
    assert epochs_run(tmp_path, flatness, accuracy, tolerant) == 12


def test_nan_is_no_improvement(tmp_path):
    flatness = [5.0, 4.0, *constant(float("nan"), 10)]
    stopping = lf.FlatnessStopping(burn_in=0, patience=3, check_finite=False)
    assert epochs_run(tmp_path, flatness, constant(0.5), stopping) == 5
    assert float(stopping.best_score) == 4.0


def test_negative_flatness_can_improve(tmp_path):
    flatness = [2.0, 0.0, -1.0, -2.0, *constant(-2.0, 8)]
    assert epochs_run(tmp_path, flatness, constant(0.5), lf.FlatnessStopping(burn_in=0, patience=3)) == 7


# ------------------------------------------------------------------------------------------------------- in the Trainer


@pytest.mark.parametrize("missing", [MONITOR, "val_acc"])
def test_a_key_that_nobody_logs_is_an_error_with_those_that_are(tmp_path, missing):
    values = {MONITOR: FLATNESS, "val_acc": ACCURACY, "val_loss": ACCURACY}
    del values[missing]
    there = ", ".join(sorted(values))
    with pytest.raises(
        lf.FlatnessError, match=f"watches '{missing}', which is not logged. The logged metrics are: {there}"
    ):
        quiet_trainer(tmp_path, lf.FlatnessStopping()).fit(Scripted(values), LOADER, LOADER)


def test_validations_count_not_epochs(tmp_path):
    stopping = lf.FlatnessStopping(burn_in=2, patience=3)
    # Validated after epochs 1, 3, 5, 7, 9; the first is in the burn-in.
    assert epochs_run(tmp_path, constant(5.0), constant(0.5), stopping, check_val_every_n_epoch=2) == 10


def test_several_validations_in_an_epoch(tmp_path):
    module = Scripted({MONITOR: constant(5.0), "val_acc": constant(0.5)})
    train = DataLoader(TensorDataset(torch.zeros(4, 1)))
    trainer = quiet_trainer(
        tmp_path, lf.FlatnessStopping(burn_in=1, patience=3), max_epochs=12, val_check_interval=0.25
    )
    trainer.fit(module, train, LOADER)
    assert trainer.current_epoch == 2


@guards("callbacks/stopping.py", "trainer.sanity_checking or", "", ids="2")
@pytest.mark.parametrize("sanity", [0, 2])
def test_sanity_check_does_not_count(tmp_path, sanity):
    stopping = lf.FlatnessStopping(burn_in=0, patience=2)
    assert epochs_run(tmp_path, [5.0, 4.0, 4.0, 4.0, 4.0], constant(0.5, 5), stopping, num_sanity_val_steps=sanity) == 4
    assert float(stopping.best_score) == 4.0


def test_validate_and_fast_dev_run_do_not_count(tmp_path):
    stopping = lf.FlatnessStopping(burn_in=0, patience=1)
    module = Scripted({MONITOR: constant(5.0), "val_acc": constant(0.5)})
    trainer = quiet_trainer(tmp_path, stopping)
    trainer.validate(module, LOADER, verbose=False)
    quiet_trainer(tmp_path, stopping, fast_dev_run=True).fit(module, LOADER, LOADER)
    assert stopping.best_score == torch.inf
    assert (stopping.wait_count, stopping.accuracy_wait_count) == (0, 0)


def test_min_epochs_is_respected(tmp_path):
    stopping = lf.FlatnessStopping(burn_in=0, patience=1)
    assert epochs_run(tmp_path, constant(5.0), constant(0.5), stopping, min_epochs=6) == 6


@guards("callbacks/stopping.py", 'trainer.strategy.reduce(value, reduce_op="mean")', "value")
def test_the_mean_over_ranks_counts(tmp_path, monkeypatch):
    # The other rank has three times as much of everything.
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", lambda strategy, value, *args, **kwargs: 2 * value)
    stopping = lf.FlatnessStopping(burn_in=0, patience=3)
    assert epochs_run(tmp_path, constant(5.0), constant(0.25), stopping) == 4
    assert float(stopping.best_score) == 10.0
    assert float(stopping.best_accuracy) == 0.5


@guards("callbacks/stopping.py", "trainer.strategy.reduce_boolean_decision(stop, all=False)", "stop")
def test_all_ranks_stop_with_one(tmp_path, monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", lambda *args, **kwargs: True)
    stopping = lf.FlatnessStopping(burn_in=2, patience=3)
    assert epochs_run(tmp_path, constant(5.0), constant(0.5), stopping) == 3


# --------------------------------------------------------------------------------------------------------------- state


@guards("callbacks/stopping.py", '= state["best"], state["wait_count"]', "= watched.best, watched.wait_count", ids="10")
@pytest.mark.parametrize("interrupted_after", range(1, 11))
def test_resume_equals_an_uninterrupted_run(tmp_path, interrupted_after):
    def stopping():
        return lf.FlatnessStopping(burn_in=4, patience=3)

    whole, first, second = stopping(), stopping(), stopping()
    epochs = epochs_run(tmp_path, FLATNESS, ACCURACY, whole)
    checkpoint = ModelCheckpoint(tmp_path, filename="part")
    run(tmp_path, FLATNESS, ACCURACY, first, checkpoint, max_epochs=interrupted_after)
    path = tmp_path / "part.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    assert saved["wait_count"] == first.wait_count
    assert saved["watched"]["val_acc"]["wait_count"] == first.accuracy_wait_count
    resumed = run(tmp_path, FLATNESS, ACCURACY, second, max_epochs=len(FLATNESS), fit={"ckpt_path": path})
    assert resumed.current_epoch == epochs == 12
    assert second.state_dict() == whole.state_dict()


@guards("callbacks/stopping.py", "if trainer.ckpt_path is None and trainer.global_step == 0", "if False")
def test_a_new_training_forgets_an_earlier_one(tmp_path):
    stopping = lf.FlatnessStopping(burn_in=0, patience=3)
    assert epochs_run(tmp_path, constant(5.0), constant(0.9), stopping) == 4
    assert epochs_run(tmp_path, [8.0, 7.0, 6.0, *constant(6.0)], constant(0.5), stopping) == 6
    assert float(stopping.best_accuracy) == 0.5


@guards("callbacks/stopping.py", "trainer.ckpt_path is None and trainer.global_step == 0", "True")
def test_a_fit_that_goes_on_remembers(tmp_path):
    stopping = lf.FlatnessStopping(burn_in=0, patience=3)
    trainer = run(tmp_path, constant(5.0), constant(0.9), stopping, max_epochs=2)
    trainer.fit_loop.max_epochs = 12
    trainer.fit(Scripted({MONITOR: constant(5.0), "val_acc": constant(0.9)}), LOADER, LOADER)
    assert trainer.current_epoch == 4


@guards("callbacks/stopping.py", "self.patience = patience", "pass")
def test_patience_of_a_resumed_run_is_the_one_given_now(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="part")
    run(tmp_path, constant(5.0), constant(0.5), lf.FlatnessStopping(burn_in=0, patience=3), checkpoint, max_epochs=2)
    longer, path = lf.FlatnessStopping(burn_in=0, patience=6), tmp_path / "part.ckpt"
    assert epochs_run(tmp_path, constant(5.0), constant(0.5), longer, fit={"ckpt_path": path}) == 7


def test_instances_with_different_monitors_coexist(tmp_path):
    flatness = lf.FlatnessStopping(burn_in=0, patience=3)
    other = lf.FlatnessStopping(monitor="other", accuracy="loss", burn_in=0, patience=3, accuracy_mode="min")
    plain = EarlyStopping(MONITOR, patience=100)
    values = {MONITOR: [10.0, 9.0, 8.0], "val_acc": [0.1, 0.2, 0.3], "other": [3.0, 3.0, 3.0], "loss": [1.0, 0.5, 0.5]}
    trainer = quiet_trainer(tmp_path, flatness, other, plain, max_epochs=3)
    trainer.fit(Scripted(values), LOADER, LOADER)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    states = torch.load(tmp_path / "three.ckpt", weights_only=True)["callbacks"]
    assert float(states[flatness.state_key]["best_score"]) == 8.0
    assert states[other.state_key]["wait_count"] == 2
    assert states[other.state_key]["watched"]["loss"]["wait_count"] == 1
    assert float(states[plain.state_key]["best_score"]) == 8.0


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"burn_in": -1}, "burn_in=-1"),
        ({"patience": 0}, "patience=0"),
        ({"min_delta": -0.1}, "min_delta=-0.1"),
        ({"min_delta": 1.0}, "a fraction.*min_delta=1.0"),
        ({"accuracy_min_delta": -1e-3}, "accuracy_min_delta=-0.001"),
        ({"mode": "lower"}, "'min' or 'max'.*mode='lower'"),
        ({"accuracy_mode": "higher"}, "'min' or 'max'.*accuracy_mode='higher'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(lf.FlatnessError, match=message):
        lf.FlatnessStopping(**options)


def test_verbose_says_what_improved(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(tmp_path, [5.0, 4.0, 4.0], [0.5, 0.5, 0.5], lf.FlatnessStopping(burn_in=0, verbose=True))
    assert f"{MONITOR} 4 (validations without improvement: 1), val_acc 0.5 (2)" in caplog.text


# ------------------------------------------------------------------------------------------------------ several metrics

BOTH = ["flatness/hessian_trace", MONITOR]


@pytest.mark.parametrize(
    ("trace", "flatness", "epochs"),
    [
        ([9.0, 8.0, 8.0, 8.0, 8.0, 8.0], [9.0, 8.0, 8.0, 8.0, 8.0, 8.0], 4),
        ([9.0, 8.0, 7.0, 6.0, 6.0, 6.0], [9.0, 8.0, 8.0, 8.0, 8.0, 8.0], 6),
        ([9.0, 8.0, 8.0, 8.0, 8.0, 8.0], [9.0, 8.0, 7.0, 7.0, 7.0, 7.0], 5),
    ],
)
def test_stops_when_all_monitored_metrics_have_stalled(tmp_path, trace, flatness, epochs):
    stopping = lf.FlatnessStopping(BOTH, burn_in=0, patience=2)
    trainer = quiet_trainer(tmp_path, stopping, max_epochs=6)
    trainer.fit(Scripted({BOTH[0]: trace, MONITOR: flatness, "val_acc": constant(0.5, 6)}), LOADER, LOADER)
    assert trainer.current_epoch == epochs
    if epochs < 6:
        assert all(key in stopping.stopping_reason_message for key in [*BOTH, "val_acc"])


def test_several_metrics_are_kept_in_checkpoints(tmp_path):
    first, second = (lf.FlatnessStopping(BOTH, burn_in=0, patience=2) for _ in range(2))
    values = {BOTH[0]: constant(8.0), MONITOR: constant(8.0), "val_acc": constant(0.5)}
    trainer = quiet_trainer(tmp_path, first, max_epochs=2)
    trainer.fit(Scripted(values), LOADER, LOADER)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    trainer = quiet_trainer(tmp_path, second, max_epochs=9)
    trainer.fit(Scripted(values), LOADER, LOADER, ckpt_path=tmp_path / "two.ckpt")
    assert trainer.current_epoch == 3
