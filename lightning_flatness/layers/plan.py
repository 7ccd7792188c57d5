"""Which layers are measured, and by which method: certified while measuring."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import LayerSelectionError, NotClosedFormError, NotExactError
from lightning_flatness.functional import Curvature, contraction_costs, separating_masks, weight_gram
from lightning_flatness.functional.conditions import same
from lightning_flatness.functional.symmetric import folded, unfolded
from lightning_flatness.layers.affine import (
    Calls,
    certify_samples,
    kernel_gradient,
    nodes_of,
    pull_back,
    why_curved,
    why_not_affine,
    why_out_of_reach,
)
from lightning_flatness.layers.certificate import certify_layer, certify_path, is_known, is_own_weight, own_weight
from lightning_flatness.layers.closed_form import (
    FULL_EVERY,
    KnownTail,
    TailDerivatives,
    certified_head,
    certified_tail,
    spectral_bound,
)
from lightning_flatness.layers.gauss_newton import is_sampled
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.recording import ConvolutionCall, Observation, kernel_sample
from lightning_flatness.layers.selection import Execution, find_classifier, select_layers
from lightning_flatness.layers.tail import why_not_closed_form
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.graph import cannot_curve, random_like
from lightning_flatness.model.logits import logits_of
from lightning_flatness.results import SAMPLED, LayerInfo

# Matrices of every layer while a batch is added: block traces, those of the batch, and the filters' Gram matrix. The
# first and the last are folded, which saves nothing for 16 filters, and a half of them for hundreds.
KEPT = 3


class Plan:
    """The layers of one model that are measured, and how.

    Args:
        model: the network.
        options: what is wanted.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.layers: dict[str, LayerInfo] = {}
        self.left_out: dict[str, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self.classifier: tuple[str | None, nn.Module | None] = (None, None)
        self.folded_grams: dict[str, Tensor] = {}  # inner products of filters, folded
        self.tolerance = 0.0 if options.strict else options.tolerance
        self._model = model
        self._options = options
        self._kernels: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}  # of the kernels
        self._same_kernels: dict[str, tuple[Tensor, int]] = {}  # other tensors that were found equal, with versions
        self._tails: dict[str, KnownTail] = {}
        self._gram_norms: dict[str, Tensor] = {}
        self.begun = False  # set when the first samples have been certified
        self._parts = 0  # of batches, that were certified for Gauss-Newton
        self._num_columns = 0
        self._sampled = False

    def choose(self, execution: Execution) -> None:
        """Find the wanted layers and the classifier among what ran."""
        classifier = find_classifier(execution)
        names = select_layers(execution, self._options.layers, classifier)
        self.modules = {name: execution.modules[name] for name in names}
        self.classifier = (classifier, None if classifier is None else execution.modules[classifier])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights of the layers that have one of their own, by layer."""
        found = {name: dict(module.named_parameters(recurse=False)) for name, module in self.modules.items()}
        return {name: parameters["weight"] for name, parameters in found.items() if "weight" in parameters}

    def calls(self, seen: Observation, samples: int) -> dict[str, Calls]:
        """What the layers did in an observed forward pass, certified to be one convolution each, of one kernel."""
        calls: dict[str, Calls] = {}
        for name in list(self.modules):
            if name not in seen.layers:
                raise LayerSelectionError(
                    f"Layer '{name}' ran on the first batch but not on this one, so its Hessian is not a mean over all "
                    "samples. Take it out of layers=."
                )
            try:
                known = self._same_kernels.get(name)
                calls[name] = [(observed, certify_layer(name, observed, known)) for observed in seen.layers[name]]
                self._certify_kernel(name, calls[name])
                if self.begun and any(observed.output.shape[0] != samples for observed, _ in calls[name]):
                    raise LayerSelectionError(
                        f"Layer '{name}' runs on some samples of this batch only (routing?), so derivatives of single "
                        "samples cannot be told apart. Choose another layer with layers=."
                    )
            except LayerSelectionError as error:
                calls.pop(name, None)
                self._leave_out(name, str(error))
        return calls

    def _certify_kernel(self, name: str, calls: Calls) -> None:
        kernel = self._kernels.setdefault(name, calls[0][1].weight.detach())
        if name not in self._samples:
            self._samples[name] = kernel_sample(kernel)
        for observed, _ in calls:
            if observed.sample is not None and not same(observed.sample, self._samples[name]):
                raise LayerSelectionError(f"Layer '{name}' had another kernel while it ran.")
        known = self._same_kernels.get(name)
        if known is not None and all(is_known(call.weight, known) for _, call in calls):
            return
        if known is not None and any(call.weight is known[0] for _, call in calls):
            # There is no copy to compare with, but the Gram matrix; looked at now, since what is known changes.
            if not torch.equal(self._weight_gram(known[0].detach(), calls[0][1]), self.folded_grams[name]):
                raise LayerSelectionError(f"The kernel of layer '{name}' was written to since the measurement began.")
            self._same_kernels[name] = (known[0], known[0]._version)
            return
        if not all(same(call.weight, kernel) for _, call in calls):
            raise LayerSelectionError(
                f"Layer '{name}' applies another kernel from one call to the next (computed from its input?), so there "
                "is no one kernel to take the Hessian of. Choose another layer with layers=."
            )

    def _weight_gram(self, kernel: Tensor, call: ConvolutionCall) -> Tensor:
        gram = weight_gram(kernel, call.geometry.groups, self._options.diagonal)
        return gram if self._options.diagonal else folded(gram)

    def know_parameters(self) -> None:
        """Keep no copies of kernels that are parameters of the model, but know these again, as they are now."""
        for name, weight in self.parameters().items():
            kernel = self._kernels.get(name)
            if kernel is not None and kernel.shape == weight.shape and torch.equal(kernel, weight):
                self._kernels[name] = weight.detach()
                self._same_kernels[name] = (weight, weight._version)

    def _leave_out(self, name: str, reason: str) -> None:
        """With ``layers="all"`` do without a layer that cannot be measured; else that is an error."""
        if self._options.layers != "all" or self.begun or len(self.modules) == 1:
            raise LayerSelectionError(reason)
        self.left_out[name] = reason
        del self.modules[name]

    def _copy(self) -> ModelCopy:
        return ModelCopy(self._model, self._options.measuring_dtype)

    def gram(self, name: str) -> Tensor:
        """Inner products of a layer's filters, ``(G, S/G, S/G)``, or their diagonal, ``(G, S/G)``."""
        gram, info = self.folded_grams[name], self.layers[name]
        return gram if self._options.diagonal else unfolded(gram, info.num_filters // info.groups)

    def gram_norm(self, name: str, gram: Tensor) -> Tensor:
        """A bound of the spectral norm of the filters' Gram matrix, made when first asked for."""
        if name not in self._gram_norms:
            self._gram_norms[name] = spectral_bound(gram)
        return self._gram_norms[name]

    def begin(self, layers: dict[str, Calls], logits: Tensor, inputs: Any, curvature: Curvature) -> None:
        """Certify layers and their way to the logits on the first samples, and describe them.

        Layers that are left out leave ``layers``, too.

        Raises:
            LayerSelectionError: naming the layer.
        """
        for name, reason in why_out_of_reach(layers, logits).items():
            self._leave_out(name, reason)
            del layers[name]
        paths = self.certify_paths(layers, logits, inputs)
        self._num_columns = curvature.num_columns
        self._sampled = is_sampled(curvature, self.tolerance)
        infos = {}
        for name, calls in layers.items():
            observed, call = calls[0]
            self.folded_grams[name] = self._weight_gram(call.weight, call)
            filters = call.weight.shape[0]
            elements = filters if self._options.diagonal else filters**2 // call.geometry.groups
            infos[name] = LayerInfo(
                name=name,
                kind=type(observed.module).__name__,
                num_filters=filters,
                patch_length=call.weight[0].numel(),
                groups=call.geometry.groups,
                classifier=self.classifier[0],
                method="closed_form",
                exact=True,
                reason="",
                kernel="parameter" if is_own_weight(call, observed.module) else "effective",
                deviation=paths[name],
                multiplications=self._multiplications(call) + self._num_columns * elements,
                memory=KEPT * 8 * elements,
            )
        self.layers = infos

    def _multiplications(self, call: ConvolutionCall, columns: int = 1) -> int:
        groups, filters, length = call.geometry.groups, call.weight.shape[0], call.weight[0].numel()
        positions = call.output[0].numel() // filters
        diagonal = self._options.diagonal
        return groups * min(contraction_costs(positions, length, filters // groups, columns, diagonal))

    def certify_paths(self, layers: dict[str, Calls], logits: Tensor, inputs: Any) -> dict[str, float]:
        """Compare gradients at the kernels with autograd's through the whole model, for all layers in one pass.

        Returns:
            The deviations. Layers that are left out leave ``layers``, too.

        Raises:
            LayerSelectionError: naming a layer whose kernel reaches the logits in another way, too.
        """
        parameters = {
            name: own_weight(calls[0][0].module)
            for name, calls in layers.items()
            if is_own_weight(calls[0][1], calls[0][0].module)
        }
        u = random_like(logits)
        found = self._gradients(list(parameters.values()), inputs, u)
        pulled = iter(pull_back(logits, nodes_of(layers), u))
        deviations = {}
        for name, calls in list(layers.items()):
            cotangents = [next(pulled) for _ in calls]
            deviations[name] = 0.0
            if name not in parameters:
                continue
            expected, squares = kernel_gradient(calls, cotangents), kernel_gradient(calls, cotangents, squares=True)
            try:
                deviations[name] = certify_path(name, found[parameters[name]], expected, squares)
            except LayerSelectionError as error:
                self._leave_out(name, str(error))
                del layers[name]
        return deviations

    def _gradients(self, parameters: list[nn.Parameter], inputs: Any, u: Tensor) -> dict[nn.Parameter, Tensor | None]:
        """Of the sum of ``u`` times the logits, by autograd."""
        # On a copy of its own: a forward that writes to its weights would spoil the graph of the observed pass.
        copy = self._copy()
        kernels = {parameter: copy.copy_of(parameter).requires_grad_() for parameter in parameters}
        again = logits_of(copy(inputs))
        if not kernels or not again.requires_grad:
            return dict.fromkeys(kernels)
        gradients = torch.autograd.grad(again, list(kernels.values()), u, allow_unused=True)
        return dict(zip(kernels, gradients, strict=True))

    def certified_tails(
        self, layers: dict[str, Calls], seen: Observation, logits: Tensor, inputs: Any, masks: Tensor, first: bool
    ) -> dict[str, TailDerivatives]:
        """The tails of the layers under the closed form, certified on every batch; what fails goes to Gauss-Newton.

        Args:
            layers: what they did.
            seen: in this forward pass.
            logits: that came of it.
            inputs: of the model.
            masks: of samples that must not depend on the others (``certify_samples``).
            first: whether nothing has been measured yet.

        Raises:
            LayerSelectionError: samples mix.
            NotExactError: with ``strict``, a layer is not exact.
        """
        tails: dict[str, TailDerivatives] = {}
        failures: dict[str, str] = {}
        candidates = [name for name, info in self.layers.items() if info.method == "closed_form"]
        if candidates:
            try:
                head = certified_head(*self.classifier, seen, logits, self._options.loss_function.shift_invariant)
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
                tails[name] = certified_tail(name, layers[name][0][0], head, logits, self._tails)
            except NotClosedFormError as error:
                failures[name] = str(error)
                continue
            deviation = max(self.layers[name].deviation, tails[name].deviation, float(head.deviation))
            self.layers[name] = replace(self.layers[name], deviation=deviation)
        others = {name: calls for name, calls in layers.items() if name not in tails}
        if others:  # the certificates of the closed form see samples that mix
            certify_samples(others, logits, separating_masks(len(logits)).to(logits.device) if failures else masks)
        checked = [name for name, info in self.layers.items() if name not in tails and info.reason in ("", SAMPLED)]
        self._under_gauss_newton({name: layers[name] for name in checked}, failures, logits, inputs, first)
        return tails

    def tails_up_to_the_classifier(
        self, layers: dict[str, Calls], seen: Observation, logits: Tensor
    ) -> dict[str, TailDerivatives]:
        """The same for a forward pass of which the graph ends at the classifier's input; no layer changes its method.

        Raises:
            NotClosedFormError: a layer or the head is not what the closed form needs.
        """
        head = certified_head(*self.classifier, seen, logits, self._options.loss_function.shift_invariant)
        return {name: certified_tail(name, calls[0][0], head, None, self._tails) for name, calls in layers.items()}

    def _under_gauss_newton(
        self, layers: dict[str, Calls], failures: dict[str, str], logits: Tensor, inputs: Any, first: bool
    ) -> None:
        """Certify on this batch that Gauss-Newton is exact for these layers; label those for which it is not."""
        once = {name: calls for name, calls in layers.items() if len(calls) == 1}
        # The first samples are certified by numbers. After that it is enough that no function of the graph can have a
        # second derivative; only hooks on tensors do not show there, so the numbers are taken again and again.
        if first or self._parts % FULL_EVERY == 0 or not cannot_curve(logits):
            reasons = why_not_affine(once, logits)
        else:
            reasons = dict.fromkeys(once, "")
        self._parts += 1
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
                why = f"{why} for some samples; others may count with all their Hessian"
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
        again = logits_of(self._copy()(inputs, {own_weight(observed.module): kernel}))
        return why_curved(again, kernel)
