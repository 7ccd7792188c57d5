"""A loss landscape, as a frozen dataclass that can be printed and saved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Tensor

from lightning_flatness.results.records import Record
from lightning_flatness.results.texts import number_of

# Fields that describe how a landscape was computed. A new call can resume it only if all of them agree.
SETTINGS = ("axes", "normalize", "norm", "biases", "update", "batch_norm", "frozen", "loss", "seed", "fingerprint")


@dataclass(frozen=True, repr=False, eq=False)
class LandscapeResult(Record):
    """Mean losses at points ``w + Σ_i α_i d_i`` of a line (one axis) or plane (two axes) through the weights ``w``.

    The axes ``d_i`` are directions in weight space, and ``α_i`` are the coordinates of a point. With ``update="adam"``,
    the points have another formula; see :func:`~lightning_flatness.loss_landscape`.

    Attributes:
        axes: names of the axes, such as ``"random direction 1"``.
        coordinates: values of ``α_i``, float64 ``(n_i,)``, for every axis ``i``.
        losses: mean loss at every point, float64 ``(n_1,)`` or ``(n_1, n_2)``. It may be infinite or NaN, and is NaN at
            points that were not computed.
        accuracies: accuracy at every point, between 0 and 1. None if targets are not class indices. Also None if the
            loss is a function of your own and there are targets outside ``0..K-1``, which it may ignore.
        computed: boolean mask of the points that were computed.
        origin_loss: mean loss at ``w``, with the model's own BatchNorm statistics.
        origin_accuracy: accuracy at ``w``, with the model's own BatchNorm statistics; None if ``accuracies`` is None.
        axis_norms: L2 norm of every ``d_i``, after normalisation.
        cosine: cosine of the angle between the two axes; NaN for a line.
        weight_norm: L2 norm of all parameters that are not in ``frozen``.
        normalize: how the axes were scaled. For example, ``"filter"`` means that every filter of an axis was scaled to
            the norm of the same filter of the weights. If the axes were scaled differently, there are two words, such
            as ``"filter, none"``.
        norm: order of the norm for ``normalize``, 1 or 2.
        biases: treatment of biases in normalised axes, ``"zero"`` or ``"scaled"``.
        update: the formula of the points: ``"add"`` for the formula above, or ``"adam"``.
        batch_norm: BatchNorm statistics at the points: ``"kept"`` if they are the model's own, ``"recomputed"`` if they
            were computed anew at every point.
        frozen: names or patterns of the parameters that are the same at all points.
        loss: name of the loss.
        num_samples: number of samples in one pass over the data.
        seed: seed of random axes.
        fingerprint: hash of weights, buffers, axes, Adam's ``ε`` and, if BatchNorm statistics were recomputed, batch
            sizes. Only a new call with the same hash can resume the landscape.
        seconds: wall time, summed over all calls if the landscape was resumed; NaN if not known, as in files of earlier
            versions.

    The fields from ``normalize`` to ``loss``, and ``seed``, state the arguments of
    :func:`~lightning_flatness.loss_landscape` with these names.

    Example:
        >>> import tempfile, torch
        >>> from lightning_flatness import loss_landscape
        >>> batch = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
        >>> result = loss_landscape(torch.nn.Linear(2, 3), [batch], steps=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = LandscapeResult.load(result.save(f"{folder}/plane.npz"))
        >>> loaded.losses.shape, bool((loaded.losses == result.losses).all())
        (torch.Size([3, 3]), True)
    """

    _short: ClassVar[tuple[str, ...]] = ("coordinates", "losses", "accuracies")

    axes: tuple[str, ...]
    coordinates: tuple[Tensor, ...]
    losses: Tensor
    accuracies: Tensor | None
    computed: Tensor
    origin_loss: float
    origin_accuracy: float | None
    axis_norms: tuple[float, ...]
    cosine: float
    weight_norm: float
    normalize: str
    norm: int
    biases: str
    update: str
    batch_norm: str
    frozen: tuple[str, ...]
    loss: str
    num_samples: int
    seed: int
    fingerprint: str
    seconds: float = math.nan

    @property
    def complete(self) -> bool:
        """Whether every point was computed."""
        return bool(self.computed.all())

    @property
    def finite(self) -> Tensor:
        """Boolean mask of the points with a finite loss."""
        return self.losses.isfinite()

    @property
    def lowest_loss(self) -> float:
        """The lowest finite loss of all points; NaN if no loss is finite."""
        return float(self.losses[self.finite].min()) if bool(self.finite.any()) else math.nan

    def table(self) -> Table:
        """Return a ``rich`` table of the numbers and settings of the landscape."""
        title, *lines = self._lines()
        table = Table(title=title, show_header=False)
        for line in lines:
            table.add_row(line)
        return table

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        """Return the title, numbers and settings of the landscape as lines of text."""
        kept = " (with its own BatchNorm statistics)" if self.batch_norm == "recomputed" else ""
        lines = [
            f"Loss landscape, {self._shape} points along {' and '.join(self.axes)}, "
            f"{number_of(self.num_samples, 'sample')}",
            f"loss of the model {self.origin_loss:.6g}{kept}, lowest {self.lowest_loss:.6g}",
            f"normalisation {self.normalize} (L{self.norm}), update {self.update}, "
            f"BatchNorm statistics {self.batch_norm}",
        ]
        if len(self.axes) == 2:
            lines.append(f"cosine between the axes {self.cosine:.3g}")
        if missing := int((~self.computed).sum()):
            lines.append(f"{number_of(missing, 'point')} not computed")
        if not_finite := int((self.computed & ~self.finite).sum()):
            lines.append(f"{number_of(not_finite, 'point')} not finite")
        return lines

    @property
    def _shape(self) -> str:
        """The numbers of points along the axes, such as ``"25 x 25"``."""
        return " x ".join(str(len(axis)) for axis in self.coordinates)

    def _line(self) -> str:
        points, samples = f"{self._shape} points along {' and '.join(self.axes)}", number_of(self.num_samples, "sample")
        part = "" if self.complete else "not complete, "
        return f"{points}, {samples}, {part}loss {self.origin_loss:.4g}, lowest {self.lowest_loss:.4g}"

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for every point, with its coordinates, its loss and its accuracy."""
        grids = [grid.flatten().tolist() for grid in torch.meshgrid(*self.coordinates, indexing="ij")]
        columns = {f"coordinate_{index}": grid for index, grid in enumerate(grids)}
        columns |= {"loss": self.losses.flatten().tolist(), "computed": self.computed.flatten().tolist()}
        if self.accuracies is not None:
            columns["accuracy"] = self.accuracies.flatten().tolist()
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
