"""Handle callbacks that change the network's weights at the end of the fit, such as weight averaging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_flatness.callbacks.lightning_imports import Callback, Checkpoint, Trainer, callbacks_of

# A sample of the weights has about this many entries of every tensor, or all entries of a smaller tensor.
ENTRIES = 1000


def leaves_averages(callback: Any) -> bool:
    """Return whether ``callback`` puts averaged weights into the network at the end of the fit.

    ``WeightAveraging`` does this. ``StochasticWeightAveraging`` does this only if it has begun to average.
    """
    names = {base.__name__ for base in type(callback).__mro__}
    has_begun = getattr(callback, "n_averaged", None) is not None
    return "WeightAveraging" in names or ("StochasticWeightAveraging" in names and has_begun)


def warn_of_initial_weights(trainer: Trainer, name: str) -> None:
    """Warn if ``WeightAveraging`` has not updated its averages yet, so that they are still the initial weights.

    ``name`` is the name of the callback that measures these averages.
    """
    for callback in callbacks_of(trainer):
        # Lightning has no public name for the averages.
        averages = getattr(callback, "_average_model", None)
        number = getattr(averages, "n_averaged", None)
        if leaves_averages(callback) and number is not None and not int(number) and trainer.global_step:
            rank_zero_warn(
                f"{type(callback).__name__} has not updated its averages yet, so it puts the initial weights into the "
                f"network (Lightning issue 21724), and {name} measures the initial weights. Start averaging earlier."
            )


def weights_sample(network: nn.Module) -> Mapping[str, Tensor]:
    """Return copies of some entries of every floating-point parameter and buffer, for :func:`have_changed`."""
    named = [*network.named_parameters(), *network.named_buffers()]
    entries = {name: tensor.detach().flatten() for name, tensor in named if tensor.is_floating_point()}
    return {
        name: flat[:: max(1, len(flat) // ENTRIES)].to("cpu", torch.float64, copy=True)
        for name, flat in entries.items()
    }


def have_changed(sample: Mapping[str, Tensor], network: nn.Module) -> bool:
    """Return whether a network's weights have changed since :func:`weights_sample` made ``sample``.

    Only the entries in the sample are compared.
    """
    now = weights_sample(network)
    return sample.keys() != now.keys() or any(
        value.shape != now[name].shape or not torch.allclose(value, now[name], rtol=0, atol=0, equal_nan=True)
        for name, value in sample.items()
    )


def call_again_after_others(trainer: Trainer, callback: Callback, own: type) -> bool:
    """Make Lightning call ``callback.on_train_end`` a second time, after all other callbacks that override this hook.

    Call this function in ``callback.on_train_end``. It returns True if Lightning will call the hook again. It returns
    False in the second call of the hook, or if no other callback with this hook comes after ``callback``. Checkpoint
    callbacks, and callbacks of the class ``own``, are ignored.
    """
    # Lightning iterates over this list while it calls the hook, so an entry that is inserted now is called, too.
    callbacks = callbacks_of(trainer)
    if is_called_again(trainer, callback):
        call_once(trainer, callback)
        return False
    first = callbacks.index(callback) + 1
    others = [
        position for position, other in enumerate(callbacks) if _acts_at_the_end(other, own) and position >= first
    ]
    if others:
        callbacks.insert(others[-1] + 1, callback)
    return bool(others)


def is_called_again(trainer: Trainer, callback: Callback) -> bool:
    """Return whether a callback is in the Trainer's list twice, so that Lightning calls its ``on_train_end`` twice."""
    return sum(other is callback for other in callbacks_of(trainer)) > 1


def call_once(trainer: Trainer, callback: Callback) -> None:
    """Remove the second entry of a callback from the Trainer's list, if there is one."""
    if is_called_again(trainer, callback):
        callbacks = callbacks_of(trainer)
        first = callbacks.index(callback) + 1
        # A new list, since Lightning may be iterating over the old one.
        rest = [other for other in callbacks[first:] if other is not callback]
        trainer.callbacks = callbacks[:first] + rest  # type: ignore[attr-defined]


def _acts_at_the_end(callback: Any, own: type) -> bool:
    hook = getattr(callback.on_train_end, "__func__", callback.on_train_end)
    return not isinstance(callback, (Checkpoint, own)) and hook is not Callback.on_train_end
