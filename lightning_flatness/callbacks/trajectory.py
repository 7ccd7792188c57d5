"""Store the weights after every epoch, and find the plane that explains most of their variance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.functional import PrincipalDirections
from lightning_flatness.model.directions import pca_directions
from lightning_flatness.results import TrajectoryResult


class Trajectory:
    """Copies of a network's parameters on the CPU, called states. Every call of :meth:`add` adds a state."""

    def __init__(self) -> None:
        self._principal: PrincipalDirections | None = None
        self.release()

    def release(self) -> None:
        """Delete all states, but keep their coordinates in the latest plane."""
        self._states: list[dict[str, Tensor]] = []

    def add(self, network: nn.Module) -> None:
        """Add a copy of the present parameters."""
        named = network.named_parameters(remove_duplicate=False)
        self._states.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in named})

    @property
    def spans_a_plane(self) -> bool:
        """Whether there are at least three states, so that they can span a plane."""
        return len(self._states) > 2

    @property
    def not_finite(self) -> int | None:
        """Index of the first state with a NaN or infinity, or None if all states are finite."""
        finite = [all(bool(tensor.isfinite().all()) for tensor in state.values()) for state in self._states]
        return None if all(finite) else finite.index(False)

    @property
    def coordinates(self) -> Tensor | None:
        """Coordinates ``(states, 2)`` of the states in the latest plane, or None if no plane was computed yet."""
        return None if self._principal is None else self._principal.coordinates

    def plane(self, network: nn.Module) -> tuple[list[Any], list[list[float]]]:
        """Return the two axes of the plane that fits the states best, and a range of coordinates for each axis.

        The plane goes through the network's present weights, which are its origin. A range goes from the smallest to
        the largest coordinate of all states and the origin, extended by a quarter of its length at both ends.
        """
        principal = pca_directions(network, self._states)
        self._principal = principal._replace(directions=())  # drop the directions, which are as large as the network
        points = torch.cat([principal.coordinates.double(), torch.zeros(1, 2, dtype=torch.float64, device="cpu")])
        low, high = points.min(0).values, points.max(0).values
        margin = 0.25 * (high - low)
        return list(principal.directions), torch.stack([low - margin, high + margin], 1).tolist()

    def save(self, path: str) -> Path:
        """Write the coordinates of all states in the latest plane to an npz file, and return the file's path."""
        assert self._principal is not None
        return TrajectoryResult(self._principal.coordinates, self._principal.explained).save(path)
