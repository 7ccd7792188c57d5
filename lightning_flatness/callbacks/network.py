"""Finding the network in a LightningModule."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_flatness.errors import FlatnessError


def find_network(pl_module: LightningModule, name: str | None) -> nn.Module:
    """The module that is measured: the attribute ``name`` of the LightningModule, or the LightningModule itself.

    Raises:
        FlatnessError: there is no such module, or no name and no ``forward``.

    Example:
        >>> module = LightningModule()
        >>> module.net = nn.Identity()
        >>> find_network(module, "net")
        Identity()
    """
    children = ", ".join(f"'{child}'" for child, _ in pl_module.named_children()) or "none"
    if name is None:
        if type(pl_module).forward is LightningModule.forward:
            raise FlatnessError(
                f"{type(pl_module).__name__} has no forward(). Name the attribute that is the network with "
                f"FlatnessCallback(model=...); there are: {children}."
            )
        return pl_module
    network: Any = pl_module
    for attribute in name.split("."):
        network = getattr(network, attribute, None)
    if not isinstance(network, nn.Module):
        raise FlatnessError(
            f"FlatnessCallback(model='{name}'): {type(pl_module).__name__} has no such module; there are: {children}."
        )
    return network
