"""Check whether the measured inputs are those that a step gives to the network, and warn or raise an error if not.

If a training step does not show the network and its inputs clearly, the callback warns, and measures nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_flatness.callbacks.data.sources import Asked
from lightning_flatness.callbacks.lightning_imports import LightningModule
from lightning_flatness.callbacks.network import Network, network_without_step
from lightning_flatness.errors import FlatnessError, in_one_line
from lightning_flatness.model.call import Call, same_tensors


def warn_of_unseen(name: str, is_watched: bool) -> None:
    """Warn that the batch's own inputs are measured, because no call of the network was seen in the step.

    ``is_watched`` is False if ``torch.compile`` runs the step or the part of it that calls the network.
    """
    compiled, none = "torch.compile runs the code that calls it", "the validation step does not call the network"
    rank_zero_warn(
        f"{name} cannot see what the network is given ({none if is_watched else compiled}), so it measures the batch's "
        "own inputs. If the network takes other inputs, give batch_fn=, a function from a batch to (inputs, targets)."
    )


def refuse_late_call(name: str, asked: Asked, call: Call | None, within: bool) -> None:
    """Raise an error if a validation step calls the network, and earlier steps did not.

    Raise none if this call has the tensors of the batch, because the earlier batches were measured so. But ``within``
    one validation of a loader, raise it always, because the earlier steps may have skipped their batches on purpose.
    """
    if within or (call is not None and not asked.is_given and not same_tensors(call, asked.copied, asked.targets)):
        raise FlatnessError(
            f"{name}: the validation step calls the network in this batch, and did not call it before. The earlier "
            "batches were measured as they are. Give batch_fn=, a function from a batch to the (inputs, targets) to "
            "measure, or to (None, None) if the step skips the batch."
        )


def check_inputs(name: str, data: Any, step: str, asked: Asked, call: Call, follows_steps: bool) -> None:
    """Warn or raise an error if the inputs to measure differ from those of ``call``, which a step has made.

    Warn if they come from ``batch_fn=``, and raise an error if they are those of the batch. ``step`` is
    ``"validation"`` or ``"training"``. ``follows_steps`` says whether the validated batches are measured.
    """
    differs = not same_tensors(call, asked.copied, asked.targets)
    if differs and asked.is_given:
        remedy = " To measure the inputs of the step, return (None, targets) from batch_fn=."
        rank_zero_warn(
            f"{name}: batch_fn= gives other inputs than the {step} step gives to the network. The inputs from "
            f"batch_fn= are measured.{remedy if follows_steps else ''}"
        )
    elif differs and step == "training":
        raise FlatnessError(
            "the training step gives other tensors to the network than those of the batch. The batch's own tensors are "
            "measured. If the step only augments the batch, change nothing. If it does more, give batch_fn=, a "
            "function that takes a batch, prepares the inputs, and returns (inputs, targets)."
        )
    elif differs:
        raise FlatnessError(
            f"{name}: the {step} step gives other tensors to the network than those of the batch. But the batches of "
            f"data={repr(data) if isinstance(data, str) else ''} are measured without this step. Give batch_fn=, a "
            "function that takes a batch, prepares the inputs as the step does, and returns (inputs, targets)."
        )


def network_after_unclear_step(
    name: str,
    pl_module: LightningModule,
    model: str | Callable[[Any], nn.Module] | None,
    shown: Network | None,
    error: Exception,
) -> Network:
    """Warn that watching a training step has raised ``error``, and return the network to measure nevertheless.

    This is the network that ``model`` names, or the LightningModule if it has a ``forward()``, or the network that the
    step has ``shown``. If there is none of these, raise ``error``.
    """
    try:
        network = network_without_step(pl_module, model)
    except FlatnessError:
        if shown is None:
            raise error from None
        network = shown
    what = "the network of model=" if network.is_named else f"'{network.prefix}'" if network.prefix else "forward()"
    unclear = "because the training step does not show clearly what to measure"
    rank_zero_warn(f"{name} measures {what}, {unclear}: {in_one_line(error)}")
    return replace(network, is_called=False)
