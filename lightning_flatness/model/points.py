"""Run a copy of a model at other points in weight space."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional import Direction, adam_step
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.logits import any_logits_of
from lightning_flatness.model.named_tensors import NamedTensors

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

State = dict[Tensor, Tensor]  # tensors of the user's model -> their values at several points, (points, ...)


class Points:
    """Runs a copy of a model at points ``w + Σ_i α_i d_i``, where the axes ``d_i`` are directions in weight space.

    Use it within :func:`isolated`. The methods compute several points at once. Tensors that are in no axis keep their
    values. If Adam's ``epsilons`` are given, keyed by parameter name, the two axes must be Adam's moments ``m`` and
    ``v``. The points are then ``w + α_1 m / (sqrt(α_2 v) + ε)``. With one coordinate, ``α_2`` is 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: NamedTensors,
        axes: Sequence[Direction],
        epsilons: Mapping[str, float] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._copy = ModelCopy(model, dtype)
        self._tensors, self._axes, self._epsilons = tensors, axes, epsilons
        self._moving = [name for name in tensors.first_names if any(name in axis for axis in axes)]
        norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
        self._norms = [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]
        self._vectorized = True
        self._synchronized = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]

    def fingerprint(self, batches: object = None) -> str:
        """Return a hash of the model's tensors, the axes, Adam's ``ε`` and ``repr(batches)``.

        ``batches`` describes the data, for example the batch sizes. If it is None, the data do not change the hash.
        """
        digest = hashlib.sha256(b"" if batches is None else repr(batches).encode())
        for name in sorted(set(self._tensors.first_names.values())):
            digest.update(name.encode() + self._copy.copy_of(self._tensors[name]).cpu().numpy().tobytes())
        for axis in self._axes:
            for name, tensor in axis.items():
                digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        if self._epsilons is not None:
            digest.update(repr(sorted(self._epsilons.items())).encode())
        return digest.hexdigest()

    def at(self, coordinates: Tensor) -> State:
        """Return the values of the tensors that are in at least one axis, at the points with these ``coordinates``.

        ``coordinates`` have shape ``(points, axes)``.
        """
        state: State = {}
        for name in self._moving:
            tensor = self._tensors[name]
            own = self._copy.copy_of(tensor)
            alphas = coordinates.to(own.device, torch.float64).reshape(*coordinates.shape, *[1] * own.ndim)
            state[tensor] = (own.double() + self._displacement(name, alphas)).to(own.dtype)
        return state

    def _displacement(self, name: str, alphas: Tensor) -> Tensor:
        if self._epsilons is not None:
            first, second = (axis[name].double() for axis in self._axes)
            scale = alphas[:, 1] if alphas.shape[1] > 1 else torch.ones_like(alphas[:, 0])
            return alphas[:, 0] * adam_step(first, second, scale, self._epsilons[name])
        # In float64, so that the point at α = 1 is the end of the direction, up to rounding.
        return sum(
            (alphas[:, index] * axis[name].double() for index, axis in enumerate(self._axes) if name in axis),
            torch.zeros((), dtype=torch.float64, device=alphas.device),
        )

    def logits(self, state: State, inputs: Any) -> Tensor:
        """Return the logits ``(points, samples, classes)`` of the model with the tensors in ``state``."""
        logits = self._mapped(lambda point: any_logits_of(self._copy(inputs, point)), state)
        return logits if isinstance(logits, Tensor) else torch.stack(logits)

    def own_logits(self, inputs: Any) -> Tensor:
        """Return the logits ``(samples, classes)`` of the model at its own weights."""
        return any_logits_of(self._copy(inputs))

    def recompute_statistics(self, state: State, batches: Iterable[Any]) -> State:
        """Return ``state`` with new running statistics of BatchNorm, computed from batches at the weights in ``state``.

        The new statistics are the averages of the means and unbiased variances of the batches. All batches have the
        same weight, as in torch with ``momentum=None`` after a reset. All other modules run in evaluation mode.
        """
        if self._synchronized:
            raise FlatnessError(
                f"batch_norm='recomputed' is not possible with SyncBatchNorm ('{self._synchronized[0]}'), which makes "
                "processes wait for each other in every forward pass. Use batch_norm='kept', or a model with BatchNorm."
            )
        if not self._norms:
            return state
        number = len(next(iter(state.values())))
        written: State = {}
        for norm in self._norms:
            for buffer, value in ((norm.running_mean, 0.0), (norm.running_var, 1.0)):
                assert buffer is not None
                start = torch.full_like(self._copy.copy_of(buffer), value)
                written[buffer] = start.expand(number, *buffer.shape).clone()
        for index, inputs in enumerate(batches):
            with _averaging(self._norms, 1 / (index + 1)):
                written = self._statistics({**state, **written}, list(written), inputs)
        return {**state, **written}

    def _statistics(self, state: State, buffers: Sequence[Tensor], inputs: Any) -> State:
        def forward(point: State) -> tuple[Tensor, ...]:
            point = {**point, **{buffer: point[buffer].clone() for buffer in buffers}}
            self._copy(inputs, point, written=buffers)
            return tuple(point[buffer] for buffer in buffers)

        try:
            statistics = self._mapped(forward, state)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise BatchError(
                "batch_norm='recomputed': a batch has only one value for every channel, so there is no variance. If "
                "only the last batch has one sample, drop it (drop_last=True). Otherwise give larger batches."
            ) from error
        if isinstance(statistics, list):
            statistics = [torch.stack(of_buffer) for of_buffer in zip(*statistics, strict=True)]
        return dict(zip(buffers, statistics, strict=True))

    def _mapped(self, function: Callable[[State], Any], state: State) -> Any:
        """Return the values of a function at several points, stacked by ``vmap``.

        ``state`` has the values of the tensors at these points. ``function`` is called with the tensors at one point.
        If ``vmap`` fails, now or in an earlier call, or if there is only one point, return a list of values.
        """
        keys, number = list(state), len(next(iter(state.values())))
        if self._vectorized and number > 1:
            try:
                return vmap(lambda *parts: function(dict(zip(keys, parts, strict=True))))(*state.values())
            except Exception:
                # Some forwards fail in vmap, and memory may not suffice. Errors of the model itself are raised below.
                self._vectorized = False
        return [function({key: tensor[index] for key, tensor in state.items()}) for index in range(number)]


@contextmanager
def _averaging(norms: Sequence[Any], factor: float) -> Iterator[None]:
    """Put BatchNorm modules in training mode with ``momentum = factor`` inside the block."""
    before = [(norm, norm.training, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.momentum = True, factor
        yield
    finally:
        for norm, training, momentum in before:
            norm.training, norm.momentum = training, momentum
