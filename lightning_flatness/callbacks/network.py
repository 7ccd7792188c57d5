"""Finding the network in a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_flatness.callbacks.root import LightningModule, is_lightning_module, is_overridden
from lightning_flatness.errors import FlatnessError


def find_network(pl_module: LightningModule, model: str | Callable[[Any], nn.Module] | None) -> nn.Module:
    """The module that is measured.

    Args:
        pl_module: the LightningModule.
        model: an attribute of it, a function of it that returns a module, or None for itself.

    Raises:
        FlatnessError: there is no such module, or nothing given and no ``forward``.

    Example:
        >>> module = LightningModule()
        >>> module.net = nn.Identity()
        >>> find_network(module, "net"), find_network(module, lambda module: module.net)
        (Identity(), Identity())
    """
    children = ", ".join(f"'{child}'" for child, _ in pl_module.named_children()) or "none"
    if model is None:
        if not is_overridden("forward", pl_module):
            raise FlatnessError(
                f"{type(pl_module).__name__} has no forward(). Name the attribute that is the network with "
                f"FlatnessCallback(model=...); there are: {children}."
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
        found = f"returned a {type(network).__name__}" if callable(model) else f"{name} has no such module"
        raise FlatnessError(f"FlatnessCallback(model={model!r}): {found}; there are: {children}.")
    return network


@contextmanager
def logging_muted(pl_module: LightningModule) -> Iterator[None]:
    """A forward that logs would otherwise log what it is measured on, or may not log at all at this time.

    Example:
        >>> module = LightningModule()
        >>> with logging_muted(module):
        ...     module.log("key", 1.0)
    """
    modules = [vars(module) for module in pl_module.modules() if is_lightning_module(module)]
    for attributes in modules:
        attributes.update(dict.fromkeys(LOGGING, _nothing))
    try:
        yield
    finally:
        for attributes in modules:
            for name in LOGGING:
                del attributes[name]


LOGGING = ("log", "log_dict")


def _nothing(*arguments: Any, **options: Any) -> None:
    pass
