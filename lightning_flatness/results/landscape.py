"""What a landscape gives back: losses at the points of a line or plane through the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_flatness.results.files import read, write

# What says how a landscape was made; two that agree in these are two parts of one.
SETTINGS = ("axes", "normalize", "norm", "biases", "update", "batch_norm", "frozen", "loss", "seed", "fingerprint")
TENSORS = ("coordinates", "losses", "accuracies", "computed")


@dataclass(frozen=True)
class LandscapeResult:
    """Losses on a line (one axis) or plane (two axes) through the weights ``w``: at ``w + Σ_i α_i d_i``.

    Attributes:
        axes: a name for every axis.
        coordinates: float64 ``(n_i,)`` for every axis, ``α_i``.
        losses: float64 ``(n_1,)`` or ``(n_1, n_2)``, mean over samples as it was computed: infinite or NaN where it is;
            NaN, too, where ``computed`` is not.
        accuracies: likewise, between 0 and 1; None if targets are not class indices.
        computed: which points were.
        origin_loss: at ``w``, with the BatchNorm statistics that the model has.
        origin_accuracy: likewise; None without class indices.
        axis_norms: L2 norm of every ``d_i``, after normalisation.
        cosine: between the two axes; NaN for a line.
        weight_norm: L2 norm of the parameters that are not frozen.
        normalize: unit of the normalisation.
        norm: 1 or 2, order of its norm.
        biases: what became of biases in it.
        update: ``"add"``, or ``"adam"``: at ``w + α_1 m / (sqrt(α_2 v) + ε)``.
        batch_norm: ``"kept"`` or ``"recomputed"`` statistics.
        frozen: patterns of parameters that do not move.
        loss: its name.
        num_samples: that count.
        seed: of random axes.
        fingerprint: of weights, buffers and axes; a landscape is resumed only where it is the same.
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
        """Which points have a finite loss."""
        return self.losses.isfinite()

    def save(self, path: str | Path) -> Path:
        """Write a file ``.npz`` of plain arrays, to be read with :meth:`load` or with ``numpy.load``.

        Raises:
            FlatnessError: the name ends with something else.

        Example:
            >>> import tempfile, torch
            >>> from lightning_flatness import loss_landscape
            >>> batch = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
            >>> result = loss_landscape(torch.nn.Linear(2, 3), [batch], steps=3)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     found = LandscapeResult.load(result.save(f"{folder}/plane.npz"))
            >>> bool((found.losses == result.losses).all())
            True
        """
        record = {name: value for name, value in vars(self).items() if name not in TENSORS}
        tensors = {name: getattr(self, name) for name in TENSORS if isinstance(getattr(self, name), Tensor)}
        tensors |= {f"coordinates_{index}": axis for index, axis in enumerate(self.coordinates)}
        return write(path, LandscapeResult, record, tensors)

    @classmethod
    def load(cls, path: str | Path) -> LandscapeResult:
        """What :meth:`save` wrote.

        Raises:
            FlatnessError: something else is in the file, or it is broken.
        """
        return read(path, cls, _fields)

    def __str__(self) -> str:
        shape = " x ".join(str(len(axis)) for axis in self.coordinates)
        lowest = self.losses[self.finite].min() if bool(self.finite.any()) else math.nan
        kept = " (with the statistics that it has)" if self.batch_norm == "recomputed" else ""
        lines = [
            f"Loss landscape, {shape} points along {' and '.join(self.axes)}, {self.num_samples} samples",
            f"loss of the model {self.origin_loss:.6g}{kept}, lowest {float(lowest):.6g}",
            f"normalisation {self.normalize} (L{self.norm}), update {self.update}, "
            f"BatchNorm statistics {self.batch_norm}",
        ]
        if len(self.axes) == 2:
            lines.append(f"cosine between the axes {self.cosine:.3g}")
        missing, odd = int((~self.computed).sum()), int((self.computed & ~self.finite).sum())
        lines += [f"{missing} points not computed"] * bool(missing) + [f"{odd} points not finite"] * bool(odd)
        return "\n".join(lines)


def _fields(record: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    record |= {name: tuple(record[name]) for name in ("axes", "axis_norms", "frozen")}
    coordinates = tuple(tensors.pop(f"coordinates_{index}") for index in range(len(record["axes"])))
    return {"coordinates": coordinates, "accuracies": None, **tensors, **record}
