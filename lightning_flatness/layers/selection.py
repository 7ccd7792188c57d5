"""Choose the classifier and the layers to measure among the modules that run in one forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from lightning_flatness.errors import LayerSelectionError
from lightning_flatness.layers.tracing import LAYERS, UNNAMED, HiddenCall, Trace, trace
from lightning_flatness.model.names import fits, listed, plain_name

WORDS = ("last", "classifier", "all")


@dataclass(frozen=True)
class Selection:
    """The result of :func:`select`: the layers to measure, the classifier, and the logits of the first samples."""

    modules: dict[str, nn.Module]  # the layers, keyed by plain name, in the order in which they run
    kernels: Mapping[str, str]  # name of a layer -> name of its parameter that is the kernel, or may be
    classifier_name: str | None
    classifier: nn.Module | None  # None if the last layer that runs is not a linear map with a weight
    logits: Tensor  # (N, K), of the first samples, on which the layers were chosen
    elements: int  # number of entries per sample in the outputs of all calls of the chosen layers
    passed_over: Mapping[str, str]  # with layers="all": name -> why the module cannot be measured
    idle: Mapping[str, nn.Module]  # with layers="all": other convolutions and linear layers, which did not run

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameter of each layer that is its kernel, or from which it may be computed, keyed by layer name."""
        own = {name: dict(module.named_parameters(remove_duplicate=False)) for name, module in self.modules.items()}
        return {name: of[self.kernels[name]] for name, of in own.items() if self.kernels[name] in of}


def select(model: nn.Module, forward: Callable[[], Any], layers: str | Sequence[str], prefix: str = "") -> Selection:
    """Run ``forward`` once; return the classifier and the layers to measure, chosen among the modules that run.

    Args:
        model: the model.
        forward: runs the model on the first samples.
        layers: ``"last"``, ``"all"``, ``"classifier"``, or names or patterns of layers.
        prefix: the model's name in a larger module; the names of layers begin with it.

    Raises:
        LayerSelectionError: ``layers`` fits no layer that runs, or it selects a layer that cannot be measured.
    """
    modules: dict[str, nn.Module] = {plain_name(n): module for n, module in model.named_modules(prefix=prefix)}
    traced = trace(model, modules, forward)
    candidates = {
        name: module for name, module in modules.items() if isinstance(module, LAYERS) or name in traced.names
    }
    classifier = _classifier(traced)
    names = _wanted(layers, modules, candidates, traced, classifier)
    return Selection(
        modules={name: candidates[name] for name in names},
        kernels={call.name: call.kernel or "weight" for call in traced.ran},
        classifier_name=classifier,
        classifier=None if classifier is None else candidates[classifier],
        logits=traced.logits,
        elements=sum(prod(call.output_shape[1:]) for call in traced.ran if call.name in names),
        passed_over=traced.passed_over if layers == "all" else {},
        idle={n: one for n, one in candidates.items() if layers == "all" and n not in {*names, *traced.passed_over}},
    )


def _classifier(traced: Trace) -> str | None:
    """Return the name of the classifier, or None if the last layer that runs is not linear or has no own ``weight``.

    If the output of a layer is the logits, this layer counts as the last one, whatever runs after it. A convolution
    from one pixel to one pixel counts as linear if its output has as many channels as there are logits. Without a
    classifier, the logits are assumed to be the pooled output of the last layer, as in SqueezeNet.
    """
    if not traced.calls or traced.calls[-1].kernel != "weight":
        return None
    last = traced.calls[-1]
    on_one_pixel = set(last.input_shape[2:]) == {1} and set(last.output_shape[2:]) == {1}
    is_linear = on_one_pixel and last.output_shape[:2] == tuple(traced.logits.shape)
    return last.name if is_linear or last.is_linear else None


def _last(traced: Trace, classifier: str | None, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of the last convolution before the classifier, for ``layers="last"``.

    A linear layer over several positions (tokens) counts as a convolution of kernel size one. So in a vision
    transformer or a mixer, the result is the linear layer at the end of the last block. A linear layer on pooled or
    flattened features does not count.

    Raises:
        LayerSelectionError: there is no such convolution, or one that cannot be measured runs after it.
    """
    for index, call in reversed(list(enumerate(traced.calls))):
        if call.convolves and call.name != classifier:
            later = [hidden for hidden in traced.hidden if hidden.convolves and hidden.calls_before > index]
            if later:
                raise _runs_later(later[-1], call.name, "last")
            return call.name
    where = f"before the classifier '{classifier}'" if classifier else "in the forward"
    raise LayerSelectionError(
        f"layers='last': no convolution runs {where}. Name a layer with layers=; there are {_listing(traced.names)}."
        f"{_unregistered(modules)}"
    )


def _unregistered(modules: Mapping[str, nn.Module]) -> str:
    """Return a sentence on modules in a plain list or dictionary, which are no submodules; ``""`` if there are none."""
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if any(isinstance(one, nn.Module) and one not in modules.values() for one in entries):
                place = f"{name}.{attribute}" if name else attribute
                return (
                    f" The modules in the {type(value).__name__} '{place}' are no submodules of the model, so their "
                    "layers are not found. Keep them in an nn.ModuleList or nn.ModuleDict."
                )
    return ""


def _runs_later(hidden: HiddenCall, layer: str, layers: str) -> LayerSelectionError:
    """Return an error which says that ``layer`` is not the last one, because ``hidden`` runs after it.

    ``hidden`` is a convolution or linear map that cannot be measured. ``layers`` is ``"last"`` or ``"classifier"``.
    """
    return LayerSelectionError(
        f"layers='{layers}': '{hidden.name}' runs after '{layer}' and cannot be measured. {hidden.reason} "
        f"To measure another layer, name it with layers=, e.g. '{layer}'."
    )


def _wanted(
    layers: str | Sequence[str],
    modules: dict[str, nn.Module],
    candidates: dict[str, nn.Module],
    traced: Trace,
    classifier: str | None,
) -> list[str]:
    """Return the names of the layers that ``layers`` selects, in the order in which they run.

    ``candidates`` are the convolutions and linear layers, and other modules that ran and only apply one kernel.
    """
    ran = traced.names
    reasons = [reason for name, reason in traced.passed_over.items() if name != UNNAMED or not candidates]
    if not ran and reasons:
        raise LayerSelectionError(reasons[0])
    if not candidates:
        raise LayerSelectionError(
            "The model has no convolution (nn.Conv1d, nn.Conv2d, nn.Conv3d) and no nn.Linear. If its layers are "
            "TorchScript, pass the original module."
        )
    if not ran:
        compiled = (
            " If the model is a copy of a compiled model, it runs the layers of the original: copy the model before "
            "you call torch.compile."
        )
        raise LayerSelectionError(
            f"The forward runs none of the model's convolutions and linear layers ({_listing(list(candidates))})."
            f"{_unregistered(modules) or compiled}"
        )
    if layers == "all":
        return ran
    if layers == "classifier":
        later = [hidden for hidden in traced.hidden if hidden.calls_before == len(traced.calls)]
        if later:
            raise _runs_later(later[-1], traced.calls[-1].name, layers)
        if classifier is None:
            raise LayerSelectionError(
                f"layers='classifier': the last layer that runs, '{traced.calls[-1].name}', is not a linear layer that "
                "applies its own parameter `weight`. Name the layer to measure with layers=."
            )
        return [classifier]
    if layers == "last":
        return [_last(traced, classifier, modules)]
    patterns = [layers] if isinstance(layers, str) else layers
    matched = {name for pattern in patterns for name in _matched(plain_name(pattern), modules, candidates, traced)}
    idle = sorted(matched - set(ran))
    if idle and idle[0] in traced.passed_over:
        raise LayerSelectionError(traced.passed_over[idle[0]])
    if idle:
        raise LayerSelectionError(
            f"In evaluation mode, the model's forward does not run {_listing(idle)} on the first samples. With "
            "layers=, select only layers that run on all samples."
        )
    return [name for name in ran if name in matched]


def _matched(pattern: str, modules: dict[str, nn.Module], candidates: dict[str, nn.Module], traced: Trace) -> list[str]:
    """Return the names of the candidates that fit a pattern; raise an error if no candidate fits."""
    matched = [name for name in candidates if fits(pattern, name)]
    if not matched and pattern in traced.passed_over:
        raise LayerSelectionError(traced.passed_over[pattern])
    if not matched and pattern in modules:
        kind = type(modules[pattern]).__name__
        raise LayerSelectionError(
            f"Layer '{pattern}' is a {kind}, not a convolution or linear layer. Name such a layer with layers=."
        )
    if not matched and pattern in WORDS:
        raise LayerSelectionError(
            f"In a list, layers= has names and patterns, and no layer is named '{pattern}'. Give layers='{pattern}' by "
            "itself."
        )
    if not matched:
        same_end = [name for name in candidates if name.endswith(f".{pattern}") or pattern.endswith(f".{name}")]
        close = list(dict.fromkeys([*same_end, *difflib.get_close_matches(pattern, candidates, n=3)]))[:3]
        close = close or list(candidates)[-3:]
        raise LayerSelectionError(
            f"layers='{pattern}' matches no convolution or linear layer of the model. Did you mean {_listing(close)}?"
        )
    return matched


def _listing(names: list[str]) -> str:
    """Return a text with the first five names in quotes, and the number of the other names."""
    return listed([f"'{name}'" for name in names], most=5)
