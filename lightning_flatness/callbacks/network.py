"""Describe the network to measure and its place in the LightningModule, and find the network of ``model=``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_flatness.callbacks.lightning_imports import LightningModule, is_overridden
from lightning_flatness.errors import FlatnessError


@dataclass(frozen=True)
class Network:
    """The network to measure, and which of its calls in a validation step is measured.

    Attributes:
        module: the network.
        prefix: name of the network in the LightningModule, with which the names of its layers begin. The prefix is
            empty if ``model=`` names the network.
        place: name under which ``get_submodule`` of the LightningModule returns the network, unless ``model=`` names
            it.
        on_batch: True if the step calls the network on several inputs. Then only the call on the batch's own inputs is
            measured.
        is_called: False if no call in the steps can be measured. Then the inputs in the batch or from ``batch_fn=`` are
            measured.
        is_named: whether ``model=`` names the network.
        is_sought: True while no step has been seen to call a network. Then later validation steps are watched, too.
    """

    module: nn.Module
    prefix: str = ""
    place: str = ""
    on_batch: bool = False
    is_called: bool = True
    is_named: bool = False
    is_sought: bool = False


class Within(nn.Module):
    """A wrapper that gives a network the name ``prefix``, so that the names of its parameters begin with this name.

    Example:
        >>> [name for name, _ in Within(nn.Linear(2, 3), "parts.net").named_parameters()]
        ['parts.net.weight', 'parts.net.bias']
    """

    def __init__(self, network: nn.Module, prefix: str) -> None:
        super().__init__()
        *parents, name = prefix.split(".")
        parent: nn.Module = self
        for part in parents:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, network)
        self._network = (network,)  # in a tuple, so that it is not registered under a second name

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the network."""
        return self._network[0](*arguments, **keywords)


def named_network(pl_module: LightningModule, model: str | Callable[[Any], nn.Module] | None) -> Network | None:
    """Return the network that ``model`` selects, or None if ``model`` is None.

    ``model`` is the name of an attribute of the LightningModule, or a function that takes the LightningModule and
    returns the network.

    Raises:
        FlatnessError: ``model`` is a module itself, or does not lead to a module.
    """
    if model is None:
        return None
    children = ", ".join(f"'{child}'" for child, _ in pl_module.named_children()) or "none"
    if isinstance(model, nn.Module):
        raise FlatnessError(
            "model= must not be a module. Give the name of an attribute of the LightningModule, or a function that "
            "takes the LightningModule and returns the network. The LightningModule has these submodules: "
            f"{children}."
        )
    network: Any = pl_module
    if callable(model):
        network = model(pl_module)
    else:
        for attribute in model.split("."):
            network = getattr(network, attribute, None)
    if not isinstance(network, nn.Module):
        name = type(pl_module).__name__
        problem = f"returned a {type(network).__name__}" if callable(model) else f"{name} has no such module"
        raise FlatnessError(f"model={model!r}: {problem}. The LightningModule has these submodules: {children}.")
    return Network(network, is_named=True)


def is_sought(network: Network | None) -> bool:
    """Return whether no step has been seen to call the network, so that the next step is to be watched."""
    return network is None or network.is_sought


def network_without_step(
    pl_module: LightningModule, model: str | Callable[[Any], nn.Module] | None, is_sought: bool = False
) -> Network:
    """Return the network that ``model`` names, or the LightningModule if ``model`` is None.

    Use this function if no training or validation step was seen to call a network. ``is_sought`` says whether later
    steps are watched.
    """
    named = named_network(pl_module, model)
    if named is None and not is_overridden("forward", pl_module) and "forward" not in vars(pl_module):
        children = ", ".join(f"'{child}'" for child, _ in pl_module.named_children()) or "none"
        raise FlatnessError(
            f"{type(pl_module).__name__} has no forward(), and no training or validation step was seen to call a "
            "network. Use model=... to name the attribute that is the network. The LightningModule has these "
            f"submodules: {children}."
        )
    return replace(named or Network(pl_module), is_called=False, is_sought=is_sought)


def present_network(
    network: Network, pl_module: LightningModule, model: str | Callable[[Any], nn.Module] | None
) -> Network | None:
    """Return ``network`` with its present module, because another callback may have replaced the module.

    Return ``network`` itself if the module is the same, and None if the LightningModule no longer has a module of this
    name.
    """
    named = named_network(pl_module, model)
    try:
        module = named.module if named else pl_module.get_submodule(network.place)
    except AttributeError:
        return None
    return network if module is network.module else replace(network, module=module)


def network_in_place(
    network: Network | None, pl_module: LightningModule, model: str | Callable[[Any], nn.Module] | None
) -> Network:
    """Return ``network`` with its present module, or call :func:`network_without_step` if ``network`` is None.

    Raises:
        FlatnessError: The LightningModule no longer has a module of this name, or no network is found.
    """
    if network is None:
        return network_without_step(pl_module, model)
    now = present_network(network, pl_module, model)
    if now is None:
        raise FlatnessError(
            f"{type(pl_module).__name__} no longer has the module '{network.prefix}', which was the network in an "
            "earlier step. Use model=... to name the network that replaces it."
        )
    return now
