"""One batch in, block traces out: runs the model on some samples at a time, and measures its layers as planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatness.capture.affine import Calls, certify_samples
from lightning_flatness.capture.certificate import own_weight
from lightning_flatness.capture.closed_form import TailDerivatives, closed_form_layer
from lightning_flatness.capture.gauss_newton import gauss_newton_layers, rows_at_a_time
from lightning_flatness.capture.isolation import ModelCopy, isolated
from lightning_flatness.capture.observation import Observation
from lightning_flatness.capture.options import Options
from lightning_flatness.capture.plan import Plan
from lightning_flatness.capture.probes import BlockTraces
from lightning_flatness.capture.residual import hutchinson_residual
from lightning_flatness.capture.rows import num_rows, take, twice
from lightning_flatness.capture.selection import Execution, logits_of, trace_execution
from lightning_flatness.errors import BatchError, LayerSelectionError
from lightning_flatness.functional import LossDerivatives
from lightning_flatness.results import LayerInfo


class LayerStatistics(NamedTuple):
    """What one batch adds to the measurement of one layer; sums over samples, so batches and ranks add up."""

    block_traces: Tensor  # (G, S/G, S/G), or its diagonal (G, S/G), float64, summed over the samples
    weight_gram: Tensor  # of the same shape, float64, times the number of samples
    num_samples: int
    normalizer: float  # what the sum is to be divided by: the number of samples, or the sum of their class weights
    variances: Tensor | None = None  # (4,), of the measures of the sum, where it is estimated


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
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self._options = Options(**options)
        self._model = model
        self._plan = Plan(model, self._options)
        self._execution: Execution | None = None
        self._rows: int | None = None  # samples that are taken at a time, once that is known
        self._halved = False
        self._generator = torch.Generator().manual_seed(self._options.seed)

    @property
    def layers(self) -> dict[str, LayerInfo]:
        """How every layer is measured; empty before the first batch."""
        return self._plan.layers

    @property
    def left_out(self) -> dict[str, str]:
        """Layers of ``"all"`` that cannot be measured, and why."""
        return self._plan.left_out

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
        totals: dict[str, LayerStatistics] = {}
        samples, start = num_rows(inputs), 0
        while start < samples:
            rows = min(self._rows or samples, samples - start)

            def tell(part: float, start: int = start, rows: int = rows) -> None:
                if advance is not None:
                    advance((start + part * rows) / samples)

            chunk = slice(start, start + rows)
            found = self._attempt(take(inputs, chunk, samples), take(targets, chunk, samples), rows, start == 0, tell)
            if found is None:
                self._halve(rows)
                continue
            if found:
                start += rows
                totals = {name: _sum(totals.get(name), part) for name, part in found.items()}
        return totals

    def _attempt(
        self, inputs: Any, targets: Tensor | None, rows: int, first: bool, advance: Callable[[float], None]
    ) -> dict[str, LayerStatistics] | None:
        """Statistics of some samples; empty if fewer are to be taken at a time, None if memory runs out."""
        try:
            with isolated(self._model):
                if rows > 1:
                    return self._measure(inputs, targets, rows, first, advance)
                # Twice: the backward pass of torch's BatchNorm is wrong for one sample in some memory layouts.
                found = self._measure(twice(inputs), twice(targets), rows, first, advance)
                return {name: _half(statistics) for name, statistics in found.items()}
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
        return None

    def _halve(self, rows: int) -> None:
        if self._halved or rows == 1:
            largest = max(self.layers.values(), key=lambda info: info.memory, default=None)
            where = "" if largest is None else f" The largest layer is '{largest.name}'."
            raise BatchError(
                f"Out of memory while measuring {rows} samples at a time.{where} Measure fewer layers (layers=), or "
                "measures=('hessian_trace',), which keeps diagonals only, or give smaller batches."
            )
        self._halved = True
        self._rows = rows // 2

    def _measure(
        self, inputs: Any, targets: Tensor | None, rows: int, first: bool, advance: Callable[[float], None]
    ) -> dict[str, LayerStatistics]:
        if self._execution is None:
            self._copy = ModelCopy(self._model)
            self._execution = trace_execution(self._model, lambda: self._copy(inputs))
            self._plan.choose(self._execution)
            columns = self._execution.logits.shape[1]
            ran = [name for name in self._execution.order if name in self._plan.modules]
            elements = sum(prod(self._execution.output_shapes.get(name, ())[1:]) for name in ran)
            most = rows_at_a_time(max(1, elements), columns, self._execution.logits.device)
            self._rows = min(most, self._rows or most)
            if rows > self._rows:
                return {}
        with Observation(self._plan.modules, self._plan.classifier[1]) as seen:
            logits = logits_of(self._copy(inputs))
        loss = self._options.loss_function(logits.detach(), targets)
        calls = self._plan.calls(seen)
        beginning = not self.layers
        if beginning:
            _certify_deterministic(self._execution.logits[:rows], logits[:rows].detach())
            self._plan.begin(calls, logits, inputs, loss.curvature.num_columns)
        if first:
            certify_samples(calls, logits)
        tails = self._plan.certified_tails(calls, seen, logits, inputs, beginning)
        found = self._measured(calls, tails, logits, loss, advance)
        self._add_residuals(found, calls, inputs, loss)
        return {name: self._statistics(name, found[name], loss) for name in self._plan.modules}

    def _measured(
        self,
        layers: dict[str, Calls],
        tails: dict[str, TailDerivatives],
        logits: Tensor,
        loss: LossDerivatives,
        advance: Callable[[float], None],
    ) -> dict[str, BlockTraces]:
        diagonal = self._options.diagonal
        found = {}
        for name, tail in tails.items():
            gram = self._plan.grams[name]
            norm = gram.new_zeros(()) if diagonal else self._plan.gram_norm(name)
            call = layers[name][0][1]
            found[name] = BlockTraces(closed_form_layer(name, call, tail, loss, gram, norm, diagonal))
        others = {name: layers[name] for name in layers if name not in tails}
        if others:
            found |= gauss_newton_layers(
                others,
                logits,
                loss.curvature,
                self._plan.grams,
                self._plan.tolerance,
                self._generator,
                diagonal,
                advance,
            )
        return found

    def _add_residuals(
        self, found: dict[str, BlockTraces], layers: dict[str, Calls], inputs: Any, loss: LossDerivatives
    ) -> None:
        kernels = {}
        for name, info in self.layers.items():
            if info.method == "gauss_newton+hutchinson":
                observed, call = layers[name][0]
                kernels[name] = (own_weight(observed.module), call.weight.detach().clone().requires_grad_())
        if not kernels:
            return
        if loss.residual is None:
            raise BatchError("residual='hutchinson' depends on the targets, and this batch has none.")
        logits = logits_of(ModelCopy(self._model)(inputs, dict(kernels.values())))
        estimates = hutchinson_residual(
            (logits * loss.residual.to(logits.dtype)).sum(),
            {name: kernel for name, (_, kernel) in kernels.items()},
            self._plan.grams,
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

    def _statistics(self, name: str, found: BlockTraces, loss: LossDerivatives) -> LayerStatistics:
        if not found.total.isfinite().all():
            raise BatchError(f"The block traces of layer '{name}' are not finite: activations overflow in this batch.")
        return LayerStatistics(
            found.total, self._plan.grams[name] * loss.num_samples, loss.num_samples, loss.normalizer, found.variances
        )


def _sum(left: LayerStatistics | None, right: LayerStatistics) -> LayerStatistics:
    if left is None:
        return right
    variances = right.variances if left.variances is None else left.variances
    if left.variances is not None and right.variances is not None:
        variances = left.variances + right.variances
    return LayerStatistics(
        left.block_traces + right.block_traces,
        left.weight_gram + right.weight_gram,
        left.num_samples + right.num_samples,
        left.normalizer + right.normalizer,
        variances,
    )


def _half(twice: LayerStatistics) -> LayerStatistics:
    block_traces, gram, samples, normalizer, variances = twice
    variances = None if variances is None else variances / 4
    return LayerStatistics(block_traces / 2, gram / 2, samples // 2, normalizer / 2, variances)


def _certify_deterministic(first: Tensor, second: Tensor) -> None:
    scale = first.abs().amax()
    if not float((first - second).abs().amax()) <= 1e3 * torch.finfo(first.dtype).eps * float(scale):
        raise LayerSelectionError(
            "Two forward passes on the same samples give different logits in evaluation mode (dropout without "
            "training=self.training? noise in the forward? statistics of the batch?), so there is no one loss to take "
            "the Hessian of."
        )
