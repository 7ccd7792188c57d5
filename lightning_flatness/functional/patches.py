"""Input patches of a convolution in 1, 2 or 3 dimensions, and their Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

KERNEL_GRADIENT: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}
# Cost of an addition outside a matrix product, relative to a multiplication inside one.
ADDITION = 4


@dataclass(frozen=True)
class ConvolutionGeometry:
    """The kernel size, stride, zero padding (on both sides) and dilation of a convolution, and its number of groups.

    All but the number of groups have one number per spatial dimension.

    Args:
        kernel_size: size of the kernel.
        stride: distance of neighbouring output positions, in input positions.
        padding: number of zeros added to the input on each side.
        dilation: distance of neighbouring kernel positions, in input positions.
        groups: ``G``, the number of groups.

    Example:
        >>> geometry = ConvolutionGeometry(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
        >>> geometry.output_size((8, 8))
        (4, 4)
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Compute the spatial size of the output from the spatial size of the input before padding."""
        sizes = zip(input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sizes)

    def pad(self, inputs: Tensor) -> Tensor:
        """Pad inputs ``(N, C, *spatial)`` with zeros."""
        widths = [width for padding in reversed(self.padding) for width in (padding, padding)]
        return torch.nn.functional.pad(inputs, widths) if any(widths) else inputs

    def windows(self, output_size: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """For every kernel position, yield the slices of the padded input that weights at this position multiply."""
        for offset in product(*map(range, self.kernel_size)):
            yield tuple(
                slice(o * d, o * d + s * (n - 1) + 1, s)
                for o, d, s, n in zip(offset, self.dilation, self.stride, output_size, strict=True)
            )


def patches(inputs: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """Return the patches ``phi[p]`` of inputs ``(N, C, *spatial)`` as a tensor ``(N, G, D, P)``.

    The entries of a patch are in the same order as those of a flattened filter.

    Args:
        inputs: the inputs of the convolution, ``(N, C, *spatial)``.
        geometry: kernel size, stride, padding, dilation and groups of the convolution.

    Example:
        >>> geometry = ConvolutionGeometry(kernel_size=(2,), stride=(1,), padding=(0,), dilation=(1,))
        >>> inputs = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> patches(inputs, geometry)
        tensor([[[[1., 2.],
                  [2., 3.]]]])
    """
    size = geometry.output_size(tuple(inputs.shape[2:]))
    padded = geometry.pad(inputs)
    every = slice(None)  # sample, channel
    columns = [padded[(every, every, *window)].flatten(2) for window in geometry.windows(size)]
    return torch.stack(columns, dim=2).reshape(inputs.shape[0], geometry.groups, -1, prod(size))


def patch_square_norms(inputs: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """Compute the squared norm ``‖phi[p]‖²`` of every patch in each group, ``(N, G, P)``.

    Args:
        inputs: the inputs of the convolution, ``(N, C, *spatial)``.
        geometry: kernel size, stride, padding, dilation and groups of the convolution.

    Example:
        >>> geometry = ConvolutionGeometry(kernel_size=(2,), stride=(1,), padding=(0,), dilation=(1,))
        >>> inputs = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> patch_square_norms(inputs, geometry)
        tensor([[[ 5., 13.]]])
    """
    squares = inputs.square().unflatten(1, (geometry.groups, -1)).sum(2)
    return patches(squares, geometry).sum(2)


def channel_square_norms(inputs: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """Compute squared norms of patches, separately for every input channel, ``(N, G, C/G, P)``."""
    apart = replace(geometry, groups=inputs.shape[1])
    norms: Tensor = patch_square_norms(inputs, apart).unflatten(1, (geometry.groups, -1))
    return norms


def patch_gram(inputs: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """Compute the patch Gram matrix ``Γ[p, p'] = <phi[p], phi[p']>`` of every sample and group, ``(N, G, P, P)``.

    Inner products of overlapping patches multiply the same pixels repeatedly. To avoid this, let ``X`` be the Gram
    matrix of single pixels, zero outside the image, and ``r`` the stride. Then ``Γ[p, p']`` is the sum of
    ``X[r p + o, r p' + o]`` over kernel offsets ``o``. The sum is taken one spatial dimension after the other. With a
    3x3 kernel of stride one, ``X`` takes a ninth of the multiplications of the direct product of patches. With larger
    strides there are more pixels than patches, and ``X`` may take more. So the function counts the multiplications of
    both ways, and takes the cheaper one (``docs/theory.md``, "Numerics").

    Args:
        inputs: the inputs of the convolution, ``(N, C, *spatial)``.
        geometry: kernel size, stride, padding, dilation and groups of the convolution.

    Example:
        >>> geometry = ConvolutionGeometry(kernel_size=(2,), stride=(1,), padding=(0,), dilation=(1,))
        >>> inputs = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> patch_gram(inputs, geometry)
        tensor([[[[ 5.,  8.],
                  [ 8., 13.]]]])
    """
    input_size = tuple(inputs.shape[2:])
    size = geometry.output_size(input_size)
    channels = inputs.shape[1] // geometry.groups
    by_pixel = prod(input_size) ** 2 * channels
    for axis, kernel in enumerate(geometry.kernel_size):
        by_pixel += ADDITION * kernel * prod((*size[: axis + 1], *input_size[axis + 1 :])) ** 2
    by_patch = prod(size) ** 2 * channels * prod(geometry.kernel_size)
    if by_patch <= by_pixel:
        phi = patches(inputs, geometry)
        return phi.mT @ phi
    pixels = inputs.flatten(2).unflatten(1, (geometry.groups, -1))  # (N, G, C/G, pixels)
    gram: Tensor = (pixels.mT @ pixels).unflatten(3, input_size).unflatten(2, input_size)
    for axis in range(len(size)):
        gram = _sum_of_shifts(gram, axis, geometry, size[axis])
    return gram.reshape(inputs.shape[0], geometry.groups, prod(size), prod(size))


def _sum_of_shifts(gram: Tensor, axis: int, geometry: ConvolutionGeometry, size: int) -> Tensor:
    """Compute ``sum_o gram[p r + o, p' r + o]`` along one spatial dimension, where ``r`` is the stride.

    ``o`` runs over the offsets of the kernel. ``gram`` is the Gram matrix of pixels, and counts as zero outside the
    image.
    """
    stride, pixels = geometry.stride[axis], gram.shape[2 + axis]
    axes = (2 + axis, 2 + axis + len(geometry.kernel_size))  # after samples and groups
    total: Tensor = gram.new_zeros([size if i in axes else n for i, n in enumerate(gram.shape)])
    for o in range(geometry.kernel_size[axis]):
        offset = o * geometry.dilation[axis] - geometry.padding[axis]
        first = max(0, -(offset // stride))  # first output position whose pixel is in the image
        count = min(size - 1, (pixels - 1 - offset) // stride) - first + 1
        if count <= 0:
            continue
        start = first * stride + offset
        target, source = [slice(None)] * gram.dim(), [slice(None)] * gram.dim()
        for i in axes:
            target[i], source[i] = slice(first, first + count), slice(start, start + stride * (count - 1) + 1, stride)
        total[tuple(target)].add_(gram[tuple(source)])  # unlike `+=`, it does not write the view back
    return total


def patches_times(slopes: Tensor, inputs: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """Compute ``Σ_p slopes[r, p] phi[p]``, ``(N, G, R, D)``, from slopes ``(N, G, R, P)``.

    This is the gradient of a convolution with respect to its kernel, for every sample separately. In float32 on a CPU,
    torch's own routine for this gradient is about twice as fast as the product with patches. That routine sums over
    samples. To keep them apart, the ``N`` samples are passed as ``N`` groups of channels of one sample.
    """
    samples, channels = inputs.shape[:2]
    size = geometry.output_size(tuple(inputs.shape[2:]))
    on_cpu = inputs.device.type == "cpu" and inputs.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not on_cpu or geometry.groups > 1 or prod(geometry.kernel_size) == 1:
        return slopes @ patches(inputs, geometry).mT
    rows = samples * slopes.shape[2]
    gradient = KERNEL_GRADIENT[len(size)](
        inputs.reshape(1, -1, *inputs.shape[2:]),
        (rows, channels, *geometry.kernel_size),
        slopes.reshape(1, rows, *size),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups=samples,
    )
    return gradient.reshape(samples, 1, slopes.shape[2], -1)


def contraction_costs(
    positions: int, patch_length: int, filters: int, columns: int = 1, diagonal: bool = False
) -> tuple[int, int]:
    """Count the multiplications, per sample and group, of two ways to compute block traces from slopes ``δ``.

    The first way is ``δ Γ δᵀ`` with the patch Gram matrix. The second is ``J Jᵀ`` with ``J[s] = sum_p δ[s, p] phi[p]``.

    Args:
        positions: ``P``, the number of output positions.
        patch_length: ``D``, the length of a filter.
        filters: ``S/G``, the number of filters of a group.
        columns: number of matrices ``δ`` per sample.
        diagonal: whether only the diagonals of the block traces are computed.

    Returns:
        The numbers of multiplications of the first and of the second way.

    Example:
        >>> contraction_costs(positions=4, patch_length=9, filters=2)
        (192, 108)
    """
    width = 1 if diagonal else filters
    by_gram = positions**2 * (patch_length + columns * filters) + columns * positions * filters * width
    by_sum = columns * filters * patch_length * (positions + width)
    return by_gram, by_sum
