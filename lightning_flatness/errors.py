"""The errors of the package: each names the culprit, the reason and the remedy."""

from __future__ import annotations


class FlatnessError(ValueError):
    """Base class of every error raised by ``lightning_flatness``."""


class LayerSelectionError(FlatnessError):
    """The wanted layer cannot be found, never runs, or runs more than once in one forward pass."""


class NotClosedFormError(FlatnessError):
    """A layer, its tail or its head does not meet the conditions under which the closed form is exact."""


class BatchError(FlatnessError):
    """A batch, or what the model makes of it, cannot be measured: wrong shapes, no targets, NaN or infinity."""
