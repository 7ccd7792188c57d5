"""What a landscape measurement returns: a frozen record, its text and its file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_flatness.results.files import read, write

# Fields that say how a landscape was computed. A computation can be resumed only if all of them agree.
SETTINGS = ("axes", "normalize", "norm", "biases", "update", "batch_norm", "frozen", "loss", "seed", "fingerprint")
TENSORS = ("coordinates", "losses", "accuracies", "computed")


@dataclass(frozen=True)
class LandscapeResult:
    """Mean losses at points ``w + Σ_i α_i d_i`` of a line (one axis) or plane (two axes) through the weights ``w``.

    Attributes:
        axes: name of every axis.
        coordinates: ``α_i``, float64 ``(n_i,)`` for every axis.
        losses: float64 ``(n_1,)`` or ``(n_1, n_2)``, infinite or NaN where the loss is, and NaN where not ``computed``.
        accuracies: of the same shape, between 0 and 1; None if targets are not class indices.
        computed: boolean, of the same shape: which points were computed.
        origin_loss: loss at ``w``, with the BatchNorm statistics of the model.
        origin_accuracy: accuracy there; None if targets are not class indices.
        axis_norms: L2 norm of every ``d_i``, after normalisation.
        cosine: of the angle between the two axes; NaN for a line.
        weight_norm: L2 norm of the parameters that are not frozen.
        normalize: what the directions were normalised by: ``"none"``, ``"weight"``, ``"filter"``, ``"layer"`` or
            ``"model"``.
        norm: order of that norm, 1 or 2.
        biases: how biases move in normalised directions, ``"zero"`` or ``"scaled"``.
        update: ``"add"``; or ``"adam"`` for points ``w + α_1 m / (sqrt(α_2 v) + ε)``.
        batch_norm: BatchNorm statistics, those of the model (``"kept"``) or of every point (``"recomputed"``).
        frozen: patterns of the names of parameters that do not move.
        loss: name of the loss.
        num_samples: number of samples, without ignored ones.
        seed: of random axes.
        fingerprint: of weights, buffers and axes; only a landscape with the same one can be resumed.

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

    @property
    def complete(self) -> bool:
        """Whether every point was computed."""
        return bool(self.computed.all())

    @property
    def finite(self) -> Tensor:
        """Boolean mask of the points with a finite loss."""
        return self.losses.isfinite()

    def save(self, path: str | Path) -> Path:
        """Write a compressed ``.npz`` file of plain arrays and text, without pickle; :meth:`load` reads it.

        Returns:
            The path.

        Raises:
            FlatnessError: the path does not end with ``.npz``.
        """
        record = {name: value for name, value in vars(self).items() if name not in TENSORS}
        tensors = {name: getattr(self, name) for name in TENSORS if isinstance(getattr(self, name), Tensor)}
        tensors |= {f"coordinates_{index}": axis for index, axis in enumerate(self.coordinates)}
        return write(path, LandscapeResult, record, tensors)

    @classmethod
    def load(cls, path: str | Path) -> LandscapeResult:
        """Read a file that :meth:`save` has written.

        Raises:
            FlatnessError: the file is broken or holds something else.
            OSError: there is no such file, or it cannot be opened.
        """
        return read(path, cls, _fields)

    def __str__(self) -> str:
        shape = " x ".join(str(len(axis)) for axis in self.coordinates)
        lowest = self.losses[self.finite].min() if bool(self.finite.any()) else math.nan
        kept = " (with its own BatchNorm statistics)" if self.batch_norm == "recomputed" else ""
        lines = [
            f"Loss landscape, {shape} points along {' and '.join(self.axes)}, {self.num_samples} samples",
            f"loss of the model {self.origin_loss:.6g}{kept}, lowest {float(lowest):.6g}",
            f"normalisation {self.normalize} (L{self.norm}), update {self.update}, "
            f"BatchNorm statistics {self.batch_norm}",
        ]
        if len(self.axes) == 2:
            lines.append(f"cosine between the axes {self.cosine:.3g}")
        if missing := int((~self.computed).sum()):
            lines.append(f"{missing} points not computed")
        if not_finite := int((self.computed & ~self.finite).sum()):
            lines.append(f"{not_finite} points not finite")
        return "\n".join(lines)


def _fields(record: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    record |= {name: tuple(record[name]) for name in ("axes", "axis_norms", "frozen")}
    coordinates = tuple(tensors.pop(f"coordinates_{index}") for index in range(len(record["axes"])))
    return {"coordinates": coordinates, "accuracies": None, **tensors, **record}
