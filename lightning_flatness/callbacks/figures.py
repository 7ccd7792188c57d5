"""Give the figures and files of a callback to every logger, or to a folder of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_flatness.callbacks.lightning_imports import Trainer, callbacks_of
from lightning_flatness.callbacks.loggers import Item, interface_of
from lightning_flatness.callbacks.run_folder import claim, claim_version, own_folder
from lightning_flatness.errors import FlatnessError, in_one_line

Figures = Literal["auto", "files", False]


def checked(figures: bool | str, name: str) -> Figures:
    """Check the ``figures`` argument of a callback, and return it. True becomes ``"auto"``.

    Example:
        >>> checked(True, "FlatnessCallback")
        'auto'
    """
    if figures is False:
        return False
    if figures is True or figures == "auto":
        return "auto"
    if figures == "files":
        return "files"
    raise FlatnessError(f"{name}: figures={figures!r} must be 'auto', 'files' or False.")


class RunOutputs:
    """Gives the figures and files of one callback in one fit to the loggers, and writes files to a folder.

    If a logger raises an error, the figure goes to the folder of the run instead, with one warning for every class of
    loggers. If drawing fails, there is one warning in the fit. Only rank zero may add figures and files.

    Args:
        name: name of the callback, for warnings.
        prefix: prefix of the callback's logged keys.
        figures: ``"auto"`` to give figures to loggers, and to write PNG files for loggers that take none; ``"files"``
            for PNG files only; False for no figures.
        folder: folder for the files, or None for a new folder that no other run writes to.
    """

    def __init__(self, name: str, prefix: str, figures: Figures, folder: str | Path | None = None) -> None:
        self._name, self._prefix, self._figures = name, prefix, figures
        self._folder = None if folder is None else Path(folder)
        self._path = prefix  # path of the folder within loggers that store files
        self._told: set[str] = set()  # problems that a warning has named already
        self.has_charts = False  # whether charts were added to TensorBoard's page Custom Scalars
        self.version: Path | None = None  # the run's folder that all callbacks share if no logger has a folder

    def add_figures(
        self,
        trainer: Trainer,
        draw: Callable[[], Mapping[str, Any]],
        record: Mapping[str, Any],
        step: int,
        suffix: str = "",
    ) -> None:
        """Draw figures of a measurement, and give them to the loggers.

        ``draw`` returns a dict from tags to figures. The tags have no prefix. File names begin with the epoch and step
        in ``record``, like the names of Lightning's checkpoints. Then follow ``suffix`` and the tag. ``step`` is the
        step number in the loggers.
        """
        is_trial = getattr(trainer, "fast_dev_run", False) or getattr(trainer, "barebones", False)
        if self._figures is False or is_trial or not trainer.is_global_zero:
            return
        try:
            figures = draw()
        except Exception as error:
            self._tell_once("draw", f"draws no figures: {in_one_line(error)}. Set figures=False to avoid this warning.")
            return
        for tag, figure in figures.items():
            file = f"{_stem(record)}{suffix}-{tag.replace('/', '-')}.png"
            loggers = trainer.loggers if self._figures == "auto" else []
            have_it = [self._add(logger, "figure", figure, self._item(tag, step, file)) for logger in loggers]
            if not all(have_it) or not have_it:
                path = self._saved(trainer, figure, file)
                for logger, has_it in zip(loggers, have_it, strict=True):
                    if path is not None and not has_it:
                        self._add(logger, "file", path, self._item(tag, step, file))

    def add_files(
        self,
        trainer: Trainer,
        write: Callable[[Path], list[Path]],
        record: Mapping[str, Any],
        step: int,
        suffix: str = "",
    ) -> None:
        """Write files of a measurement, and give them to the loggers.

        ``write`` takes the path with which the paths of all its files must begin, and returns the paths of the files
        that it has written. Errors of ``write`` are raised.
        """
        for path in write(self.folder(trainer) / f"{_stem(record)}{suffix}"):
            item = self._item(path.stem, step, path.name)
            for logger in trainer.loggers:
                self._add(logger, "file", path, item)

    def folder(self, trainer: Trainer) -> Path:
        """Return the folder for files. The first call creates it."""
        if self._folder is None:
            parent = own_folder(trainer.loggers)
            if parent is None:
                parent = self.version = _version_of(trainer) or claim_version(
                    Path(trainer.default_root_dir) / "lightning_logs"
                )
            self._folder = claim(parent / self._prefix)
            self._path = self._folder.relative_to(parent).as_posix()
            rank_zero_info(f"{self._name}: figures and files of this run are in {self._folder}")
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def _item(self, tag: str, step: int, file: str) -> Item:
        return Item(f"{self._prefix}/{tag}", step, f"{self._path}/{file}")

    def _add(self, logger: Any, kind: Literal["figure", "file"], value: Any, item: Item) -> bool:
        """Give a figure or file to a logger, and return whether the logger has taken it."""
        try:
            add = getattr(interface_of(logger), f"add_{kind}")
            if add is not None:
                add(logger, value, item)
        except Exception as error:
            self._tell_once(
                type(logger).__name__,
                f"could not give {type(logger).__name__} the {kind} '{item.tag}'. It is in a folder of the run "
                f"instead, and training goes on. The error: {in_one_line(error)}. To give loggers no figures, use "
                "figures='files'.",
            )
            return False
        return add is not None

    def _saved(self, trainer: Trainer, figure: Any, file: str) -> Path | None:
        try:
            path = self.folder(trainer) / file
            figure.savefig(path)
        except Exception as error:
            self._tell_once("save", f"could not write a figure: {in_one_line(error)}. figures=False draws no figures.")
            return None
        return path

    def _tell_once(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            rank_zero_warn(f"{self._name} {message}")


def _stem(record: Mapping[str, Any]) -> str:
    return f"epoch={record['epoch']}-step={record['step']}"


def _version_of(trainer: Trainer) -> Path | None:
    """Return the folder that another callback of the Trainer has created for this run, or None."""
    outputs = [getattr(callback, "run_outputs", None) for callback in callbacks_of(trainer)]
    return next((one.version for one in outputs if isinstance(one, RunOutputs) and one.version), None)
