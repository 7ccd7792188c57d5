"""The callback that computes the loss landscape around a network while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_flatness.callbacks.base import Record
from lightning_flatness.callbacks.data.sources import Samples
from lightning_flatness.callbacks.epoch_end import EpochEndCallback
from lightning_flatness.callbacks.labels import known
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer
from lightning_flatness.callbacks.trajectory import Trajectory
from lightning_flatness.checks import check_positive
from lightning_flatness.errors import FlatnessError, LandscapeError
from lightning_flatness.measure.landscape import landscape_of
from lightning_flatness.measure.landscape_options import KINDS, LandscapeOptions
from lightning_flatness.plots import plot_contour, plot_kept_and_recomputed, plot_line, plot_surface
from lightning_flatness.results import LandscapeResult

Statistics = Literal["kept", "recomputed"]


class LandscapeCallback(EpochEndCallback):
    """A callback that computes the loss on a line or plane through the weights.

    It computes such a loss landscape at the end of a fit and, on request, at the end of epochs. Figures show the losses
    of a line as a curve, and those of a plane as contours and as a surface. Every landscape is written to a file
    that :meth:`LandscapeResult.load <lightning_flatness.LandscapeResult.load>` reads. The file is named
    ``epoch=...-step=...-kept.npz``, or ``-recomputed.npz`` if the statistics of BatchNorm are recomputed. With
    ``axes="trajectory"``, the path of the weights is written to a file that ``TrajectoryResult.load`` reads. Ctrl-C
    ends the computation of a landscape, and the points computed so far are kept.

    Training with this callback is bit-identical to training without it, with few exceptions: ``docs/limits.md``,
    "Random numbers and side effects".

    The origin of a landscape is at the present weights. At the end of the fit, these are the final weights. If a
    callback such as Lightning's ``StochasticWeightAveraging`` or ``WeightAveraging`` puts averages into the network
    when training ends, the final weights are these averages. The order of the callbacks in the list does not matter.

    Args:
        data: ``"train"`` or ``"val"`` for a fixed random subset of the training or validation data, which a separate
            loader reads; or your own ``DataLoader`` or list of batches, of which every rank measures a part. The
            network is in evaluation mode. All samples stay in memory during a measurement.
        max_samples: number of samples over all ranks; by default 512, or all samples of a given loader or list.
            With a loader that has ``batch_size=None``, it is a number of batches.
        every_n_epochs: measure also after the first epoch, and after every n-th epoch from then on; None to measure
            only after the fit.
        axes: kind of the axes: ``"random"``, ``"adam"`` (from the moments of the Trainer's optimizer) or ``"hessian"``.
            One such string gives a plane with two axes of this kind. A list of one string gives a line. A list of
            two strings gives a plane. ``"trajectory"`` gives the plane of the first two principal directions of the
            weights after all epochs, and the figure shows the path of the weights in this plane. For ``"trajectory"``,
            every rank keeps copies of the initial parameters, and of the parameters after every epoch of this fit, in
            CPU memory. Checkpoints do not contain these copies.
        normalize: normalization of the axes. :func:`~lightning_flatness.loss_landscape` explains this argument and the
            following ones up to ``dtype``.
        norm: norm that the normalization uses: 1 for L1, 2 for L2.
        biases: how the axes treat biases, ``"zero"`` or ``"scaled"``.
        update: how the weights of a point are computed from its coordinates, ``"add"`` or ``"adam"``.
        span: range of the coordinates; by default 1. For a trajectory, the default is the range of the trajectory,
            extended by a quarter on every side.
        steps: number of points along every axis.
        frozen: parameters that are the same at all points.
        batch_norm: ``"kept"`` to keep the running statistics of BatchNorm at all points, ``"recomputed"`` to compute
            them at every point, or ``"both"`` for two landscapes, drawn side by side.
        loss: name, module or function of the loss.
        label_smoothing: label smoothing of the cross-entropy.
        class_weight: class weights of the cross-entropy.
        ignore_index: target value that the cross-entropy ignores.
        seed: seed of the random axes.
        dtype: floating-point type of the computation.
        cap: largest loss in figures. Larger losses are drawn as this value.
        prefix: prefix of the figures' tags. Several callbacks in one Trainer need different prefixes.
        model: name of the LightningModule's attribute that is the network, e.g. ``"net"``, or a function that takes the
            LightningModule and returns the network; by default the network that the first validation step calls, or the
            first training step if there is no validation.
        batch_fn: function that takes a batch and returns ``(inputs, targets)``.
        folder: folder for the files; by default a new folder named ``prefix`` in the folder of the run. Loggers that
            store files get the files, too.
        figures: ``"auto"`` to give figures to every logger that takes figures, and to write PNG files for the other
            loggers; ``"files"`` for PNG files only; False for none. See ``docs/loggers.md``.
        figures_every: draw after every n-th measurement, and at the end; None to draw only at the end.
        on_error: ``"raise"``, or ``"warn"`` to go on training after an error.

    Attributes:
        history: one record for every measurement of a fit, saved in checkpoints. A record is a dict with ``epoch`` and
            ``step``. ``loss`` and ``accuracy`` are those at the origin, and ``lowest_loss`` is the lowest of all
            points. ``complete`` is False after Ctrl-C. ``seconds`` is also logged, as ``{prefix}/seconds``. ``data``,
            ``num_samples``, ``loss_name``, ``axes`` and ``batch_norm`` say what was measured.
        results: the latest landscapes, a dict with keys ``"kept"`` and ``"recomputed"`` and values of type
            :class:`~lightning_flatness.LandscapeResult`.

    Raises:
        FlatnessError: An argument is invalid, or the network or data cannot be measured (checked before training).

    Source:
        Li et al. 2018 (arXiv 1712.09913); Gabdullin 2024 (arXiv 2412.10146) for axes, updates and BatchNorm.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LandscapeCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        data: Literal["val", "train"] | Iterable[Any] = "train",
        max_samples: int | None = None,
        every_n_epochs: int | None = None,
        axes: str | list[str] = "random",
        normalize: Literal["none", "weight", "filter", "layer", "model"] | None = None,
        norm: Literal[1, 2] = 2,
        biases: Literal["zero", "scaled"] = "zero",
        update: Literal["add", "adam"] = "add",
        span: float | list[float] | list[list[float]] | None = None,
        steps: int | list[int] = 25,
        frozen: str | list[str] | None = None,
        batch_norm: Literal["kept", "recomputed", "both"] = "kept",
        # Function types come first, since a command line uses the first type that fits.
        loss: Callable[[Tensor, Tensor], Tensor] | nn.Module | str = "cross_entropy",
        label_smoothing: float = 0.0,
        class_weight: list[float] | None = None,
        ignore_index: int = -100,
        seed: int = 0,
        dtype: Literal["float32", "float64"] | None = None,
        cap: float | None = None,
        prefix: str = "landscape",
        model: Callable[[Any], Any] | str | None = None,
        batch_fn: Callable[[Any], tuple[Any, Tensor | None]] | None = None,
        folder: str | None = None,
        figures: bool | Literal["auto", "files"] = "auto",
        figures_every: int | None = 1,
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        shared = (data, max_samples, prefix, model, batch_fn, figures, figures_every, on_error)
        super().__init__("landscape", every_n_epochs, folder, *shared)
        statistics: tuple[Statistics, ...] = ("kept", "recomputed") if batch_norm == "both" else (batch_norm,)
        words = [axes] if isinstance(axes, str) or not isinstance(axes, Sequence) else axes
        if not all(isinstance(word, str) for word in words):
            raise FlatnessError(
                f"LandscapeCallback: {axes=}: the callback takes strings only. To use your own directions, call "
                "loss_landscape()."
            )
        if axes != "trajectory" and not set(words) <= set(KINDS):
            known = ", ".join(map(repr, KINDS))
            raise FlatnessError(
                f"LandscapeCallback: {axes=} must be one of {known}, a list of one or two of these, or 'trajectory'."
            )
        options = LandscapeOptions(
            axes="random" if axes == "trajectory" else axes,  # placeholder: a trajectory's axes are not known yet
            normalize=normalize,
            norm=norm,
            biases=biases,
            update=update,
            span=1.0 if span is None else span,
            steps=steps,
            frozen=frozen or (),
            loss=loss,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            ignore_index=ignore_index,
            seed=seed,
            dtype=dtype,
        )
        check_positive("LandscapeCallback: cap", cap, or_none=True)
        self.cap = cap
        self.results: dict[Statistics, LandscapeResult] = {}
        self._stored: dict[Statistics, LandscapeResult] = {}  # of the measurement in progress
        self._coordinates: Tensor | None = None  # of the trajectory, in the plane of self.results
        self._options = {name: replace(options, batch_norm=name) for name in statistics}
        self._needs_adam = "adam" in words
        self._trajectory = Trajectory() if axes == "trajectory" else None
        self._spans_trajectory = axes == "trajectory" and span is None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history and a new trajectory."""
        self.results, self._stored, self._coordinates = {}, {}, None
        self._trajectory = None if self._trajectory is None else Trajectory()
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute a small landscape on one batch as a trial, and store the initial weights for the trajectory."""
        super().on_train_start(trainer, pl_module)
        self._keep_weights(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the weights for the trajectory, and compute a landscape if one is due."""
        self._keep_weights(pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the data, the model and the stored weights of the trajectory."""
        super().teardown(trainer, pl_module, stage)
        if self._trajectory is not None:
            self._trajectory.release()

    def _keep_weights(self, pl_module: LightningModule) -> None:
        if self._trajectory is not None:
            with self._errors.kept(1):
                self._trajectory.add(self._model_of(pl_module))

    def _is_ready(self, final: bool) -> bool:
        if self._trajectory is None:
            return True
        reason, epochs = None, self._trajectory.not_finite
        if not self._trajectory.spans_a_plane:
            reason = "needs two epochs at least to span a plane"
        elif epochs is not None:
            when = f"after {epochs} epoch{'s' * (epochs > 1)} of this fit" if epochs else "at the start of this fit"
            reason = f"needs finite weights, but the weights {when} are not finite: the training has diverged"
        if reason is not None and final:
            rank_zero_warn(f"LandscapeCallback(axes='trajectory') {reason}; there is no landscape.")
        return reason is None

    def _try(self, trainer: Trainer, network: nn.Module, batches: list[Samples]) -> None:
        if self._needs_adam:
            _adam(trainer, network)
        for options in self._options.values():
            # Compute two points along a random axis, since other axes may not exist before training.
            trial = replace(options, axes=["random"], span=1.0, steps=2, update="add", biases="scaled")
            landscape_of(network, batches, trial, sync=True, progress=False, say=None)

    def _compute(self, trainer: Trainer, network: nn.Module, batches: list[Samples], progress: bool | None) -> Record:
        plane: dict[str, Any] = {}
        if self._trajectory is not None:
            axes, span = self._trajectory.plane(network)
            plane = {"axes": axes, "span": span} if self._spans_trajectory else {"axes": axes}
        optimizer = _adam(trainer, network) if self._needs_adam else None
        say = None if self.results else self._say  # print the expected effort once in a run
        shared: dict[str, Any] = {"optimizer": optimizer, "sync": True, "progress": progress}
        self._stored = {}
        for name, options in self._options.items():
            try:
                options = replace(options, **plane)
                result = landscape_of(network, batches, options, **shared, say=say)
            except LandscapeError as error:
                self._stored[name] = error.result
                raise
            self._stored[name] = result
            if not result.complete:
                break
        first = next(iter(self._stored.values()))
        finite = first.losses[first.finite]
        return {
            "data": self._data_name,
            "num_samples": first.num_samples,
            "loss_name": first.loss,
            "axes": list(first.axes),
            "batch_norm": first.batch_norm,
            "loss": known(first.origin_loss),
            "accuracy": None if first.origin_accuracy is None else known(first.origin_accuracy),
            "lowest_loss": float(finite.min()) if len(finite) else None,
            "complete": not self._is_interrupted,
            "seconds": sum(result.seconds for result in self._stored.values()),
        }

    def _accept(self) -> None:
        self.results = self._stored
        self._coordinates = None if self._trajectory is None else self._trajectory.coordinates

    def _logged(self, record: Record) -> dict[str, float]:
        return {"seconds": record["seconds"]} if "seconds" in record else {}

    @property
    def trajectory(self) -> Tensor | None:
        """Coordinates ``(epochs + 1, 2)`` of the trajectory in the plane of ``results``, or None without a trajectory.

        The first row is for the initial weights, and every other row for the weights after an epoch.
        """
        return self._coordinates

    @property
    def _is_interrupted(self) -> bool:
        return not all(result.complete for result in self._stored.values())

    def _write(self, stem: Path) -> list[Path]:
        paths = [result.save(f"{stem}-{name}.npz") for name, result in self._stored.items()]
        return paths if self._trajectory is None else [*paths, self._trajectory.save(f"{stem}-trajectory.npz")]

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        data = self._data_name
        for name, result in self.results.items():
            tag = name if len(self._options) > 1 else ""
            if len(result.axes) == 1:
                figures[f"line/{tag}".rstrip("/")] = plot_line(result, cap=self.cap, data=data)[0]
                continue
            contour = plot_contour(result, cap=self.cap, trajectory=self.trajectory, data=data)[0]
            figures[f"contour/{tag}".rstrip("/")] = contour
            log = self.cap is None and _spans_tenfold(result)
            figures[f"surface/{tag}".rstrip("/")] = plot_surface(result, cap=self.cap, log=log, data=data)[0]
        if len(self.results) == 2:
            pair = self.results["kept"], self.results["recomputed"]
            figures["batch_norm"] = plot_kept_and_recomputed(*pair, cap=self.cap, data=data)[0]
        return figures


def _spans_tenfold(result: LandscapeResult) -> bool:
    """Return whether the finite losses are positive and differ by more than a factor of ten."""
    finite = result.losses[result.finite]
    return bool(len(finite)) and 0 < 10 * float(finite.min()) < float(finite.max())


def _adam(trainer: Trainer, network: nn.Module) -> list[torch.optim.Optimizer]:
    """Return the Trainer's optimizers that keep Adam's moments for this network; raise an error if none does."""
    own = {id(parameter) for parameter in network.parameters()}
    fitting = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
    ]
    if not fitting:
        names = _names(trainer.optimizers) or "none"
        raise FlatnessError(
            f"LandscapeCallback: axes='adam': no optimizer of the Trainer ({names}) has parameters of this network. "
            "Use axes='random', 'hessian' or 'trajectory', or use model= to name a network that an optimizer trains."
        )
    with_moments = [one for one in fitting if "betas" in one.defaults and not isinstance(one, torch.optim.Adamax)]
    if not with_moments:
        raise FlatnessError(
            f"LandscapeCallback: axes='adam' needs the moments exp_avg and exp_avg_sq, but {_names(fitting)} keeps "
            "none. Train with Adam, AdamW, NAdam or RAdam, or use axes='random', 'hessian' or 'trajectory'."
        )
    return with_moments


def _names(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    return ", ".join(type(optimizer).__name__ for optimizer in optimizers)
