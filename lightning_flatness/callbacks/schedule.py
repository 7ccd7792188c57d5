"""When to measure, as functions of epoch numbers."""

from __future__ import annotations


def epochs_have_passed(epoch: int, last: int | None, every_n_epochs: int) -> bool:
    """Whether to measure at a validation: ``every_n_epochs`` after the last measured epoch, or again within it.

    Args:
        epoch: the current one, from 0.
        last: epoch of the last measurement; None before the first, which is always due.
        every_n_epochs: epochs from one measurement to the next.

    Example:
        >>> epochs_have_passed(3, None, 2), epochs_have_passed(4, 3, 2), epochs_have_passed(5, 3, 2)
        (True, False, True)
    """
    return last is None or epoch == last or epoch - last >= every_n_epochs


def is_nth_epoch(epoch: int, every_n_epochs: int | None) -> bool:
    """Whether to measure at the end of an epoch: of the first and of every n-th after it.

    Args:
        epoch: the current one, from 0.
        every_n_epochs: n; None for no epoch.

    Example:
        >>> [epoch for epoch in range(5) if is_nth_epoch(epoch, 2)], is_nth_epoch(0, None)
        ([0, 2, 4], False)
    """
    return every_n_epochs is not None and epoch % every_n_epochs == 0
