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
    """The batches on which calls of a function have agreed.

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
        """Return what is known after calls have agreed on a batch of this many samples."""
        return Compared(max(samples, self.samples))

    def again(self) -> Compared:
        """Return what is known after one more batch, on which calls were not compared."""
        return self._replace(batches=self.batches + 1)


def differences(
    call: Callable[[Tensor, Tensor], Any], losses: Tensor, logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return whether another call gives other losses than ``losses``, and whether calls on parts of the batch do.

    Both are tensors with one entry, on the device of the losses.
    """
    again = _differ(call(logits, targets), losses, logits)
    try:
        # Every second sample of the lower or the upper targets, so that parts differ in size, classes and counts.
        halves = targets.reshape(len(logits), -1)[:, 0].argsort().chunk(2)
        parts = [half[start::2] for half in halves for start in range(2) if len(half) > start]
        in_parts = torch.cat([call(logits[part], targets[part]) for part in parts])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # The function works only on whole batches of this size, for example because it holds their weights.
        return again, torch.zeros_like(again)
    return again, _differ(in_parts, losses[torch.cat(parts)], logits)


def _differ(losses: Tensor, expected: Tensor, logits: Tensor) -> Tensor:
    """Return whether losses differ by more than rounding, which depends on the number of samples in a call."""
    if losses.shape != expected.shape or not len(logits):
        return torch.zeros((), dtype=torch.bool, device=expected.device)
    one, other, scale = (tensor.detach().double().nan_to_num() for tensor in (losses, expected, logits))
    eps = torch.finfo(expected.dtype).eps
    allowed = max(1e-4, 16 * eps) * other.abs().max() + 16 * eps * scale.abs().max()
    return ((one - other).abs() > allowed).any()
