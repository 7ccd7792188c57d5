"""How a layer is measured, and whether its numbers are the Hessian's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

# The reason of a layer whose numbers estimate the whole Hessian, with standard errors.
SAMPLED = "classes without much mass are sampled"


@dataclass(frozen=True)
class LayerInfo:
    """How a layer is measured; batches measured later may change it.

    Attributes:
        name: of the module, without ``_orig_mod.``, which ``torch.compile`` adds.
        kind: name of the module's class.
        num_filters: ``S``.
        patch_length: ``D``, the number of weights of one filter.
        groups: ``G``.
        classifier: name of the linear layer that the closed form uses; None under Gauss-Newton, or if the pooled output
            of the layer is the logits.
        method: ``"closed_form"``: the Hessian; ``"gauss_newton"``: its Gauss-Newton part, which is the whole Hessian if
            ``exact``; ``"gauss_newton+hutchinson"``: that part, and an estimate of the rest.
        exact: whether the numbers are the Hessian's.
        reason: why they are not; empty if they are.
        kernel: ``"parameter"`` if derivatives are with respect to the layer's weight; ``"effective"`` if the layer
            computes the kernel it applies (parametrised, standardised) and derivatives are with respect to that kernel.
        deviation: largest relative deviation that the certificates have seen, some rounding errors at most.
        backward_passes: per batch, shared by all layers; zero under the closed form. An upper bound if classes are
            sampled.
        multiplications: per sample, in addition to passes through the model.
        memory: bytes for the sums of block traces, those of a batch, and the Gram matrix of the filters.
    """

    name: str
    kind: str
    num_filters: int
    patch_length: int
    groups: int
    classifier: str | None
    method: Literal["closed_form", "gauss_newton", "gauss_newton+hutchinson"]
    exact: bool
    reason: str
    kernel: Literal["parameter", "effective"]
    deviation: float
    backward_passes: int = 0
    multiplications: int = 0
    memory: int = 0


def merged(infos: Sequence[LayerInfo]) -> LayerInfo:
    """Merge what several processes say of one layer: exact only if all say so, with the largest deviation.

    Example:
        >>> info = LayerInfo("conv", "Conv2d", 4, 9, 1, "fc", "closed_form", True, "", "parameter", 1e-7)
        >>> merged([info, replace(info, exact=False, reason="why", deviation=2e-7)]).reason
        'why'
    """
    least_exact = min(infos, key=lambda info: (info.exact, info.method == "closed_form"))
    return replace(least_exact, deviation=max(info.deviation for info in infos))
