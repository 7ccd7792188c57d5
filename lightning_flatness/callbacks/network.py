"""Search for the network in a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_flatness.callbacks.lightning_imports import LightningModule, is_overridden
from lightning_flatness.errors import FlatnessError


def find_network(pl_module: LightningModule, model: str | Callable[[Any], nn.Module] | None) -> nn.Module:
    """Return the module that ``model`` names or returns. Without ``model``, return the LightningModule itself."""
    children = ", ".join(f"'{child}'" for child, _ in pl_module.named_children()) or "none"
    if model is None:
        if not is_overridden("forward", pl_module):
            raise FlatnessError(
                f"{type(pl_module).__name__} has no forward(). Name the attribute that is the network with "
                f"model=...; there are: {children}."
            )
        return pl_module
    network: Any = pl_module
    if callable(model):
        network = model(pl_module)
    else:
        for attribute in model.split("."):
            network = getattr(network, attribute, None)
    if not isinstance(network, nn.Module):
        name = type(pl_module).__name__
        problem = f"returned a {type(network).__name__}" if callable(model) else f"{name} has no such module"
        raise FlatnessError(f"model={model!r}: {problem}; there are: {children}.")
    return network
