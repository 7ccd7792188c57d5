"""Figures and files with loggers that are not installed, with none, and with failing ones; folders of runs."""

import gc
import sys
import warnings
import weakref

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

import lightning_flatness as lf
from lightning_flatness.callbacks import flatness_figures
from lightning_flatness.callbacks import spectrum as drawn
from lightning_flatness.callbacks.figures import RunOutputs
from tests.callbacks.command_lines import trainer_of
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.callbacks.loggers_at_hand import Broken, CometExperiment, FakeLogger, LitLoggerFake, aim_experiment
from tests.callbacks.tensorboard_events import events
from tests.guarding import guards

TAGS = ["flatness/block_traces/net.conv2", "flatness/history"]
PNGS = ["epoch=1-step=8-block_traces-net.conv2.png", "epoch=1-step=8-history.png"]


@pytest.fixture(autouse=True)
def plain_figures(request, monkeypatch):
    """Small figures in place of the real ones, which take half a second each; not for tests of ``real_figures``."""
    from matplotlib.figure import Figure

    def plain(*arguments, **options):
        return Figure(figsize=(4, 4)), None

    if "real_figures" not in request.fixturenames:
        for module, kind in ((flatness_figures, "history"), (flatness_figures, "block_traces"), (drawn, "density")):
            monkeypatch.setattr(module, f"plot_{kind}", plain)
        monkeypatch.setattr(drawn, "plot_eigenvalues", plain)


@pytest.fixture
def real_figures():
    pass


def fit(folder, *callbacks, **options):
    trainer = quiet_trainer(folder, *callbacks, figures="auto", **options)
    trainer.fit(Classifier(), *loaders())
    return trainer


def flatness(**options):
    return lf.FlatnessCallback(summary=False, **options)


def spectrum(**options):
    return KINDS["spectrum"](**options)


def names(folder, pattern="*.*"):
    return sorted(path.name for path in folder.glob(pattern))


# ------------------------------------------------------------------------------------------------- folders of the run


def test_without_a_logger_figures_and_files_are_in_a_folder_of_the_run(tmp_path):
    fit(tmp_path, flatness(), spectrum(), logger=False)
    run = tmp_path / "lightning_logs" / "version_0"
    assert names(run / "flatness") == PNGS
    assert names(run / "spectrum") == ["epoch=1-step=8-density.png", "epoch=1-step=8.npz"]
    assert lf.SpectrumResult.load(run / "spectrum" / "epoch=1-step=8.npz").num_samples == 32
    for path in run.rglob("*.png"):
        assert min(Image.open(path).size) > 300
    assert names(tmp_path, "*") == ["lightning_logs"]


@guards(
    "callbacks.run_folder:claim_version",
    body="(parent / 'version_0').mkdir(exist_ok=True, parents=True); return parent / 'version_0'",
)
@guards("callbacks.run_folder:claim", body="folder.mkdir(exist_ok=True, parents=True); return folder")
@pytest.mark.parametrize("again", ["a new Trainer", "the same Trainer", "the same CSVLogger"])
def test_a_second_run_overwrites_nothing(tmp_path, again):
    logger = CSVLogger(tmp_path) if again == "the same CSVLogger" else False
    trainer = fit(tmp_path, spectrum(), logger=logger)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    if again == "the same Trainer":
        trainer.fit_loop.max_epochs += 1
        trainer.fit(trainer.lightning_module, *loaders())
    else:
        fit(tmp_path, spectrum(), logger=logger)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    assert len(files) == 2 * len(first) == 2
    assert first.items() <= files.items()
    pngs = [path.parent for path in tmp_path.rglob("*density.png")]
    assert sorted(pngs) == sorted(path.parent for path in files)
    assert len({folder.parent for folder in pngs}) == (1 if logger else 2)  # a version for every run


def test_csv_has_them_in_the_folder_of_its_version(tmp_path):
    fit(tmp_path, flatness(), spectrum(), logger=CSVLogger(tmp_path, name="logs"))
    run = tmp_path / "logs" / "version_0"
    assert names(run / "flatness") == PNGS
    assert names(run / "spectrum") == ["epoch=1-step=8-density.png", "epoch=1-step=8.npz"]
    assert (run / "metrics.csv").exists()


def test_tensorboard_has_figures_and_a_folder_for_files(tmp_path):
    fit(tmp_path, flatness(), spectrum(), logger=TensorBoardLogger(tmp_path, name=""))
    assert set(TAGS) < set(events(tmp_path).Tags()["images"])
    assert not list(tmp_path.rglob("*.png"))
    assert [path.parent.parent.name for path in tmp_path.rglob("*.npz")] == ["version_0"]


def test_two_loggers_have_both(tmp_path):
    comet = FakeLogger(CometExperiment())
    loggers = [comet, TensorBoardLogger(tmp_path, name=""), CSVLogger(tmp_path / "csv")]
    fit(tmp_path, flatness(), logger=loggers)
    assert sorted(events(tmp_path).Tags()["images"]) == TAGS
    assert sorted(comet.experiment.figures) == [(tag, 7) for tag in TAGS]
    assert names(tmp_path / "version_0" / "flatness") == PNGS  # of the first logger with a folder


def test_files_alone(tmp_path):
    comet = FakeLogger(CometExperiment())
    fit(tmp_path, flatness(figures="files"), logger=[comet, TensorBoardLogger(tmp_path, name="")])
    assert names(tmp_path / "version_0" / "flatness") == PNGS
    assert events(tmp_path).Tags()["images"] == comet.experiment.figures == []


def test_no_figures(tmp_path):
    fit(tmp_path, flatness(figures=False), logger=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["fast_dev_run", "barebones"])
def test_trial_runs_write_nothing(tmp_path, option):
    fit(tmp_path, flatness(), logger=None if option == "barebones" else False, **{option: True})
    assert not list(tmp_path.iterdir())


def test_a_given_folder_is_taken(tmp_path):
    fit(tmp_path, spectrum(folder=str(tmp_path / "here")), logger=False)
    assert names(tmp_path / "here") == ["epoch=1-step=8-density.png", "epoch=1-step=8.npz"]


# ---------------------------------------------------------------------------------------------------- during training


def test_every_second_measurement_is_drawn(tmp_path):
    fit(tmp_path, flatness(figures_every=2), logger=TensorBoardLogger(tmp_path, name=""), max_epochs=5)
    seen = events(tmp_path)
    scalars = [event.step for event in seen.Scalars("flatness/relative_flatness")]
    for tag in TAGS:
        assert [image.step for image in seen.Images(tag)] == [scalars[1], scalars[3], scalars[4]]


def test_the_last_measurement_is_drawn_once(tmp_path):
    fit(tmp_path, flatness(figures_every=1), logger=TensorBoardLogger(tmp_path, name=""), val_check_interval=0.5)
    seen = events(tmp_path)
    steps = [image.step for image in seen.Images("flatness/history")]
    assert steps == [event.step for event in seen.Scalars("flatness/relative_flatness")] == [1, 3, 5, 7]


class TwoOptimizers(Classifier):
    """Its optimizers both step in every batch, so Lightning counts every batch twice in ``global_step``."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net.conv1, self.net.conv2)]


@guards(
    "callbacks/loggers.py",
    "steps if trainer.evaluating else steps - 1",
    "trainer.global_step - 1",
    ids="TwoOptimizers-options0-steps0",
)
@pytest.mark.parametrize(
    ("module", "options", "steps"),
    [
        (TwoOptimizers, {}, [3, 7]),
        (Classifier, {"accumulate_grad_batches": 2, "val_check_interval": 3}, [1, 3]),
    ],
)
def test_figures_have_the_steps_of_the_scalars(tmp_path, module, options, steps):
    logger = TensorBoardLogger(tmp_path, name="")
    trainer = quiet_trainer(tmp_path, flatness(figures_every=1), spectrum(), figures="auto", logger=logger, **options)
    trainer.fit(module(), *loaders())
    seen = events(tmp_path)
    drawn = [image.step for image in seen.Images("flatness/history")]
    assert drawn == [event.step for event in seen.Scalars("flatness/relative_flatness")] == steps
    last = steps[-1]
    assert [event.step for event in seen.Scalars("spectrum/trace")] == [last]
    assert [image.step for image in seen.Images("spectrum/density")] == [last]


@pytest.mark.parametrize(("every", "steps"), [(None, [11]), (1, [3, 7, 11]), (2, [7, 11])])
def test_figures_of_spectra(tmp_path, every, steps):
    callback = spectrum(every_n_epochs=1, figures_every=every)
    fit(tmp_path, callback, logger=TensorBoardLogger(tmp_path, name=""), max_epochs=3)
    seen = events(tmp_path)
    assert [image.step for image in seen.Images("spectrum/density")] == steps
    assert [image.step for image in seen.Images("spectrum/eigenvalues")] == [step for step in steps if step > 3]


def test_figures_are_not_kept_in_memory(tmp_path, monkeypatch):
    figures = []
    plot = flatness_figures.plot_history

    def remembered(*given, **options):
        figure, axes = plot(*given, **options)
        figures.append(weakref.ref(figure))
        return figure, axes

    monkeypatch.setattr(flatness_figures, "plot_history", remembered)
    loggers = [FakeLogger(CometExperiment()), TensorBoardLogger(tmp_path, name="")]
    fit(tmp_path, flatness(figures_every=1), logger=loggers, max_epochs=3)
    gc.collect()
    assert [figure() for figure in figures] == [None] * 3
    from matplotlib import pyplot

    assert not pyplot.get_fignums()


# -------------------------------------------------------------------------------------------------------------- fakes


def test_comet(tmp_path):
    comet = FakeLogger(CometExperiment())
    fit(tmp_path, flatness(), spectrum(), logger=comet)
    assert set(comet.experiment.figures) == {(tag, 7) for tag in [*TAGS, "spectrum/density"]}
    assert comet.experiment.assets == [("spectrum/epoch=1-step=8.npz", 7)]
    assert comet.steps["flatness/relative_flatness"] == [3, 7]
    assert not list(tmp_path.rglob("*.png"))


def test_files_in_a_logger_are_named_like_the_folder_of_the_run(tmp_path, monkeypatch):
    comet = FakeLogger(CometExperiment())
    monkeypatch.setattr(CometExperiment, "log_figure", lambda *_, **options: 1 / 0)
    (tmp_path / "lightning_logs" / "version_0" / "flatness").mkdir(parents=True)
    with pytest.warns(UserWarning, match="could not give FakeLogger the figure"):
        fit(tmp_path, flatness(), logger=[CSVLogger(tmp_path, version=0), comet])
    assert comet.experiment.assets == [(f"flatness-v1/{name}", 7) for name in reversed(PNGS)]


def test_aim(tmp_path, monkeypatch):
    aim = FakeLogger(aim_experiment(monkeypatch))
    fit(tmp_path, flatness(), spectrum(), logger=aim)
    tracked = {(kind, name, step) for kind, name, step, _ in aim.experiment.tracked}
    assert tracked == {("Image", tag, 7) for tag in [*TAGS, "spectrum/density"]}
    assert all(min(size) > 300 for *_, size in aim.experiment.tracked)
    assert [path.name for path in tmp_path.rglob("*.npz")] == ["epoch=1-step=8.npz"]


def test_litlogger(tmp_path):
    logger = LitLoggerFake(tmp_path / "run")
    fit(tmp_path, flatness(), spectrum(), logger=logger)
    folder = tmp_path / "run" / "flatness"
    assert {str(folder / name) for name in PNGS} < set(logger.files)
    assert str(tmp_path / "run" / "spectrum" / "epoch=1-step=8.npz") in logger.files
    assert len(logger.files) == 4


def test_an_unknown_logger(tmp_path):
    fit(tmp_path, flatness(), logger=FakeLogger())
    assert names(tmp_path / "lightning_logs" / "version_0" / "flatness") == PNGS


# ----------------------------------------------------------------------------------------------------------- failures


@guards(
    "callbacks/figures.py",
    "except Exception as error:\n            self._tell_once(\n",
    "except ZeroDivisionError as error:\n            self._tell_once(\n",
)
def test_a_logger_that_fails_is_warned_of_once(tmp_path):
    broken = Broken()
    with pytest.warns(UserWarning, match="Broken") as caught:
        fit(tmp_path, flatness(figures_every=1), logger=[broken, TensorBoardLogger(tmp_path, name="")])
    told = [str(one.message) for one in caught if "Broken" in str(one.message)]
    assert len(told) == 1
    assert "could not give Broken the figure 'flatness/history'" in told[0]
    assert "ConnectionError: no answer" in told[0]
    assert "figures='files'" in told[0]
    assert broken.calls == 4
    assert sorted(events(tmp_path).Tags()["images"]) == TAGS
    assert len(names(tmp_path / "version_0" / "flatness")) == 4


def test_a_figure_that_cannot_be_drawn(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("something of matplotlib's")

    monkeypatch.setattr(flatness_figures, "plot_history", fails)
    with pytest.warns(UserWarning, match="draws no figures: RuntimeError: something of matplotlib's"):
        trainer = fit(tmp_path, flatness(), logger=False)
    assert trainer.current_epoch == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "lightning_logs").touch()
    with pytest.warns(UserWarning, match="FlatnessCallback could not write a figure: .*figures=False"):
        fit(tmp_path, flatness(), logger=False)


@pytest.mark.usefixtures("real_figures")
def test_without_matplotlib_there_are_files_and_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, spectrum(every_n_epochs=1), logger=False)
    told = [str(one.message) for one in caught if "matplotlib" in str(one.message)]
    assert len(told) == 1
    assert "pip install matplotlib" in told[0]
    assert len(list(tmp_path.rglob("*.npz"))) == 2


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("value", [True, False, "auto", "files"])
@pytest.mark.parametrize("make", [flatness, spectrum, KINDS["landscape"]], ids=["flatness", "spectrum", "landscape"])
def test_values_of_the_argument(make, value):
    assert make(figures=value).figures == ("auto" if value is True else value)


@pytest.mark.parametrize("options", [{"figures": "png"}, {"figures": None}, {"figures_every": 0}], ids=str)
def test_wrong_values_are_refused(options):
    with pytest.raises(lf.FlatnessError, match=next(iter(options))):
        flatness(**options)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["auto", "files", True, False])
def test_command_line(tmp_path, value):
    callback = trainer_of(tmp_path, {"FlatnessCallback": {"figures": value, "figures_every": 1}}).callbacks[0]
    assert callback.figures == ("auto" if value is True else value)
    assert isinstance(callback.run_outputs, RunOutputs)
