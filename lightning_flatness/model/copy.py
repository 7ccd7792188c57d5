"""Run a model on copies of its tensors, in the precision and on the device of the measurement."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointError

from lightning_flatness.errors import BatchError, LayerSelectionError, UnbuiltError, is_out_of_memory
from lightning_flatness.functional.autocast import WithoutAutocast, device_types
from lightning_flatness.model.call import Call, as_call, map_tensors, tensors_of
from lightning_flatness.model.logits import differ, logits_of
from lightning_flatness.model.modules import every_module
from lightning_flatness.model.names import plain_name
from lightning_flatness.model.precision import HALF, name_of

WITHOUT_FLOAT64 = ("mps",)  # types of devices that do not support float64


class ModelCopy:
    """A model that runs on copies of its parameters and buffers, which are made on construction.

    No gradient can reach the user's parameters. A forward that writes to parameters, buffers or inputs writes to their
    copies. A call also runs the forward hooks of the user's model. Use a ``ModelCopy`` within :func:`isolated`. The
    copies have the dtype that :func:`measured` gives them. Autocast is disabled even where the forward enables it. With
    ``as_it_runs``, the copies have the dtype of the originals, even if that is half precision, and autocast stays.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None, as_it_runs: bool = False) -> None:
        if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
            raise LayerSelectionError(
                f"The model is a {type(model).__name__} (TorchScript or DataParallel), which cannot be observed; pass "
                "the original module that it was made of."
            )
        self._model, self._dtype, self._as_it_runs = model, dtype, as_it_runs
        self._copies: dict[int, Tensor] = {}
        self._slots: dict[str, int] = {}
        self._buffers: set[int] = set()
        self.keeps_graph = False  # whether a buffer requires gradients after the latest call
        for prefix, module in model.named_modules():
            tensors = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
            self._buffers |= {id(buffer) for buffer in buffers.values()}
            for name, tensor in (tensors | buffers).items():
                long_name = f"{prefix}.{name}" if prefix else name
                refuse_meta(plain_name(long_name), tensor)
                # A tensor with several names gets one copy, so that tied parameters stay tied.
                self._slots[long_name] = id(tensor)
                if id(tensor) not in self._copies:
                    self._copies[id(tensor)] = measured(tensor.detach(), self._dtype_of(tensor)).clone()
        kinds = {"cpu", *(copy.device.type for copy in self._copies.values())}
        self._full_precision = _FullPrecision(kinds.intersection(device_types()))
        self._num_parameters = _num_parameters(model)

    def _dtype_of(self, tensor: Tensor) -> torch.dtype | None:
        return tensor.dtype if self._as_it_runs and tensor.is_floating_point() else self._dtype

    def copy_of(self, tensor: Tensor) -> Tensor:
        """Return the copy of one of the model's parameters or buffers."""
        return self._copies[id(tensor)]

    @property
    def enables_autocast(self) -> bool:
        """Whether the forward has enabled autocast itself in the latest call."""
        return self._full_precision.was_needed

    def __call__(
        self,
        inputs: Any,
        replacements: Mapping[nn.Parameter, Tensor] | Mapping[Tensor, Tensor] | None = None,
        written: Collection[Tensor] = (),
    ) -> Any:
        """Call the model on a copy of ``inputs``, which are in any form that :func:`as_call` takes.

        ``replacements`` maps parameters and buffers to the tensors used in their place. Every call gets fresh copies of
        the buffers or of their replacements. Replacements of buffers in ``written`` are not copied, so the forward
        writes to them.
        """
        replaced = {id(parameter): tensor for parameter, tensor in (replacements or {}).items()}
        return self._run(inputs, replaced, {id(buffer) for buffer in written})[0]

    def changing_buffers(self, inputs: Any) -> list[str]:
        """Return the names of the buffers that the forward changes.

        The list is empty if these changes do not matter: a second call, which begins with the changed buffers, returns
        the same logits.
        """
        first, after = self._run(inputs, {}, set())
        keys = {name: key for name, key in self._slots.items() if key in self._buffers}
        names = [name for name, key in keys.items() if not _same(after[name], self._copies[key])]
        second, _ = self._run(inputs, {keys[name]: after[name] for name in names}, set())
        return [plain_name(name) for name in names] if differ(logits_of(first), logits_of(second)) else []

    def _run(
        self, inputs: Any, replaced: Mapping[int, Tensor], written: Collection[int]
    ) -> tuple[Any, Mapping[str, Tensor]]:
        """Call the model as :meth:`__call__` does; return the output, and the tensors by name as they are afterwards.

        ``replaced`` and ``written`` name parameters and buffers by ``id``.
        """
        call = map_tensors(as_call(inputs), lambda tensor: measured(tensor, self._dtype_of(tensor)).clone())
        tensors = {**self._copies, **replaced}
        begun = self._buffers - {*written}
        with torch.inference_mode(False):  # so that these tensors can be in an autograd graph
            tensors |= {key: tensors[key].clone() for key in begun}  # so that every call begins with the same buffers
        substitutes = {name: tensors[key] for name, key in self._slots.items()}
        # Tied tensors are handled above, not by tie_weights. If a module has two names, functional_call with
        # tie_weights would replace its tensors twice, and not put the original ones back.
        try:
            self._full_precision.was_needed = False
            self._full_precision.weights = {id(tensor) for tensor in substitutes.values()}
            with nullcontext() if self._as_it_runs else self._full_precision:
                output = functional_call(
                    self._model, substitutes, call.arguments, dict(call.keywords), tie_weights=False
                )
        except (TypeError, ValueError, RuntimeError, *LOOKUP_ERRORS) as error:
            reason = _why_it_fails(self._model, call, error, self._dtype)
            if reason:
                raise BatchError(reason) from error
            raise
        self._refuse_new_parameters()
        buffers = [name for name, key in self._slots.items() if key in self._buffers]
        self.keeps_graph = any(substitutes[name].requires_grad for name in buffers)
        return output, substitutes

    def _refuse_new_parameters(self) -> None:
        """Raise an error if the forward has made or deleted parameters: then no two calls have the same network."""
        if _num_parameters(self._model) == self._num_parameters:
            return
        before = {name for name, key in self._slots.items() if key not in self._buffers}
        now = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        names = ", ".join(f"'{plain_name(name)}'" for name in sorted(now ^ before))
        raise UnbuiltError(
            f"The model's forward makes or deletes parameters ({names}), so it is another network before its first "
            "call. Call the model once before it is measured."
        )


class _FullPrecision(WithoutAutocast):
    """Also ignores that the forward sets ``requires_grad`` of a tensor to False, if its ``id`` is in ``weights``.

    Fine-tuning code freezes weights in the forward. What is measured does not depend on which weights are trained.
    """

    weights: Collection[int] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in FREEZING and id(args[0]) in self.weights:
            wanted = next(iter([*args[1:], *(kwargs or {}).values()]), True)  # the default of requires_grad_ is True
            if not wanted:
                return args[0]
        return super().__torch_function__(func, types, args, kwargs)


FREEZING = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


def _num_parameters(model: nn.Module) -> int:
    return sum(one is not None for module in every_module(model) for one in module._parameters.values())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def refuse_meta(name: str, tensor: Tensor) -> None:
    """Raise an error if a parameter or buffer is on the meta device."""
    if tensor.is_meta:
        raise LayerSelectionError(
            f"'{name}' is on the meta device, so it holds no numbers. Load the weights before measuring, without "
            "offloading."
        )


def _why_it_fails(model: nn.Module, call: Call, error: Exception, dtype: torch.dtype | None) -> str:
    """Return a text that says why the forward fails on the inputs of a call, and a remedy.

    The text is empty if the cause is not known.
    """
    if isinstance(error, TypeError):
        try:
            signature(model.forward).bind(*call.arguments, **call.keywords)
        except TypeError as unfit:
            return (
                f"The model's forward{signature(model.forward)} does not take the batch's inputs ({unfit}). A tuple or "
                f"list is passed as positional arguments (here {len(call.arguments)}), a mapping as keyword arguments. "
                "Give batches with the inputs that forward takes (in a callback by batch_fn=), or name another network "
                "with model=."
            )
    first_line = str(error).partition("\n")[0]  # torch lists the arguments that a function takes in the next ones
    looks_up = isinstance(error, IndexError) or any(words in str(error) for words in LOOKUP_WORDS)
    if looks_up or (isinstance(error, TypeError) and _is_of_inputs(model, call, str(error))):
        return (
            f"The model's forward fails on the batch's inputs ({type(error).__name__}: {first_line}). Give "
            "batches with the inputs that forward takes (in a callback by batch_fn=), or name another network with "
            "model=."
        )
    if isinstance(error, ValueError):
        return ""
    whole = [str(one.dtype) for one in tensors_of(call) if not one.is_floating_point() and not one.is_complex()]
    if whole and not is_out_of_memory(error) and any(word in str(error) for word in TYPE_WORDS):
        return (
            f"The model's forward fails on inputs of type {whole[0]} ({error}). Convert them to floating point, e.g. "
            "images.float() / 255, in the data set, in the forward or, in a callback, by batch_fn=."
        )
    if not isinstance(error, RuntimeError) or isinstance(error, CheckpointError) or is_out_of_memory(error):
        return ""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if "type" in str(error) and _are_cast(types, dtype):
        # Half precision cannot be measured in, so another dtype= does not help there.
        own = "" if len(types) > 1 or types & {*HALF} else f", or set dtype='{name_of(*types)}'"
        return (
            f"The model's forward fails in {dtype or torch.float32}, in which it is measured ({error}). The forward "
            "seems to cast tensors to a fixed type; cast to the type of a weight instead, e.g. "
            f"x.to(self.conv.weight.dtype){own}."
        )
    kinds = dict.fromkeys(f"{tuple(tensor.shape)} and type {tensor.dtype}" for tensor in tensors_of(call))
    if not kinds or not any(word in str(error).lower() for word in SHAPE_WORDS):
        return ""  # an error of the user's own
    doubles = {tensor.dtype for tensor in tensors_of(call)} - {parameter.dtype for parameter in model.parameters()}
    remedy = (
        "Convert them to the type of the weights, inputs.float()."
        if torch.float64 in doubles
        else "Give inputs with the number of channels, the size and the type that the model was trained on."
    )
    return f"The model's forward fails on inputs of shape {', '.join(kinds)} ({error}). {remedy}"


def _is_of_inputs(model: nn.Module, call: Call, message: str) -> bool:
    """Return whether a TypeError shows that a function or module inside ``model`` does not accept the inputs."""
    passes_on = any(
        one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in signature(model.forward).parameters.values()
    )
    given = (*call.arguments, *call.keywords.values())
    if not all(isinstance(one, Tensor) for one in given) and any(words in message for words in NO_TENSOR_WORDS):
        return True
    return passes_on and "forward()" in message and "argument" in message


def _are_cast(types: Collection[torch.dtype], dtype: torch.dtype | None) -> bool:
    """Return whether any of these floating-point types of parameters is converted to another one to measure."""
    return any(own in HALF or own != (dtype or own) for own in types)


# Errors of a forward that expects a mapping or another object, but is given a tensor.
LOOKUP_ERRORS = (IndexError, AttributeError)
# Words in errors about a tensor that is taken for another object, or about a missing forward.
LOOKUP_WORDS = (
    "'Tensor' object has no attribute",
    "invalid data type 'str'",
    "Tensor.__contains__",
    "values to unpack",
    'missing the required "forward"',
)
# Words in torch's messages about arguments that are no tensors.
NO_TENSOR_WORDS = ("must be Tensor", "invalid combination of arguments")
# Words in torch's messages about tensors of a wrong shape or dtype.
SHAPE_WORDS = ("size", "shape", "channel", "dimension", "expected", "type")
# Words in torch's messages about tensors of a wrong dtype.
TYPE_WORDS = ("type", "not implemented for", "Byte", "Char", "Int", "Long")


def measured(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Move a tensor to the device of the measurement, and convert a floating-point tensor to ``dtype``.

    Without ``dtype``, half precision becomes float32, because a Hessian of activations that are rounded to half
    precision has no meaning. Tensors of other dtypes keep their dtype.
    """
    tensor = tensor.to(measuring_device(tensor.device))
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype or (torch.float32 if tensor.dtype in HALF else tensor.dtype))


def measuring_device(device: torch.device) -> torch.device:
    """Return the device to measure on: the model's ``device``, or the CPU if that device does not support float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device
