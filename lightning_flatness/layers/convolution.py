"""Describe calls of ``conv1d``, ``conv2d``, ``conv3d`` and ``linear`` as convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.functional import ConvolutionGeometry

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Convolution:
    """One call of ``conv1d``, ``conv2d``, ``conv3d`` or ``linear``, described as a convolution.

    With ``padding="same"``, ``inputs`` are the padded inputs, because the padding may be uneven. A linear map is
    described as a convolution of kernel size one over its tokens; its ``output`` has the channels in the last
    dimension.
    """

    inputs: Tensor  # (N, C, *spatial), detached
    weight: Tensor  # (S, C/G, *kernel_size)
    geometry: ConvolutionGeometry
    output: Tensor  # (N, S, *output), or (N, *tokens, S)
    channel_dimension: int = 1
    unpadded: Tensor | None = None  # with padding="same": the inputs before padding; else None
    output_version: int | None = None  # version counter of the output when it was computed; None if it has none
    bias: Tensor | None = None

    @property
    def read(self) -> Tensor:
        """The inputs ``(N, C, *spatial)`` before the convolution pads them with zeros."""
        return self.inputs if self.unpadded is None else self.unpadded

    def without_output(self) -> Convolution:
        """Return the same convolution, detached from the autograd graph and with an empty output, to save memory."""
        return replace(self, weight=self.weight.detach(), output=self.output.detach().new_empty(0))


def version_of(tensor: Tensor) -> int | None:
    """Return a tensor's version counter, which torch increases when the tensor is changed in place.

    The result is None for an inference tensor, which has no version counter.
    """
    return None if tensor.is_inference() else tensor._version


def described(func: Callable[..., Any], output: Tensor, args: tuple[Any, ...], keywords: dict[str, Any]) -> Convolution:
    """Describe a call of ``func``, one of :data:`CONVOLVING`, with these arguments, which returned ``output``."""
    of_func = _linear if func is nn.functional.linear else partial(_convolution, CONVOLVING.index(func))
    return replace(of_func(output, *args, **keywords), output_version=version_of(output))


# The functions that convolve; the index is the number of spatial dimensions.
CONVOLVING = (nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d)


def _convolution(
    dimensions: int,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Convolution:
    """Describe a call of ``conv1d``, ``conv2d`` or ``conv3d``; the parameters have the same names as in torch."""

    def per_dimension(value: int | tuple[int, ...]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dimensions if len(values) == 1 else values

    kernel_size, dilations = tuple(weight.shape[2:]), per_dimension(dilation)
    inputs, unpadded = input.detach(), None
    if padding == "same":  # of an odd number of padding pixels, the right side gets one more
        totals = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
        widths = [width for total in reversed(totals) for width in (total // 2, total - total // 2)]
        inputs = nn.functional.pad(inputs, widths)
        unpadded = input.detach()
    paddings = (0,) * dimensions if isinstance(padding, str) else per_dimension(padding)
    geometry = ConvolutionGeometry(kernel_size, per_dimension(stride), paddings, dilations, groups)
    return Convolution(inputs, weight, geometry, output, unpadded=unpadded, bias=bias)


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Convolution:
    """Describe a call of ``linear`` as a convolution of kernel size one over its tokens."""
    inputs = input.detach()
    tokens = inputs.flatten(1, -2) if inputs.ndim > 2 else inputs.unsqueeze(1) if inputs.ndim > 1 else inputs
    geometry = ConvolutionGeometry((1,), (1,), (0,), (1,))
    return Convolution(
        tokens.mT if inputs.ndim > 1 else tokens, weight, geometry, output, channel_dimension=-1, bias=bias
    )
