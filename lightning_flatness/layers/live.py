"""Observe a forward pass that the user makes, so that the measurement needs no pass of its own.

A trial (``trial.py``) must first show that observing changes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from lightning_flatness.errors import BatchError
from lightning_flatness.layers.recording import Pass, Recorder
from lightning_flatness.model.answer import Answer, weights_sample
from lightning_flatness.model.call import Call, Overheard, as_call, heard_call, map_tensors, only_heard_by, same_inputs
from lightning_flatness.model.modules import every_module
from lightning_flatness.model.precision import Precision, current_precision


class Listener:
    """A context manager that records one call of a model by the user's code, and may observe its forward pass.

    At most one call is recorded: the first call on the very objects ``inputs``. If there is no such call and ``only``
    is False, it is the first call on other objects. If ``inputs`` is None, it is the first call of all. :attr:`call`
    holds copies of the recorded call's arguments, and the model's :class:`Answer`. If the recorded call is not on
    ``inputs``, :attr:`num_others` counts the later calls on objects other than those of the recorded call. A call that
    raises an error does not count, because the user's code may catch the error and skip the batch.

    Errors of the package are never raised in the user's code, only in :meth:`result`. If observing makes the forward
    fail, the listener runs the forward again without observing it. After the call, the grad mode and the inference mode
    are as they were before the call, even if the call raised an error.

    Args:
        model: the model that the user calls.
        recorder: makes the recorder that observes the pass; if None, the call is recorded but not observed.
        inputs: the inputs of the call to record; None for any.
        only: with ``inputs``, record no call on other inputs.
        precision: observe the pass only if it runs in this precision; None for any.
        compares_weights: whether the recorded answer includes a sample of the weights.
    """

    _active: ClassVar[list[Listener]] = []  # listeners with a recorder, while their `with` block runs
    _observing: ClassVar[bool] = False  # whether a listener observes a pass; two at a time would mix their graphs

    def __init__(
        self,
        model: nn.Module,
        recorder: Callable[[], Recorder] | None = None,
        inputs: Any = None,
        precision: Precision | None = None,
        only: bool = True,
        compares_weights: bool = False,
    ) -> None:
        self.call: Call | None = None
        self.num_others = 0
        self.reason = NOT_CALLED  # why the pass was not observed; empty if it was observed
        self.output: Any = None  # what the recorded call returned
        self._model, self._recorder, self._precision = model, recorder, precision
        self._only, self._compares_weights = only, compares_weights
        self._wanted = None if inputs is None else as_call(inputs)
        self._called: Call | None = None  # the recorded call, on the user's tensors
        self._recorded: Recorder | None = None
        self._is_called = False  # whether the recorded call is running
        self._overheard = Overheard([model], self._hear)
        self._state: list[Any] = []

    @property
    def is_on_inputs(self) -> bool:
        """Whether the recorded call is on the very objects ``inputs``."""
        return self._is_wanted(self._called)

    def result(self) -> Pass:
        """Return the observed forward pass.

        Raises:
            BatchError: no pass was observed, or observing failed.
        """
        recorder = self._recorded
        if recorder is None or self.reason:
            raise BatchError(self.reason)
        if recorder.failure is not None:
            raise BatchError(f"observing failed ({recorder.failure})")
        return recorder.result(self.call, self.output)

    def __enter__(self) -> Listener:
        self._overheard.__enter__()
        self._state = _state(self._model)
        if self._recorder is not None:
            Listener._active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._overheard.__exit__()
        if self in Listener._active:
            Listener._active.remove(self)

    def alone(self) -> AbstractContextManager[None]:
        """Return a context manager in which calls of the model reach this listener, but no other listener.

        The trial uses it, because other listeners must record only calls that the user's code makes.
        """
        return only_heard_by(self._overheard)

    def release(self) -> None:
        """Drop all references to tensors, so that their memory can be freed."""
        self._recorded = self.output = self.call = self._called = self._wanted = None

    def graph(self) -> weakref.ref[Any]:
        """Return a weak reference that is alive as long as any part of the observed autograd graph is."""
        token = _Token()
        with torch.inference_mode(False), torch.enable_grad():
            nodes = [] if self._recorded is None else self._recorded.nodes
            for node in (node for node in nodes if node.requires_grad):  # a classifier's output has no graph
                metadata: Any = get_gradient_edge(node).node.metadata
                metadata["lightning_flatness"] = token
        return weakref.ref(token)

    def _hear(
        self, module: nn.Module, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Run a call that the user's code makes of the model, and record or observe it if it is the call to record."""
        called = heard_call(arguments, keywords)
        counts = not self._is_called and (self._wanted is None or not self._only or self._is_wanted(called))
        takes_over = counts and self._is_wanted(called) and not self._is_wanted(self._called)
        if not counts or (self._called is not None and not takes_over):
            is_other = counts and not self._is_wanted(self._called) and not same_inputs(called, self._called)
            output = forward(*arguments, **keywords)
            self.num_others += is_other
            return output
        before = self._called, self.call, self.num_others
        self._recorded, self.num_others = None, 0
        self._called, self.call = called, called.copied()
        self.reason = "observing is not asked for" if self._recorder is None else self._why_not_now()
        self._is_called = True
        try:
            if not self.reason and self._recorder is not None:
                # These contexts restore the grad and inference modes, even if the forward leaves them changed.
                with torch.inference_mode(torch.is_inference_mode_enabled()), torch.no_grad():
                    self._observe(self._recorder(), forward, called)
            if self.reason:
                self.output = forward(*arguments, **keywords)
            weights = weights_sample(self._model) if self._compares_weights else None
            self.call = self.call._replace(answer=Answer(self._model, self.output, weights))
        except BaseException:
            self._called, self.call, self.num_others = before
            raise
        finally:
            self._is_called = False
        if self._recorded is None or self._recorded.has_classifier:
            return self.output
        # Without a classifier the output is part of the observed graph, so the user gets a detached copy. In inference
        # mode this copy is an inference tensor, as the user expects.
        return map_tensors(self.output, lambda made: made.detach().clone())

    def _is_wanted(self, called: Call | None) -> bool:
        return called is not None and self._wanted is not None and same_inputs(called, self._wanted)

    def _observe(self, recorder: Recorder, forward: Callable[..., Any], called: Call) -> None:
        """Run the forward and record it. If observing makes the forward fail, put the error into ``reason``."""
        Listener._observing = True
        try:
            with recorder:
                self.output = forward(*called.arguments, **called.keywords)
            self._recorded = recorder
        except BaseException as error:
            self.reason = f"the network fails when it is observed ({type(error).__name__}: {error})"
            # Only a RuntimeError can come from observing: autograd raises it for operations that it cannot record. Any
            # other error is the network's own.
            if not (recorder.nodes and isinstance(error, RuntimeError)):
                self.reason = "the network raised an error"
                raise
        finally:
            Listener._observing = False

    def _why_not_now(self) -> str:
        """Return why the pass that begins now must not be observed, or an empty string if it may be."""
        if Listener._observing:
            return "another callback observes the same forward pass"
        if torch.is_grad_enabled():
            return "validation records gradients"
        if self._precision is not None and current_precision() != self._precision:
            return "validation runs in another precision than before (autocast)"
        if _state(self._model) != self._state:
            return "validation changes modes or hooks of modules"
        return ""


def is_observed(model: nn.Module) -> bool:
    """Return whether an active listener observes the model, or another model that shares a module with this one."""
    modules = set(every_module(model)) if Listener._active else set()
    return any(not modules.isdisjoint(every_module(listener._model)) for listener in Listener._active)


KEEPS_TENSORS = "the network keeps tensors of the pass (features, in an attribute or a list)"
OBSERVED_BY_ANOTHER = "another callback observes the same network"
NOT_CALLED = "validation does not call the network"


class _Token:
    """An object that an autograd graph holds, and that is alive as long as the graph."""


def _state(model: nn.Module) -> list[Any]:
    """Return the training modes and the numbers of hooks of all modules."""
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in every_module(model)]
