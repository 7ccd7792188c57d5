"""One batch in, block traces out: runs the model once, certifies the first batch, chooses a method for every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatness.capture.affine import (
    Calls,
    certify_reach,
    certify_samples,
    kernel_gradient,
    nodes_of,
    pull_back,
    why_curved,
    why_not_affine,
)
from lightning_flatness.capture.certificate import certify_layer, certify_path, is_own_weight
from lightning_flatness.capture.closed_form import TailDerivatives, certified_head, certified_tail, closed_form_layer
from lightning_flatness.capture.gauss_newton import gauss_newton_layers, is_sampled, rows_at_a_time
from lightning_flatness.capture.isolation import ModelCopy, isolated
from lightning_flatness.capture.observation import ConvolutionCall, Observation
from lightning_flatness.capture.options import Options
from lightning_flatness.capture.probes import BlockTraces
from lightning_flatness.capture.residual import hutchinson_residual
from lightning_flatness.capture.rows import num_rows, take
from lightning_flatness.capture.selection import (
    Execution,
    find_classifier,
    logits_of,
    select_layers,
    trace_execution,
)
from lightning_flatness.capture.tail import random_like, why_not_closed_form
from lightning_flatness.errors import BatchError, LayerSelectionError, NotClosedFormError, NotExactError
from lightning_flatness.functional import LossDerivatives, contraction_costs, weight_gram
from lightning_flatness.results import LayerInfo

SAMPLED = "classes without much mass are sampled"


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
        self.layers: dict[str, LayerInfo] = {}
        self._options = Options(**options)
        self._model = model
        self._modules: dict[str, nn.Module] = {}
        self._classifier: tuple[str | None, nn.Module | None] = (None, None)
        self._grams: dict[str, Tensor] = {}
        self._execution: Execution | None = None
        self._rows: int | None = None  # samples that are taken at a time, once that is known
        self._halved = False
        self._generator = torch.Generator().manual_seed(self._options.seed)

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
            found = self._attempt(take(inputs, chunk, samples), take(targets, chunk, samples), start == 0, tell)
            if found is None:
                self._halve(rows)
                continue
            if found:
                start += rows
                totals = {name: _sum(totals.get(name), part) for name, part in found.items()}
        return totals

    def _attempt(
        self, inputs: Any, targets: Tensor | None, first: bool, advance: Callable[[float], None]
    ) -> dict[str, LayerStatistics] | None:
        """Statistics of some samples; empty if fewer are to be taken at a time, None if memory runs out."""
        try:
            with isolated(self._model):
                return self._measure(inputs, targets, first, advance)
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
        self, inputs: Any, targets: Tensor | None, first: bool, advance: Callable[[float], None]
    ) -> dict[str, LayerStatistics]:
        if self._execution is None:
            self._copy = ModelCopy(self._model)
            self._execution = trace_execution(self._model, lambda: self._copy(inputs))
            self._choose(self._execution)
            samples, columns = self._execution.logits.shape
            ran = [name for name in self._execution.order if name in self._modules]
            elements = sum(prod(self._execution.output_shapes.get(name, ())[1:]) for name in ran)
            self._rows = rows_at_a_time(max(1, elements), columns, self._execution.logits.device)
            if samples > self._rows:
                return {}
        with Observation(self._modules, self._classifier[1]) as seen:
            logits = logits_of(self._copy(inputs))
        loss = self._options.loss_function(logits.detach(), targets)
        calls = {name: self._calls(name, seen) for name in self._modules}
        beginning = not self.layers
        if beginning:
            _certify_deterministic(self._execution.logits[: len(logits)], logits.detach())
            self._certify(calls, logits, inputs, loss)
        if first:
            certify_samples(calls, logits)
        tails = self._certified_tails(calls, seen, logits, inputs, beginning)
        found = self._measured(calls, tails, logits, loss, advance)
        self._add_residuals(found, calls, inputs, loss)
        return {name: self._statistics(name, found[name], loss) for name in self._modules}

    def _choose(self, execution: Execution) -> None:
        classifier = find_classifier(execution)
        names = select_layers(execution, self._options.layers, classifier)
        self._modules = {name: execution.modules[name] for name in names}
        self._classifier = (classifier, None if classifier is None else execution.modules[classifier])

    def _calls(self, name: str, seen: Observation) -> Calls:
        if name not in seen.layers:
            raise LayerSelectionError(f"Layer '{name}' ran on the first batch but not on this one.")
        return [(observed, certify_layer(name, observed)) for observed in seen.layers[name]]

    def _measured(
        self,
        layers: dict[str, Calls],
        tails: dict[str, TailDerivatives],
        logits: Tensor,
        loss: LossDerivatives,
        advance: Callable[[float], None],
    ) -> dict[str, BlockTraces]:
        diagonal = self._options.diagonal
        found = {
            name: BlockTraces(closed_form_layer(name, layers[name][0][1], tail, loss, self._grams[name], diagonal))
            for name, tail in tails.items()
        }
        others = {name: layers[name] for name in layers if name not in tails}
        if others:
            found |= gauss_newton_layers(
                others, logits, loss.curvature, self._grams, self._tolerance, self._generator, diagonal, advance
            )
        return found

    @property
    def _tolerance(self) -> float:
        return 0.0 if self._options.strict else self._options.tolerance

    def _add_residuals(
        self, found: dict[str, BlockTraces], layers: dict[str, Calls], inputs: Any, loss: LossDerivatives
    ) -> None:
        kernels = {}
        for name, info in self.layers.items():
            if info.method == "gauss_newton+hutchinson":
                observed, call = layers[name][0]
                kernels[name] = (_weight(observed.module), call.weight.detach().clone().requires_grad_())
        if not kernels:
            return
        if loss.residual is None:
            raise BatchError("residual='hutchinson' depends on the targets, and this batch has none.")
        logits = logits_of(ModelCopy(self._model)(inputs, dict(kernels.values())))
        estimates = hutchinson_residual(
            (logits * loss.residual.to(logits.dtype)).sum(),
            {name: kernel for name, (_, kernel) in kernels.items()},
            self._grams,
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
            found.total, self._grams[name] * loss.num_samples, loss.num_samples, loss.normalizer, found.variances
        )

    # -------------------------------------------------------------------------------------------- which method, why

    def _certified_tails(
        self, layers: dict[str, Calls], seen: Observation, logits: Tensor, inputs: Any, first: bool
    ) -> dict[str, TailDerivatives]:
        """The tails of the layers under the closed form, certified on every batch; what fails goes to Gauss-Newton."""
        tails: dict[str, TailDerivatives] = {}
        failures: dict[str, str] = {}
        candidates = [name for name, info in self.layers.items() if info.method == "closed_form"]
        if candidates:
            try:
                head = certified_head(*self._classifier, seen, logits, self._options.loss_function.shift_invariant)
            except NotClosedFormError as error:
                failures = dict.fromkeys(candidates, str(error))
        for name in candidates:
            if name not in failures and (len(layers[name]) > 1 or layers[name][0][1].channel_dimension != 1):
                failures[name] = "it is for a convolution that runs once in a forward pass."
        if first and len(failures) < len(candidates):
            failures |= why_not_closed_form(
                {name: layers[name][0][0].output for name in candidates if name not in failures}, head.features
            )
        for name in candidates:
            if name in failures:
                continue
            try:
                tails[name] = certified_tail(name, layers[name][0][0], head, logits)
            except NotClosedFormError as error:
                failures[name] = str(error)
                continue
            deviation = max(self.layers[name].deviation, tails[name].deviation)
            self.layers[name] = replace(self.layers[name], deviation=deviation)
        checked = [name for name, info in self.layers.items() if name not in tails and info.reason in ("", SAMPLED)]
        self._under_gauss_newton({name: layers[name] for name in checked}, failures, logits, inputs, first)
        return tails

    def _under_gauss_newton(
        self, layers: dict[str, Calls], failures: dict[str, str], logits: Tensor, inputs: Any, first: bool
    ) -> None:
        """Certify on this batch that Gauss-Newton is exact for these layers; label those for which it is not."""
        reasons = why_not_affine({name: calls for name, calls in layers.items() if len(calls) == 1}, logits)
        for name, calls in layers.items():
            why = reasons[name] if name in reasons else self._why_polynomial(calls, inputs)
            info = self.layers[name]
            if self._options.strict and why:
                closed_form = f" The closed form does not hold: {failures[name]}" if name in failures else ""
                raise NotExactError(
                    f"Layer '{name}': only the Gauss-Newton part of its Hessian can be had ({why}), and strict=True "
                    f"asks for exact numbers.{closed_form}"
                )
            method: Any = "gauss_newton"
            if why and self._options.residual and is_own_weight(calls[0][1], calls[0][0].module):
                method = "gauss_newton+hutchinson"
            if why and not first:
                why = f"{why} in a later batch; earlier ones count with all their Hessian"
            sampled = self._sampled and not why
            passes = self._num_columns
            self.layers[name] = replace(
                info,
                method=method,
                classifier=None,
                exact=not why and not sampled,
                reason=SAMPLED if sampled else why,
                backward_passes=passes,
                multiplications=sum(self._multiplications(call, passes) for _, call in calls),
            )

    def _why_polynomial(self, calls: Calls, inputs: Any) -> str:
        observed, call = calls[0]
        if not is_own_weight(call, observed.module):
            return "it runs several times with a computed kernel"
        # What one call returns may reach the next, so only the whole model as a function of the kernel tells.
        kernel = call.weight.detach().clone().requires_grad_()
        again = logits_of(ModelCopy(self._model)(inputs, {_weight(observed.module): kernel}))
        return why_curved(again, kernel)

    # --------------------------------------------------------------------------------------- once, on the first batch

    def _certify(self, layers: dict[str, Calls], logits: Tensor, inputs: Any, loss: LossDerivatives) -> None:
        certify_reach(layers, logits)
        paths = self._certify_paths(layers, logits, inputs)
        self._num_columns = loss.curvature.num_columns
        self._sampled = is_sampled(self._num_columns, self._tolerance)
        infos = {}
        for name, calls in layers.items():
            observed, call = calls[0]
            self._grams[name] = weight_gram(call.weight, call.geometry.groups, self._options.diagonal)
            infos[name] = LayerInfo(
                name=name,
                kind=type(observed.module).__name__,
                num_filters=call.weight.shape[0],
                patch_length=call.weight[0].numel(),
                groups=call.geometry.groups,
                classifier=self._classifier[0],
                method="closed_form",
                exact=True,
                reason="",
                kernel="parameter" if is_own_weight(call, observed.module) else "effective",
                deviation=paths[name],
                multiplications=self._multiplications(call) + self._num_columns * self._grams[name].numel(),
                memory=2 * 8 * self._grams[name].numel(),
            )
        self.layers = infos

    def _multiplications(self, call: ConvolutionCall, columns: int = 1) -> int:
        groups, filters, length = call.geometry.groups, call.weight.shape[0], call.weight[0].numel()
        positions = call.output[0].numel() // filters
        diagonal = self._options.diagonal
        return groups * min(contraction_costs(positions, length, filters // groups, columns, diagonal))

    def _certify_paths(self, layers: dict[str, Calls], logits: Tensor, inputs: Any) -> dict[str, float]:
        """Compare gradients at the kernels with autograd's through the whole model, for all layers in one pass."""
        kernels: dict[nn.Parameter, Tensor] = {}
        parameters: dict[str, nn.Parameter] = {}
        for name, calls in layers.items():
            observed, call = calls[0]
            if is_own_weight(call, observed.module):
                parameters[name] = _weight(observed.module)
                kernels[parameters[name]] = call.weight.detach().clone().requires_grad_()
        # On a copy of its own: a forward that writes to its weights would spoil the graph of the observed pass.
        again = logits_of(ModelCopy(self._model)(inputs, kernels))
        u = random_like(logits)
        found: dict[nn.Parameter, Tensor | None] = dict.fromkeys(kernels)
        if kernels and again.requires_grad:
            gradients = torch.autograd.grad(again, list(kernels.values()), u, allow_unused=True)
            found = dict(zip(kernels, gradients, strict=True))
        pulled = iter(pull_back(logits, nodes_of(layers), u))
        deviations = {}
        for name, calls in layers.items():
            expected = kernel_gradient(calls, [next(pulled) for _ in calls])
            deviations[name] = certify_path(name, found[parameters[name]], expected) if name in parameters else 0.0
        return deviations


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


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _certify_deterministic(first: Tensor, second: Tensor) -> None:
    scale = first.abs().amax()
    if not float((first - second).abs().amax()) <= 1e3 * torch.finfo(first.dtype).eps * float(scale):
        raise LayerSelectionError(
            "Two forward passes on the same samples give different logits in evaluation mode (dropout without "
            "training=self.training? noise in the forward? statistics of the batch?), so there is no one loss to take "
            "the Hessian of."
        )
