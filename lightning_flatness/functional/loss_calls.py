"""Compare calls of a user's loss function, to find out whether it is random, or mixes samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_flatness.errors import is_out_of_memory

# At least one in this many batches is compared. Whether calls agree is a property of the function, not of the batch.
COMPARED_EVERY = 16


class Compared(NamedTuple):
    """The batches on which calls of a function have agreed, and not all targets were the same.

    Example:
        >>> compared = Compared().having(8)
        >>> compared.suffices(8), compared.suffices(9), compared._replace(batches=15).suffices(8)
        (True, False, False)
    """

    samples: int = 0  # the number of samples in the largest of these batches
    batches: int = 0  # the number of batches since the last of these batches

    def suffices(self, samples: int) -> bool:
        """Return whether calls need not be compared on a batch of this many samples."""
        return samples <= self.samples and self.batches + 1 < COMPARED_EVERY

    def having(self, samples: int) -> Compared:
        """Return what is known after one more such batch, of this many samples."""
        return Compared(max(samples, self.samples))

    def again(self) -> Compared:
        """Return what is known after one more batch, on which calls were not compared."""
        return self._replace(batches=self.batches + 1)


class Comparison(NamedTuple):
    """What further calls of a function on one batch have shown."""

    is_random: bool  # another call with the same samples gives other losses
    is_mixing: bool  # calls with some of the samples, or with some of them twice, give other losses
    targets_differ: bool  # if all targets are the same, the mean of their weights is the weight of every one


Call = Callable[[Tensor, Tensor], Any]


def compare(call: Call, losses: Tensor, logits: Tensor, targets: Tensor) -> Comparison:
    """Compare ``losses``, which a call on a batch has returned, with those of further calls."""
    again = _differ(call(logits, targets), losses, logits)
    if targets.shape[:1] != logits.shape[:1] or not targets.numel():
        return Comparison(bool(again), is_mixing=False, targets_differ=False)  # there are no targets of single samples
    order = targets.reshape(len(logits), -1)[:, 0].real.argsort()
    halves = order.chunk(2)
    # Every second sample of the lower or the upper targets, so that parts differ in size, classes and counts.
    parts = [half[start::2] for half in halves for start in range(2) if len(half) > start]
    # If no two targets are the same, counts differ only where samples are repeated.
    repeated = [torch.cat([order, halves[0]])]
    is_mixing = _differ_in(parts, call, losses, logits, targets) | _differ_in(repeated, call, losses, logits, targets)
    found = [again, is_mixing, (targets != targets[:1]).any().to(again.device)]
    return Comparison(*torch.stack(found).tolist())  # all together, so that the program waits for a GPU once


def _differ_in(parts: list[Tensor], call: Call, losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return whether calls on parts of a batch give other losses, as a tensor with one entry."""
    try:
        in_parts = torch.cat([call(logits[part], targets[part]) for part in parts])
    except Exception as error:  # the function works only on batches of some sizes: it may hold one weight per sample
        if is_out_of_memory(error):
            raise
        return torch.zeros((), dtype=torch.bool, device=losses.device)
    return _differ(in_parts, losses[torch.cat(parts)], logits)


def _differ(losses: Tensor, expected: Tensor, logits: Tensor) -> Tensor:
    """Return whether losses differ by more than rounding, which depends on the number of samples in a call."""
    if losses.shape != expected.shape or not len(logits):
        return torch.zeros((), dtype=torch.bool, device=expected.device)
    one, other, scale = (tensor.detach().double().nan_to_num() for tensor in (losses, expected, logits))
    eps = torch.finfo(expected.dtype).eps
    allowed = max(1e-4, 16 * eps) * other.abs().max() + 16 * eps * scale.abs().max()
    return ((one - other).abs() > allowed).any()
