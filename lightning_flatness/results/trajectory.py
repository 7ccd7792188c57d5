"""The path of the weights during training, projected on a plane, as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rich.table import Table
from torch import Tensor

from lightning_flatness.results.records import Record
from lightning_flatness.results.texts import number_of


@dataclass(frozen=True, repr=False, eq=False)
class TrajectoryResult(Record):
    """The weights before training and after every epoch, called states, as points in a plane.

    The origin of the plane is at the weights that the network had when the plane was computed. The plane is spanned by
    the two principal directions of the states' differences from the origin.
    ``plot_contour(landscape, trajectory=trajectory.coordinates)`` draws the points into a landscape of this plane.

    Attributes:
        coordinates: coordinates of each state in the plane, float64 ``(states, 2)``.
        explained: for each axis, the share of the states' squared distances from the origin that lies along this axis,
            float64 ``(2,)``.

    Example:
        >>> import tempfile, torch
        >>> way = TrajectoryResult(torch.tensor([[3.0, 1.0], [1.0, 0.5], [0.0, 0.0]]), torch.tensor([0.8, 0.1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TrajectoryResult.load(way.save(f"{folder}/way.npz"))
        TrajectoryResult(3 states; the two axes explain 80 % and 10 % of their squared distances from the origin)
    """

    _short: ClassVar[tuple[str, ...]] = ("coordinates", "explained")
    _unlabelled: ClassVar[frozenset[str]] = frozenset(("coordinates", "explained"))

    coordinates: Tensor
    explained: Tensor

    def table(self) -> Table:
        """Return a ``rich`` table of the coordinates."""
        shares = [f"axis {index} ({100 * share:.0f} %)" for index, share in enumerate(self.explained.tolist(), start=1)]
        table = Table("state", *shares, title=f"Trajectory of {number_of(len(self.coordinates), 'state')}")
        for index, state in enumerate(self.coordinates.tolist()):
            table.add_row(str(index), *(f"{coordinate:.4g}" for coordinate in state))
        return table

    def _line(self) -> str:
        shares = " and ".join(f"{100 * share:.0f} %" for share in self.explained.tolist())
        states = number_of(len(self.coordinates), "state")
        return f"{states}; the two axes explain {shares} of their squared distances from the origin"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"state": index, **{f"coordinate_{axis}": value for axis, value in enumerate(state)}}
            for index, state in enumerate(self.coordinates.tolist())
        ]
