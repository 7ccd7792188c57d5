"""Run the user's code without autocast, even where the code enables autocast itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@cache
def device_types() -> tuple[str, ...]:
    """Return the types of devices that this machine has: ``"cpu"`` and, if there is one, that of the accelerator."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


class WithoutAutocast(TorchFunctionMode):
    """A mode in which operations run without autocast. ``was_needed`` says whether one ran where it was enabled.

    ``kinds`` are the types of devices on which autocast is disabled; by default all of :func:`device_types`.

    Every call of a torch function takes some microseconds longer in a mode. So enter it for the user's code only.

    Example:
        >>> with WithoutAutocast() as mode, torch.autocast("cpu", torch.bfloat16):
        ...     product = torch.ones(2, 2) @ torch.ones(2, 2)
        >>> product.dtype, mode.was_needed
        (torch.float32, True)
    """

    def __init__(self, kinds: Collection[str] | None = None) -> None:
        super().__init__()
        self.was_needed = False
        self._kinds = device_types() if kinds is None else kinds

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        enabled = [device_type for device_type in self._kinds if torch.is_autocast_enabled(device_type)]
        if not enabled:
            return func(*args, **(kwargs or {}))
        self.was_needed = True
        with ExitStack() as stack:
            for device_type in enabled:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            return func(*args, **(kwargs or {}))
