"""The time that measuring takes is logged, and said once beside that of validation."""

import time
from contextlib import suppress

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_flatness as lf
from lightning_flatness.callbacks import flatness, stopwatch
from lightning_flatness.callbacks.stopwatch import Stopwatch, in_words
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.flatness_runs import flatness_callback
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.guarding import guards

CPU = torch.device("cpu")


def test_blocks_inside_of_others_count_once():
    watch = Stopwatch()
    with watch.running(CPU):
        with watch.running(CPU):
            time.sleep(0.02)
        time.sleep(0.02)
    time.sleep(0.02)
    assert 0.04 <= watch.seconds() < watch.since_start - 0.015


def test_the_rest_is_without_what_other_callbacks_measure():
    earlier, one, other = Stopwatch(), Stopwatch(), Stopwatch()
    earlier.start -= 5
    one.start -= 0.9
    for watch, seconds in ((earlier, 4.0), (one, 0.2), (other, 0.3)):
        watch._elapsed = seconds
    assert one.rest([earlier, one, other]) == pytest.approx(0.4, abs=0.05)
    assert other.rest([earlier, one, other]) < 0  # so short that the clocks overlap


@guards("callbacks/flatness.py", "for one in callbacks_of(trainer)", "for one in [self]")
def test_two_callbacks_are_no_validation_of_each_other(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(Stopwatch, "rest", lambda self, clocks: counted.append(clocks) or 1.0)
    pair = [lf.FlatnessCallback(layers, prefix=layers, summary=False) for layers in ("last", "classifier")]
    quiet_trainer(tmp_path, *pair, max_epochs=1).fit(Classifier(), *loaders())
    assert counted == 2 * [[callback._stopwatch for callback in pair]]


def test_the_time_of_a_block_that_raises_counts():
    watch = Stopwatch()
    with suppress(ValueError), watch.running(CPU):
        time.sleep(0.02)
        raise ValueError
    with watch.running(CPU):
        time.sleep(0.02)
    assert watch.seconds() >= 0.04


@pytest.mark.parametrize(
    ("seconds", "advice"),
    [(1.0, ""), (2.0, ""), (2.1, "max_samples=470 "), (100.0, ""), (40.0, ""), (10.0, "max_samples=100 ")],
    ids=["a tenth", "a fifth", "more", "too much for any number", "too much", "as much"],
)
def test_advice_is_given_where_it_helps(seconds, advice):
    """A thousand samples beside ten seconds. Under a hundred samples, what a measurement begins with takes the time."""
    words = in_words(seconds, 10.0, [1000])
    assert ("max_samples" in words) == bool(advice)
    assert advice in words


@pytest.mark.parametrize(("sizes", "advice"), [([5000, 5000], 500), ([9900, 100], 900), ([100, 9900], 900)], ids=str)
def test_advice_counts_the_samples_of_every_loader(sizes, advice):
    words = in_words(10.0, 10.0, sizes)
    assert words.startswith("measuring 10,000 samples took 10 s")
    assert f"max_samples={advice} would make it +10 %" in words


def test_long_times_are_in_minutes():
    assert in_words(130.0, 1170.0, [10]) == "measuring 10 samples took 2.2 min beside a validation of 20 min (+11 %)"


class Event:
    """Stands for an event of a CUDA device."""

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.0


@guards("callbacks/flatness.py", "if (self._running or self._asked) and", "if", ids="flatness")
@guards(
    "callbacks/base.py",
    "with self._errors.kept(trainer.world_size):  # and no",
    "with self._measuring(trainer, pl_module):  # and no",
    ids="spectrum",
)
@pytest.mark.parametrize("kind", ["flatness", "spectrum"])
def test_no_events_where_nothing_is_measured(tmp_path, monkeypatch, kind):
    events, counts = [], {}
    monkeypatch.setattr(stopwatch, "_event", lambda device: events.append(Event()) or events[-1])

    class Counts(Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            counts[trainer.current_epoch] = -len(events)

        def on_validation_end(self, trainer, pl_module):
            counts[trainer.current_epoch] += len(events)

    make = flatness_callback if kind == "flatness" else KINDS[kind]
    quiet_trainer(tmp_path, make(every_n_epochs=2), Counts(), max_epochs=4).fit(Classifier(), *loaders())
    assert counts[1] == counts[3] == 0
    assert (counts[2] > 0) == (kind == "flatness")


@pytest.mark.parametrize("kind", ["flatness", "spectrum"])
def test_events_do_not_pile_up(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(stopwatch, "_event", lambda device: Event())
    kept = []

    class Counts(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept.append(len(callback._stopwatch._intervals))

    callback = flatness_callback(every_n_epochs=2) if kind == "flatness" else KINDS[kind](every_n_epochs=1)
    quiet_trainer(tmp_path, callback, Counts(), max_epochs=4).fit(Classifier(), *loaders())
    assert kept[1] == kept[3]
    assert kept[3] < 9


def test_seconds_are_in_reports_history_and_logs(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(flatness, "rank_zero_info", said.append)
    callback = lf.FlatnessCallback(summary=False)
    trainer = quiet_trainer(tmp_path, callback, max_epochs=2)
    start = time.perf_counter()
    trainer.fit(Classifier(), *loaders())
    taken = time.perf_counter() - start
    seconds = [record["seconds"] for record in callback.history]
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert sum(seconds) < taken
    assert callback.report.seconds == seconds[-1]
    assert float(trainer.callback_metrics["flatness/seconds"]) == pytest.approx(seconds[-1])
    assert len(said) == 1
    assert said[0].startswith(f"FlatnessCallback: measuring {callback.report.num_samples} samples took ")


def test_the_samples_of_all_loaders_are_said(tmp_path, monkeypatch):
    said, (train, val) = [], loaders()
    monkeypatch.setattr(flatness, "rank_zero_info", said.append)
    quiet_trainer(tmp_path, lf.FlatnessCallback(summary=False), max_epochs=1).fit(Classifier(), train, [val, val])
    assert said[0].startswith("FlatnessCallback: measuring 44 samples took ")


def test_measure_flatness_says_what_it_took():
    report = lf.measure_flatness(Classifier().net, loaders()[1])
    assert 0 < report.seconds < 600
