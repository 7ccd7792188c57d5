"""The standard deviations of a layer's input channels, which normalised relative flatness needs.

Let ``x_c`` be input channel ``c``, ``σ_c`` its standard deviation over samples and positions, and ``w_sc`` the slice of
filter ``s`` on this channel. A layer with the slices ``σ_c w_sc`` and the inputs ``x_c / σ_c`` has the same output, and
its input channels have standard deviation one. Normalised relative flatness is the relative flatness of that layer
(``docs/theory.md``, "Invariance").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A channel counts as constant if its standard deviation is at most this many machine epsilons times its root mean
# square.
ROUNDINGS = 8


@dataclass(frozen=True)
class ChannelSums:
    """For each channel, the number of its entries, their mean, and the sum of their squared deviations from the mean.

    An object made by :meth:`of` holds these numbers for every sample. An object made by :meth:`total` holds them for
    all samples together. Such an object is called a total.

    Example:
        >>> sums = ChannelSums.of(torch.tensor([[[1.0, 3.0]], [[5.0, 3.0]]]))
        >>> sums.total().deviations(), ChannelSums.added([sums[:1].total(), sums[1:].total()]).deviations()
        (tensor([1.4142], dtype=torch.float64), tensor([1.4142], dtype=torch.float64))
    """

    count: Tensor  # float64, (N,), or () in a total
    mean: Tensor  # float64, (N, C), or (C,) in a total
    squares: Tensor  # sum of squared deviations from the mean, in the shape of the mean
    eps: float = torch.finfo(torch.float64).eps  # machine epsilon of the dtype of the layer's inputs

    @classmethod
    def of(cls, inputs: Tensor) -> ChannelSums:
        """Compute the sums of every sample from a layer's inputs ``(N, C, *spatial)`` before zero padding."""
        entries = inputs.detach().flatten(2) if inputs.ndim > 2 else inputs.detach()[:, :, None]
        mean = entries.mean(2, dtype=torch.float64)
        squares = (entries.double() - mean[:, :, None]).square().sum(2)
        count = mean.new_full((len(mean),), entries.shape[2])
        return cls(count, mean, squares, torch.finfo(inputs.dtype).eps)

    def __getitem__(self, samples: slice | Tensor) -> ChannelSums:
        return ChannelSums(self.count[samples], self.mean[samples], self.squares[samples], self.eps)

    @classmethod
    def joined(cls, parts: list[ChannelSums]) -> ChannelSums:
        """Concatenate the samples of several objects, none of which is a total."""
        count = torch.cat([part.count for part in parts])
        mean, squares = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "squares"))
        return cls(count, mean, squares, max(part.eps for part in parts))

    def cpu(self) -> ChannelSums:
        """Return the same sums on the CPU."""
        return ChannelSums(self.count.cpu(), self.mean.cpu(), self.squares.cpu(), self.eps)

    def total(self) -> ChannelSums:
        """Return the sums over all samples together, as a total."""
        count = self.count.sum()
        mean = (self.count[:, None] * self.mean).sum(0) / count.clamp_min(1)
        squares = (self.squares + self.count[:, None] * (self.mean - mean).square()).sum(0)
        return ChannelSums(count, mean, squares, self.eps)

    @classmethod
    def added(cls, totals: list[ChannelSums]) -> ChannelSums:
        """Combine several totals into the total over all their samples."""
        count = torch.stack([one.count for one in totals])
        mean, squares = (torch.stack([getattr(one, name) for one in totals]) for name in ("mean", "squares"))
        return cls(count, mean, squares, max(one.eps for one in totals)).total()

    def deviations(self) -> Tensor:
        """Return the standard deviation ``σ`` of every channel, ``(C,)``; the object must be a total.

        ``σ`` is 0 for constant channels.
        """
        variance = self.squares / self.count
        size = variance + self.mean.square()
        return torch.where(variance > (ROUNDINGS * self.eps) ** 2 * size, variance, 0.0).sqrt()
