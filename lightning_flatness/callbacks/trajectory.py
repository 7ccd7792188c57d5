"""The weights of all epochs, and the plane in which they moved most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.functional import PrincipalDirections
from lightning_flatness.model.named_tensors import pca_directions


class Trajectory:
    """Keeps copies of a network's parameters on the CPU, one for every call of :meth:`add`.

    Example:
        >>> path, net = Trajectory(), nn.Linear(2, 1)
        >>> for _ in range(4):
        ...     path.add(net)
        ...     _ = nn.init.normal_(net.weight)
        >>> directions, span = path.plane(net)
        >>> len(directions), path.coordinates.shape
        (2, torch.Size([4, 2]))
    """

    def __init__(self) -> None:
        self._found: PrincipalDirections | None = None
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
        """Whether there are two states beside the last one."""
        return len(self._states) > 2

    @property
    def not_finite(self) -> int | None:
        """The number of the first state, from 0, that has numbers which are not finite."""
        finite = [all(bool(tensor.isfinite().all()) for tensor in state.values()) for state in self._states]
        return None if all(finite) else finite.index(False)

    @property
    def coordinates(self) -> Tensor | None:
        """Of the states in the plane found last, ``(states, 2)``; None before."""
        return None if self._found is None else self._found.coordinates

    def plane(self, network: nn.Module) -> tuple[list[Any], list[list[float]]]:
        """Axes through the network, and the span that holds all states and a quarter more on every side.

        Raises:
            FlatnessError: the states do not span a plane.
        """
        found = pca_directions(network, self._states)
        self._found = found._replace(directions=())  # these are as large as the network
        points = torch.cat([found.coordinates.double(), torch.zeros(1, 2, dtype=torch.float64)])
        low, high = points.min(0).values, points.max(0).values
        margin = 0.25 * (high - low)
        return list(found.directions), torch.stack([low - margin, high + margin], 1).tolist()

    def save(self, path: str) -> None:
        """Write coordinates and explained shares as plain arrays."""
        import numpy as np

        assert self._found is not None
        np.savez(path, coordinates=self._found.coordinates.numpy(), explained=self._found.explained.numpy())
