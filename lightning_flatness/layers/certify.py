"""Certify a recorded forward pass, and decide by which method each layer is measured.

The functions return the certificates of earlier batches, updated by this batch. The certificates have numbers, as in
``docs/theory.md``, "What is certified, and how". ``layers/__init__.py`` explains the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_flatness.errors import LayerSelectionError, NotClosedFormError, naming
from lightning_flatness.functional import ClassCurvature, LossDerivatives, separating_masks
from lightning_flatness.layers.certificates import Known
from lightning_flatness.layers.certificates.affine import Inexact, sums_to_zero, why_curved, why_not_affine
from lightning_flatness.layers.certificates.head import Head, certify_head
from lightning_flatness.layers.certificates.layer import Kernel, certify_layer, is_kernel
from lightning_flatness.layers.certificates.path import certify_path, is_output
from lightning_flatness.layers.certificates.samples import SAMPLES_MIX, find_mixing_layer, why_out_of_reach
from lightning_flatness.layers.certificates.tail import (
    TailDerivatives,
    certify_tail,
    follow_tail,
    why_not_first_order,
)
from lightning_flatness.layers.certified import Calls, Certified, CertifiedLayer, CertifiedPass, Context
from lightning_flatness.layers.convolution import CONVOLVING
from lightning_flatness.layers.cotangents import nodes_of, pull_back
from lightning_flatness.layers.methods import first_description, under_gauss_newton
from lightning_flatness.layers.recording import LayerCall, Pass, in_float32
from lightning_flatness.model.graph import cannot_curve, has_custom_function, random_like
from lightning_flatness.model.logits import logits_of, question_outputs


def certify(
    recorded: Pass, loss: LossDerivatives, known: Certified, context: Context, masks: Tensor
) -> tuple[CertifiedPass, Certified]:
    """Certify a forward pass that this package has made by itself, and decide how each layer is measured.

    Args:
        recorded: the forward pass.
        loss: the derivatives of the loss at the logits of this pass.
        known: the certificates of earlier batches.
        context: the layers to measure, the options, and a function that copies the model.
        masks: ``(M, N)``. Each row selects a set of samples, whose logits must not depend on samples outside the set
            (certificate 5).

    Returns:
        The certified pass, and the certificates updated by this batch.

    Raises:
        LayerSelectionError: a layer cannot be measured, and it may not be left out.
    """
    certificates = _Certificates(recorded, known, context)
    first, left_out = certificates.first, known.left_out_after(recorded)
    calls, kernels = certificates.certified_calls(left_out)
    if first:
        question_outputs(recorded.logits, context.options.loss_function)
        for name, reason in why_out_of_reach(calls, recorded.logits).items():
            certificates.leave_out(name, LayerSelectionError(f"Layer '{name}': {reason}"), calls, left_out)
    recognised = known.paths is not None and known.paths.recognises(_uses(recorded, known.layers), every=None)
    if not recognised:
        deviations = certificates.certified_paths(calls, left_out)
    if first:
        layers = {
            name: first_description(name, calls[name], kernels[name], deviations[name], loss.curvature, context)
            for name in calls
        }
    else:
        layers = {name: replace(known.layers[name], kernel=kernels[name]) for name in calls}
    tails, failures = certificates.certified_tails(calls, layers)
    certified = CertifiedPass(recorded, loss, calls, tails)
    others = certified.others
    if others:  # under the closed form, certificate 2 already tests all pairs of samples
        every_pair = separating_masks(len(recorded.logits)).to(recorded.logits.device)
        tested = every_pair if failures else masks
        while others and (mixing := find_mixing_layer(others, recorded.logits, tested)) is not None:
            certificates.leave_out(mixing, LayerSelectionError(f"Layer '{mixing}': {SAMPLES_MIX}"), calls, left_out)
            others.pop(mixing)
            layers.pop(mixing)
    if not recognised:
        known = replace(known, paths=Known(None, _uses(recorded, layers)))
    invariant = certificates.shift_invariant
    reasons, affine = certificates.why_not_affine(others, layers, invariant or sums_to_zero(loss.residual))
    if isinstance(loss.curvature, ClassCurvature):
        exact = {name: others[name] for name, inexact in reasons.items() if inexact is None}
        outputs = frozenset(name for name, of in exact.items() if is_output(of, recorded.logits, invariant))
        certified = replace(certified, outputs=outputs)
    for name, inexact in reasons.items():
        failure = failures.get(name, "")
        layers[name] = under_gauss_newton(layers[name], certified, inexact, failure, context.options, first)
    return certified, replace(known, layers=layers, left_out=left_out, affine=affine)


def certify_observed(
    recorded: Pass, loss_at: Callable[[Tensor], LossDerivatives], known: Certified, context: Context
) -> tuple[CertifiedPass, Certified]:
    """Certify a forward pass that was observed: one of the user's, or one that runs in the same way.

    The recorded autograd graph reaches from the layers to the classifier's input, not to the logits. So every layer
    must already be measured by the closed form, or its output must be the logits. In half precision, the tails must
    have the same operations as in the first observed pass in half precision. The logits are then computed again in
    float32, from the classifier's input.

    Args:
        recorded: the observed forward pass.
        loss_at: returns the derivatives of the loss at given logits.
        known: the certificates of the trial (``trial.py``) and of earlier observed batches.
        context: the layers to measure, the options, and a function that copies the model.

    Returns:
        The certified pass, and the certificates updated by this batch.

    Raises:
        FlatnessError: a certificate fails.
    """
    certificates = _Certificates(recorded, known, context)
    calls, kernels = certificates.certified_calls({})
    if known.paths is None or not known.paths.recognises(_uses(recorded, known.layers), every=None):
        raise LayerSelectionError("a layer's weight is used outside the layer, or by other functions than before")
    head = certificates.certified_head()
    layers, tails = {}, {}
    for name, layer in known.layers.items():
        if len(calls[name]) > 1:
            raise LayerSelectionError(f"layer '{name}' runs more than once, but ran once on the first samples")
        node, tail = calls[name][0].node, layer.tail
        if tail is not None and recorded.half is not None:
            tails[name], tail = follow_tail(node, head, tail)
        elif not layer.is_output:
            tails[name], tail = certify_tail(node, head, None, tail)
        if recorded.half is not None:
            calls[name] = tuple(map(in_float32, calls[name]))
        layers[name] = replace(layer, kernel=kernels[name], tail=tail)
    outputs = frozenset(name for name, layer in layers.items() if layer.is_output)
    known = replace(known, layers=layers, left_out=known.left_out_after(recorded))
    return CertifiedPass(recorded, loss_at(head.logits), calls, tails, outputs), known


def _uses(recorded: Pass, layers: Mapping[str, CertifiedLayer]) -> tuple[tuple[str, str], ...] | None:
    """Return, for every use of a kernel of these layers, the layer's name and the function that took the kernel.

    Return None if a parameter that is a layer's kernel has other uses than the calls of the layer. Certificate 4 then
    runs on every batch, because another use may matter on some samples only.
    """
    for name, layer in layers.items():
        functions = [function for used, function in recorded.kernel_uses if used == name]
        if layer.info.kernel == "parameter" and (
            len(functions) != len(recorded.calls[name]) or not {*functions} <= CONVOLVING_NAMES
        ):
            return None
    return tuple(use for use in recorded.kernel_uses if use[0] in layers)


@dataclass(frozen=True)
class _Certificates:
    """Runs the certificates on one forward pass. ``known`` has the certificates of earlier batches."""

    recorded: Pass
    known: Certified
    context: Context

    @property
    def first(self) -> bool:
        """Whether these are the first samples of the measurement."""
        return not self.known.layers

    @property
    def shift_invariant(self) -> bool:
        """Whether the loss stays the same if a number is added to all logits of a sample."""
        return self.context.options.loss_function.shift_invariant

    def leave_out(self, name: str, error: LayerSelectionError, calls: Calls, left_out: dict[str, str]) -> None:
        """Move a layer that cannot be measured from ``calls`` to ``left_out``, or raise ``error``.

        A layer may be left out only on the first samples, with ``layers="all"``, and if at least one other layer
        remains.
        """
        left = self.context.selection.modules.keys() - left_out.keys()
        if not self.first or self.context.options.layers != "all" or len(left) == 1:
            raise error
        left_out[name] = str(error)
        calls.pop(name, None)

    def certified_calls(self, left_out: dict[str, str]) -> tuple[Calls, dict[str, Known[Kernel]]]:
        """Certify that every layer returns the output of a single convolution; return the layers' calls and kernels."""
        calls: Calls = {}
        kernels: dict[str, Known[Kernel]] = {}
        samples = len(self.recorded.logits)
        for name in self.known.layers or self.context.selection.modules:
            if name not in self.recorded.calls:
                raise LayerSelectionError(
                    f"Layer '{name}' ran on the first batch but not on this one, so its Hessian is not a mean over all "
                    "samples. Take it out of layers=."
                )
            of_layer = self.recorded.calls[name]
            try:
                with naming(name):
                    kernels[name] = self._certified_kernel(of_layer, self.known.layers.get(name))
                    if not self.first and any(call.node.shape[0] != samples for call in of_layer):
                        raise LayerSelectionError(
                            "it runs on some samples of this batch only, e.g. because of routing, so derivatives of "
                            "single samples cannot be told apart. Choose another layer with layers=."
                        )
            except LayerSelectionError as error:
                self.leave_out(name, error, calls, left_out)
            else:
                calls[name] = of_layer
        return calls, kernels

    def _certified_kernel(self, calls: Sequence[LayerCall], layer: CertifiedLayer | None) -> Known[Kernel]:
        """Certify that the calls of a layer apply one kernel (certificate 1), and return the kernel.

        ``layer`` has the layer's certificates after earlier batches; None on the first samples.
        """

        def unchanged(weight: Tensor) -> bool:
            groups = calls[0].convolution.geometry.groups
            return layer is not None and layer.gram.equal(self.context.gram(weight, groups))

        half = self.recorded.half is not None
        return certify_layer(calls, None if layer is None else layer.kernel, unchanged, half)

    def certified_paths(self, calls: Calls, left_out: dict[str, str]) -> dict[str, float]:
        """Run certificate 4 on all layers together, and return the deviation that :func:`certify_path` finds for each.

        A layer that computes its kernel from a parameter is not tested. The deviation of such a layer is set to zero.
        """
        parameters = self.context.selection.parameters
        own = {name: p for name, p in parameters.items() if name in calls and is_kernel(p, calls[name][0])}
        u = random_like(self.recorded.logits)
        gradients = self._gradients(own, u)
        pulled = iter(pull_back(self.recorded.logits, nodes_of(calls), u))
        deviations = dict.fromkeys(calls, 0.0)
        for name, of_layer in list(calls.items()):
            cotangents = [next(pulled) for _ in of_layer]
            try:
                if name in own:
                    with naming(name):
                        deviations[name] = certify_path(gradients[name], of_layer, cotangents)
            except LayerSelectionError as error:
                self.leave_out(name, error, calls, left_out)
        return deviations

    def _gradients(self, parameters: Mapping[str, nn.Parameter], u: Tensor) -> dict[str, Tensor | None]:
        """Run a copy of the model, and return the gradient of ``<u, logits>`` with respect to each parameter.

        The gradient is None for a parameter on which the logits do not depend.
        """
        copy = self.context.copy()
        kernels = [copy.copy_of(parameter).requires_grad_() for parameter in parameters.values()]
        again = logits_of(copy(self.recorded.inputs))
        if not kernels or not again.requires_grad:
            return dict.fromkeys(parameters)
        return dict(zip(parameters, torch.autograd.grad(again, kernels, u, allow_unused=True), strict=True))

    def certified_head(self) -> Head:
        """Certify that the logits are an affine map of the classifier's input (certificate 3), and return this map."""
        selection = self.context.selection
        with naming(selection.classifier_name or "", "Classifier"):
            return certify_head(selection.classifier, self.recorded, self.shift_invariant)

    def certified_tails(
        self, calls: Calls, layers: dict[str, CertifiedLayer]
    ) -> tuple[dict[str, TailDerivatives], dict[str, str]]:
        """Run certificates 2 and 3 on the layers that are measured by the closed form so far.

        Return two dictionaries, keyed by layer name. The first has the derivatives of the certified tails, the second
        the reason for every layer that fails. ``layers`` is updated with the certified tails and deviations.
        """
        candidates = [name for name, layer in layers.items() if layer.info.method == "closed_form"]
        if not candidates:
            return {}, {}
        try:
            head = self.certified_head()
        except NotClosedFormError as error:
            return {}, dict.fromkeys(candidates, str(error))
        failures = {
            name: "the layer is not a convolution that runs once in a forward pass."
            for name in candidates
            if len(calls[name]) > 1 or calls[name][0].convolution.channel_dimension != 1
        }
        failures |= dict.fromkeys(self._rounded({n: calls[n] for n in candidates}), f"{Inexact.ROUNDED.value}.")
        if self.first:
            names = [name for name in candidates if name not in failures]
            reasons = why_not_first_order(head.features, [calls[name][0].node for name in names])
            failures |= {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
        tails = {}
        for name in candidates:
            if name not in failures:
                layer = layers[name]
                try:
                    tails[name], tail = certify_tail(calls[name][0].node, head, self.recorded.logits, layer.tail)
                except NotClosedFormError as error:
                    failures[name] = str(error)
                else:
                    layers[name] = replace(layer.with_deviation(tail.value.deviation, float(head.deviation)), tail=tail)
        return tails, failures

    def why_not_affine(
        self, calls: Calls, layers: Mapping[str, CertifiedLayer], up_to_shift: bool
    ) -> tuple[dict[str, Inexact | None], Known[None] | None]:
        """Return why the logits are not affine in the kernel of each layer, and the updated ``known.affine``.

        The reason is None if the logits are affine. Layers that failed this test on earlier batches are left out. The
        functions in the graph may show that all second derivatives are zero. Then layers that run once are tested only
        on the first samples and on one of sixteen batches. That finds hooks on tensors, which the graph does not show.
        """
        logits, known = self.recorded.logits, self.known.affine
        checked = {name: of_layer for name, of_layer in calls.items() if layers[name].inexact in NOT_LABELLED}
        rounded = self._rounded(checked)
        once = {name: of for name, of in checked.items() if len(of) == 1 and name not in rounded}
        fingerprint = CANNOT_CURVE if checked and not self.first and cannot_curve(logits) else None
        if known is not None and known.recognises(fingerprint):
            reasons: dict[str, Inexact | None] = dict.fromkeys(once)
            known = known.again()
        else:
            reasons = why_not_affine(once, logits, up_to_shift)
            known = Known(None, CANNOT_CURVE) if once else known
        reasons |= rounded
        repeated = {name: of_layer for name, of_layer in checked.items() if name not in reasons}
        return reasons | {name: self._why_polynomial(name, of, up_to_shift) for name, of in repeated.items()}, known

    def _why_polynomial(self, name: str, calls: Sequence[LayerCall], up_to_shift: bool) -> Inexact | None:
        """Return why the logits are not affine in the kernel of a layer that runs several times; None if they are."""
        parameter = self.context.selection.parameters.get(name)
        if parameter is None or not is_kernel(parameter, calls[0]):
            return Inexact.COMPUTED_KERNEL
        # The output of one call may be the input of the next, which makes the logits a polynomial in the kernel. So the
        # whole model is tested as a function of the kernel.
        kernel = calls[0].convolution.weight.detach().clone().requires_grad_()
        logits = logits_of(self.context.copy()(self.recorded.inputs, {parameter: kernel}))
        return why_curved(logits, kernel, up_to_shift)

    def _rounded(self, calls: Calls) -> dict[str, Inexact | None]:
        """Return ``Inexact.ROUNDED`` for every layer before a custom function, if the forward enables autocast itself.

        A function with ``custom_bwd`` then enables autocast in its backward pass, too.
        """
        candidates = calls.items() if self.recorded.enables_autocast else ()
        nodes = {name: [call.node for call in of_layer] for name, of_layer in candidates}
        return {name: Inexact.ROUNDED for name in nodes if has_custom_function(self.recorded.logits, nodes[name])}


# Values of `CertifiedLayer.inexact` of a layer in whose kernel the logits have been affine so far.
NOT_LABELLED = (None, Inexact.SAMPLED)
CANNOT_CURVE = "no function of the graph can curve"
CONVOLVING_NAMES = frozenset(function.__name__ for function in CONVOLVING)
