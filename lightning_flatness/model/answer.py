"""Check that passes of this package run the same network, with the same weights, as a call by the user's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.errors import BatchError
from lightning_flatness.model.call import Call
from lightning_flatness.model.isolation import float32_is_reduced
from lightning_flatness.model.logits import ROUNDINGS, any_logits_of
from lightning_flatness.model.names import listed
from lightning_flatness.model.precision import HALF, current_precision, runs_in_half
from lightning_flatness.model.whole import is_sharded

# How much logits of the user's call may differ from those of a pass in float32, relative to the largest logit. REDUCED
# is for calls with TF32 or bfloat16 products, ROUNDED for half precision. The rounding of deep networks is well below.
REDUCED, ROUNDED = 0.05, 0.25
# A sample of the weights has about this many entries of every parameter, or all entries of a smaller parameter.
ENTRIES = 64


class Answer:
    """The logits that a network returned in a call by the user's code, and some of its weights during the call.

    Create the object within the call, because creation reads the precision of the call. This is not a dataclass, so
    that ``map_tensors`` and ``tensors_of`` leave out its tensors when they go through a :class:`Call`.

    Args:
        network: the network that was called.
        output: what the network returned. Its logits are copied, because the user's code may change them in place.
        weights: what :func:`weights_sample` returned right after the call; None if the weights are not compared.

    Example:
        >>> network = nn.Linear(2, 3)
        >>> answer = Answer(network, network(torch.ones(4, 2)), weights_sample(network))
        >>> answer.certify_logits(network(torch.ones(2, 2)), 0)
    """

    def __init__(self, network: nn.Module, output: Any, weights: Mapping[torch.device, Tensor] | None = None) -> None:
        self.network, self.weights = network, weights
        self._logits: Tensor | None = None  # None if the network returned no logits
        with suppress(Exception):  # the user's step is running, and must not fail here
            logits = any_logits_of(output).detach()
            self._precision, self._is_reduced = current_precision(), float32_is_reduced(logits.device)
            self._logits, self._num_samples = logits.clone(), len(logits)

    def chosen(self, mask: Tensor) -> Answer:
        """Return the answer for the samples for which ``mask``, ``(N,)``, is True."""
        chosen: Answer = object.__new__(Answer)
        vars(chosen).update(vars(self))
        if self._logits is not None:
            chosen._logits = self._logits[mask.to(self._logits.device)]
        return chosen

    def certify_logits(self, logits: Tensor, start: int, in_half: bool = False) -> None:
        """Raise a :class:`BatchError` if ``logits`` differ by more than rounding from the logits of the call.

        ``logits`` are those of the samples from index ``start`` on. ``in_half`` says that the forward itself enables
        autocast. Passes of this package switch that off, so the logits may differ more.
        """
        if self._logits is None:
            return
        expected = self._logits[start : start + len(logits)].to(logits)
        allowed = ROUNDED if in_half else max(self._allowed_difference(), ROUNDINGS * torch.finfo(logits.dtype).eps)
        if expected.shape != logits.shape or not bool(_largest(logits - expected) <= allowed * _largest(expected)):
            apart = len(logits) != self._num_samples or len(logits) == 1
            cause = OTHER_SAMPLES.format(self._num_samples, len(logits)) if apart else ""
            raise BatchError(OTHER_LOGITS.format(cause) + _overridden_call(type(self.network)))

    def _allowed_difference(self) -> float:
        """Return how far logits of other passes may be off by rounding, relative to the largest logit of the call."""
        assert self._logits is not None
        is_cast = self._logits.dtype in HALF or runs_in_half(self.network, self._precision)
        if is_cast or any(map(is_sharded, self.network.parameters())):  # FSDP2 may cast weights during the call
            return ROUNDED
        if self._logits.dtype == torch.float32 and self._is_reduced:
            return REDUCED
        return ROUNDINGS * torch.finfo(self._logits.dtype).eps


def certify_weights(call: Call | None) -> None:
    """Raise a :class:`BatchError` if the network has other weights now than during a call by the user's code.

    Do nothing if the call has no sample of the weights.
    """
    answer = None if call is None else call.answer
    before = None if answer is None else answer.weights
    now = None if answer is None or before is None else weights_sample(answer.network)
    if before is None or now is None:
        return
    if not _same(before, now):
        raise BatchError(OTHER_WEIGHTS)


def certify_unchanged(
    network: nn.Module, before: Mapping[torch.device, Tensor] | None
) -> Mapping[torch.device, Tensor] | None:
    """Return ``before``, which :func:`weights_sample` has returned earlier, or a first sample if it is None.

    Raise a :class:`BatchError` if the network has other weights now.
    """
    now = weights_sample(network)
    if now is not None and before is not None and not _same(before, now):
        raise BatchError(
            "The weights have changed since the first batch, and this FlatnessObserver knows the earlier ones. Make a "
            "new one for every measurement, e.g. in on_validation_epoch_start, and reset the metrics that it updates."
        )
    return before or now


def _same(before: Mapping[torch.device, Tensor], now: Mapping[torch.device, Tensor]) -> bool:
    return now.keys() == before.keys() and all(torch.equal(sample, now[device]) for device, sample in before.items())


OTHER_WEIGHTS = (
    "The validation step runs the network with other weights than it has after the step, e.g. with averages that the "
    "step puts in. The batch is measured after the step, so these weights cannot be measured. Swap them in "
    "on_validation_start, and back in on_validation_end. Or let the step call a network that keeps them, and "
    "name it with model=."
)
OTHER_LOGITS = (
    "The network returns other logits within the validation step than after it, on the same inputs in evaluation mode. "
    "{}Either it is random in the step (e.g. dropout in training mode), or the step changes it for the time of the "
    "call: modes, hooks, attributes or weights. So the network of the step cannot be measured. Make such changes in "
    "on_validation_start, and take them back in on_validation_end."
)
OTHER_SAMPLES = (
    "In the step it ran on {} samples at once, and here on {}. If its logits depend on the other samples of a batch, "
    "e.g. on their mean, no sample can be measured apart: give batches that are measured as a whole (drop_last=True, "
    "no max_samples=). Otherwise there is another cause. "
)


def _overridden_call(kind: type) -> str:
    """Return a sentence on the method ``__call__`` of a class of networks, or ``""`` if it is torch's own method."""
    if str(kind.__call__.__module__).startswith("torch."):
        return ""
    return (
        f" {kind.__name__} overrides __call__, and calls are recorded where they reach forward(). If __call__ changes "
        "inputs or logits, make these changes in forward()."
    )


@contextmanager
def naming_buffers(changing: Callable[[], list[str]]) -> Iterator[None]:
    """Inside the block, an error about other logits names the buffers that ``changing`` returns, if there are any."""
    try:
        yield
    except BatchError as error:
        names = changing()
        if not names:
            raise
        raise BatchError(
            "The network returns other logits within the validation step than after it. Its forward changes buffers in "
            f"evaluation mode ({listed([repr(name) for name in names], most=3)}), and the logits depend on them, so "
            "the next call returns other logits. Let the forward change them in training mode only (if "
            "self.training). For fake quantization, call model.apply(torch.ao.quantization.disable_observer) before "
            "validation."
        ) from error


def _largest(logits: Tensor) -> Tensor:
    return logits.abs().amax()


def weights_sample(network: nn.Module) -> Mapping[torch.device, Tensor] | None:
    """Return copies of some entries of every parameter, as one tensor for each device.

    Buffers are left out, because a forward pass may change them. Return None if parameters are sharded over processes,
    have no shape yet (lazy modules), or are of a tensor subclass that does not allow reading.
    """
    parameters = list(network.parameters())
    if any(is_sharded(parameter) or nn.parameter.is_lazy(parameter) for parameter in parameters):
        return None
    entries: dict[torch.device, list[Tensor]] = {}
    try:
        with torch._C.DisableTorchFunction():
            for parameter in parameters:
                flat = parameter.detach().flatten()
                if flat.dtype in (torch.float32, torch.float64, *HALF):
                    entries.setdefault(flat.device, []).append(flat[:: max(1, len(flat) // ENTRIES)])
            return {device: torch.cat(parts).nan_to_num() for device, parts in entries.items()}
    except Exception:  # the user's step may be running, and must not fail here
        return None
