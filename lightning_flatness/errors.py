"""The errors of the package: each names the culprit, the reason and the remedy."""

from __future__ import annotations


class FlatnessError(ValueError):
    """Base class of every error raised by ``lightning_flatness``."""


class LayerSelectionError(FlatnessError):
    """The wanted layer cannot be found, never runs, or runs more than once in one forward pass."""


class NotClosedFormError(FlatnessError):
    """A tail or head does not meet the conditions of the closed form; caught where another method can take over."""


class BatchError(FlatnessError):
    """A batch, or what the model makes of it, cannot be measured: wrong shapes, no targets, NaN or infinity."""


class NotExactError(FlatnessError):
    """With ``strict=True``: a number would not be the Hessian's."""
