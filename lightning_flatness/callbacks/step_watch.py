"""Record the calls of modules in a step, to find out which module is the network, and which inputs it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_flatness.callbacks import watched
from lightning_flatness.callbacks.lightning_imports import LightningModule
from lightning_flatness.callbacks.network import Network
from lightning_flatness.errors import BatchError, FlatnessError
from lightning_flatness.model.answer import Answer, weights_sample
from lightning_flatness.model.call import Call, Overheard, as_call, equal_inputs, heard_call, same_inputs, tensors_of
from lightning_flatness.model.logits import any_logits_of
from lightning_flatness.model.names import plain_name

# Depth to which calls within calls are recorded, in search of the call that returns logits.
DEPTH = 4


@dataclass(frozen=True)
class Found:
    """The network that a step has called, and the call to measure, if there is one.

    Attributes:
        network: the network.
        call: the call to measure, or None. Its tensors are copies, made before the call. Its ``answer`` has the logits
            that the network returned.
    """

    network: Network
    call: Call | None = None


@dataclass
class _Heard:
    """A recorded call of a module in a step, with the module's output, and the calls of modules inside this call.

    If the output has no logits, the network is sought among the calls inside. If these are calls of several modules,
    they are dropped, because they would keep the step's activations in memory.
    """

    module: nn.Module
    call: Call  # with the user's tensors
    # With copies of the tensors, made before the call, because the step may change them in place. If the call returns
    # logits, it has the module's answer.
    copied: Call
    output: Any = None
    within: list[_Heard] = field(default_factory=list)
    several: bool = False  # whether several modules are called within

    def add(self, heard: _Heard) -> None:
        """Add a call within this call."""
        self.several |= any(other.module is not heard.module for other in self.within)
        self.within = [] if self.several else [*self.within, heard]


class StepWatch:
    """A context manager that records the calls of modules with weights in a step, to find the network among them.

    ``step`` names the step in messages: ``"validation"`` or ``"training"``.

    Example:
        >>> import torch
        >>> module = LightningModule()
        >>> module.net, x = nn.Linear(2, 3), torch.ones(4, 2)
        >>> with StepWatch(module, None) as watch:
        ...     logits = module.net(x)
        >>> found = watch.found(None)
        >>> found.network.prefix, found.call.arguments[0].shape
        ('net', torch.Size([4, 2]))
    """

    def __init__(self, pl_module: LightningModule, named: Network | None, step: str = "validation") -> None:
        self._pl_module, self._named, self.step = pl_module, named, step
        self._forward = vars(pl_module).get("forward")
        self.is_compiled, self._num_traced = False, Overheard.num_traced  # whether torch.compile runs the calls
        self._places = {module: name for name, module in pl_module.named_modules()}
        self._names = {module: plain_name(name) for module, name in self._places.items()}
        self._calls: list[_Heard] = []
        self._open: list[_Heard] = []  # the calls that are running now, from the outside to the inside
        self._after: list[nn.Module] = []  # modules that are called after the module that the user names
        self._in_other = False  # whether a module other than the named one is running now
        self._outside: list[nn.Module] = []  # called modules that return logits but are no submodules
        # Without DDP, the steps of a LightningModule run eagerly even after module.compile(). So watch its children.
        found = [pl_module, *(part for child in pl_module.children() for part in watched.eager_modules(child))]
        modules = [module for module in dict.fromkeys(found) if next(module.parameters(), None) is not None]
        self._around: set[nn.Module] = set()  # compiled modules that contain the module that the user names
        if named:
            others = [module for module in modules if named.module not in module.modules()]
            self._around = watched.compiled_around(pl_module, named.module)
            modules = [named.module, *others, *self._around]
        else:
            modules += watched.modules_outside(pl_module)
        self._overheard = Overheard(modules, self._hear)

    def __enter__(self) -> StepWatch:
        self._overheard.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._overheard.__exit__()
        self.is_compiled |= Overheard.num_traced > self._num_traced

    def _hear(
        self, module: nn.Module, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        # DDP calls the LightningModule to run a step. If the LightningModule is compiled, this step is compiled, too.
        is_replaced = vars(module).get("forward") is not self._forward
        is_step = module is self._pl_module and watched.is_compiled(module) and is_replaced
        self.is_compiled |= is_step
        if is_step or module in self._around:
            with self._overheard.paused():
                return forward(*arguments, **keywords)
        if not self._named and module not in self._places:
            return self._hear_outside(module, forward, arguments, keywords)
        if len(self._open) >= DEPTH or (self._named and self._open):
            return forward(*arguments, **keywords)
        call = heard_call(arguments, keywords)
        if self._named and module is not self._named.module:
            return self._hear_other(module, forward, call)
        heard = _Heard(module, call, call)
        counts = not (self._open and self._open[-1].several)  # otherwise this call is dropped
        if counts:
            heard.copied = call.copied()
        self._open.append(heard)
        try:
            with self._overheard.paused() if watched.is_compiled(module) else nullcontext():
                heard.output = forward(*arguments, **keywords)
        finally:
            self._open.pop()
        if watched.weighs_losses(call, heard.output):
            return heard.output
        if not _why_no_logits(heard.output):
            heard.within.clear()
            weights = weights_sample(module) if counts else None
            heard.copied = heard.copied._replace(answer=Answer(module, heard.output, weights))
        if self._open:
            self._open[-1].add(heard)
        else:
            self._calls.append(heard)
        return heard.output

    def _hear_other(self, module: nn.Module, forward: Callable[..., Any], call: Call) -> Any:
        """Make a call of a module other than the one that the user names, and return its output.

        Note the module for a warning if it is called after the named module and on other inputs. Modules that are
        called inside such a module, and modules that weigh losses, are not noted.
        """
        is_within, self._in_other = self._in_other, True
        try:
            output = forward(*call.arguments, **call.keywords)
        finally:
            self._in_other = is_within
        with suppress(Exception):  # the user's step must go on, whatever the arguments are
            # On the inputs of the named module, it is another network and no part of this one.
            is_part = self._calls and not any(same_inputs(call, other.call) for other in self._calls)
            if is_part and not is_within and not watched.weighs_losses(call, output):
                self._after.append(module)
        return output

    def _hear_outside(
        self, module: nn.Module, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Make a call of a module that is no submodule of the LightningModule, and return its output.

        If the output is logits, note the module, and drop the calls of submodules within this call.
        """
        before = len(self._calls)
        with self._overheard.paused() if watched.is_compiled(module) else nullcontext():
            output = forward(*arguments, **keywords)
        if not _why_no_logits(output):
            self._outside.append(module)
            del self._calls[before:]
        return output

    @property
    def is_empty(self) -> bool:
        """Whether no call was recorded.

        If the user names a module, only calls of this module count. Otherwise a call counts if it is one of a submodule
        with weights, or one of any other module whose output is logits.
        """
        return not self._calls and not self._outside

    def found(self, inputs: Any, is_given: bool = False) -> Found:
        """Return the network, and the call to measure.

        ``inputs`` are the inputs in the batch, or None if unknown. If ``is_given``, they come from ``batch_fn=``. If
        the step calls the network several times, on different inputs, the call to measure is the one on ``inputs``. If
        none of these calls is on ``inputs``, and ``is_given`` is True, the result has no call.

        Raises:
            FlatnessError: The step calls several networks, or only one that is no submodule of the LightningModule. Or
                the step calls the network several times, on different inputs but never on ``inputs``, and ``is_given``
                is False.
            BatchError: The output of the network has no logits.
        """
        if not self._calls:
            raise FlatnessError(
                f"The {self.step} step calls a {type(self._outside[-1]).__name__} that has its own weights but is no "
                "submodule of the LightningModule. Name the network to measure with a function, e.g. "
                "model=lambda module: module.averages[0]."
            )
        heard, different, counts = self._counting(self._calls, None if inputs is None else as_call(inputs))
        place = "" if self._named else self._places[heard.module]
        found = Network(heard.module, plain_name(place), place, is_named=self._named is not None)
        if not counts and not is_given:
            raise FlatnessError(
                f"The {self.step} step calls {self._name(heard.module)} {_how_they_differ(different, inputs)} A tuple "
                "of inputs is passed as arguments, and a mapping is passed as keyword arguments."
            )
        if not counts:
            return Found(replace(found, is_called=False))
        self._warn_of_others(heard)
        return Found(replace(found, on_batch=len(different) > 1), heard.copied)

    def _counting(self, calls: Sequence[_Heard], batch: Call | None) -> tuple[_Heard, Sequence[_Heard], bool]:
        """Find the call to measure. The candidates are ``calls``, or calls inside one of them if it returns no logits.

        Return the call, a candidate for each of the different inputs, and True. If no candidate can be chosen, return
        the first one, a candidate for each of the different inputs, and False.
        """
        self._refuse_several(calls)
        different: list[_Heard] = []
        for heard in calls:
            if not any(same_inputs(heard.call, other.call) for other in different):
                different.append(heard)
        counting = different
        if len(different) > 1:
            counting = [heard for heard in different if batch is not None and same_inputs(heard.call, batch)]
        if len(counting) != 1:
            return different[0], different, False
        reason = _why_no_logits(counting[0].output)
        within = counting[0].within
        if reason and within:
            return self._counting(within, batch)
        if reason:
            raise BatchError(f"{self._name(counting[0].module)}: {reason}")
        return counting[0], different, True

    def _warn_of_others(self, heard: _Heard) -> None:
        """Warn if the step calls another module with weights after the module that the user names."""
        if self._after:
            named = self._name(heard.module)
            rank_zero_warn(
                f"The {self.step} step calls {self._name(self._after[0])}, which has weights of its own, after "
                f"{named}. If the output of {named} is not the logits, the measured loss is not your loss. Then "
                "use model=... to name a module that returns the logits."
            )

    def _refuse_several(self, calls: Sequence[_Heard]) -> None:
        """Raise an error if the step calls several modules. The message tells how to name the network."""
        modules = list(dict.fromkeys(heard.module for heard in calls))
        if len(modules) < 2:
            return
        names = " and ".join(map(self._name, modules))
        remedy = "Call one module in the step to get the logits, e.g. self(x) with a forward() that applies all parts."
        whole = self._whole(modules)
        if whole:
            remedy = (
                f"They are parts of {whole}. If {whole} returns the logits of the step, give model={whole}. Otherwise "
                f"{remedy[0].lower()}{remedy[1:]}"
            )
        for heard in calls:
            taking = [other for other in calls if other.module is not heard.module and _takes(other, heard.output)]
            heads = list(dict.fromkeys(other.module for other in taking))
            if heads:
                owning = "which has weights of its own" if len(heads) == 1 else "which have weights of their own"
                if not _why_no_logits(heard.output):
                    remedy += f" {self._if_logits(heard.module)}"
                raise FlatnessError(
                    f"The {self.step} step gives the output of {self._name(heard.module)} to "
                    f"{' and '.join(map(self._name, heads))}, {owning}. {remedy}"
                )
        if any(_why_no_logits(heard.output) for heard in calls):
            raise FlatnessError(
                f"The {self.step} step calls {names}. Not all of these return logits, so they seem to be parts of one "
                f"network. {remedy} If one of these modules is the whole network, name it with model=."
            )
        if not all(same_inputs(heard.call, calls[0].call) for heard in calls):
            raise FlatnessError(
                f"The {self.step} step calls {names} on different inputs, so they may be parts of one network. "
                f"{remedy} {self._if_logits(calls[-1].module)}"
            )
        modules.sort(key=lambda module: not any(p.requires_grad for p in module.parameters()))  # trained ones first
        arguments = " or ".join(f"model={self._as_argument(module)}" for module in modules)
        several = f"The {self.step} step calls several networks, {names}. "
        raise FlatnessError(f"{several}Name the one to measure: {arguments}.")

    def _whole(self, parts: Sequence[nn.Module]) -> str:
        """Return the name of the smallest submodule with a ``forward`` that contains ``parts``; empty if none does."""
        around = [
            module
            for module in self._places
            if module not in (self._pl_module, *parts)
            and type(module).forward is not nn.Module.forward  # unlike that of a ModuleList
            and set(parts) <= set(module.modules())
        ]
        return self._name(around[-1]) if around else ""

    def _if_logits(self, module: nn.Module) -> str:
        return f"If the output of {self._name(module)} is the logits, give model={self._as_argument(module)}."

    def _as_argument(self, module: nn.Module) -> str:
        """Return Python code for the argument ``model=`` that names a module."""
        return "lambda module: module" if module is self._pl_module else self._name(module)

    def _name(self, module: nn.Module) -> str:
        if module is self._pl_module:
            return "the LightningModule itself"
        return f"'{self._names.get(module) or type(module).__name__}'"


def _why_no_logits(output: Any) -> str:
    try:
        any_logits_of(output)
    except BatchError as error:
        return str(error)
    return ""


def _how_they_differ(calls: Sequence[_Heard], inputs: Any) -> str:
    """Return the part of an error message that says how several calls differ, and what to give as ``batch_fn=``.

    ``inputs`` are the inputs in the batch, or None if unknown.
    """
    remedy = "Give batch_fn=, a function from a batch to the (inputs, targets) to measure"
    number, (first, *others) = len(calls), calls
    tensors = tensors_of(first.call)
    if tensors and all(same_inputs(tensors, tensors_of(other.call)) for other in others):
        return f"{number} times on the same tensors, but with other arguments. {remedy}."
    if all(equal_inputs(first.copied, other.copied) for other in others):
        return f"{number} times on equal tensors that are not the same object. Make them once in the step. {remedy}."
    if inputs is None:
        return f"on {number} different inputs. The batch does not show which of them to measure. {remedy}."
    return (
        f"on {number} different inputs, none of which is the batch's own input. {remedy}, e.g. "
        "batch_fn=lambda batch: (batch[0], batch[1])."
    )


def _takes(heard: _Heard, output: Any) -> bool:
    """Return whether a call has a tensor of ``output`` among its arguments."""
    return any(one is other for one in tensors_of(heard.call) for other in tensors_of(output))
