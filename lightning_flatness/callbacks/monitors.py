"""Find the callbacks that monitor logged flatness, and warn of those that monitor it in a misleading way."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_flatness.callbacks.lightning_imports import ROOTS, Trainer, callbacks_of

# Logged numbers that are small if the network is flat, and also before the network has learnt anything.
FLAT_IF_SMALL = (
    "hessian_trace",
    "relative_flatness",
    "log10_hessian_trace",
    "log10_relative_flatness",
    "normalized_relative_flatness",
    "channelwise_flatness",
    "lambda_max",
    "trace",
)
# For classes of Lightning's callbacks: what they do wrong when they monitor such a number, and what to use instead.
REMEDIES = {
    "EarlyStopping": ("stops in the first epochs", "FlatnessStopping, which has a burn-in"),
    "ModelCheckpoint": (
        "keeps the first epochs",
        "FlatCheckpoint, which chooses among epochs of nearly the best accuracy",
    ),
}


def watched_keys(callback: Any) -> list[str]:
    """Return the keys that a callback such as ``ModelCheckpoint`` or ``FlatCheckpoint`` monitors."""
    keys = (getattr(callback, name, None) for name in ("monitor", "flatness"))
    return [key for key in keys if isinstance(key, str)]


def warn_of_traps(trainer: Trainer, prefix: str, on_error: str) -> None:
    """Warn if a callback of Lightning monitors flatness from the first epoch on, or in the wrong direction.

    With ``on_error="warn"``, also warn if an ``EarlyStopping`` stops training at the NaN of a failed measurement. Only
    keys with this ``prefix`` are checked. Subclasses of Lightning's callbacks are not, because they may begin later.
    """
    for callback in callbacks_of(trainer):
        kind, key = type(callback), str(getattr(callback, "monitor", None))
        measure = key.partition("/dataloader_idx_")[0].rpartition("/")[2]
        is_lightning = kind.__name__ in REMEDIES and kind.__module__.startswith(ROOTS)
        if not key.startswith(f"{prefix}/") or not is_lightning:
            continue
        if on_error == "warn" and kind.__name__ == "EarlyStopping" and callback.check_finite:
            rank_zero_warn(
                f"EarlyStopping(monitor='{key}') stops training after a failed measurement, which logs NaN with "
                "on_error='warn'. To go on training, use check_finite=False."
            )
        if measure not in FLAT_IF_SMALL:
            continue
        what, remedy = REMEDIES[kind.__name__]
        if callback.mode == "max":
            rank_zero_warn(
                f"{kind.__name__}(monitor='{key}', mode='max') takes the sharpest network for the best one: a small "
                "number means a flat network. Use mode='min'."
            )
        elif _begins_at_once(callback):
            rank_zero_warn(
                f"{kind.__name__}(monitor='{key}') {what}: a network that has not learnt anything is flat, and the "
                f"number rises at first. Use {remedy}, or a subclass of {kind.__name__} that begins at a later epoch."
            )


def _begins_at_once(callback: Any) -> bool:
    """Return whether a callback compares the value of the first epoch with those of later epochs."""
    keeps_some = getattr(callback, "save_top_k", 1) not in (0, -1)
    return keeps_some and (getattr(callback, "every_n_epochs", 1) or 0) <= 1
