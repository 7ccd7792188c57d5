"""Log measured values, and suppress all other logging during a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_flatness.callbacks.labels import numbers_of
from lightning_flatness.callbacks.lightning_imports import LightningModule, Trainer, is_lightning_module
from lightning_flatness.errors import FlatnessError
from lightning_flatness.model.copy import measuring_device
from lightning_flatness.model.modules import every_module
from lightning_flatness.results import FlatnessReport

LOGGING = ("log", "log_dict")


def with_logarithm(values: Mapping[str, float], measure: str) -> dict[str, float]:
    """Return the values, and under ``log10_{measure}`` the base-10 logarithm of the value of ``measure``.

    The logarithm is NaN if this value is not positive. Further loaders have logarithms, too.
    """
    of_loaders = {key: value for key, value in values.items() if key.partition("/dataloader_idx_")[0] == measure}
    return {
        **values,
        **{f"log10_{key}": math.log10(value) if value > 0 else math.nan for key, value in of_loaders.items()},
    }


def accuracy_key(metrics: Mapping[str, Any], name: str | None) -> str | None:
    """Return the key under which loggers have the accuracy that the LightningModule logs as ``name``.

    Without a name, use the first key that contains ``acc`` and ``val``, or else the first that contains ``acc``. If
    this key with ``_epoch`` at its end exists, too, return the key with ``_epoch``. Return None if there is neither a
    name nor a key that contains ``acc``.

    Example:
        >>> accuracy_key({"train_acc": 0, "val_acc": 0, "val_acc_epoch": 0}, None)
        'val_acc_epoch'
    """
    names = [key for key in metrics if "acc" in key.lower()]
    name = name or next((key for key in names if "val" in key.lower()), next(iter(names), None))
    # If a metric is logged both in steps and in epochs, loggers have the epoch's value under this key only.
    return f"{name}_epoch" if f"{name}_epoch" in metrics else name


def accuracy_of(metrics: Mapping[str, Any], name: str | None) -> float | None:
    """Return the logged accuracy that :func:`accuracy_key` finds, or None if no accuracy is logged."""
    value = metrics.get(accuracy_key(metrics, name) or "")
    return None if value is None else float(value)


def log(pl_module: LightningModule, prefix: str, values: Mapping[str, float]) -> None:
    """Log values under ``prefix``. The values must be the same on all ranks.

    Those of further loaders come first: in the table of ``Trainer.validate``, Lightning drops the ends of their keys,
    and shows the values that come last in the columns of all loaders.
    """
    device = pl_module.device
    kind = torch.float64 if measuring_device(device) == device else torch.float32
    for key, value in sorted(values.items(), key=lambda item: "/dataloader_idx_" not in item[0]):
        pl_module.log(
            f"{prefix}/{key}",
            torch.tensor(value, dtype=kind, device="cpu"),
            on_step=False,
            on_epoch=True,
            sync_dist=True,  # the values are the same on all ranks, but Lightning warns without sync_dist
            batch_size=1,
            add_dataloader_idx=False,  # keys of further loaders have the index already
        )


def logged_value(metrics: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    """Return a copy of the metric that is logged as ``key``.

    Raise a :class:`FlatnessError` if it is not logged. ``name`` is the name of the callback that watches the metric.
    """
    if key not in metrics:
        raise FlatnessError(
            f"{name} watches '{key}', which is not logged. The logged metrics are: "
            f"{', '.join(sorted(metrics)) or 'none'}. To log flatness, add a FlatnessCallback to the Trainer. To log "
            "the accuracy, call self.log in validation_step."
        )
    return metrics[key].detach().clone()


def where(trainer: Trainer) -> str:
    """Return the point in training at which a callback measures, for messages."""
    if trainer.state.fn == "fit":
        return f"epoch {trainer.current_epoch}"
    return "the test" if trainer.testing else "the validation"


def record_of(trainer: Trainer, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as a record for the history, with epoch and step. ``accuracy`` is None until it is known."""
    return {"epoch": trainer.current_epoch, "step": trainer.global_step, "accuracy": None, **values}


def logged_values(record: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]], measure: str) -> dict[str, float]:
    """Return the numbers of a record that are logged, and the logarithm of ``measure``.

    ``earlier`` are the records before this one. If one of them has a number under a key, this key is logged even if
    its value is None now; the logged value is then NaN.
    """
    return with_logarithm(numbers_of(record, earlier), measure)


def log_again(
    trainer: Trainer, pl_module: LightningModule, prefix: str, history: Sequence[Mapping[str, Any]], measure: str
) -> None:
    """After a resume, log the last record again, so that callbacks that monitor one of its keys find a value."""
    if f"{prefix}/{measure}" not in trainer.callback_metrics:
        log(pl_module, prefix, logged_values(history[-1], history, measure))


def tell_of_loaders(trainer: Trainer, prefix: str, measure: str, reports: Mapping[int, FlatnessReport]) -> None:
    """Before ``Trainer.validate`` or ``test`` prints its table, tell the measure of each of several loaders."""
    if trainer.state.fn != "fit" and len(reports) > 1:
        each = ", ".join(f"{getattr(report, measure):.4g} for loader {index}" for index, report in reports.items())
        rank_zero_info(
            f"FlatnessCallback: '{prefix}/{measure}' is {each}. Lightning's table shows the values of loader 0 in the "
            "columns of all loaders."
        )


def log_failure(pl_module: LightningModule, prefix: str, earlier: Mapping[str, float]) -> None:
    """Log NaN, and 0 as ``exact``, under the keys of ``earlier`` values, because a measurement has failed.

    Otherwise callbacks that monitor one of these keys would read the number of earlier weights.
    """
    names = {key: key.partition("/dataloader_idx_")[0].rpartition("/")[2] for key in earlier}
    log(pl_module, prefix, {key: 0.0 if name == "exact" else math.nan for key, name in names.items()})


def warn_outside_of_fit() -> None:
    """Warn that a validation or test run does not measure the training data."""
    rank_zero_warn("FlatnessCallback(data='train') measures during fit only; nothing is measured now.")


def warn_no_validation(prefix: str) -> None:
    """Warn that a fit without validation measures no validation data."""
    rank_zero_warn(
        "FlatnessCallback measures at validation, and this fit runs none (no validation_step, no validation data, or "
        f"limit_val_batches=0). So '{prefix}/hessian_trace' and the other keys will not be logged, and callbacks that "
        "monitor these keys will fail. Add validation data, or use FlatnessCallback(data='train')."
    )


@contextmanager
def logging_muted(pl_module: LightningModule) -> Iterator[None]:
    """Disable ``log`` and ``log_dict`` of this LightningModule and of all LightningModules inside it.

    Otherwise a ``forward`` that logs would log values of the measured samples, or raise an error where Lightning
    forbids logging.
    """
    modules = [vars(module) for module in every_module(pl_module) if is_lightning_module(module)]
    own = [{name: attributes[name] for name in LOGGING if name in attributes} for attributes in modules]
    for attributes in modules:
        attributes.update(dict.fromkeys(LOGGING, lambda *arguments, **options: None))
    try:
        yield
    finally:
        for attributes, before in zip(modules, own, strict=True):
            for name in LOGGING:
                del attributes[name]
            attributes.update(before)
