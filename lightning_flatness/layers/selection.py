"""Choosing layers and the classifier from what really runs in one forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, nn

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.layers.recording import CONVOLUTIONS
from lightning_flatness.model.logits import logits_of
from lightning_flatness.model.names import fits, plain_name


@dataclass(frozen=True)
class Execution:
    """The convolutions and linear layers that ran, in order, and the logits that came out."""

    modules: dict[str, nn.Module]  # all convolutions and linear layers of the model, by plain name
    order: list[str]  # names in order of execution, once for every call
    output_shapes: dict[str, tuple[int, ...]]  # of the last call
    input_shapes: dict[str, tuple[int, ...]]
    logits: Tensor  # (N, K)
    kinds: dict[str, str]  # class names of all modules, by plain name


def trace_execution(model: nn.Module, forward: Callable[[], Any]) -> Execution:
    """Run ``forward`` once and record which convolutions and linear layers of ``model`` run.

    Returns:
        An :class:`Execution`; names come without ``_orig_mod.``.

    Raises:
        BatchError: the model's output has no logits of shape ``(N, K)``.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 5))
        >>> trace_execution(net, lambda: net(torch.randn(4, 1, 8))).order
        ['0', '3']
    """
    kinds = (*CONVOLUTIONS, nn.Linear)
    named: list[tuple[str, nn.Module]] = list(model.named_modules())
    modules = {plain_name(name): module for name, module in named if isinstance(module, kinds)}
    order: list[str] = []
    output_shapes: dict[str, tuple[int, ...]] = {}
    input_shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, returned: Any) -> None:
            order.append(name)
            if arguments and isinstance(arguments[0], Tensor):
                input_shapes[name] = tuple(arguments[0].shape)
            if isinstance(returned, Tensor):
                output_shapes[name] = tuple(returned.shape)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        logits = logits_of(forward())
    finally:
        for handle in handles:
            handle.remove()
    class_names = {plain_name(name): type(module).__name__ for name, module in named}
    return Execution(modules, order, output_shapes, input_shapes, logits.detach(), class_names)


@dataclass(frozen=True)
class Selection:
    """The layers to measure and the classifier, chosen on the first samples."""

    modules: dict[str, nn.Module]  # the layers, by plain name, in the order in which they run
    classifier_name: str | None
    classifier: nn.Module | None  # None: the last layer that runs is not linear on pooled features
    logits: Tensor  # (N, K), of the samples on which it was chosen
    elements: int  # of the outputs of all calls of the layers, for one sample

    def only(self, names: Collection[str]) -> Selection:
        """Without layers that cannot be measured."""
        return replace(self, modules={name: module for name, module in self.modules.items() if name in names})

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights of the layers that have one of their own, by layer."""
        own = {name: dict(module.named_parameters(recurse=False)) for name, module in self.modules.items()}
        return {name: parameters["weight"] for name, parameters in own.items() if "weight" in parameters}


def select(model: nn.Module, forward: Callable[[], Any], layers: str | Sequence[str]) -> Selection:
    """Choose layers and classifier by what runs in one forward pass.

    Raises:
        BatchError: the model's output has no logits of shape ``(N, K)``.
        LayerSelectionError: see :func:`select_layers`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 5))
        >>> selection = select(net, lambda: net(torch.randn(4, 1, 8)), "last")
        >>> list(selection.modules), selection.classifier_name, selection.elements
        (['0'], '3', 12)
    """
    execution = trace_execution(model, forward)
    classifier = find_classifier(execution)
    names = select_layers(execution, layers, classifier)
    ran = [name for name in execution.order if name in names]
    return Selection(
        modules={name: execution.modules[name] for name in names},
        classifier_name=classifier,
        classifier=None if classifier is None else execution.modules[classifier],
        logits=execution.logits,
        elements=sum(prod(execution.output_shapes.get(name, ())[1:]) for name in ran),
    )


def find_classifier(execution: Execution) -> str | None:
    """Name of the classifier: the last thing that runs, if it is linear on pooled features; None if it is not.

    A 1x1 convolution on a 1x1 map is linear too. With None the logits are the pooled layer itself (SqueezeNet).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv1d(1, 5, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        >>> find_classifier(trace_execution(net, lambda: net(torch.randn(4, 1, 8)))) is None
        True
    """
    if not execution.order:
        return None
    name = execution.order[-1]
    if isinstance(execution.modules[name], nn.Linear):
        return name
    inputs, outputs = (shapes.get(name, ()) for shapes in (execution.input_shapes, execution.output_shapes))
    on_one_pixel = set(inputs[2:]) == {1} and set(outputs[2:]) == {1}
    return name if on_one_pixel and outputs[:2] == tuple(execution.logits.shape) else None


def select_layers(execution: Execution, layers: str | Sequence[str], classifier: str | None) -> list[str]:
    """Names of the wanted layers, in the order in which they run.

    Args:
        execution: what ran.
        layers: ``"last"`` (the last convolution before the classifier), ``"all"`` (every convolution and linear layer
            that runs), ``"classifier"``, or module names or glob patterns, with or without ``_orig_mod.``.
        classifier: its name, or None.

    Raises:
        LayerSelectionError: nothing to measure, no match, or a named layer that never runs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 5))
        >>> select_layers(trace_execution(net, lambda: net(torch.randn(4, 1, 8))), "last", "3")
        ['0']
    """
    if not execution.modules:
        raise LayerSelectionError(
            "The model has no convolution (nn.Conv1d, nn.Conv2d, nn.Conv3d) and no nn.Linear. If it has, but as "
            "TorchScript, pass the original module."
        )
    ran = list(dict.fromkeys(execution.order))
    if not ran:
        raise LayerSelectionError(
            "The forward runs none of the model's own convolutions and linear layers, "
            f"{_listing(list(execution.modules))}. Is it a copy of a compiled model, which runs the original's? Copy "
            "before compiling."
        )
    if layers == "all":
        return ran
    if layers == "classifier":
        if classifier is None:
            raise LayerSelectionError(
                "layers='classifier': the last thing that runs is not a linear layer. Name the layer with layers=."
            )
        return [classifier]
    if layers == "last":
        convolutions = [
            name for name in ran if isinstance(execution.modules[name], CONVOLUTIONS) and name != classifier
        ]
        if not convolutions:
            raise LayerSelectionError(
                f"layers='last': no convolution runs before the classifier '{classifier}'. Name a layer with layers=; "
                f"there are {_listing(ran)}."
            )
        return [[name for name in execution.order if name in convolutions][-1]]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    matched = {name for pattern in patterns for name in _match(plain_name(pattern), execution)}
    idle = sorted(matched - set(ran))
    if idle:
        raise LayerSelectionError(
            f"Layer {_listing(idle)} never runs in the model's forward, in evaluation mode. Take it out of layers=."
        )
    return [name for name in ran if name in matched]


def _match(pattern: str, execution: Execution) -> list[str]:
    names = list(execution.modules)
    matched = [name for name in names if fits(pattern, name)]
    if not matched and pattern in execution.kinds:
        raise LayerSelectionError(
            f"Layer '{pattern}' is a {execution.kinds[pattern]}, not a convolution or linear layer."
        )
    if not matched:
        close = difflib.get_close_matches(pattern, names, n=3) or names[-3:]
        raise LayerSelectionError(
            f"layers='{pattern}' matches no convolution or linear layer of the model. Did you mean {_listing(close)}?"
        )
    return matched


def _listing(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
