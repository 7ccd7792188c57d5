"""From a recorded forward pass, and what is known, to a certified one, and what is known then. Nothing else changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import FlatnessError, LayerSelectionError, NotClosedFormError
from lightning_flatness.functional import LossDerivatives, separating_masks
from lightning_flatness.layers.certificates.affine import Inexact, why_curved, why_not_affine
from lightning_flatness.layers.certificates.head import Head, certify_head
from lightning_flatness.layers.certificates.layer import (
    Kernel,
    certify_kernel,
    certify_layer,
    is_own_weight,
    own_weight,
)
from lightning_flatness.layers.certificates.path import certify_path
from lightning_flatness.layers.certificates.samples import SAMPLES_MIX, find_mixing_layer, why_out_of_reach
from lightning_flatness.layers.certificates.tail import Tail, TailDerivatives, certify_tail, why_not_first_order
from lightning_flatness.layers.certified import Calls, Certified, CertifiedLayer, CertifiedPass, Context
from lightning_flatness.layers.cotangents import nodes_of, pull_back
from lightning_flatness.layers.known import Known
from lightning_flatness.layers.methods import first_description, under_gauss_newton
from lightning_flatness.layers.recording import LayerCall, Pass
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.graph import cannot_curve, random_like
from lightning_flatness.model.logits import logits_of

# Tails by layer: their derivatives on this batch, and what is known of them.
Tails = dict[str, tuple[TailDerivatives, Known[Tail]]]


def certify(
    recorded: Pass, loss: LossDerivatives, known: Certified, context: Context, masks: Tensor
) -> tuple[CertifiedPass, Certified]:
    """Certify a forward pass of our own, with all certificates, and how its layers are to be measured.

    Raises:
        LayerSelectionError: a layer that cannot be measured, or samples mix.
        NotExactError: with ``strict``, a layer is not exact.
    """
    first = not known.layers
    left_out = dict(known.left_out)
    calls, kernels = _certified_calls(recorded, len(recorded.logits), known, context, left_out)
    if first:
        for name, reason in why_out_of_reach(calls, recorded.logits).items():
            _leave_out(name, LayerSelectionError(f"Layer '{name}': {reason}"), calls, left_out, context)
    if known.paths is None or not known.paths.recognises(_uses(recorded, calls), every=None):
        deviations = _certified_paths(recorded, calls, context, left_out if first else None)
        known = replace(known, paths=Known(None, _uses(recorded, calls)))
    if first:
        layers = {
            name: first_description(name, calls[name], kernels[name], deviations[name], loss.curvature, context)
            for name in calls
        }
    else:
        layers = {name: replace(known.layers[name], kernel=kernels[name]) for name in calls}
    tails, deviation, failures = _certified_tails(recorded, calls, layers, context, first)
    layers |= {name: _with_tail(layers[name], tail, deviation) for name, (_, tail) in tails.items()}
    others = {name: of_layer for name, of_layer in calls.items() if name not in tails}
    if others:  # tails are certified for all samples
        every_pair = separating_masks(len(recorded.logits)).to(recorded.logits.device)
        mixing = find_mixing_layer(others, recorded.logits, every_pair if failures else masks)
        if mixing is not None:
            raise LayerSelectionError(f"Layer '{mixing}': {SAMPLES_MIX}")
    reasons, affine = _why_not_affine(recorded, others, layers, known.affine, context, first)
    for name, inexact in reasons.items():
        failure = failures.get(name, "")
        layers[name] = under_gauss_newton(layers[name], calls[name], inexact, failure, loss.curvature, context, first)
    known = replace(known, layers=layers, left_out=left_out, affine=affine)
    derivatives = {name: of_batch for name, (of_batch, _) in tails.items()}
    return CertifiedPass(recorded, loss, calls, derivatives), known


def certify_observed(
    recorded: Pass, loss: LossDerivatives, known: Certified, context: Context
) -> tuple[CertifiedPass, Certified]:
    """Certify a forward pass of the user's, whose graph ends at the classifier; no layer changes its method.

    Raises:
        FlatnessError: it is not as in the passes of our own.
    """
    if known.paths is None or not known.paths.recognises(_uses(recorded, known.layers), every=None):
        raise LayerSelectionError("the forward does something else with a kernel than before")
    calls, kernels = _certified_calls(recorded, len(recorded.logits), known, context, {})
    head = _certified_head(recorded, context)
    layers, tails = {}, {}
    for name, layer in known.layers.items():
        tails[name], tail = certify_tail(calls[name][0].node, head, None, layer.tail)
        layers[name] = replace(layer, kernel=kernels[name], tail=tail)
    return CertifiedPass(recorded, loss, calls, tails), replace(known, layers=layers)


def _uses(recorded: Pass, layers: Collection[str]) -> tuple[tuple[str, str], ...]:
    """The functions that take the kernels of these layers."""
    return tuple(use for use in recorded.kernel_uses if use[0] in layers)


@contextmanager
def naming(name: str, kind: str = "Layer") -> Iterator[None]:
    """Add the name of a layer to the errors of certificates."""
    try:
        yield
    except FlatnessError as error:
        raise type(error)(f"{kind} '{name}': {error}") from error


def _leave_out(name: str, error: LayerSelectionError, calls: Calls, left_out: dict[str, str], context: Context) -> None:
    """With ``layers="all"`` do without a layer that cannot be measured on the first samples; else that is an error."""
    if context.options.layers != "all" or len(context.selection.modules) - len(left_out) == 1:
        raise error
    left_out[name] = str(error)
    calls.pop(name, None)


def _certified_calls(
    recorded: Pass, samples: int, known: Certified, context: Context, left_out: dict[str, str]
) -> tuple[Calls, dict[str, Known[Kernel]]]:
    """The calls of every layer, certified to be one convolution each, of one kernel."""
    calls: Calls = {}
    kernels: dict[str, Known[Kernel]] = {}
    for name in known.layers or context.selection.modules:
        if name not in recorded.calls:
            raise LayerSelectionError(
                f"Layer '{name}' ran on the first batch but not on this one, so its Hessian is not a mean over all "
                "samples. Take it out of layers=."
            )
        layer = known.layers.get(name)
        try:
            with naming(name):
                kernels[name] = _certified_kernel(recorded.calls[name], layer, context)
                if layer is not None and any(call.node.shape[0] != samples for call in recorded.calls[name]):
                    raise LayerSelectionError(
                        "it runs on some samples of this batch only (routing?), so derivatives of single samples "
                        "cannot be told apart. Choose another layer with layers=."
                    )
        except LayerSelectionError as error:
            if known.layers:
                raise
            _leave_out(name, error, calls, left_out, context)
        else:
            calls[name] = recorded.calls[name]
    return calls, kernels


def _certified_kernel(calls: Sequence[LayerCall], layer: CertifiedLayer | None, context: Context) -> Known[Kernel]:
    kernel = None if layer is None else layer.kernel
    for call in calls:
        certify_layer(call, kernel)
    groups = calls[0].convolution.geometry.groups

    def unchanged(weight: Tensor) -> bool:
        return layer is not None and layer.gram.equal(context.gram(weight, groups))

    return certify_kernel(calls, kernel, unchanged)


def _certified_paths(
    recorded: Pass, calls: Calls, context: Context, left_out: dict[str, str] | None
) -> dict[str, float]:
    """Deviations of gradients at the kernels from autograd's through the whole model, for all layers in one pass."""
    own = {name: own_weight(of_layer[0].module) for name, of_layer in calls.items() if is_own_weight(of_layer[0])}
    u = random_like(recorded.logits)
    gradients = _gradients(list(own.values()), recorded.inputs, u, context.copy())
    pulled = iter(pull_back(recorded.logits, nodes_of(calls), u))
    deviations = {}
    for name, of_layer in list(calls.items()):
        cotangents = [next(pulled) for _ in of_layer]
        deviations[name] = 0.0
        if name not in own:
            continue
        try:
            with naming(name):
                deviations[name] = certify_path(gradients[own[name]], of_layer, cotangents)
        except LayerSelectionError as error:
            if left_out is None:
                raise
            _leave_out(name, error, calls, left_out, context)
    return deviations


def _gradients(
    parameters: list[nn.Parameter], inputs: Any, u: Tensor, copy: ModelCopy
) -> dict[nn.Parameter, Tensor | None]:
    """Of the sum of ``u`` times the logits, by autograd through a copy of the model."""
    kernels = {parameter: copy.copy_of(parameter).requires_grad_() for parameter in parameters}
    again = logits_of(copy(inputs))
    if not kernels or not again.requires_grad:
        return dict.fromkeys(kernels)
    gradients = torch.autograd.grad(again, list(kernels.values()), u, allow_unused=True)
    return dict(zip(kernels, gradients, strict=True))


def _certified_head(recorded: Pass, context: Context) -> Head:
    selection, shift_invariant = context.selection, context.options.loss_function.shift_invariant
    with naming(selection.classifier_name or "", "Classifier"):
        return certify_head(selection.classifier, recorded, shift_invariant)


def _certified_tails(
    recorded: Pass, calls: Calls, layers: Mapping[str, CertifiedLayer], context: Context, first: bool
) -> tuple[Tails, float, dict[str, str]]:
    """Tails of the layers under the closed form, the head's deviation, and why others are not under it any more."""
    candidates = [name for name, layer in layers.items() if layer.info.method == "closed_form"]
    tails: Tails = {}
    if not candidates:
        return tails, 0.0, {}
    try:
        head = _certified_head(recorded, context)
    except NotClosedFormError as error:
        return tails, 0.0, dict.fromkeys(candidates, str(error))
    failures = {
        name: "it is for a convolution that runs once in a forward pass."
        for name in candidates
        if len(calls[name]) > 1 or calls[name][0].convolution.channel_dimension != 1
    }
    if first:
        names = [name for name in candidates if name not in failures]
        reasons = why_not_first_order(head.features, [calls[name][0].node for name in names])
        failures |= {name: str(reason) for name, reason in zip(names, reasons, strict=True) if reason is not None}
    for name in candidates:
        if name not in failures:
            try:
                tails[name] = certify_tail(calls[name][0].node, head, recorded.logits, layers[name].tail)
            except NotClosedFormError as error:
                failures[name] = str(error)
    return tails, float(head.deviation), failures


def _with_tail(layer: CertifiedLayer, tail: Known[Tail], of_head: float) -> CertifiedLayer:
    deviation = max(layer.info.deviation, tail.value.deviation, of_head)
    return replace(layer, tail=tail, info=replace(layer.info, deviation=deviation))


def _why_not_affine(
    recorded: Pass,
    calls: Calls,
    layers: Mapping[str, CertifiedLayer],
    known: Known[None] | None,
    context: Context,
    first: bool,
) -> tuple[dict[str, Inexact | None], Known[None]]:
    """Why the logits are not certified to be affine in the kernels of layers that are not labelled inexact yet.

    On the first samples that is shown by numbers. After that it is enough that no function of the graph can have a
    second derivative. Hooks on tensors do not show there, so the numbers are taken again and again.
    """
    checked = {name: of_layer for name, of_layer in calls.items() if layers[name].inexact in (None, Inexact.SAMPLED)}
    once = {name: of_layer for name, of_layer in checked.items() if len(of_layer) == 1}
    fingerprint = CANNOT_CURVE if checked and not first and cannot_curve(recorded.logits) else None
    if known is not None and known.recognises(fingerprint):
        reasons: dict[str, Inexact | None] = dict.fromkeys(once)
        known = known.again()
    else:
        reasons, known = why_not_affine(once, recorded.logits), Known(None, CANNOT_CURVE)
    repeated = {name: of_layer for name, of_layer in checked.items() if name not in once}
    return reasons | {name: _why_polynomial(calls, recorded.inputs, context) for name, calls in repeated.items()}, known


CANNOT_CURVE = "no function of the graph can curve"


def _why_polynomial(calls: Sequence[LayerCall], inputs: Any, context: Context) -> Inexact | None:
    if not is_own_weight(calls[0]):
        return Inexact.COMPUTED_KERNEL
    # What one call returns may reach the next, so only the whole model as a function of the kernel tells.
    kernel = calls[0].convolution.weight.detach().clone().requires_grad_()
    return why_curved(logits_of(context.copy()(inputs, {own_weight(calls[0].module): kernel})), kernel)
