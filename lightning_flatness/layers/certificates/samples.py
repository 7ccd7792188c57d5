"""Certificate 5, the samples: no sample's logits depend on another sample, so the loss is a mean over samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError
from lightning_flatness.layers.cotangents import Calls, nodes_of, pull_back, pull_back_where_used
from lightning_flatness.model.graph import random_like


def why_out_of_reach(calls: Calls, logits: Tensor) -> dict[str, str]:
    """Return the names of the layers that cannot be measured, each with a reason.

    There are two possible reasons. The logits do not depend on the layer's output, or the output of some call does not
    have one row for every sample.

    Raises:
        BatchError: a gradient of the logits at a layer's output is not finite.
    """
    gradients = iter(pull_back_where_used(logits, nodes_of(calls), torch.ones_like(logits)))
    reasons = {}
    for name, of_layer in calls.items():
        pulled = [next(gradients) for _ in of_layer]
        others = {call.node.shape[0] for call in of_layer} - {len(logits)}
        if all(gradient is None for gradient in pulled):
            reasons[name] = (
                "the logits do not depend on its output through autograd. The forward does not use it, detaches it, or "
                "runs what follows under torch.no_grad(), as TorchScript or in a checkpoint with use_reentrant=True. "
                "Choose another layer with layers=."
            )
            if any(call.module._forward_hooks for call in of_layer):
                reasons[name] += " " + HOOKED
        elif not all(gradient is None or bool(gradient.isfinite().all()) for gradient in pulled):
            raise BatchError(f"Layer '{name}': {NOT_FINITE}")
        elif others:
            runs = "it runs" if len(of_layer) == 1 else "one of its calls runs"
            reasons[name] = (
                f"{runs} on {max(others)} rows for {len(logits)} samples, so derivatives of single samples cannot be "
                "told apart. Rows may be windows or tokens that are folded into the batch, or those of a table that "
                "all samples share. Choose another layer with layers=."
            )
    return reasons


def find_mixing_layer(calls: Calls, logits: Tensor, masks: Iterable[Tensor]) -> str | None:
    """Return the name of the first layer after which samples influence each other; None if there is no such layer.

    Each mask ``(N,)`` selects some samples. The logits of the selected samples must not depend on what the layer
    returned for the other samples. The masks of :func:`~lightning_flatness.functional.separating_masks` test every pair
    of samples.

    Raises:
        BatchError: a gradient of the logits at a layer's output is not finite.
    """
    for mask in masks:
        pulled = iter(pull_back(logits, nodes_of(calls), random_like(logits) * mask.to(logits)[:, None]))
        for name, of_layer in calls.items():
            of_others = [next(pulled)[~mask] for _ in of_layer]
            if any(bool(gradient.any()) for gradient in of_others):
                if not all(bool(gradient.isfinite().all()) for gradient in of_others):
                    raise BatchError(f"Layer '{name}': {NOT_FINITE}")
                return name
    return None


HOOKED = (
    "The layer has a forward hook. If the forward uses what the hook keeps (features), let it use what the layer "
    "returns instead: only that is followed."
)
NOT_FINITE = (
    "a derivative of the logits with respect to its output is not finite (NaN or infinity), so there is no Hessian. "
    "An operation after it has no derivative at its input, such as a square root or norm at zero, or acos at 1. "
    "Add an epsilon there, e.g. (x + 1e-12).sqrt(), or leave such samples out."
)


SAMPLES_MIX = (
    "after it, the logits of one sample depend on other samples, so the loss is not a mean over samples. The cause may "
    "be batch statistics in evaluation mode, pairs of samples, or a forward that puts samples in another order. Use "
    "running statistics, a model that takes a pair as one sample, or a forward that keeps the order."
)


def certify_rows(logits: Tensor, rows: int) -> None:
    """Raise a :class:`BatchError` unless there is one row of logits for each of ``rows`` samples.

    A single sample must have two rows, because it is duplicated before the pass (``docs/theory.md``, "Numerics").
    """
    if len(logits) != max(rows, 2):
        returned = f"{len(logits)} row{'s' * (len(logits) != 1)}"
        given = f"{rows} samples" if rows > 1 else "1 sample, which is duplicated for measuring"
        raise BatchError(
            f"The model returns {returned} of logits for {given}. The number of samples is the length of the targets. "
            "Without targets, or if the inputs are a single tensor that no step has passed on, it is the length of the "
            "longest input. If a sample gives several rows (crops, two views), give as many targets as rows, in a "
            "callback by batch_fn=. A single input tensor must then have that length, too. If the longest input is a "
            "table that all samples share, give targets, or leave the table out of the inputs."
        )
