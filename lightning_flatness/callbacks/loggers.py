"""Describe how each kind of logger takes figures and files.

A logger is recognised by its methods, not by its class.
"""

from __future__ import annotations

import glob
import importlib
import posixpath
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_flatness.callbacks.lightning_imports import Trainer


@dataclass(frozen=True)
class Item:
    """The names under which loggers store a figure or file of one measurement.

    Attributes:
        tag: name of the figure or file, like the key of a logged number.
        step: number of the step, like that of a logged number.
        path: relative path of the file, the same in the folder of the run and in a logger's own store of files.
    """

    tag: str
    step: int
    path: str


Add = Callable[[Any, Any, Item], None]


@dataclass(frozen=True)
class Interface:
    """How to give figures and files to one kind of logger.

    Attributes:
        fits: function that returns whether a logger is of this kind.
        add_figure: function that gives a logger a figure, or None if the logger takes no figures.
        add_file: function that gives a logger the path of a file, or None if the logger takes no files.
    """

    fits: Callable[[Any], bool]
    add_figure: Add | None = None
    add_file: Add | None = None


def interface_of(logger: Any) -> Interface:
    """Return the :class:`Interface` for a logger.

    A logger of an unknown kind takes neither figures nor files.

    Example:
        >>> from types import SimpleNamespace
        >>> interface_of(SimpleNamespace(log_image=print)).add_figure is None
        False
        >>> interface_of(SimpleNamespace(experiment=None)).add_figure is None
        True
    """
    return next((interface for interface in INTERFACES if interface.fits(logger)), Interface(lambda logger: True))


def logged_step(trainer: Trainer) -> int:
    """Return the step number under which Lightning logs scalars now.

    It is the number of batches with an optimizer step, less one. ``trainer.global_step`` would count the steps of
    several optimizers one by one. During validation, Lightning has not counted the latest batch yet, so nothing is
    subtracted.
    """
    # Lightning has no public name for the number of batches.
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return max(0, steps if trainer.evaluating else steps - 1)


def _experiment_has(*names: str) -> Callable[[Any], bool]:
    return lambda logger: all(hasattr(logger.experiment, name) for name in names)


def _add_tensorboard_figure(logger: Any, figure: Any, item: Item) -> None:
    logger.experiment.add_figure(item.tag, figure, global_step=item.step)


def _add_wandb_figure(logger: Any, figure: Any, item: Item) -> None:
    # WandbLogger logs an image like scalars: in a row with the step as "trainer/global_step", the x axis of charts.
    logger.log_image(key=item.tag, images=[_as_image(figure)], step=item.step)


def _add_wandb_file(logger: Any, path: Path, item: Item) -> None:
    # Copy the file into the folder of the W&B run. save() alone would make a link, which breaks if the run is moved.
    folder = Path(logger.experiment.dir)
    (folder / item.path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / item.path)
    logger.experiment.save(str(folder / glob.escape(item.path)), base_path=str(folder), policy="now")


def _add_mlflow_figure(logger: Any, figure: Any, item: Item) -> None:
    logger.experiment.log_figure(logger.run_id, figure, item.path)


def _add_mlflow_file(logger: Any, path: Path, item: Item) -> None:
    logger.experiment.log_artifact(logger.run_id, str(path), posixpath.dirname(item.path))


def _add_comet_figure(logger: Any, figure: Any, item: Item) -> None:
    logger.experiment.log_figure(figure_name=item.tag, figure=figure, step=item.step)


def _add_comet_file(logger: Any, path: Path, item: Item) -> None:
    logger.experiment.log_asset(file_data=str(path), file_name=item.path, step=item.step)


def _is_aim(logger: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "aim" for kind in type(logger.experiment).__mro__)


def _add_aim_figure(logger: Any, figure: Any, item: Item) -> None:
    image = importlib.import_module("aim").Image(image=_as_image(figure), caption=item.tag)
    logger.experiment.track(image, name=item.tag, step=item.step)


def _as_image(figure: Any) -> Any:
    """Return a figure as a PIL image. PIL is installed, because matplotlib depends on it."""
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


# The first interface that fits is used. Interfaces that do not read logger.experiment come first, because reading this
# attribute creates the experiment.
INTERFACES = (
    Interface(lambda logger: hasattr(logger, "log_image"), _add_wandb_figure, _add_wandb_file),
    # LitLogger
    Interface(lambda logger: hasattr(logger, "log_file"), None, lambda logger, path, item: logger.log_file(str(path))),
    Interface(
        lambda logger: hasattr(logger, "run_id") and _experiment_has("log_figure", "log_artifact")(logger),
        _add_mlflow_figure,
        _add_mlflow_file,
    ),
    Interface(_experiment_has("add_figure"), _add_tensorboard_figure),
    Interface(_experiment_has("log_figure", "log_asset"), _add_comet_figure, _add_comet_file),
    Interface(_is_aim, _add_aim_figure),
)
