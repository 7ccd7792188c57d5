"""Certificate 4, the path: the logits depend on the kernel only through the outputs of its layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.layers.certificates import ROUNDINGS
from lightning_flatness.layers.cotangents import kernel_gradient
from lightning_flatness.layers.recording import LayerCall


def certify_path(gradient: Tensor | None, calls: Sequence[LayerCall], cotangents: Sequence[Tensor]) -> float:
    """Certify that autograd's gradient at the kernel equals the one computed from the cotangents at the layer.

    Both belong to one random combination of logits: the gradient at the kernel, through the whole model, and the
    cotangents at the layer's outputs. A kernel that the model also uses elsewhere (tied weights, a functional call)
    fails here. The returned deviation is relative to the norm of the gradient, or, if its terms cancel, to the norm of
    the terms.
    """
    expected = kernel_gradient(calls, cotangents)
    if gradient is None and bool(expected.any()):
        raise LayerSelectionError(
            "it runs under torch.no_grad() or on detached values, so its Hessian cannot be certified. To freeze it use "
            "requires_grad_(False) on it instead of torch.no_grad() in the forward."
        )
    gradient = torch.zeros_like(expected) if gradient is None else gradient
    terms = kernel_gradient(calls, cotangents, squares=True).sum().sqrt()
    scale = float(torch.stack([expected.norm(), gradient.norm(), terms]).amax())
    deviation = float((gradient - expected).norm() / scale) if scale > 0 else 0.0
    if not deviation <= 10 * ROUNDINGS * torch.finfo(expected.dtype).eps:
        raise LayerSelectionError(
            f"the logits depend on its kernel in another way too (relative deviation {deviation:.1e}): the weight is "
            "shared with another layer, or used again in the forward. Its Hessian is not that of this layer alone; "
            "choose another layer with layers=."
        )
    return deviation
