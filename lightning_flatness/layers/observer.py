"""One batch in, block traces out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.functional.conditions import holds, together
from lightning_flatness.functional.curvature import MANY_CLASSES
from lightning_flatness.functional.symmetric import folded, unfolded
from lightning_flatness.layers.certificate import own_weight
from lightning_flatness.layers.closed_form import TailDerivatives, closed_form_layer
from lightning_flatness.layers.gauss_newton import gauss_newton_layers
from lightning_flatness.layers.live import Listener, try_observing, why_not_observed
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.passes import ForwardPasses, ObservedPass
from lightning_flatness.layers.probes import BlockTraces
from lightning_flatness.layers.residual import hutchinson_residual
from lightning_flatness.layers.tail import ROUNDINGS
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.isolation import differentiable
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.rows import num_rows, take
from lightning_flatness.results import LayerInfo

# Samples on which it is tried out whether the user's forward passes can be observed.
TRIAL = 4


class LayerStatistics(NamedTuple):
    """What one batch adds to the measurement of one layer; sums over samples, so batches and ranks add up."""

    block_traces: Tensor  # (G, S/G, S/G), or its diagonal (G, S/G), float64, summed over the samples
    weight_gram: Tensor  # of the same shape, float64
    num_samples: int
    normalizer: float  # what the sum is to be divided by: the number of samples, or the sum of their class weights
    variances: Tensor | None = None  # (4,), of the measures of the sum, where it is estimated

    def whole(self, info: LayerInfo, diagonal: bool) -> LayerStatistics:
        """Of folded statistics (:meth:`FlatnessObserver.sums`): the matrices, which share no memory with anything.

        Args:
            info: of the layer.
            diagonal: there are only diagonals, which are not folded.
        """
        with torch.inference_mode(False):
            if diagonal:
                return self._replace(weight_gram=self.weight_gram.clone())
            filters = info.num_filters // info.groups
            block_traces, gram = (unfolded(strips, filters) for strips in (self.block_traces, self.weight_gram))
            return self._replace(block_traces=block_traces, weight_gram=gram)

    def plus(self, other: LayerStatistics | None) -> LayerStatistics:
        """The sum with those of other samples of the same layer, whose block traces are written to.

        Example:
            >>> one, two = (LayerStatistics(n * torch.ones(1, 1, 1), torch.ones(1, 1, 1), n, float(n)) for n in (1, 2))
            >>> one.plus(two).block_traces, two.plus(None) is two
            (tensor([[[3.]]]), True)
        """
        if other is None:
            return self
        given = [variances for variances in (self.variances, other.variances) if variances is not None]
        return LayerStatistics(
            other.block_traces.add_(self.block_traces),
            self.weight_gram,
            self.num_samples + other.num_samples,
            self.normalizer + other.normalizer,
            torch.stack(given).sum(0) if given else None,
        )


class FlatnessObserver:
    """Measures batches of one model, whose weights must stay the same meanwhile.

    The first call finds the layers, and certifies on its batch how each can be measured: by the closed form, where it
    holds; else by the Gauss-Newton method, which is exact where the logits are affine in the layer's weight, and is
    labelled where they are not. :attr:`layers` then describes them. Every call leaves the model, its gradients, buffers
    and modes, the batch and all random states as they were.

    Args:
        model: any module that returns logits ``(N, K)``.
        options: keyword arguments of :func:`~lightning_flatness.measure_flatness`: ``layers``, ``loss``, ...

    Raises:
        FlatnessError: options that cannot be; on the first call, whatever does not allow a measurement.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> observer = FlatnessObserver(net)
        >>> statistics = observer(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))
        >>> statistics["0"].block_traces.shape, statistics["0"].num_samples
        (torch.Size([1, 4, 4]), 5)

    Beside that, it can observe forward passes that the user makes: :meth:`why_not_live`, :meth:`listen`,
    :meth:`observed`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self._options = Options(**options)
        self._model = model
        self._passes = ForwardPasses(model, self._options)
        self._generator = torch.Generator().manual_seed(self._options.seed)
        self._within: list[nn.Module] = []
        self._looks_once = True  # at the conditions on a batch that was observed

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """How every layer is measured; empty before the first batch."""
        return self._passes.plan.layers

    @property
    def left_out(self) -> dict[str, str]:
        """Layers of ``"all"`` that cannot be measured, and why."""
        return self._passes.plan.left_out

    def __call__(
        self, inputs: Any, targets: Tensor | None = None, advance: Callable[[float], None] | None = None
    ) -> dict[str, LayerStatistics]:
        """Statistics of one batch, by layer.

        Args:
            inputs: for the model: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
            targets: as the loss takes them; without them, what needs them raises an error.
            advance: is told which part of the batch is done.

        Raises:
            BatchError: targets that do not fit the logits or are missing where needed, values that are not finite; or
                memory runs out for half as many samples at a time, too.
            LayerSelectionError: a layer that cannot be measured.
            NotExactError: with ``strict``, a layer that is not exact.
        """
        return self._whole(self.sums(inputs, targets, advance))

    def _whole(self, sums: dict[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        return {name: one.whole(self.layers[name], self._options.diagonal) for name, one in sums.items()}

    def sums(
        self, inputs: Any, targets: Tensor | None = None, advance: Callable[[float], None] | None = None
    ) -> dict[str, LayerStatistics]:
        """What a call returns, for adding up: symmetric matrices are folded (:meth:`LayerStatistics.whole`)."""
        totals: dict[str, LayerStatistics] = {}
        for found in self._passes(inputs, targets, self._measure, advance):
            totals = {name: part.plus(totals.get(name)) for name, part in found.items()}
        return totals

    def why_not_live(
        self, inputs: Any, targets: Tensor | None, forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> str:
        """Why forward passes that the user makes cannot be observed in place of some of our own; nothing, if they can.

        That is tried out on the first samples of a batch: a pass of our own, observed in the way theirs would be and
        under the modes that are on now, must return bit-identical values, keep nothing, and give the same numbers.

        Args:
            inputs: of the first batch.
            targets: of the first batch.
            forward: a context that the user's passes run in, e.g. autocast.
        """
        samples, options = num_rows(inputs, targets), self._options
        reason = why_not_observed(self._model, options.measuring_dtype)
        if reason or samples < 2:
            return reason or "the batch has one sample"
        few = slice(0, TRIAL)
        inputs, targets = take(inputs, few, samples), take(targets, few, samples)
        own: dict[str, LayerStatistics] = {}
        for found in self._passes(inputs, targets, self._measure_closed_form):
            own = {name: part.plus(own.get(name)) for name, part in found.items()}
        self._passes.let_go()  # else it would lie there while whole batches are validated
        missing = [name for name in self.layers if name not in own]
        if missing:
            return f"layer '{missing[0]}' is not measured by the closed form"
        with forward():
            live, reason, self._within = try_observing(
                self._model, inputs, self._passes.observation, lambda heard: self.observed_sums(heard, targets)
            )
        for name, statistics in (live or {}).items():
            one, other = statistics.block_traces, own[name].block_traces
            if not bool((one - other).norm() <= ROUNDINGS * torch.finfo(self._passes.dtype).eps * other.norm()):
                return f"the numbers of layer '{name}' are others when it is observed (TF32?)"
        self._passes.plan.know_parameters()
        return reason

    def listen(self, inputs: Any) -> Listener:
        """Hooks on the model, to observe the user's forward pass on these inputs."""
        return Listener(self._model, inputs, self._passes.observation, self._within)

    def observed(self, heard: Listener, targets: Tensor | None) -> dict[str, LayerStatistics]:
        """Statistics of a batch that the user's forward pass was observed on.

        Raises:
            FlatnessError: it was not as in the passes of our own.
        """
        return self._whole(self.observed_sums(heard, targets))

    def observed_sums(self, heard: Listener, targets: Tensor | None) -> dict[str, LayerStatistics]:
        """What :meth:`observed` returns, folded."""
        with differentiable(self._model):
            if self._looks_once:
                with together() as all_hold:
                    try:
                        found = self._measure(self._passes.live(heard, targets), lambda part: None)
                    except (FlatnessError, RuntimeError):
                        if all_hold():
                            raise
                if all_hold():
                    return found
                self._looks_once = False  # one by one, to tell which does not hold; so it may be with other batches
            return self._measure(self._passes.live(heard, targets), lambda part: None)

    def _measure_closed_form(self, seen: ObservedPass, advance: Callable[[float], None]) -> dict[str, LayerStatistics]:
        return self._measure(seen, advance) if len(seen.tails) == len(seen.layers) else {}

    def _measure(self, seen: ObservedPass, advance: Callable[[float], None]) -> dict[str, LayerStatistics]:
        plan, diagonal = self._passes.plan, self._options.diagonal
        found = {}
        for name, tail in seen.tails.items():
            found[name] = BlockTraces(self._closed_form(name, tail, seen))
        others = {name: calls for name, calls in seen.layers.items() if name not in seen.tails}
        if others:
            found |= gauss_newton_layers(
                others,
                seen.logits,
                seen.loss.curvature,
                plan.gram,
                plan.tolerance,
                self._generator,
                diagonal,
                advance,
            )
        self._add_residuals(found, seen)
        return {name: self._statistics(name, found[name], seen) for name in seen.layers}

    def _closed_form(self, name: str, tail: TailDerivatives, seen: ObservedPass) -> Tensor:
        plan, diagonal, weights = self._passes.plan, self._options.diagonal, None
        if plan.tolerance > 0 and seen.loss.curvature.num_classes >= MANY_CLASSES and not diagonal:
            gram = plan.gram(name)
            weights = gram, plan.gram_norm(name, gram)
        return closed_form_layer(name, seen.layers[name][0][1], tail, seen.loss, diagonal, weights)

    def _add_residuals(self, found: dict[str, BlockTraces], seen: ObservedPass) -> None:
        kernels = {}
        for name, info in self.layers.items():
            if info.method == "gauss_newton+hutchinson":
                observed, call = seen.layers[name][0]
                kernels[name] = (own_weight(observed.module), call.weight.detach().clone().requires_grad_())
        if not kernels:
            return
        if seen.loss.residual is None:
            raise BatchError("residual='hutchinson' depends on the targets, and this batch has none.")
        logits = logits_of(ModelCopy(self._model, self._options.measuring_dtype)(seen.inputs, dict(kernels.values())))
        estimates = hutchinson_residual(
            (logits * seen.loss.residual.to(logits.dtype)).sum(),
            {name: kernel for name, (_, kernel) in kernels.items()},
            self._passes.plan.gram,
            self._options.num_probes,
            self._generator,
            self._options.diagonal,
        )
        for name, estimate in estimates.items():
            if estimate is None:
                self.layers[name] = replace(self.layers[name], method="gauss_newton")
                continue
            total, variances = found[name]
            assert estimate.variances is not None
            found[name] = BlockTraces(
                total + estimate.total, estimate.variances if variances is None else variances + estimate.variances
            )

    def _statistics(self, name: str, found: BlockTraces, seen: ObservedPass) -> LayerStatistics:
        if not holds(found.total.sum().isfinite()):
            raise BatchError(f"The block traces of layer '{name}' are not finite: activations overflow in this batch.")
        samples = round(seen.share * seen.loss.num_samples)
        total = found.total if seen.share == 1 else seen.share * found.total
        return LayerStatistics(
            total if self._options.diagonal else folded(total),  # symmetric but for rounding
            self._passes.plan.folded_grams[name],
            samples,
            seen.share * seen.loss.normalizer,
            None if found.variances is None else seen.share**2 * found.variances,
        )
