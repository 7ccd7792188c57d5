"""Which checkpoints FlatCheckpoint keeps, on curves that are written down."""

import itertools
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
from lightning_flatness.callbacks.checkpoint import Candidate, survivors
from tests.callbacks.lightning_modules import Classifier, FailingWhenMeasured, Scripted, loaders, quiet_trainer
from tests.guarding import guards

MONITOR = "flatness/relative_flatness"
LOADER = DataLoader(TensorDataset(torch.zeros(1, 1)))
# What the demo logs, from epoch 0 on.
DEMO_ACCURACY = [
    0.4185, 0.7706, 0.9577, 0.9839, 0.9859, 0.9859, 0.9879, 0.992, 0.994, 0.992, 0.992, 0.992, 0.992, 0.992, 0.992,
    0.992, 0.994, 0.992, 0.992, 0.992, 0.992, 0.994, 0.994, 0.994, 0.994, 0.992, 0.994, 0.994, 0.9899, 0.9899, 0.992,
    0.9899, 0.992, 0.992, 0.994,
]  # fmt: skip
DEMO_FLATNESS = [
    14.59, 88.20, 57.37, 42.24, 15.64, 11.89, 9.042, 7.104, 5.347, 4.789, 4.461, 4.376, 4.122, 3.825, 4.002, 3.773,
    3.946, 3.862, 4.057, 3.576, 4.242, 4.203, 3.398, 3.488, 3.480, 3.321, 3.299, 4.038, 3.101, 3.129, 3.430, 3.541,
    3.461, 3.432, 3.313,
]  # fmt: skip


class Kept(lf.FlatCheckpoint):
    """Remembers what was on disk after every check."""

    def __init__(self, folder, **options):
        super().__init__(dirpath=folder / "kept", filename="{epoch}", **options)
        self.best, self.files = [], []

    def _save_topk_checkpoint(self, trainer, monitor_candidates):
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        self.best.append(epoch_of(self.best_model_path))
        self.files.append(files(self.dirpath))
        assert self.files[-1] == sorted(epoch_of(path) for path in self.best_k_models)


def epoch_of(path):
    return int(re.search(r"epoch=(\d+)(-v\d+)?\.ckpt$", str(path))[1]) if path else None


def files(folder):
    return sorted(map(epoch_of, Path(folder).glob("*.ckpt")))


def run(folder, accuracy, flatness, *callbacks, fit=None, **options):
    trainer = quiet_trainer(folder, *callbacks, **({"max_epochs": len(flatness)} | options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exists and is not empty")
        trainer.fit(Scripted({MONITOR: flatness, "val_acc": accuracy}), LOADER, LOADER, **(fit or {}))
    return trainer


def flattest(accuracy, flatness, within, sign=1):
    """The first epoch of the smallest flatness among those near the best accuracy so far; None without any."""
    known = [
        (epoch, sign * one, other)
        for epoch, (one, other) in enumerate(zip(accuracy, flatness, strict=True))
        if math.isfinite(one) and math.isfinite(other)
    ]
    best = max((one for _, one, _ in known), default=0)
    near = [(other, -one, epoch) for epoch, one, other in known if one >= best - within - 1e-6]
    return min(near)[2] if near else None


# ------------------------------------------------------------------------------------------------------- what it keeps


def test_on_the_demo_it_keeps_a_flatter_network_of_the_same_accuracy(tmp_path):
    recipe = ModelCheckpoint(tmp_path / "recipe", "{epoch}", monitor="val_acc", mode="max")
    same, near = Kept(tmp_path / "same", within=0.0), Kept(tmp_path / "near", within=0.005)
    run(tmp_path, DEMO_ACCURACY, DEMO_FLATNESS, recipe, same, near)
    by_recipe, by_same, by_near = (epoch_of(one.best_model_path) for one in (recipe, same, near))
    assert (by_recipe, by_same, by_near) == (8, 26, 28)
    assert DEMO_ACCURACY[by_same] == DEMO_ACCURACY[by_recipe]
    assert DEMO_FLATNESS[by_same] < 0.62 * DEMO_FLATNESS[by_recipe]
    assert DEMO_FLATNESS[by_near] < 0.59 * DEMO_FLATNESS[by_recipe]
    assert float(near.best_model_score) == pytest.approx(0.9899)
    assert near.best_flatness == pytest.approx(3.101)


CURVES = {
    # The flattest falls out when the best rises, and the next one takes its place.
    "rising": ([0.5, 0.55, 0.6, 0.7, 0.62], [1.0, 2.0, 3.0, 4.0, 0.5], 0.12),
    "twice": ([0.5, 0.6, 0.58, 0.7, 0.69], [1.0, 5.0, 3.0, 4.0, 6.0], 0.1),
    "all alike": ([0.5] * 4, [2.0, 2.0, 1.0, 1.0], 0.0),
    "falling accuracy": ([0.9, 0.8, 0.7], [3.0, 2.0, 1.0], 0.15),
    "negative": ([0.9, 0.9, 0.9], [0.5, -1.0, 0.2], 0.0),
    "nothing known": ([0.9, math.nan, 0.95], [math.nan, 1.0, math.inf], 0.1),
    "not known at times": ([0.5, math.nan, 0.6, 0.9, 0.58], [3.0, 0.1, math.nan, 2.0, 1.0], 0.4),
    "best without flatness": ([0.5, 0.9, 0.52], [3.0, math.nan, 2.0], 0.1),
}


@guards("callbacks/checkpoint.py", "is_near and (", "(", ids="rising")
@pytest.mark.parametrize("curve", CURVES)
def test_keeps_the_flattest_near_the_best_at_every_epoch(tmp_path, curve):
    accuracy, flatness, within = CURVES[curve]
    kept = Kept(tmp_path, within=within)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FlatCheckpoint has kept no checkpoint")
        run(tmp_path, accuracy, flatness, kept)
    wanted = [flattest(accuracy[:end], flatness[:end], within) for end in range(1, len(accuracy) + 1)]
    assert kept.best == wanted
    if wanted[-1] is not None:
        found = torch.load(kept.best_model_path, weights_only=True)
        assert found["epoch"] == wanted[-1]
        assert found["callbacks"][kept.state_key]["best_model_path"] is not None


def test_a_loss_in_place_of_accuracy(tmp_path):
    loss, flatness = [1.0, 0.5, 0.45, 0.3, 0.34], [1.0, 2.0, 1.5, 4.0, 3.0]
    kept = Kept(tmp_path, within=0.05, mode="min")
    run(tmp_path, loss, flatness, kept)
    assert kept.best == [flattest(loss[:end], flatness[:end], 0.05, sign=-1) for end in range(1, 6)]
    assert float(kept.best_model_score) == pytest.approx(0.34)


def test_rounding_of_float32_is_not_a_difference(tmp_path):
    kept = Kept(tmp_path, within=0.01)
    run(tmp_path, [0.90, 0.91], [1.0, 2.0], kept)  # in float32, they differ by more than 0.01
    assert kept.best == [0, 0]


numbers = st.integers(0, 12).map(lambda number: number / 8)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=25), st.integers(0, 6).map(lambda n: n / 8))
def test_dropping_candidates_changes_nothing(curve, within):
    kept = []
    for epoch, (score, flatness) in enumerate(curve):
        kept = survivors([*kept, Candidate(str(epoch), score, flatness)], within, max_files=100)
        scores, others = zip(*curve[: epoch + 1], strict=True)
        wanted = flattest(scores, others, within)
        assert (kept[-1].score, kept[-1].flatness) == curve[wanted]
        assert kept[0].score == max(scores)
        # Each of those kept is the flattest if the best rises so far that it is just near enough.
        assert all(one.score > other.score and one.flatness > other.flatness for one, other in itertools.pairwise(kept))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=25), st.integers(2, 5))
def test_never_more_files_than_allowed(curve, most):
    kept = []
    for epoch, (score, flatness) in enumerate(curve):
        kept = survivors([*kept, Candidate(str(epoch), score, flatness)], 10.0, most)
        assert len(kept) <= most
        assert kept[-1].flatness == min(one for _, one in curve[: epoch + 1])
        assert kept[0].score == max(one for one, _ in curve[: epoch + 1])


def test_of_many_those_that_differ_most_are_left():
    front = [
        Candidate(str(index), 1 - index / 10, flatness) for index, flatness in enumerate([9.0, 8.9, 5.0, 4.8, 1.0])
    ]
    assert [one.path for one in survivors(front, 1.0, 4)] == ["0", "2", "3", "4"]
    assert [one.path for one in survivors(front, 1.0, 3)] == ["0", "2", "4"]
    assert [one.path for one in survivors(front, 1.0, 2)] == ["0", "4"]


def test_files_that_cannot_win_are_deleted(tmp_path):
    kept = Kept(tmp_path, within=0.1, max_files=3)
    run(tmp_path, [0.5, 0.8, 0.75, 0.72, 0.71, 0.86, 0.9], [1.0, 9.0, 7.0, 5.0, 4.9, 6.0, 8.0], kept)
    # After epoch 4 there were four. 0.90 leaves nothing below 0.80.
    assert kept.files == [[0], [1], [1, 2], [1, 2, 3], [1, 3, 4], [5], [5, 6]]
    assert epoch_of(kept.best_model_path) == 5


# ------------------------------------------------------------------------------------------------------ in the Trainer


@pytest.mark.parametrize("missing", [MONITOR, "val_acc"])
def test_a_key_that_nobody_logs_is_an_error_with_those_that_are(tmp_path, missing):
    values = {MONITOR: [1.0, 2.0], "val_acc": [0.5, 0.6], "val_loss": [1.0, 0.9]}
    del values[missing]
    with pytest.raises(
        lf.FlatnessError, match=f"watches '{missing}', which is not logged. The logged metrics are: .*val_loss"
    ):
        quiet_trainer(tmp_path, lf.FlatCheckpoint(dirpath=tmp_path)).fit(Scripted(values), LOADER, LOADER)


def test_the_best_can_be_tested(tmp_path):
    checkpoint = lf.FlatCheckpoint(within=1.0)
    module, (train, val) = Classifier(), loaders()
    trainer = quiet_trainer(tmp_path, lf.FlatnessCallback(summary=False), checkpoint, max_epochs=4)
    trainer.fit(module, train, val)
    (tested,) = trainer.test(module, val, ckpt_path="best", verbose=False)
    assert tested[MONITOR] == pytest.approx(checkpoint.best_flatness, rel=1e-6)
    assert tested["val_acc"] == pytest.approx(float(checkpoint.best_model_score))


@pytest.mark.parametrize("options", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}], ids=str)
def test_each_validation_counts(tmp_path, options):
    callback = lf.FlatnessCallback(summary=False)
    checkpoint = lf.FlatCheckpoint(dirpath=tmp_path / "kept", within=1.0)
    trainer = quiet_trainer(tmp_path, checkpoint, callback, max_epochs=4, **options)
    trainer.fit(Classifier(), *loaders())
    least = min(callback.history, key=lambda record: record["relative_flatness"])
    assert checkpoint.best_model_path.endswith(f"epoch={least['epoch']}-step={least['step']}.ckpt")
    assert checkpoint.best_flatness == pytest.approx(least["relative_flatness"], rel=1e-6)


@guards("callbacks/checkpoint.py", 'one.history[-1]["step"] == trainer.global_step', "True")
@pytest.mark.parametrize("data", ["val", "train"])
def test_epochs_without_a_measurement_do_not_count(tmp_path, data):
    callback = lf.FlatnessCallback(every_n_epochs=3, data=data, summary=False)
    kept = Kept(tmp_path, within=1.0)
    quiet_trainer(tmp_path, kept, callback, max_epochs=8).fit(Classifier(), *loaders())
    assert {epoch for epochs in kept.files for epoch in epochs} <= {0, 3, 6}
    wanted = min(callback.history, key=lambda record: record["relative_flatness"])
    assert kept.best[-1] == wanted["epoch"]


def test_a_failed_measurement_does_not_count(tmp_path):
    kept = Kept(tmp_path, within=1.0)
    module = FailingWhenMeasured({1, 3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(tmp_path, kept, lf.FlatnessCallback(on_error="warn", summary=False), max_epochs=4).fit(
            module, *loaders()
        )
    assert {epoch for epochs in kept.files for epoch in epochs} <= {0, 2}


def test_without_validation(tmp_path):
    class LogsInTraining(Classifier):
        def training_step(self, batch, batch_idx):
            self.log("train_acc", 0.5, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    callback = lf.FlatnessCallback(data="train", summary=False)
    kept = Kept(tmp_path, monitor="train_acc")
    quiet_trainer(tmp_path, kept, callback, max_epochs=3).fit(LogsInTraining(), loaders()[0])
    wanted = min(callback.history, key=lambda record: record["relative_flatness"])
    assert kept.best[-1] == wanted["epoch"]


@pytest.mark.slow
def test_the_spectrum_can_be_watched(tmp_path):
    callback = lf.SpectrumCallback(every_n_epochs=2, top_k=1, num_steps=2, num_probes=1)
    kept = Kept(tmp_path, flatness="spectrum/lambda_max", within=1.0)
    quiet_trainer(tmp_path, kept, callback, max_epochs=4).fit(Classifier(), *loaders())
    measured = {record["epoch"]: record["lambda_max"] for record in callback.history if record["epoch"] in (0, 2)}
    assert kept.best[-1] == min(measured, key=measured.get)


def test_nothing_kept_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="FlatCheckpoint has kept no checkpoint, because .*'val_acc' and"):
        run(tmp_path, [math.nan] * 2, [1.0, 2.0], Kept(tmp_path))


@guards("callbacks/checkpoint.py", 'trainer.strategy.reduce(value, reduce_op="mean").cpu()', "value.cpu()")
def test_the_mean_over_ranks_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", lambda strategy, value, *args, **kwargs: 2 * value)
    kept = Kept(tmp_path, within=0.0)
    run(tmp_path, [0.25, 0.5], [1.0, 3.0], kept)
    assert (float(kept.best_model_score), kept.best_flatness) == (1.0, 6.0)


def test_beside_a_model_checkpoint_and_another_one(tmp_path):
    ones = [Kept(tmp_path / str(within), within=within) for within in (0.0, 0.5)]
    plain = ModelCheckpoint(tmp_path / "plain", "{epoch}", monitor="val_acc", mode="max")
    run(tmp_path, [0.5, 0.6, 0.7], [1.0, 2.0, 3.0], plain, *ones)
    assert [epoch_of(one.best_model_path) for one in (plain, *ones)] == [2, 2, 0]


def test_last_checkpoint_and_names(tmp_path):
    checkpoint = lf.FlatCheckpoint(dirpath=tmp_path / "kept", filename="flat", within=1.0, save_last=True)
    run(tmp_path, [0.5, 0.6, 0.7], [1.0, 2.0, 3.0], checkpoint)
    names = sorted(path.name for path in (tmp_path / "kept").glob("*"))
    assert names == ["flat-v1.ckpt", "flat-v2.ckpt", "flat.ckpt", "last.ckpt"]
    assert checkpoint.best_model_path.endswith("flat.ckpt")


# --------------------------------------------------------------------------------------------------------------- state

ACCURACY = [0.5, 0.6, 0.58, 0.7, 0.69, 0.66, 0.75, 0.71, 0.9, 0.7]
FLATNESS = [1.0, 5.0, 3.0, 4.0, 6.0, 3.5, 9.0, 3.0, 8.0, 1.0]


@guards("callbacks/checkpoint.py", 'state_dict["candidates"]] if is_same else []', "[]] if is_same else []", ids="4")
@pytest.mark.parametrize("interrupted_after", [1, 3, 4, 7, 9])
def test_resume_equals_an_uninterrupted_run(tmp_path, interrupted_after):
    whole, first, second = (Kept(tmp_path / name, within=0.1) for name in ("whole", "part", "part"))
    run(tmp_path, ACCURACY, FLATNESS, whole)
    last = ModelCheckpoint(tmp_path, filename="resume")
    run(tmp_path, ACCURACY, FLATNESS, first, last, max_epochs=interrupted_after)
    path = tmp_path / "resume.ckpt"
    run(tmp_path, ACCURACY, FLATNESS, second, max_epochs=len(ACCURACY), fit={"ckpt_path": path})
    assert first.best + second.best == whole.best
    assert first.files + second.files == whole.files
    assert second.best_flatness == whole.best_flatness


@guards("callbacks/checkpoint.py", "if self.file_exists(one.path, trainer)", "")
def test_files_that_are_gone_are_forgotten(tmp_path):
    """Resumed from an earlier epoch, of which later epochs have deleted candidates."""
    first, second = (lf.FlatCheckpoint(dirpath=tmp_path / "kept", filename="{epoch}") for _ in range(2))
    every = ModelCheckpoint(tmp_path / "every", "{epoch}", save_top_k=-1)
    run(tmp_path, [0.5, 0.9, 0.95], [1.0, 2.0, 3.0], first, every)
    path = tmp_path / "every" / "epoch=1.ckpt"
    run(tmp_path, [0.5, 0.9, 0.4, 0.41], [1.0, 2.0, 0.5, 2.5], second, max_epochs=4, fit={"ckpt_path": path})
    assert list(map(epoch_of, second.best_k_models)) == [3, 2]
    assert all(Path(one).exists() for one in second.best_k_models)


def test_state_is_read_with_weights_only(tmp_path):
    kept = Kept(tmp_path, within=0.5)
    run(tmp_path, [0.5, 0.6], [1.0, 2.0], kept)
    state = torch.load(kept.best_model_path, weights_only=True)["callbacks"][kept.state_key]
    assert [one[1:] for one in state["candidates"]] == [[0.5, 1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"within": -0.1}, "within=-0.1 must be a finite number, at least 0"),
        ({"within": math.nan}, "within=nan"),
        ({"within": True}, "within=True"),
        ({"mode": "flat"}, "mode must be 'max' or 'min' for monitor='val_acc'; got mode='flat'"),
        ({"max_files": 1}, "max_files=1 must be a whole number, 2 at least"),
        ({"monitor": ""}, "names of logged metrics"),
        ({"flatness": ["flatness/hessian_trace"]}, "names of logged metrics"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(lf.FlatnessError, match=message):
        lf.FlatCheckpoint(**options)
