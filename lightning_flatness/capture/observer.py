"""One batch in, block traces out: runs the model once, certifies the first batch, applies the closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatness.capture.certificate import certify_head, certify_layer, certify_path, is_own_weight
from lightning_flatness.capture.isolation import call_model, isolated
from lightning_flatness.capture.observation import ConvolutionCall, Observation
from lightning_flatness.capture.selection import (
    Execution,
    find_classifier,
    logits_of,
    select_layers,
    trace_execution,
)
from lightning_flatness.capture.tail import (
    certify_channels,
    certify_curvatures,
    channel_map,
    tail_curvatures,
    tail_slopes,
)
from lightning_flatness.errors import BatchError, FlatnessError, NotClosedFormError
from lightning_flatness.functional import closed_form_block_traces, cross_entropy_derivatives, weight_gram
from lightning_flatness.results import LayerInfo


class LayerStatistics(NamedTuple):
    """What one batch adds to the measurement of one layer; sums over samples, so batches and ranks add up."""

    block_traces: Tensor  # (G, S/G, S/G), float64, summed over the samples
    weight_gram: Tensor  # (G, S/G, S/G), float64, times the number of samples
    num_samples: int


class FlatnessObserver:
    """Measures batches of one model, whose weights must stay the same meanwhile.

    The first call finds the classifier and the layers, and certifies on its batch that the closed form is exact for
    them; :attr:`layers` then describes them. Every call leaves the model, its gradients, buffers and modes, the batch
    and all random states as they were.

    Args:
        model: any module that returns logits ``(N, K)``.
        layers: ``"last"``, ``"all"``, names or glob patterns of convolutions.
        loss: ``"cross_entropy"``.

    Raises:
        FlatnessError: an unknown loss; on the first call, whatever does not allow an exact number.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> observer = FlatnessObserver(net)
        >>> statistics = observer(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]))
        >>> statistics["0"].block_traces.shape, statistics["0"].num_samples
        (torch.Size([1, 4, 4]), 5)
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str] = "last", loss: str = "cross_entropy") -> None:
        check_arguments(layers, loss)
        self.layers: dict[str, LayerInfo] = {}
        self._model = model
        self._wanted = layers
        self._modules: dict[str, nn.Module] = {}
        self._classifier: tuple[str, nn.Module] | None = None
        self._channels: dict[str, Tensor] = {}  # c(s) of every layer, -1 where no slope was active so far
        self._grams: dict[str, Tensor] = {}

    def __call__(self, inputs: Any, targets: Tensor | None = None) -> dict[str, LayerStatistics]:
        """Statistics of one batch, by layer.

        Args:
            inputs: for the model: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
            targets: class indices ``(N,)``; not needed where all activations are piecewise linear.

        Raises:
            BatchError: targets that do not fit the logits or are missing where needed, values that are not finite.
            NotClosedFormError, LayerSelectionError: on the first call.
        """
        with isolated(self._model):
            first = not self.layers
            if first:
                execution = trace_execution(self._model, lambda: call_model(self._model, inputs))
                self._prepare(execution)
            name, classifier = self._classifier or (None, None)
            with Observation(self._modules, classifier) as seen:
                output = call_model(self._model, inputs)
            logits = logits_of(output)
            if first:
                _certify_deterministic(execution.logits, logits.detach())
            features = logits if classifier is None else seen.features
            if features is None:
                raise NotClosedFormError(f"The classifier '{name}' ran on the first batch but not on this one.")
            features = _flat_features(features)
            weight, bias = _linear_map(classifier, features)
            if first:
                certify_head(name, features.detach(), weight, bias, seen.classifier_output, logits.detach())
            targets = _check_targets(targets, logits)
            return {
                layer: self._measure(layer, seen, inputs, features, weight, logits.detach(), targets)
                for layer in self._modules
            }

    def _prepare(self, execution: Execution) -> None:
        classifier = find_classifier(execution)
        names = select_layers(execution, self._wanted, classifier)
        self._modules = {name: execution.modules[name] for name in names}
        if classifier is not None:
            self._classifier = (classifier, execution.modules[classifier])

    def _measure(
        self,
        name: str,
        seen: Observation,
        inputs: Any,
        features: Tensor,
        weight: Tensor,
        logits: Tensor,
        targets: Tensor | None,
    ) -> LayerStatistics:
        if name not in seen.layers:
            raise NotClosedFormError(f"Layer '{name}' ran on the first batch but not on this one.")
        observed = seen.layers[name]
        call = certify_layer(name, observed)
        slopes = tail_slopes(name, features, observed.output)
        curvatures, deviation = self._certified_curvatures(name, features, observed.output, slopes)
        channels = self._channels[name]
        columns = weight[:, channels.clamp_min(0)] * (channels >= 0)
        slopes = slopes.detach()
        if name not in self.layers:
            own = is_own_weight(call, observed.module)
            if own:
                deviation = max(deviation, self._certify_path(name, inputs, observed.module, call, slopes, columns))
            self._grams[name] = weight_gram(call.weight, call.geometry.groups)
            self.layers[name] = _describe(name, observed.module, call, own, deviation, self._classifier)
        probabilities, residual = cross_entropy_derivatives(logits, targets)
        if curvatures is not None and residual is None:
            if bool(curvatures.any()):
                raise BatchError(
                    f"Layer '{name}': the activation after it is curved, so its Hessian depends on the targets, and "
                    "this batch has none. Give batches of (inputs, targets)."
                )
            curvatures = None
        block_traces = closed_form_block_traces(
            call.inputs,
            call.geometry,
            slopes,
            columns,
            probabilities,
            None if curvatures is None else curvatures.detach(),
            residual,
        )
        if not block_traces.isfinite().all():
            raise BatchError(f"The block traces of layer '{name}' are not finite: activations overflow in this batch.")
        return LayerStatistics(block_traces, self._grams[name] * len(logits), len(logits))

    def _certified_curvatures(
        self, name: str, features: Tensor, output: Tensor, slopes: Tensor
    ) -> tuple[Tensor | None, float]:
        """Curvatures; meanwhile ``c(s)`` is learned, and the tail certified, until every channel has been active."""
        known = self._channels.get(name)
        channels = known
        if known is None or bool((known < 0).any()):
            found = channel_map(features, output, slopes)
            channels = found if known is None else torch.where(known >= 0, known, found)
        if channels is None or (known is not None and torch.equal(channels, known)):
            return tail_curvatures(name, slopes, output), 0.0
        first = certify_channels(name, features, output, slopes, channels)
        curvatures = tail_curvatures(name, slopes, output)
        second = certify_curvatures(name, features, output, slopes, curvatures, channels)
        self._channels[name] = channels
        return curvatures, max(first, second)

    def _certify_path(
        self, name: str, inputs: Any, module: nn.Module, call: ConvolutionCall, slopes: Tensor, columns: Tensor
    ) -> float:
        # By identity: a tied weight has one name, which need not be this layer's.
        parameter = next(key for key, value in self._model.named_parameters() if value is module.weight)
        kernel = call.weight.detach().clone().requires_grad_()
        logits = logits_of(call_model(self._model, inputs, {parameter: kernel}))
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        u = u - u.mean(1, keepdim=True)
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits, kernel, u, allow_unused=True)
        return certify_path(name, gradient, call, slopes, columns, u)


def check_arguments(layers: str | Sequence[str], loss: str) -> None:
    """Refuse what can be refused before any model is seen.

    Raises:
        FlatnessError: an unknown loss, or no layers.
    """
    if loss != "cross_entropy":
        raise FlatnessError(f"loss={loss!r} is not known; this version measures loss='cross_entropy'.")
    if not layers or not all(isinstance(pattern, str) and pattern for pattern in layers):
        raise FlatnessError(f"layers={layers!r}: give 'last', 'all', or names or glob patterns of convolutions.")


def _flat_features(features: Tensor) -> Tensor:
    if features.ndim > 2 and set(features.shape[2:]) != {1}:
        raise NotClosedFormError(
            f"The classifier's input has shape {tuple(features.shape)}; the closed form needs one vector for every "
            "sample, as global average pooling gives."
        )
    return features.flatten(1)


def _linear_map(classifier: nn.Module | None, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """``V`` of shape ``(K, m)`` and ``b``; the identity where the features are the logits."""
    if classifier is None:
        return torch.eye(features.shape[1], dtype=features.dtype, device=features.device), None
    weight, bias = classifier.weight, classifier.bias
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1), bias.detach() if isinstance(bias, Tensor) else None


def _check_targets(targets: Tensor | None, logits: Tensor) -> Tensor | None:
    samples, classes = logits.shape
    if targets is None:
        return None
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
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
        raise NotClosedFormError(
            "Two forward passes on the same batch give different logits in evaluation mode (dropout without "
            "training=self.training? noise in the forward?), so there is no one loss to take the Hessian of."
        )


def _describe(
    name: str,
    module: nn.Module,
    call: ConvolutionCall,
    own_weight: bool,
    deviation: float,
    classifier: tuple[str, nn.Module] | None,
) -> LayerInfo:
    return LayerInfo(
        name=name,
        kind=type(module).__name__,
        num_filters=call.weight.shape[0],
        patch_length=call.weight[0].numel(),
        groups=call.geometry.groups,
        classifier=classifier[0] if classifier else None,
        method="closed_form",
        exact=True,
        kernel="parameter" if own_weight else "effective",
        deviation=deviation,
    )
