"""Test whether observing forward passes changes nothing in the network and gives the right block traces.

The terms are explained in ``layers/__init__.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional import hessian_trace
from lightning_flatness.layers.certificates import ROUNDINGS
from lightning_flatness.layers.certificates.layer import as_parameter
from lightning_flatness.layers.certified import Certified, CertifiedPass, Context
from lightning_flatness.layers.live import KEEPS_TENSORS, OBSERVED_BY_ANOTHER, Listener, is_observed
from lightning_flatness.layers.options import Options
from lightning_flatness.layers.passes import OwnPasses
from lightning_flatness.layers.sums import LayerSums, added
from lightning_flatness.model.call import as_call, tensors_of
from lightning_flatness.model.copy import ModelCopy
from lightning_flatness.model.isolation import BACKWARD_HOOKS, float32_is_reduced, untouched
from lightning_flatness.model.names import COMPILED
from lightning_flatness.model.precision import Precision, current_precision, name_of
from lightning_flatness.model.rows import num_rows, take

# The number of samples of the trial.
TRIAL = 4
# Block traces of an observed pass in TF32 may differ from those in full float32 by this share.
REDUCED = 0.02
# Block traces of an observed pass in half precision may differ from those in float32 by this share. For confident
# samples of a ResNet, they differed by up to 0.09.
ROUNDED = 0.25
# Attributes that torch and Lightning set on a module when they compile it.
COMPILERS = ("_compiled_call_impl", "_compiler_ctx")


Sums = dict[str, LayerSums]


@dataclass(frozen=True)
class Observable:
    """What a trial has found about a model whose forward passes can be observed, such as its certificates."""

    known: Certified
    context: Context
    precision: Precision | None = None  # the precision of the observed pass of the trial
    half: torch.dtype | None = None  # half-precision dtype of layers, classifier or logits in this pass
    compiled: str = ""  # names a compiled module; if there is one, only passes of our own are observed

    @property
    def device(self) -> torch.device:
        """The device of the logits, and so of the loss."""
        return self.context.selection.logits.device


MeasureObserved = Callable[[Observable, Listener, Tensor | None], tuple[Sums, Certified]]


def try_observing(
    model: nn.Module,
    options: Options,
    batch: tuple[Any, Tensor | None],
    measure_own: Callable[[CertifiedPass, Certified], Sums],
    measure_observed: MeasureObserved,
) -> Observable | str:
    """Measure the first samples of a batch twice, without and with observing, and compare the block traces.

    Both passes are our own, not the user's. The observed pass runs in the current modes. If the inputs are a recorded
    :class:`Call`, it runs in the precision of that call, as the user's passes do. It runs eagerly even if the model is
    compiled. In this case only passes of our own can be observed, not the user's.

    Args:
        model: the model.
        options: the options of the measurement.
        batch: inputs and targets.
        measure_own: returns each layer's sums for a certified pass, given this pass and the certificates.
        measure_observed: returns each layer's sums for an observed pass, and the updated certificates.

    Returns:
        The observable model, or a text that says why it cannot be observed.
    """
    samples = num_rows(*batch)
    reason = why_not_observed(model, options.measuring_dtype, as_call(batch[0]).precision)
    if reason or samples < 2:
        return reason or "the batch has one sample"
    inputs, targets = (take(part, slice(0, TRIAL), samples) for part in batch)
    passes = OwnPasses(model, options)
    expected: Sums = {}
    for part in passes(inputs, targets, lambda seen, known, _: {} if seen.need_backward else measure_own(seen, known)):
        expected = added(expected, part)
    passes.release()  # its copy of the model would stay in memory during validation
    context = passes.context
    for name, layer in passes.known.layers.items():
        if context.selection.modules[name] is model:
            return f"layer '{name}' is the whole network"
        if name not in expected or (layer.is_output and name != context.selection.classifier_name):
            return f"layer '{name}' is not measured by the closed form, and is not the classifier"
    known = Observable(passes.known, context, compiled=why_compiled(model))
    outcome = _observe(model, inputs, targets, known, measure_observed)
    if isinstance(outcome, str):
        return outcome
    sums, observable = outcome
    logits, parameters = context.selection.logits, context.selection.parameters
    layers = dict(observable.known.layers)
    eps = torch.finfo(logits.dtype).eps
    allowed = REDUCED if eps > 1e-8 and float32_is_reduced(logits.device) else ROUNDINGS * eps
    for name, of_layer in sums.items():
        deviation = _relative(of_layer.block_traces.strips, expected[name].block_traces.strips)
        if not deviation <= (allowed if observable.half is None else ROUNDED):
            where = "" if observable.half is None else f", and its features are {name_of(observable.half)}"
            return f"the numbers of layer '{name}' differ by {deviation:.1e} when it is observed{where}"
        layers[name] = layers[name].with_deviation(deviation)
        if observable.half is not None:
            trace = _trace(expected[name])  # 0 if, for example, all units of a ReLU are dead
            change = _trace(of_layer) / trace - 1 if trace else 0.0
            layers[name] = layers[name].in_precision(name_of(observable.half), change)
        if name in parameters:
            layers[name] = replace(layers[name], kernel=as_parameter(layers[name].kernel, parameters[name]))
    return replace(observable, known=replace(observable.known, layers=layers))


def _relative(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference of two tensors, relative to the norm of ``other``."""
    difference = (one - other).norm()
    return float(torch.where(difference == 0, difference, difference / other.norm()))


def _trace(sums: LayerSums) -> float:
    """Return the Hessian trace, summed over samples."""
    return float(hessian_trace(sums.block_traces.whole()))


def _observe(
    model: nn.Module, inputs: Any, targets: Tensor | None, observable: Observable, measure: MeasureObserved
) -> tuple[Sums, Observable] | str:
    """Observe a pass of our own in the same way as a pass of the user's, under the current modes.

    Return the sums of the pass and the observable model, or a text that says why observing fails.
    """
    precision = as_call(inputs).precision or current_precision()
    model_copy, own = _copied(model)
    with untouched(model), precision.entered():
        expected = model_copy(inputs, own)
    with untouched(model):
        listener = Listener(model, observable.context.recorder)
        try:
            with listener, listener.alone(), precision.entered():
                output = model_copy(inputs, own)
        except Exception as error:
            return f"the network fails when it is observed ({type(error).__name__}: {error})"
        reason = listener.reason or _why_different(output, expected)
        if reason:
            return reason
        if model_copy.keeps_graph:
            return "the network writes features to a buffer"
        alive = listener.graph()
        try:
            half = listener.result().half
            if half is not None:
                observable = replace(observable, known=observable.known.without_operations(), half=half)
            sums, known = measure(observable, listener, targets)
        except (FlatnessError, RuntimeError) as error:  # RuntimeError: from autograd, or memory ran out
            return str(error)
        finally:
            listener.release()
        del output, expected
        if alive() is not None:
            gc.collect()
        found = replace(observable, known=known, precision=precision)
        return KEEPS_TENSORS if alive() is not None else (sums, found)


def repeated(model: nn.Module, inputs: Any, observable: Observable) -> Listener:
    """Make a pass of our own on ``inputs``, and observe it in the same way as a pass of the user's.

    The pass runs in the precision of the trial. The returned listener holds the observed pass.
    """
    assert observable.precision is not None
    listener = Listener(model, observable.context.recorder)
    model_copy, own = _copied(model)
    with untouched(model), listener, listener.alone(), observable.precision.entered():
        model_copy(inputs, own)
    return listener


def _copied(model: nn.Module) -> tuple[ModelCopy, dict[nn.Parameter, Tensor]]:
    """Return a copy of a model in its own precision, and a map from the model's parameters to their copies."""
    with torch.inference_mode(False):
        model_copy = ModelCopy(model, as_it_runs=True)
        # The same parameters must require gradients, so that the graph is the same as in a pass of the user's.
        return model_copy, {p: model_copy.copy_of(p).requires_grad_(p.requires_grad) for p in model.parameters()}


def _why_different(output: Any, expected: Any) -> str:
    """Return how the output of an observed pass differs from the expected one, or an empty string."""
    tensors, expected_tensors = tensors_of(output), tensors_of(expected)
    if any(tensor.requires_grad for tensor in tensors):
        return "the network returns more than its classifier's output, such as features"
    if len(tensors) != len(expected_tensors) or not all(map(_identical, tensors, expected_tensors)):
        return "the network returns other values when it is observed"
    return ""


def _identical(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same type and entries, and both or neither are inference tensors."""
    kinds = [(tensor.dtype, tensor.is_inference()) for tensor in (one, other)]
    return kinds[0] == kinds[1] and torch.equal(one.detach(), other.detach())


def why_compiled(model: nn.Module) -> str:
    """Return a text that says which module of a model is compiled; empty if none is."""
    for name, module in model.named_modules():
        if COMPILED in dict(module.named_children()) or any(vars(module).get(name) for name in COMPILERS):
            return f"module '{name or type(module).__name__}' is compiled"
    return ""


def why_not_observed(model: nn.Module, dtype: torch.dtype | None = None, precision: Precision | None = None) -> str:
    """Return why the user's passes of a model must not be observed; empty if they may be.

    ``dtype`` is the dtype in which the user wants the model to be measured; None means the model's own dtype.
    ``precision`` is the precision of the user's passes.
    """
    if dtype is not None and precision is not None and precision.autocast:
        return f"validation runs under autocast, and dtype= asks for {dtype}"
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != (dtype or tensor.dtype):
            return f"weights in {tensor.dtype} are measured in {dtype}"
        if tensor.is_inference():
            return "weights or buffers were made in inference mode"
    if is_observed(model):
        return OBSERVED_BY_ANOTHER
    for name, module in model.named_modules():
        what = f"module '{name or type(module).__name__}'"
        if module.training:
            return f"{what} is in training mode"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{what} is TorchScript"
        if any(vars(module).get(hooks) for hooks in BACKWARD_HOOKS):
            return f"{what} has backward hooks"
    return ""
