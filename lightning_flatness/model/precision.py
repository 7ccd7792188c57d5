"""The precision that a network is called in: autocast, and the default dtype of new tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn

from lightning_flatness.functional.autocast import device_types

HALF = (torch.float16, torch.bfloat16)


class Precision(NamedTuple):
    """The state of autocast and the default dtype, which, with the tensors' dtypes, determine a call's precision.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     now = current_precision()
        >>> now
        Precision(autocast=(('cpu', torch.bfloat16),), default=torch.float32)
        >>> with now.entered():
        ...     torch.is_autocast_enabled("cpu")
        True
    """

    autocast: tuple[tuple[str, torch.dtype], ...]  # device types with autocast, and the dtype that autocast uses
    default: torch.dtype  # dtype of new tensors

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run a block in this precision."""
        wanted, before = dict(self.autocast), torch.get_default_dtype()
        with ExitStack() as stack:
            for kind in device_types():
                stack.enter_context(torch.autocast(kind, wanted.get(kind), enabled=kind in wanted))
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(self.default)
            yield


def current_precision() -> Precision:
    """Return the precision that a call would have if it were made now."""
    autocast = ((kind, torch.get_autocast_dtype(kind)) for kind in device_types() if torch.is_autocast_enabled(kind))
    return Precision(tuple(autocast), torch.get_default_dtype())


def runs_in_half(model: nn.Module, precision: Precision | None) -> bool:
    """Return whether a model may run in half precision, because of autocast or of half-precision parameters."""
    return bool(precision and precision.autocast) or any(p.dtype in HALF for p in model.parameters())


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``.

    Example:
        >>> name_of(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
