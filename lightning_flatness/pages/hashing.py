"""Compute a hash of the measured data, which shows whether two pages are about the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.model.call import as_call, tensors_of


class DataHash:
    """A hash of batches, computed from the shapes, dtypes and bytes of their tensors.

    The hash depends on the order of the batches and on how samples are divided into batches.

    Example:
        >>> one, other = DataHash(), DataHash()
        >>> one.add(torch.ones(2), None)
        >>> other.add(torch.zeros(2), None)
        >>> one.text == other.text, len(one.text)
        (False, 16)
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, inputs: Any, targets: Tensor | None = None) -> None:
        """Add the tensors of a batch to the hash."""
        call = as_call(inputs)
        for tensor in tensors_of([call.arguments, dict(call.keywords), targets]):
            self._digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            self._digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    @property
    def text(self) -> str:
        """The first 16 hexadecimal digits of the hash."""
        return self._digest.hexdigest()[:16]


def data_hash(batches: Iterable[Any]) -> str:
    """Return a hash of batches as 16 hexadecimal digits; see :class:`DataHash`.

    Args:
        batches: pairs ``(inputs, targets)``.

    Example:
        >>> data_hash([(torch.ones(2, 3), torch.tensor([0, 1]))])
        '0277a80c86533b61'
    """
    found = DataHash()
    for batch in batches:
        found.add(batch)
    return found.text
