"""One batch in, block traces out: runs the model once, certifies the first batch, chooses a method for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatness.capture.certificate import certify_layer, certify_path, is_own_weight
from lightning_flatness.capture.closed_form import TailDerivatives, certified_head, certified_tail, closed_form_layer
from lightning_flatness.capture.gauss_newton import (
    Calls,
    certify_reach,
    certify_samples,
    gauss_newton_layers,
    kernel_gradient,
    pull_back,
    why_curved,
    why_not_affine,
)
from lightning_flatness.capture.isolation import ModelCopy, isolated
from lightning_flatness.capture.observation import Observation
from lightning_flatness.capture.selection import (
    Execution,
    find_classifier,
    logits_of,
    select_layers,
    trace_execution,
)
from lightning_flatness.capture.tail import random_like
from lightning_flatness.errors import BatchError, FlatnessError, LayerSelectionError, NotClosedFormError, NotExactError
from lightning_flatness.functional import cross_entropy_derivatives, weight_gram
from lightning_flatness.results import LayerInfo


class LayerStatistics(NamedTuple):
    """What one batch adds to the measurement of one layer; sums over samples, so batches and ranks add up."""

    block_traces: Tensor  # (G, S/G, S/G), float64, summed over the samples
    weight_gram: Tensor  # (G, S/G, S/G), float64, times the number of samples
    num_samples: int


class FlatnessObserver:
    """Measures batches of one model, whose weights must stay the same meanwhile.

    The first call finds the layers, and certifies on its batch how each can be measured: by the closed form, where it
    holds; else by the Gauss-Newton method, which is exact where the logits are affine in the layer's weight, and is
    labelled where they are not. :attr:`layers` then describes them. Every call leaves the model, its gradients, buffers
    and modes, the batch and all random states as they were.

    Args:
        model: any module that returns logits ``(N, K)``.
        layers: ``"last"``, ``"all"``, ``"classifier"``, names or glob patterns of convolutions and linear layers.
        loss: ``"cross_entropy"``.
        strict: refuse layers whose number would not be the Hessian's.

    Raises:
        FlatnessError: an unknown loss; on the first call, whatever does not allow a measurement.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> observer = FlatnessObserver(net)
        >>> statistics = observer(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))
        >>> statistics["0"].block_traces.shape, statistics["0"].num_samples
        (torch.Size([1, 4, 4]), 5)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "last",
        loss: str = "cross_entropy",
        strict: bool = False,
    ) -> None:
        check_arguments(layers, loss)
        self.layers: dict[str, LayerInfo] = {}
        self._model = model
        self._wanted = layers
        self._strict = strict
        self._modules: dict[str, nn.Module] = {}
        self._classifier: tuple[str | None, nn.Module | None] = (None, None)
        self._grams: dict[str, Tensor] = {}
        self._samples_apart = False  # certified on the first batch of more than one sample

    def __call__(self, inputs: Any, targets: Tensor | None = None) -> dict[str, LayerStatistics]:
        """Statistics of one batch, by layer.

        Args:
            inputs: for the model: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
            targets: class indices ``(N,)``; needed only by the closed form of a curved activation.

        Raises:
            BatchError: targets that do not fit the logits or are missing where needed, values that are not finite.
            LayerSelectionError: a layer that cannot be measured.
            NotExactError: with ``strict``, a layer that is not exact.
        """
        with isolated(self._model):
            execution = None
            if not self.layers:
                self._copy = ModelCopy(self._model)
                execution = trace_execution(self._model, lambda: self._copy(inputs))
                self._choose(execution)
            with Observation(self._modules, self._classifier[1]) as seen:
                logits = logits_of(self._copy(inputs))
            targets = _check_targets(targets, logits)
            calls = {name: self._calls(name, seen) for name in self._modules}
            if execution is not None:
                _certify_deterministic(execution.logits, logits.detach())
                self._certify(calls, logits, inputs)
            if len(logits) > 1 and not self._samples_apart:
                certify_samples(calls, logits)
                self._samples_apart = True

            probabilities, residual = cross_entropy_derivatives(logits.detach(), targets)
            tails = self._certified_tails(calls, seen, logits, inputs, execution is not None)
            block_traces = {
                name: closed_form_layer(name, calls[name][0][1], tail, probabilities, residual)
                for name, tail in tails.items()
            }
            others = {name: calls[name] for name in calls if name not in tails}
            if others:
                block_traces |= gauss_newton_layers(others, logits, probabilities)
            return {name: self._statistics(name, block_traces[name], len(logits)) for name in self._modules}

    def _choose(self, execution: Execution) -> None:
        classifier = find_classifier(execution)
        names = select_layers(execution, self._wanted, classifier)
        self._modules = {name: execution.modules[name] for name in names}
        self._classifier = (classifier, None if classifier is None else execution.modules[classifier])

    def _calls(self, name: str, seen: Observation) -> Calls:
        if name not in seen.layers:
            raise LayerSelectionError(f"Layer '{name}' ran on the first batch but not on this one.")
        return [(observed, certify_layer(name, observed)) for observed in seen.layers[name]]

    def _statistics(self, name: str, block_traces: Tensor, num_samples: int) -> LayerStatistics:
        if not block_traces.isfinite().all():
            raise BatchError(f"The block traces of layer '{name}' are not finite: activations overflow in this batch.")
        return LayerStatistics(block_traces, self._grams[name] * num_samples, num_samples)

    def _certified_tails(
        self, layers: dict[str, Calls], seen: Observation, logits: Tensor, inputs: Any, first: bool
    ) -> dict[str, TailDerivatives]:
        """The tails of the layers under the closed form, certified on every batch; what fails goes to Gauss-Newton."""
        tails: dict[str, TailDerivatives] = {}
        candidates = [name for name, info in self.layers.items() if info.method == "closed_form"]
        for name, info in self.layers.items():
            if info.method == "gauss_newton" and info.exact and not first:
                self.layers[name] = self._under_gauss_newton(info, "", layers[name], logits, inputs)
        if not candidates:
            return tails
        failures: dict[str, str] = {}
        try:
            head = certified_head(*self._classifier, seen, logits)
        except NotClosedFormError as error:
            failures = dict.fromkeys(candidates, str(error))
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
        for name, reason in failures.items():
            info = self._under_gauss_newton(self.layers[name], reason, layers[name], logits, inputs)
            if info.reason and not first:
                info = replace(
                    info, reason=f"{info.reason} in a later batch; earlier ones count with all their Hessian"
                )
            self.layers[name] = info
        return tails

    def _under_gauss_newton(
        self, info: LayerInfo, no_closed_form: str, calls: Calls, logits: Tensor, inputs: Any
    ) -> LayerInfo:
        certify_samples({info.name: calls}, logits)
        why = self._why_inexact(calls, logits, inputs)
        if self._strict and why:
            raise NotExactError(
                f"Layer '{info.name}': only the Gauss-Newton part of its Hessian can be had ({why}), and strict=True "
                f"asks for exact numbers. The closed form does not hold: {no_closed_form}"
            )
        return replace(info, method="gauss_newton", classifier=None, exact=not why, reason=why)

    # --------------------------------------------------------------------------------------- once, on the first batch

    def _certify(self, layers: dict[str, Calls], logits: Tensor, inputs: Any) -> None:
        certify_reach(layers, logits)
        paths = self._certify_paths(layers, logits, inputs)
        infos = {}
        for name, calls in layers.items():
            observed, call = calls[0]
            self._grams[name] = weight_gram(call.weight, call.geometry.groups)
            info = LayerInfo(
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
            )
            if len(calls) > 1 or call.channel_dimension != 1:
                reason = "it is for a convolution that runs once in a forward pass."
                info = self._under_gauss_newton(info, reason, calls, logits, inputs)
            infos[name] = info
        self.layers = infos

    def _why_inexact(self, calls: Calls, logits: Tensor, inputs: Any) -> str:
        if len(calls) == 1:
            return why_not_affine(calls, logits)
        observed, call = calls[0]
        if not is_own_weight(call, observed.module):
            return "it runs several times with a computed kernel"
        # What one call returns may reach the next, so only the whole model as a function of the kernel tells.
        kernel = call.weight.detach().clone().requires_grad_()
        again = logits_of(ModelCopy(self._model)(inputs, {_weight(observed.module): kernel}))
        return why_curved(again, kernel)

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
        deviations = {}
        for name, calls in layers.items():
            cotangents = pull_back(logits, [observed.output for observed, _ in calls], u)
            expected = kernel_gradient(calls, cotangents)
            deviations[name] = certify_path(name, found[parameters[name]], expected) if name in parameters else 0.0
        return deviations


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def check_arguments(layers: str | Sequence[str], loss: str) -> None:
    """Refuse what can be refused before any model is seen.

    Raises:
        FlatnessError: an unknown loss, or no layers.
    """
    if loss != "cross_entropy":
        raise FlatnessError(f"loss={loss!r} is not known; this version measures loss='cross_entropy'.")
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
        raise FlatnessError(
            f"layers={layers!r}: give 'last', 'all', 'classifier', or names or glob patterns of convolutions and "
            "linear layers."
        )


def _check_targets(targets: Tensor | None, logits: Tensor) -> Tensor | None:
    samples, classes = logits.shape
    if targets is None:
        return None
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise BatchError(
            f"The targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; cross-entropy is measured for "
            "class indices, integers of shape (samples,)."
        )
    if len(targets) != samples:
        raise BatchError(f"The batch has {samples} logits and {len(targets)} targets.")
    targets = targets.clone().long()  # a copy is an ordinary tensor also under inference mode
    if samples and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        raise BatchError(
            f"The targets lie in {int(targets.min())}..{int(targets.max())}, but the model has {classes} classes "
            f"(0..{classes - 1})."
        )
    return targets


def _certify_deterministic(first: Tensor, second: Tensor) -> None:
    scale = first.abs().amax()
    if not float((first - second).abs().amax()) <= 1e3 * torch.finfo(first.dtype).eps * float(scale):
        raise LayerSelectionError(
            "Two forward passes on the same batch give different logits in evaluation mode (dropout without "
            "training=self.training? noise in the forward?), so there is no one loss to take the Hessian of."
        )
