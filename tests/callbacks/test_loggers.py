"""Figures and files in W&B (offline) and MLflow, read back from what these have stored."""

import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from PIL import Image

import lightning_flatness as lf
from tests.callbacks.epoch_end_runs import KINDS
from tests.callbacks.lightning_modules import Classifier, loaders, quiet_trainer
from tests.callbacks.loggers_at_hand import wandb_steps
from tests.guarding import guards

MISSING = "needs the extra: pip install 'lightning-flatness[loggers]'"
FILE = "epoch=1-step=8.npz"
PNGS = {"epoch=1-step=8-block_traces-net.conv2.png", "epoch=1-step=8-history.png", "epoch=1-step=8-density.png"}
TAGS = {"flatness/block_traces/net.conv2", "flatness/history", "spectrum/density"}


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    package = pytest.importorskip("wandb", reason=MISSING)
    options = {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}
    folders = {name: str(tmp_path / "wandb_own") for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
    for name, value in {**options, **folders}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    yield package
    package.teardown()


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "true")
    monkeypatch.chdir(tmp_path)
    package = pytest.importorskip("mlflow", reason=MISSING)
    before = package.get_tracking_uri()
    yield package
    package.set_tracking_uri(before)


def fit(folder, *loggers, every=None):
    callbacks = [lf.FlatnessCallback(summary=False, figures_every=every), KINDS["spectrum"]()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(Flatness|Spectrum)Callback could not")
        trainer = quiet_trainer(folder, *callbacks, logger=list(loggers))
        torch.manual_seed(0)
        trainer.fit(Classifier(), *loaders())
    return callbacks


@pytest.mark.slow
def test_wandb(tmp_path, wandb):
    runs = []
    for _ in range(2):
        logger = WandbLogger(save_dir=tmp_path, project="flat")
        fit(tmp_path, logger, every=1)
        runs.append(logger.experiment.dir)
        wandb.finish()
    assert len(set(runs)) == 2
    results = []
    for folder in map(tmp_path.joinpath, runs):
        (stored,) = folder.parent.glob("*.wandb")
        steps, images = wandb_steps(stored)
        assert steps["val_acc"] == steps["flatness/relative_flatness"] == [3, 7]
        assert steps["flatness/history"] == steps["flatness/block_traces/net.conv2"] == [3, 7]
        assert steps["spectrum/density"] == steps["spectrum/trace"] == [7]
        assert set(images) == TAGS
        for names in images.values():
            assert all(min(Image.open(folder / name).size) > 300 for name in names)
        assert not (folder / "spectrum" / FILE).is_symlink()
        results.append(lf.SpectrumResult.load(folder / "spectrum" / FILE))
    assert len(results) == 2
    own = sorted(path.relative_to(tmp_path) for path in (tmp_path / "lightning_logs").rglob("*.*"))
    assert [str(path) for path in own] == [f"lightning_logs/version_{run}/spectrum/{FILE}" for run in (0, 1)]


@pytest.mark.slow
def test_a_wandb_image_draws_no_random_numbers(tmp_path, wandb):
    from matplotlib.figure import Figure

    from lightning_flatness.callbacks.loggers import Item, interface_of

    logger = WandbLogger(save_dir=tmp_path, project="flat")
    assert logger.experiment
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    interface_of(logger).add_figure(logger, Figure(), Item("tag", 0, "tag/figure.png"))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    wandb.finish()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def artifacts(logger, path=""):
    """The paths of all files that a run has."""
    found = logger.experiment.list_artifacts(logger.run_id, path)
    nested = [artifacts(logger, file.path) if file.is_dir else {file.path} for file in found]
    return set().union(*nested)


def mlflow_logger(store, folder):
    if store == "file":
        return MLFlowLogger(save_dir=str(folder / "mlruns"))
    return MLFlowLogger(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_location=str(folder / "artifacts"))


@guards(
    "callbacks.run_folder:own_folder",
    body="return Path(loggers[0].save_dir) if loggers[0].save_dir else None",
    ids="file",
)
@pytest.mark.slow
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow(tmp_path, mlflow, store):
    wanted = {f"{'spectrum' if 'density' in name else 'flatness'}/{name}" for name in PNGS} | {f"spectrum/{FILE}"}
    runs = []
    for _ in range(2):
        logger = mlflow_logger(store, tmp_path)
        fit(tmp_path, logger)
        assert artifacts(logger) == wanted
        local = logger.experiment.download_artifacts(logger.run_id, f"spectrum/{FILE}", str(tmp_path))
        assert lf.SpectrumResult.load(local).num_samples == 32
        history = logger.experiment.get_metric_history(logger.run_id, "flatness/relative_flatness")
        assert [metric.step for metric in history] == [3, 7]
        runs.append(logger.run_id)
    assert len(set(runs)) == 2
    experiments = {one.name for one in logger.experiment.search_experiments()}
    assert experiments == {"Default", "lightning_logs"}
    if store == "file":
        folders = {path.name for path in (tmp_path / "mlruns").iterdir() if not path.name.startswith(".")}
        assert folders <= {"0", "models", logger.experiment_id}
    assert len(list(tmp_path.joinpath("lightning_logs").rglob("*.npz"))) == 2


@pytest.mark.slow
def test_wandb_and_csv(tmp_path, wandb):
    logger = WandbLogger(save_dir=tmp_path, project="flat")
    fit(tmp_path, logger, CSVLogger(tmp_path, name="csv"))
    (stored,) = tmp_path.rglob("*.wandb")
    wandb.finish()
    assert set(wandb_steps(stored)[1]) == TAGS
    run = tmp_path / "csv" / "version_0"
    assert {path.name for path in run.rglob("*.png")} == PNGS
    assert (run / "spectrum" / FILE).exists()
