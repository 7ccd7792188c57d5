"""The spread of a layer's input channels, which normalised relative flatness needs.

Let ``σ_c`` be the standard deviation of input channel ``c`` over samples and positions. The same function has a kernel
``σ_c w_sc`` that reads channels ``x_c / σ_c``, all of standard deviation one. Normalised relative flatness is relative
flatness of that kernel (``docs/theory.md``, "Invariance").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A channel whose standard deviation is at most so many roundings of its root mean square does not vary.
ROUNDINGS = 8


@dataclass(frozen=True)
class ChannelSums:
    """Number, mean and squared deviations of the entries of each channel, which can be added over samples.

    Example:
        >>> sums = ChannelSums.of(torch.tensor([[[1.0, 3.0]], [[5.0, 3.0]]]))
        >>> sums.total().deviations(), ChannelSums.added([sums[:1].total(), sums[1:].total()]).deviations()
        (tensor([1.4142], dtype=torch.float64), tensor([1.4142], dtype=torch.float64))
    """

    count: Tensor  # (N,), or () of a total, float64
    mean: Tensor  # (N, C), or (C,), float64
    squares: Tensor  # sum of squared deviations from the mean, of the same shape
    eps: float = torch.finfo(torch.float64).eps  # machine epsilon of the entries

    @classmethod
    def of(cls, inputs: Tensor) -> ChannelSums:
        """Return the sums of every sample of inputs ``(N, C, *spatial)``, without padding."""
        entries = inputs.detach().flatten(2) if inputs.ndim > 2 else inputs.detach()[:, :, None]
        mean = entries.mean(2, dtype=torch.float64)
        squares = (entries.double() - mean[:, :, None]).square().sum(2)
        count = mean.new_full((len(mean),), entries.shape[2])
        return cls(count, mean, squares, torch.finfo(inputs.dtype).eps)

    def __getitem__(self, samples: slice | Tensor) -> ChannelSums:
        return ChannelSums(self.count[samples], self.mean[samples], self.squares[samples], self.eps)

    @classmethod
    def joined(cls, parts: list[ChannelSums]) -> ChannelSums:
        """Return the sums of every sample of several parts."""
        count = torch.cat([part.count for part in parts])
        mean, squares = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "squares"))
        return cls(count, mean, squares, max(part.eps for part in parts))

    def cpu(self) -> ChannelSums:
        """Return the same sums on the CPU."""
        return ChannelSums(self.count.cpu(), self.mean.cpu(), self.squares.cpu(), self.eps)

    def total(self) -> ChannelSums:
        """Return the sums over all samples."""
        count = self.count.sum()
        mean = (self.count[:, None] * self.mean).sum(0) / count.clamp_min(1)
        squares = (self.squares + self.count[:, None] * (self.mean - mean).square()).sum(0)
        return ChannelSums(count, mean, squares, self.eps)

    @classmethod
    def added(cls, totals: list[ChannelSums]) -> ChannelSums:
        """Return the total of several totals."""
        count = torch.stack([one.count for one in totals])
        mean, squares = (torch.stack([getattr(one, name) for one in totals]) for name in ("mean", "squares"))
        return cls(count, mean, squares, max(one.eps for one in totals)).total()

    def deviations(self) -> Tensor:
        """Return ``σ``, the standard deviation of every channel of a total, ``(C,)``; 0 if it does not vary."""
        variance = self.squares / self.count
        size = variance + self.mean.square()
        return torch.where(variance > (ROUNDINGS * self.eps) ** 2 * size, variance, 0.0).sqrt()
