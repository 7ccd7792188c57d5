"""Describe how a layer is measured.

The *closed form* is a formula for the whole Hessian. It holds if the operations between a layer and the classifier
treat every channel by itself. If certificates show this, a layer is measured by the closed form. When a certificate of
the closed form fails on a batch, the layer is measured by the *Gauss-Newton* method on that batch and on all later
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_flatness.errors import NotExactError
from lightning_flatness.functional import Curvature, contraction_costs
from lightning_flatness.functional.curvature import MANY_CLASSES
from lightning_flatness.functional.weighting import spectral_bound
from lightning_flatness.layers.certificates import Known
from lightning_flatness.layers.certificates.affine import Inexact
from lightning_flatness.layers.certificates.layer import Kernel, is_kernel
from lightning_flatness.layers.certified import CertifiedLayer, CertifiedPass, Context
from lightning_flatness.layers.convolution import Convolution
from lightning_flatness.layers.gauss_newton import is_sampled
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.recording import LayerCall
from lightning_flatness.model.precision import name_of
from lightning_flatness.results import LayerInfo

# The number of float64 matrices of one layer that are in memory while a batch is added. They are the block traces so
# far, the block traces of the batch, and the Gram matrix of the filters.
MATRICES_KEPT = 3
# The number of Gram matrices in a :class:`Weighting`. They have the dtype of the kernel.
WEIGHTING_MATRICES = 2


def first_description(
    name: str,
    calls: Sequence[LayerCall],
    kernel: Known[Kernel],
    deviation: float,
    curvature: Curvature,
    context: Context,
) -> CertifiedLayer:
    """Return the first :class:`CertifiedLayer` of a layer, with a description that assumes that the closed form holds.

    If a certificate of the closed form fails, :func:`under_gauss_newton` changes the description. ``deviation`` is the
    relative deviation that :func:`certify_path` has found.
    """
    call, convolution = calls[0], calls[0].convolution
    groups, filters = convolution.geometry.groups, convolution.weight.shape[0]
    diagonal = context.options.diagonal
    elements = filters if diagonal else filters**2 // groups
    kernel_bytes = convolution.weight.element_size()
    info = LayerInfo(
        name=name,
        kind=type(call.module).__name__,
        num_filters=filters,
        patch_length=convolution.weight[0].numel(),
        groups=groups,
        classifier=context.selection.classifier_name,
        method="closed_form",
        exact=True,
        reason="",
        kernel="parameter" if is_kernel(context.selection.parameters.get(name), call) else "effective",
        deviation=deviation,
        multiplications=_multiplications(convolution, 1, diagonal) + curvature.num_columns * elements,
        memory=elements * (MATRICES_KEPT * 8 + (0 if diagonal else WEIGHTING_MATRICES * kernel_bytes)),
        precision=name_of(convolution.weight.dtype),
        num_classes=curvature.num_classes,
    )
    gram = context.gram(convolution.weight, groups)
    may_leave_out_classes = (
        context.options.class_tolerance > 0 and curvature.num_classes >= MANY_CLASSES and not diagonal
    )
    return CertifiedLayer(info, kernel, gram, spectral_bound(gram.whole()) if may_leave_out_classes else None)


def under_gauss_newton(
    layer: CertifiedLayer,
    certified: CertifiedPass,
    inexact: Inexact | None,
    failure: str,
    options: Options,
    first: bool,
) -> CertifiedLayer:
    """Return a copy of ``layer`` with the description of a layer that is measured by the Gauss-Newton method.

    Args:
        layer: the layer's certificates and its description so far.
        certified: the certified forward pass on the current samples.
        inexact: why the logits are not affine in the layer's kernel; None if they are affine.
        failure: why the closed form failed on this batch; empty if it failed on an earlier batch.
        options: the options of the measurement.
        first: whether these are the first samples of the measurement.

    Raises:
        NotExactError: ``inexact`` is given, and the options have ``strict=True``.
    """
    info, calls, curvature = layer.info, certified.calls[layer.info.name], certified.loss.curvature
    if options.strict and inexact:
        closed_form = f" The closed form does not hold: {failure}" if failure else ""
        raise NotExactError(
            f"Layer '{info.name}': only the Gauss-Newton part of its Hessian can be computed ({inexact.value}), and "
            "strict=True asks for exact numbers. Leave strict=True out, or choose another layer with layers=."
            f"{closed_form}"
        )
    estimated = inexact is Inexact.CURVED and options.residual is not None and info.kernel == "parameter"
    is_output = info.name in certified.outputs
    sampled = not is_output and is_sampled(curvature, options.class_tolerance)
    label = inexact or (Inexact.SAMPLED if sampled else None)
    reason = "" if label is None else label.value
    if inexact and not first:
        reason = f"{reason} for some samples; for other samples, the number may contain the whole Hessian"
    columns = curvature.num_columns
    multiplications = sum(_multiplications(call.convolution, columns, options.diagonal) for call in calls)
    if is_output:
        columns, multiplications = 0, info.num_filters * info.patch_length
    info = replace(
        info,
        method="gauss_newton+hutchinson" if estimated else "gauss_newton",
        classifier=None,
        exact=label is None,
        reason=reason,
        backward_passes=columns,
        multiplications=multiplications,
    )
    return replace(layer, info=info, inexact=label, tail=None, is_output=is_output)


def _multiplications(convolution: Convolution, columns: int, diagonal: bool) -> int:
    """Return how many multiplications the block traces of one sample take, not counting passes through the model.

    ``columns`` is the number of cotangents at the layer's output that enter the block traces of one sample.
    """
    groups, (filters, length) = convolution.geometry.groups, convolution.weight.flatten(1).shape
    positions = convolution.output[0].numel() // filters
    return groups * min(contraction_costs(positions, length, filters // groups, columns, diagonal))
