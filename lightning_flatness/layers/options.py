"""The options of a measurement of layers, which are checked when they are created."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_flatness.checks import check_whole, is_number
from lightning_flatness.errors import FlatnessError
from lightning_flatness.functional.loss_argument import LOSSES, CustomLoss
from lightning_flatness.model.generators import held_by
from lightning_flatness.model.isolation import differentiable, states_kept
from lightning_flatness.model.options import MeasuringOptions

# `MEASURES` are computed by default. `ALL_MEASURES` has one more, which is computed only on request.
MEASURES = (
    "hessian_trace",
    "relative_flatness",
    "neuronwise_flatness",
    "layerwise_flatness",
    "normalized_relative_flatness",
)
ALL_MEASURES = (*MEASURES, "channelwise_flatness")
# The measures that block traces and Gram matrices do not determine, so their own sums are kept.
EXTRA_MEASURES = ("normalized_relative_flatness", "channelwise_flatness")


@dataclass(frozen=True, kw_only=True)
class Options(MeasuringOptions):
    """The options of :func:`~lightning_flatness.measure_flatness`, whose docstring explains them."""

    layers: str | Sequence[str] = "last"
    prefix: str = ""  # name of the model inside a larger module; the names of layers begin with it
    measures: Sequence[str] = MEASURES
    tolerance: float = 0.01
    residual: Literal["hutchinson"] | None = None
    num_probes: int = 16
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [self.layers] if isinstance(self.layers, str) else self.layers
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
            raise FlatnessError(
                f"layers={self.layers!r}: give 'last', 'all', 'classifier', or names or glob patterns of convolutions "
                "and linear layers."
            )
        measures = self.measures if isinstance(self.measures, (list, tuple)) else []
        if not measures or any(name not in ALL_MEASURES for name in measures):
            raise FlatnessError(f"measures={self.measures!r}: give some of {', '.join(ALL_MEASURES)}.")
        if not is_number(self.tolerance) or not 0 <= self.tolerance < 1:
            raise FlatnessError(
                f"tolerance={self.tolerance!r}: give the relative standard error that is accepted with many classes, "
                "e.g. 0.01, or 0 to use all classes."
            )
        if self.residual not in (None, "hutchinson"):
            raise FlatnessError(f"residual={self.residual!r}: give None or 'hutchinson'.")
        check_whole("seed", self.seed)
        check_whole("num_probes", self.num_probes)
        if self.residual and self.num_probes < 2:
            raise FlatnessError(f"num_probes={self.num_probes!r}: a standard error needs two probes at least.")

    @property
    def diagonal(self) -> bool:
        """Whether the wanted measures need only the diagonals of the block traces, one entry for every filter."""
        return not {"relative_flatness", "normalized_relative_flatness", "channelwise_flatness"} & {*self.measures}

    @property
    def is_normalized(self) -> bool:
        """Whether normalised relative flatness is wanted, which needs the standard deviations of input channels."""
        return "normalized_relative_flatness" in self.measures

    @property
    def by_channel(self) -> bool:
        """Whether channel-wise flatness is wanted."""
        return "channelwise_flatness" in self.measures

    @property
    def class_tolerance(self) -> float:
        """The accepted relative standard error of estimates with many classes.

        With 0, the sum over classes is not estimated by random probes, and no class is left out.
        """
        return 0.0 if self.strict else self.tolerance

    @property
    def held_by_loss(self) -> list[Any]:
        """The objects from which a loss of the user's may draw random numbers; empty for any other loss."""
        loss = self.loss_function
        if isinstance(loss, tuple(LOSSES.values())):
            return []
        return held_by(loss.function if isinstance(loss, CustomLoss) else loss)

    @contextmanager
    def derivatives(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """Run a block that computes derivatives of the loss at logits on ``device``.

        A loss of the user's does not change the random states, nor those of generators that it holds.
        """
        held = self.held_by_loss
        with differentiable(model), states_kept(held, [device]) if held else nullcontext():
            yield
