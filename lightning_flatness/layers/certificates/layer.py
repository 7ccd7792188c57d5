"""Certificate 1, the layer: a layer returns the output of a single convolution, whose kernel never changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError, LayerSelectionError
from lightning_flatness.functional.conditions import holds, same
from lightning_flatness.layers.certificates import Known
from lightning_flatness.layers.recording import LayerCall, kernel_sample


class OtherKernelError(LayerSelectionError):
    """The kernel of a layer in a user's pass differs from the certified kernel."""


@dataclass(frozen=True)
class Kernel:
    """The kernel of a layer, as it was when the layer was certified."""

    weight: Tensor  # the kernel, detached
    sample: Tensor  # a copy of some entries of the kernel
    parameter: Tensor | None = None  # the model's parameter, if it is the kernel; kept alive so that its id is unique


def certify_layer(
    calls: Sequence[LayerCall], known: Known[Kernel] | None, unchanged: Callable[[Tensor], bool], half: bool = False
) -> Known[Kernel]:
    """Certify that every call of a layer runs exactly one convolution, always with the same kernel; return the kernel.

    ``known`` is the kernel that earlier batches have used, or None. If given, this batch must use the same kernel.
    ``known`` may hold the model's parameter itself instead of a copy. Then comparing entries cannot show that the
    parameter was written to. So if its version counter has changed, ``unchanged`` is called. It returns whether a
    kernel has the same Gram matrix as in earlier batches. With ``half``, the layer may run in half precision.

    Raises:
        LayerSelectionError: the layer does not return the output of one convolution, its kernel changes, its input has
            no batch dimension, or its input is changed in place after the layer has run.
        BatchError: the layer's dtypes do not allow the measurement, or a weight is not finite.
    """
    for call in calls:
        _certify_convolution(call, known, half)
    return _certified_kernel(calls, known, unchanged)


def _certify_convolution(call: LayerCall, kernel: Known[Kernel] | None, half: bool) -> None:
    """Certify that a layer ran exactly one convolution and returned that convolution's output unchanged.

    The measurement takes the input and the kernel from this convolution, not from the layer. If the layer itself pads
    its input or transforms its weight, these are the padded input and the transformed weight.
    """
    if len(call.convolutions) != 1:
        raise LayerSelectionError(
            f"it ({type(call.module).__name__}) runs {len(call.convolutions)} convolutions or linear maps in its "
            "forward, and only a layer that runs exactly one can be measured. Choose another layer with layers=."
        )
    if call.has_changed_input:
        raise LayerSelectionError(
            "the forward changes the layer's input in place after the layer has run (relu_, +=). Use an out-of-place "
            "operation, or choose another layer with layers=."
        )
    convolution = call.convolution
    output, weight = convolution.output, convolution.weight
    if output.ndim < 2 if convolution.channel_dimension == -1 else output.ndim != weight.ndim:
        raise LayerSelectionError(
            "it runs on an input without a batch dimension. Give inputs whose first dimension counts samples, or "
            "choose another layer with layers=."
        )
    if weight.is_complex():
        raise LayerSelectionError("its weights are complex numbers. Choose another layer with layers=.")
    if not half and weight.dtype not in (torch.float32, torch.float64):
        raise BatchError(
            f"it runs with weights in {weight.dtype}, because the forward casts the weights to this type. A Hessian "
            "needs float32 or float64. Remove the cast, or leave the casting to the Trainer's precision=."
        )
    if not half and output.dtype != weight.dtype:
        raise BatchError(
            f"it runs under torch.autocast inside the model's forward (weights {weight.dtype}, output {output.dtype}), "
            "which cannot be switched off from outside. Put autocast around the model instead, as the Trainer's "
            "precision= does."
        )
    recognised = kernel is not None and kernel.recognises(identity(weight), every=None)
    if not recognised and not holds(weight.isfinite().all()):
        raise BatchError("its weights contain NaN or infinity: training has diverged.")
    returned = call.returned
    alias = output.data_ptr() == returned.data_ptr() and output.stride() == returned.stride()
    if call.has_changed_output or output.shape != returned.shape or not (alias or same(output, returned)):
        raise LayerSelectionError(
            f"it ({type(call.module).__name__}) does not return the output of its convolution or linear map, because "
            "its forward or a hook changes the output. Make this change in a separate module after the layer."
        )


def _certified_kernel(
    calls: Sequence[LayerCall], known: Known[Kernel] | None, unchanged: Callable[[Tensor], bool]
) -> Known[Kernel]:
    """Certify that all calls apply the same kernel, and that earlier batches used it, too; return the kernel."""
    if known is None:
        weight = calls[0].convolution.weight
        known = Known(Kernel(weight.detach(), kernel_sample(weight)), None)
    kernel = known.value
    for call in calls:
        if call.kernel_sample is not None and not same(call.kernel_sample, kernel.sample):
            raise OtherKernelError("its kernel has changed since it was certified.")
    weights = [call.convolution.weight for call in calls]
    if all(known.recognises(identity(weight), every=None) for weight in weights):
        return known
    reference = kernel.weight
    if kernel.parameter is not None and any(weight is kernel.parameter for weight in weights):
        # `kernel` holds the parameter itself, not a copy. Only the Gram matrix shows whether the parameter was changed.
        if not unchanged(kernel.parameter.detach()):
            raise LayerSelectionError(
                "its kernel has been changed in place since the measurement began. Keep the weights constant until all "
                "batches are measured."
            )
        known, reference = Known(kernel, identity(kernel.parameter)), kernel.parameter
    if not all(same(weight, reference) for weight in weights):
        raise LayerSelectionError(
            "its kernel differs from one call to the next, e.g. because the layer computes it from its input. A "
            "Hessian needs one kernel for all samples. Choose another layer with layers=."
        )
    return known


def as_parameter(known: Known[Kernel], weight: Tensor) -> Known[Kernel]:
    """Replace a certified kernel by the model's parameter ``weight`` if both are equal, so that no copy is kept."""
    kernel = known.value
    if kernel.weight.shape != weight.shape or not torch.equal(kernel.weight, weight.to(kernel.weight)):
        return known
    return Known(Kernel(weight.detach(), kernel.sample, weight), identity(weight))


def identity(weight: Tensor) -> tuple[int, int]:
    """Return an identifier of a tensor and its values, which changes when the tensor is written to.

    Requires: the tensor stays alive while identifiers are compared, because Python reuses ids.
    """
    return id(weight), weight._version


def is_kernel(parameter: nn.Parameter | None, call: LayerCall) -> bool:
    """Return whether the kernel that a layer applied equals ``parameter``.

    If not, the layer computes the kernel, for example by normalising its weight.
    """
    weight = call.convolution.weight
    return (
        parameter is not None and parameter.shape == weight.shape and torch.equal(parameter.detach().to(weight), weight)
    )
