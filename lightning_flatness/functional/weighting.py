"""The flatness measures of single samples, and the matrices that they need besides block traces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.functional.measures import weight_gram

# The measures that a :class:`Contraction` has for every sample, in this order.
SAMPLE_MEASURES = ("hessian_trace", "relative_flatness", "normalized_relative_flatness", "channelwise_flatness")
TRACE, RELATIVE, NORMALIZED, CHANNELWISE = range(len(SAMPLE_MEASURES))


@dataclass(frozen=True)
class Weighting:
    """The matrices that the flatness measures of one layer need, besides block traces.

    A measure is not computed if its matrix is None.

    Attributes:
        gram: inner products ``<w_s, w_s'>``, ``(G, S/G, S/G)``, in the dtype of the kernel. Relative flatness needs
            them.
        deviations: ``σ``, the standard deviations of the input channels, float64 ``(C,)``. Channels with the standard
            deviation 0 are left out.
        normalized: ``sum_c σ_c² <w_sc, w_s'c>`` over input channels ``c``, in the shape of ``gram``, where ``w_sc`` is
            the slice of filter ``s`` on channel ``c``. Normalised relative flatness needs it.
        kernel: the kernel ``(S, C/G, *kernel_size)``. Channel-wise flatness needs it.
    """

    gram: Tensor | None = None
    deviations: Tensor | None = None
    normalized: Tensor | None = None
    kernel: Tensor | None = None

    @classmethod
    def of(
        cls, kernel: Tensor, groups: int, gram: Tensor | None, deviations: Tensor | None, by_channel: bool
    ) -> Weighting:
        """Make the matrices for a kernel ``(S, C/G, *kernel_size)``.

        Relative flatness is measured only if ``gram`` is given, normalised relative flatness only if ``deviations`` are
        given, and channel-wise flatness only if ``by_channel`` is True.
        """
        kernel = kernel.detach()
        normalized = None
        if deviations is not None:
            deviations = deviations.to(kernel.device)
            by_group = deviations.view(groups, 1, -1, 1)
            scaled = kernel.double().reshape(groups, -1, by_group.shape[2], prod(kernel.shape[2:])) * by_group
            normalized = weight_gram(scaled.flatten(0, 1), groups)
        grams = [one if one is None else one.to(kernel.dtype) for one in (gram, normalized)]
        return cls(grams[0], deviations, grams[1], kernel if by_channel else None)

    @cached_property
    def normalized_norm(self) -> Tensor | None:
        """An upper bound of the spectral norms of :attr:`normalized`; None if there is no such matrix."""
        return None if self.normalized is None else spectral_bound(self.normalized.double())

    @cached_property
    def inverse(self) -> Tensor:
        """``1 / σ``, ``(C,)``; 0 for a channel that is left out."""
        assert self.deviations is not None
        return torch.where(self.deviations > 0, 1 / self.deviations, 0.0)

    def scaled(self, inputs: Tensor) -> Tensor:
        """Return inputs ``(N, C, *spatial)`` divided by ``σ``."""
        return inputs * self.inverse.to(inputs).view(-1, *[1] * (inputs.ndim - 2))

    def scaled_patches(self, sums: Tensor) -> Tensor:
        """Divide every entry of sums of patches ``sum_p a[p] phi[p]``, ``(N, G, ..., D)``, by its channel's ``σ``."""
        groups, length = sums.shape[1], sums.shape[-1]
        of_groups = self.inverse.to(sums).view(groups, -1)
        of_entries = of_groups.repeat_interleave(length // of_groups.shape[1], dim=1)
        return sums * of_entries.view(groups, *[1] * (sums.ndim - 3), length)


def spectral_bound(gram: Tensor) -> Tensor:
    """Return an upper bound of the spectral norms of symmetric matrices: their largest Schatten norm of order eight."""
    scale = torch.linalg.matrix_norm(gram).amax().clamp_min(torch.finfo(gram.dtype).tiny)
    fourth = torch.linalg.matrix_power((gram / scale).float(), 4)
    bound: Tensor = 1.001 * scale * torch.linalg.matrix_norm(fourth).amax().double() ** 0.25  # 1.001: float32 rounds
    return bound


class Contraction(NamedTuple):
    """Block traces summed over samples, and the measures of every sample."""

    total: Tensor  # (G, S/G, S/G), of which only the upper triangle counts, or (G, S/G); float64
    samples: Tensor  # float64 (N, 4), with the columns SAMPLE_MEASURES; NaN if not measured
    left_out: Tensor  # scalar: trace of the terms that a tolerance removed from normalised relative flatness


def no_values(samples: int, device: torch.device) -> Tensor:
    """Return a tensor ``(N, 4)`` of NaN, to be filled with the measures of samples."""
    return torch.full((samples, len(SAMPLE_MEASURES)), torch.nan, dtype=torch.float64, device=device)


def channelwise_values(kernel: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute ``Σ_c <W_cᵀ L_c, W_cᵀ R_c>`` for every sample, float64 ``(N,)``.

    ``left`` is ``L`` and ``right`` is ``R``, ``(N, G, S/G, D)``. Per sample, both have as many entries as the kernel.
    ``W_c``, ``L_c`` and ``R_c`` are the parts of the kernel, of ``L`` and of ``R`` on input channel ``c``. They are
    matrices with ``S/G`` rows and one column per kernel position. For example, let ``B Bᵀ`` be the loss's Hessian with
    respect to the logits ``f``, and ``b`` a column of ``B``. Let ``L = R`` be the gradient of ``<b, f>`` with respect
    to the kernel, with ``b`` constant. Then the sum of the values over all columns of ``B`` is channel-wise flatness.
    """
    samples, groups, filters, _ = left.shape
    channels = kernel.shape[1]
    weights = kernel.reshape(groups, filters, channels, -1).permute(0, 2, 3, 1).to(left).contiguous()  # (G, C/G, k, s)
    images = []
    for jacobian in [left] if right is left else [left, right]:
        by_channel = jacobian.reshape(samples, groups, filters, channels, -1).permute(1, 3, 2, 0, 4)
        images.append((weights @ by_channel.flatten(3)).unflatten(3, (samples, -1)))  # (G, C/G, k, N, k)
    values: Tensor = (images[0] * images[-1]).sum((0, 1, 2, 4)).double()
    return values
