"""The weights of all epochs, and the plane that contains most of their path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.functional import PrincipalDirections
from lightning_flatness.model.directions import pca_directions


class Trajectory:
    """Copies of a network's parameters on the CPU, one for every call of :meth:`add`."""

    def __init__(self) -> None:
        self._principal: PrincipalDirections | None = None
        self.release()

    def release(self) -> None:
        """Drop all copies; the coordinates found last remain."""
        self._states: list[dict[str, Tensor]] = []

    def add(self, network: nn.Module) -> None:
        """Copy the parameters as they are now."""
        named = network.named_parameters(remove_duplicate=False)
        self._states.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in named})

    @property
    def spans_a_plane(self) -> bool:
        """Whether there are at least three states."""
        return len(self._states) > 2

    @property
    def not_finite(self) -> int | None:
        """Index of the first state that is not finite; None if all are."""
        finite = [all(bool(tensor.isfinite().all()) for tensor in state.values()) for state in self._states]
        return None if all(finite) else finite.index(False)

    @property
    def coordinates(self) -> Tensor | None:
        """Coordinates of the states in the plane found last, ``(states, 2)``; None before the first."""
        return None if self._principal is None else self._principal.coordinates

    def plane(self, network: nn.Module) -> tuple[list[Any], list[list[float]]]:
        """Return axes through the network's weights, and a span of all states and a quarter more around."""
        principal = pca_directions(network, self._states)
        self._principal = principal._replace(directions=())  # they are as large as the network
        points = torch.cat([principal.coordinates.double(), torch.zeros(1, 2, dtype=torch.float64, device="cpu")])
        low, high = points.min(0).values, points.max(0).values
        margin = 0.25 * (high - low)
        return list(principal.directions), torch.stack([low - margin, high + margin], 1).tolist()

    def save(self, path: str) -> None:
        """Write coordinates and explained shares of the variance to an npz file."""
        import numpy as np

        assert self._principal is not None
        np.savez(path, coordinates=self._principal.coordinates.numpy(), explained=self._principal.explained.numpy())
