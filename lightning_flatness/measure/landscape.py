"""Compute loss landscapes: the loss on a line or plane through the weights of a model."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Direction, Loss, direction_norm, inner_product
from lightning_flatness.measure.announcement import LOGGER, Say
from lightning_flatness.measure.axes import find_axes
from lightning_flatness.measure.landscape_options import LandscapeOptions
from lightning_flatness.measure.landscape_points import completed, resumed
from lightning_flatness.measure.loss_sums import RepeatedBatches
from lightning_flatness.measure.ranks import own_rank
from lightning_flatness.measure.spectrum import SpectrumOptions, spectrum_of
from lightning_flatness.model.copy import measured
from lightning_flatness.model.isolation import isolated, without_wrapper
from lightning_flatness.model.named_tensors import NamedTensors
from lightning_flatness.model.options import of_arguments
from lightning_flatness.model.points import Points
from lightning_flatness.model.whole import whole_model
from lightning_flatness.results import LandscapeResult


def loss_landscape(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    axes: Any = "random",
    normalize: Literal["none", "weight", "filter", "layer", "model"] | None = None,
    norm: Literal[1, 2] = 2,
    biases: Literal["zero", "scaled"] = "zero",
    update: Literal["add", "adam"] = "add",
    span: Any = 1.0,
    steps: int | Sequence[int] = 25,
    frozen: Sequence[str] = (),
    batch_norm: Literal["kept", "recomputed"] = "kept",
    loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    seed: int = 0,
    dtype: Literal["float32", "float64"] | torch.dtype | None = None,
    chunk: int | None = None,
    resume: LandscapeResult | None = None,
    sync: bool = False,
    progress: bool | None = None,
) -> LandscapeResult:
    """Compute mean loss and accuracy at ``w + Σ_i α_i d_i`` on a line or a plane through a model's weights ``w``.

    Here ``d_1`` and ``d_2`` are the axes, directions in weight space, and ``α_1`` and ``α_2`` are the coordinates of a
    point. ``docs/landscape.md`` has the formulas.

    The model runs on copies of its weights, in evaluation mode, and stays as it was. Every sample has the same weight.
    Points are computed from the middle outwards. After an interrupt (Ctrl-C), the function returns the points computed
    so far, and a call with ``resume=`` computes the others. If no progress bar is shown, Python's logger
    ``lightning_flatness`` gets the number of points and an estimate of the time, as for
    :func:`~lightning_flatness.hessian_spectrum`.

    Args:
        model: any module that returns logits ``(samples, classes)``.
        batches: pairs ``(inputs, targets)`` that can be read many times, as a list or a ``DataLoader``. Every pass uses
            the same random numbers.
        axes: ``"random"``, ``"adam"`` or ``"hessian"`` for a plane of two axes of this kind; or a list with one entry
            for a line, or two entries for a plane. An entry is one of these strings, or a direction. Random axes have
            normal random entries; the second one is made orthogonal to the first before the normalisation. Adam axes
            are the optimizer's ``exp_avg`` and ``exp_avg_sq``; a line takes ``exp_avg``. Hessian axes are the unit
            eigenvectors that have the largest eigenvalues; this Hessian is with respect to the trainable parameters
            that are not ``frozen``. A direction is a flat tensor, or a mapping from names of parameters or buffers to
            tensors, e.g. from ``direction_between`` or ``pca_directions``.
        normalize: which parts of a direction are scaled to the norm of the same part of the weights: every
            ``"filter"``, every ``"layer"`` (tensor), or the whole ``"model"``. ``"weight"`` multiplies every entry of
            the direction by the weight itself, and ``"none"`` scales nothing. By default ``"filter"`` for random axes,
            ``"none"`` for others.
        norm: order of the norm for ``normalize``, 1 or 2.
        biases: treatment of parameters with one dimension (biases, BatchNorm) in normalised directions: they do not
            move (``"zero"``, as in the code of Li et al. 2018), or are ``"scaled"`` like all others.
        update: ``"add"`` for the points ``w + Σ_i α_i d_i``; or ``"adam"``, with Adam axes, for the points
            ``w + α_1 m / (sqrt(α_2 v) + ε)``. Here ``m`` and ``v`` are the two Adam axes, and ``ε`` is the optimizer's
            ``eps``. On a line, ``α_2 = 1``.
        span: range of the coordinates: a number ``s`` for ``-s`` to ``s``; a pair ``(from, to)``; or such a pair for
            every axis. With ``update="adam"``, a number applies to ``α_1`` only, and ``α_2`` goes from 0.1 to 1.9.
        steps: number of points along every axis, or a list of one number per axis. With an odd number and a symmetric
            span, the point in the middle is the model itself.
        frozen: names or glob patterns of parameters or modules that do not move.
        batch_norm: with ``"kept"``, BatchNorm uses the model's running statistics at all points. With ``"recomputed"``,
            statistics are computed anew at every point, as the mean over ``batches``. Every batch has the same
            weight, as in torch with ``momentum=None``. With ``sync``, a rank uses the statistics of its own batches.
        loss: as for :func:`~lightning_flatness.measure_flatness`.
        label_smoothing: label smoothing of cross-entropy.
        class_weight: class weights of cross-entropy.
        ignore_index: target value that cross-entropy ignores.
        optimizer: the optimizer for Adam axes, or a list of optimizers that train different parameters.
        seed: seed of random axes.
        dtype: precision in which the model runs, as for ``measure_flatness``.
        chunk: number of points that ``torch.func.vmap`` computes at once, if it supports the model; by default 16 if
            forward passes are cheap, otherwise 1.
        resume: an earlier result of the same call, to compute only the points that it lacks.
        sync: compute the losses over the batches of all ranks of a process group. Then call this function on every
            rank, with that rank's batches or with none. By default nothing communicates.
        progress: show a progress bar; by default only in a terminal.

    Returns:
        A :class:`~lightning_flatness.LandscapeResult`. Losses that are not finite are kept, with a warning.

    Raises:
        FlatnessError: an option is invalid, all parameters are frozen, the optimizer has no moments for Adam axes, or
            ``resume=`` has other settings, weights, axes or data.
        BatchError: batches can be read only once, or batches, targets or logits do not fit the loss.
        LayerSelectionError: two forward passes on the same samples give different logits.
        LandscapeError: the model or the loss fails at a point; the error's ``result`` has the points computed so far.

    Source:
        Li et al. 2018 (arXiv 1712.09913); Gabdullin 2024 (arXiv 2412.10146) for axes, updates and BatchNorm.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> plane = loss_landscape(net, [(torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))], steps=5)
        >>> plane.losses.shape, bool((plane.losses[2, 2] - plane.origin_loss).abs() < 1e-6)
        (torch.Size([5, 5]), True)
    """
    options = of_arguments(LandscapeOptions, locals())
    model = whole_model(model) if sync else model
    return landscape_of(model, batches, options, optimizer=optimizer, resume=resume, sync=sync, progress=progress)


def landscape_of(
    model: nn.Module,
    batches: Iterable[Any],
    options: LandscapeOptions,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    resume: LandscapeResult | None = None,
    sync: bool,
    progress: bool | None = None,
    say: Say | None = LOGGER.log,
) -> LandscapeResult:
    """Compute a landscape as :func:`loss_landscape` does, from options that have been checked.

    If no progress bar is shown, ``say`` gets the messages about points and time, on rank zero. For Hessian axes,
    ``say`` also gets the messages about products with the Hessian, even if a progress bar is shown. If ``say`` is None,
    there are no messages.
    """
    start = time.perf_counter()
    model, precision = without_wrapper(model), options.measuring_dtype
    repeated = RepeatedBatches(model, batches, options.loss_function, sync)
    with isolated(model), torch.no_grad():
        tensors = NamedTensors(model)
        frozen = tensors.frozen(options.frozen)
        names = set(tensors.first_names.values())
        weights = {name: measured(tensors[name].detach(), precision) for name in names}
        moving = [name for name, tensor in tensors.parameters.items() if tensor.requires_grad and name not in frozen]
        axes = find_axes(
            options,
            tensors,
            weights,
            frozen,
            optimizer=optimizer,
            eigenvectors=lambda number: _eigenvectors(model, batches, options, moving, number, sync, say),
        )
        points = Points(model, tensors, axes.directions, axes.epsilons, precision)
        origin = repeated.at_origin(points)
        directions = axes.directions[: len(axes.names)]
        norms = tuple(direction_norm(direction) for direction in directions)
        shape = [len(coordinates) for coordinates in options.coordinates]
        unknown = torch.full(shape, math.nan, dtype=torch.float64, device="cpu")
        mean, accuracy = origin.sums.mean, origin.sums.accuracy
        result = LandscapeResult(
            axes=axes.names,
            coordinates=options.coordinates,
            losses=unknown,
            accuracies=None if accuracy is None else unknown,
            computed=torch.zeros_like(unknown, dtype=torch.bool),
            origin_loss=mean,
            origin_accuracy=math.nan if accuracy is not None and math.isnan(mean) else accuracy,
            axis_norms=norms,
            cosine=inner_product(*directions) / math.prod(norms) if len(directions) == 2 else math.nan,
            weight_norm=direction_norm({name: weights[name] for name in tensors.parameters if name not in frozen}),
            normalize=", ".join(dict.fromkeys(axes.units)),
            norm=options.norm,
            biases=options.biases,
            update=options.update,
            batch_norm=options.batch_norm,
            frozen=tuple(options.frozen),
            loss=options.loss_function.label,
            num_samples=origin.sums.num_samples,
            seed=options.seed,
            # Recomputed statistics depend on which samples share a batch, so the fingerprint includes batch sizes.
            fingerprint=points.fingerprint(origin.batch_sizes if options.batch_norm == "recomputed" else None),
            seconds=time.perf_counter() - start,
        )
        if resume is not None:
            result = resumed(result, resume)
        result = completed(result, points, repeated, origin, options.chunk, progress, say)
    odd = int((result.computed & ~result.losses.isfinite()).sum())
    if odd and own_rank(sync) == 0:
        # The user called loss_landscape, which called this function.
        reason = origin.not_finite
        if options.batch_norm != "recomputed":
            reason = reason or _negative_variance(weights, directions, options.coordinates)
        named = f"{odd} of {result.losses.numel()} points of the landscape have no finite loss."
        warnings.warn(f"{named} {reason}".strip(), stacklevel=3)
    return result


def _negative_variance(
    weights: Mapping[str, Tensor], directions: Sequence[Mapping[str, Tensor]], coordinates: Sequence[Tensor]
) -> str:
    """Return a sentence on a variance of BatchNorm that is negative at a corner of the landscape, or an empty string.

    Directions between networks change the running statistics, too.
    """
    corners = list(itertools.product(*((float(of_axis.min()), float(of_axis.max())) for of_axis in coordinates)))
    for name, variance in weights.items():
        moves = [direction.get(name) for direction in directions]
        if name.endswith("running_var") and any(move is not None for move in moves):
            for corner in corners:
                pairs = zip(corner, moves, strict=True)
                at_corner = variance + sum(number * move for number, move in pairs if move is not None)
                if bool((at_corner < 0).any()):
                    return (
                        f"Away from the networks that the axes connect, the variance '{name}' of BatchNorm is "
                        "negative. Use batch_norm='recomputed'."
                    )
    return ""


def _eigenvectors(
    model: nn.Module,
    batches: Iterable[Any],
    options: LandscapeOptions,
    params: Sequence[str],
    number: int,
    sync: bool,
    say: Say | None,
) -> list[Direction]:
    """Return the ``number`` eigenvectors with the largest eigenvalues of the Hessian with respect to ``params``."""
    of_spectrum = SpectrumOptions(
        loss=options.loss_function,
        dtype=options.dtype,
        seed=options.seed,
        params=params or None,
        top_k=number,
        num_probes=0,
    )
    spectrum = spectrum_of(model, batches, of_spectrum, progress=False, sync=sync, say=say)
    if not spectrum.converged and own_rank(sync) == 0:
        # The user called loss_landscape, which called landscape_of, find_axes, the lambda and this function.
        warnings.warn("The Hessian's eigenvectors have not converged, so the axes are approximate.", stacklevel=6)
    if len(spectrum.eigenvalues) < number:
        raise FlatnessError(
            f"The Hessian has fewer than {number} eigenvectors. Give fewer Hessian axes, or axes of another kind."
        )
    return [spectrum.eigenvector(index) for index in range(number)]
