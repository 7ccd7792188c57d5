"""Loss landscapes: the loss on a line or plane through the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import Direction, Loss, direction_norm, inner_product
from lightning_flatness.measure.axes import find_axes
from lightning_flatness.measure.landscape_options import LandscapeOptions
from lightning_flatness.measure.landscape_points import completed, resumed
from lightning_flatness.measure.loss_sums import RepeatedBatches
from lightning_flatness.measure.ranks import own_rank
from lightning_flatness.measure.spectrum import SpectrumOptions, spectrum_of
from lightning_flatness.model.copy import measured
from lightning_flatness.model.isolation import isolated
from lightning_flatness.model.named_tensors import NamedTensors
from lightning_flatness.model.options import of_arguments
from lightning_flatness.model.points import Points
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
    progress: bool | None = None,
) -> LandscapeResult:
    """Compute mean loss and accuracy at ``w + Σ_i α_i d_i`` on a line or a plane through a model's weights ``w``.

    The model runs on copies, in evaluation mode, and is left as it was; every sample counts the same. Points are
    computed from the middle outwards; an interrupt (Ctrl-C) returns those computed so far, to be completed with
    ``resume=``. In a process group every rank gives its own batches and gets the losses over all: call it on every rank
    or on none. ``docs/landscape.md`` has the formulas.

    Args:
        model: any module that returns logits ``(samples, classes)``.
        batches: pairs ``(inputs, targets)`` that can be read many times: a list or a ``DataLoader``. Random numbers are
            the same every time.
        axes: ``"random"``, ``"adam"`` or ``"hessian"``, a plane of two such axes; or a list of one (a line) or two
            (a plane) of these words or of directions, which are mappings from names of parameters or buffers to
            tensors, or flat tensors. Random: normal numbers, the second orthogonal to the first before it is
            normalised. Adam: ``exp_avg`` and ``exp_avg_sq`` of the optimizer; a line takes the first. Hessian: unit
            eigenvectors of the largest eigenvalues, with respect to the trainable parameters that are not ``frozen``.
            Directions: e.g. from ``direction_between`` or ``pca_directions``.
        normalize: scale directions to the weights, by ``"weight"``, ``"filter"``, ``"layer"`` (every tensor) or
            ``"model"``; or ``"none"``. By default ``"filter"`` for random axes and ``"none"`` for others.
        norm: 1 or 2, order of the norm in this.
        biases: in a normalised direction, parameters with one dimension (biases, BatchNorm) do not move (``"zero"``, as
            in the paper's code) or are ``"scaled"`` like all others.
        update: ``"add"``, as above; or ``"adam"``, with Adam axes: ``w + α_1 m / (sqrt(α_2 v) + ε)``; a line has
            ``α_2 = 1``.
        span: of the coordinates: a number ``s`` for ``-s`` to ``s``; a pair ``(from, to)``; or such a pair for every
            axis. With ``update="adam"`` a number leaves ``α_2`` from 0.1 to 1.9.
        steps: points along every axis, or one number for each axis. With odd numbers the model itself is a point.
        frozen: names or glob patterns of parameters or modules that do not move.
        batch_norm: ``"kept"``: BatchNorm uses the model's statistics at all points. ``"recomputed"``: statistics are
            computed anew at every point from these batches, with equal weights, as torch does with ``momentum=None``;
            on several ranks, from the rank's own batches.
        loss: as for :func:`~lightning_flatness.measure_flatness`; so are the next three.
        label_smoothing: of cross-entropy.
        class_weight: of cross-entropy.
        ignore_index: of cross-entropy.
        optimizer: for Adam axes; one, or a list of those that train different parameters.
        seed: of random axes.
        dtype: as for ``measure_flatness``; so is ``progress``.
        chunk: points that ``torch.func.vmap`` computes at once, where it can; by default 16 for light passes, else 1.
        resume: an earlier result of the same call that is not ``complete``.
        progress: show a progress bar.

    Returns:
        A :class:`~lightning_flatness.LandscapeResult`. Losses that are not finite are kept, with a warning.

    Raises:
        FlatnessError: an option that is not possible; all parameters frozen; no moments for Adam axes; batches that can
            be read only once; a ``resume=`` of another landscape.
        BatchError: batches, targets or logits that do not fit the loss.
        LandscapeError: the model or the loss fails at a point; its ``result`` has what was computed.

    Source:
        Li et al. 2018 (arXiv 1712.09913); Gabdullin 2024 (arXiv 2412.10146) for axes, updates and BatchNorm.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> plane = loss_landscape(net, [(torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))], steps=5)
        >>> plane.losses.shape, bool((plane.losses[2, 2] - plane.origin_loss).abs() < 1e-6)
        (torch.Size([5, 5]), True)
    """
    options = of_arguments(LandscapeOptions, locals())
    return landscape_of(model, batches, options, optimizer=optimizer, resume=resume, progress=progress)


def landscape_of(
    model: nn.Module,
    batches: Iterable[Any],
    options: LandscapeOptions,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    resume: LandscapeResult | None = None,
    progress: bool | None = None,
) -> LandscapeResult:
    """:func:`loss_landscape` with options that have been checked."""
    tensors, precision = NamedTensors(model), options.measuring_dtype
    repeated = RepeatedBatches(model, batches, options.loss_function)
    frozen = tensors.frozen(options.frozen)
    with isolated(model), torch.no_grad():
        names = set(tensors.first_names.values())
        weights = {name: measured(tensors[name].detach(), precision) for name in names}
        moving = [name for name, tensor in tensors.parameters.items() if tensor.requires_grad and name not in frozen]
        axes = find_axes(
            options,
            tensors,
            weights,
            frozen,
            optimizer=optimizer,
            eigenvectors=lambda number: _eigenvectors(model, batches, options, moving, number),
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
            loss=options.loss_function.name,
            num_samples=origin.sums.num_samples,
            seed=options.seed,
            # Recomputed statistics depend on which samples go together.
            fingerprint=points.fingerprint(origin.batch_sizes if options.batch_norm == "recomputed" else None),
        )
        if resume is not None:
            result = resumed(result, resume)
        result = completed(result, points, repeated, origin, options.chunk, progress)
    odd = int((result.computed & ~result.losses.isfinite()).sum())
    if odd and own_rank() == 0:
        # Between here and the user is loss_landscape.
        warnings.warn(f"{odd} of {result.losses.numel()} points of the landscape have no finite loss.", stacklevel=3)
    return result


def _eigenvectors(
    model: nn.Module, batches: Iterable[Any], options: LandscapeOptions, params: Sequence[str], number: int
) -> list[Direction]:
    """Eigenvectors of the largest eigenvalues of the Hessian with respect to these parameters."""
    of_spectrum = SpectrumOptions(
        loss=options.loss_function,
        dtype=options.dtype,
        seed=options.seed,
        params=params or None,
        top_k=number,
        num_steps=1,
        num_probes=1,
    )
    spectrum = spectrum_of(model, batches, of_spectrum, progress=False)
    if not spectrum.converged and own_rank() == 0:
        # Between here and the user are the lambda, find_axes, landscape_of and loss_landscape.
        warnings.warn("The Hessian's eigenvectors have not converged; the axes are close to them.", stacklevel=6)
    if len(spectrum.eigenvalues) < number:
        raise FlatnessError(f"The Hessian has fewer than {number} eigenvectors, so there is no plane along them.")
    return [spectrum.eigenvector(index) for index in range(number)]
