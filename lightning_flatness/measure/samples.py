"""Keep values of single samples, and sums over groups of samples, from which standard errors are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.errors import BatchError
from lightning_flatness.functional.channels import ChannelSums
from lightning_flatness.functional.sampling import GROUPS, grouped, largest_tenth, sampling_errors
from lightning_flatness.functional.weighting import RELATIVE, SAMPLE_MEASURES
from lightning_flatness.layers.sums import CORRECT, COUNT, CURVATURE, LOSS, OUTCOMES, PREDICTION, WEIGHT, LayerSums
from lightning_flatness.measure.ranks import gather

# Number of samples at the beginning of the measured set, over all ranks, from which the standard deviations of the
# input channels are computed.
FIRST_SAMPLES = 128


def none_left(positions: Tensor, num_ranks: int) -> bool:
    """Return whether none of the first samples can follow on this rank, after samples at these ``positions``.

    The ranks take turns. The result is the same on all of them if they have seen equally many samples.

    Example:
        >>> [none_left(torch.tensor([position]), num_ranks=3) for position in (122, 123, 125, 126, 127, 128)]
        [False, False, False, True, True, True]
    """
    return bool((positions // num_ranks * num_ranks >= FIRST_SAMPLES - num_ranks).any())


@dataclass(frozen=True)
class Held:
    """Samples that are measured later, when the standard deviations of the layers' input channels are known."""

    channels: Mapping[str, ChannelSums]  # for each layer, the sums of every sample over each input channel
    positions: Tensor  # indices of the samples in the measured set
    measure: Callable[[], dict[str, LayerSums]]  # measures the samples; returns the sums of each layer


def deviations_of(held: list[Held], sync: bool) -> dict[str, Tensor]:
    """Return a mapping from names of layers to the standard deviations ``(C,)`` of their input channels.

    Only the first ``FIRST_SAMPLES`` samples of the measured set are used. With ``sync``, they come from all ranks, and
    this function is a collective. Then call it once in a measurement on every rank, even with an empty list.
    """
    totals: dict[str, list[ChannelSums]] = {}
    for some in held:
        for name, of_samples in some.channels.items():
            first = some.positions[: len(of_samples.count)] < FIRST_SAMPLES
            totals.setdefault(name, []).append(of_samples[first.to(of_samples.count.device)].total().cpu())
    own = {name: ChannelSums.added(of_layer) for name, of_layer in totals.items()}
    ranks = gather(own, sync)
    return {
        name: ChannelSums.added([of_rank[name] for of_rank in ranks if name in of_rank]).deviations()
        for name in {name for of_rank in ranks for name in of_rank}
    }


class SampleValues:
    """Sums over the 32 groups of samples from which standard errors are computed, and values of single samples.

    The position of a sample, which is its index in the measured set, decides its group (``functional.sampling``).
    ``outcomes`` has the sums of numbers that do not depend on a layer, such as the loss (``layers.sums.OUTCOMES``).
    With ``keeps_all``, these numbers are also kept for every sample, and the ``SAMPLE_MEASURES`` for every sample and
    layer.
    """

    def __init__(self, keeps_all: bool = False) -> None:
        self.groups: dict[str, Tensor] = {}  # for each layer, (32, 5) sums of the weights and of the SAMPLE_MEASURES
        self.outcomes = torch.zeros(GROUPS, len(OUTCOMES), dtype=torch.float64, device="cpu")
        self._keeps_all = keeps_all
        self._kept: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []  # positions, outcomes, values of each layer

    def add(self, sums: Mapping[str, LayerSums], positions: Tensor, keeps: set[str]) -> None:
        """Add the samples of a batch, whose indices in the measured set are ``positions``.

        Without ``keeps_all``, only the relative flatness of every sample is kept, for the layers in ``keeps``.
        """
        for name, of_layer in sums.items():
            groups = of_layer.groups(positions)
            self.groups[name] = self.groups[name] + groups if name in self.groups else groups
        outcomes = next(iter(sums.values())).outcomes
        self.outcomes = self.outcomes.to(outcomes.device) + grouped(outcomes, positions)
        if self._keeps_all:
            kept = {name: of_layer.samples for name, of_layer in sums.items()}
        else:
            # Ignored samples become NaN. Removing them here would make the program wait for a GPU.
            counts = outcomes[:, COUNT, None] > 0
            kept = {
                name: torch.where(counts, sums[name].samples[:, RELATIVE, None], torch.nan)
                for name in keeps & sums.keys()
            }
        self._kept.append((positions, outcomes if self._keeps_all else outcomes[:0], kept))

    def of_rank(self) -> OfRank:
        """Return the sums and the kept values of this rank, on the CPU."""
        names = {name for _, _, values in self._kept for name in values}
        empty = torch.zeros(0, device="cpu")
        return OfRank(
            self.outcomes.cpu(),
            {name: groups.cpu() for name, groups in self.groups.items()},
            torch.cat([empty.long(), *(positions for positions, _, _ in self._kept)]),
            torch.cat([empty.double().new_zeros(0, len(OUTCOMES)), *(outcomes.cpu() for _, outcomes, _ in self._kept)]),
            {
                name: torch.cat([values[name].cpu() for _, _, values in self._kept])
                for name in names
                if all(name in values for _, _, values in self._kept)
            },
        )

    def gathered(self, sync: bool) -> Samples:
        """Return the sums and the kept values of all ranks, in one object. With ``sync``, this is a collective."""
        measured = [of_rank for of_rank in gather(self.of_rank(), sync) if of_rank.groups]
        if not measured:
            raise BatchError("No sample was measured, so there is no flatness. Is the data set empty?")
        names = list(dict.fromkeys(name for of_rank in measured for name in of_rank.groups))
        order = torch.cat([of_rank.positions for of_rank in measured]).argsort(stable=True)
        return Samples(
            outcomes=torch.stack([of_rank.sums for of_rank in measured]).sum(0),
            groups={name: torch.stack([of_rank.groups[name] for of_rank in measured]).sum(0) for name in names},
            of_samples=torch.cat([of_rank.outcomes for of_rank in measured])[order] if self._keeps_all else None,
            of_layers={
                name: torch.cat([of_rank.values[name] for of_rank in measured])[order]
                for name in names
                if all(name in of_rank.values for of_rank in measured)
            },
        )


class OfRank(NamedTuple):
    """The sums over groups of samples, and the values of single samples, that one rank has kept."""

    sums: Tensor  # (32, 6), sums of OUTCOMES
    groups: dict[str, Tensor]  # for each layer, (32, 5) sums of the weights and of the SAMPLE_MEASURES
    positions: Tensor  # (N,), indices of this rank's samples in the measured set
    outcomes: Tensor  # (N, 6), OUTCOMES of every sample; (0, 6) if they are not kept
    values: dict[str, Tensor]  # for each layer, SAMPLE_MEASURES of every sample (N, 4), or relative flatness (N, 1)


@dataclass(frozen=True)
class Samples:
    """Sums over groups of samples, and values of single samples in the order of the measured set, from all ranks."""

    outcomes: Tensor  # (32, 6), sums of OUTCOMES
    groups: Mapping[str, Tensor]  # for each layer, (32, 5) sums of the weights and of the SAMPLE_MEASURES
    of_samples: Tensor | None  # (N, 6), OUTCOMES of every sample; None unless all values are kept
    of_layers: Mapping[str, Tensor]  # for each layer, (N, 4) or (N, 1), as in OfRank.values

    def network(self) -> tuple[float, float, float]:
        """Return mean loss, accuracy and curvature (mean trace of the loss's Hessian with respect to the logits)."""
        sums = self.outcomes.sum(0)
        return (
            float(sums[LOSS] / sums[WEIGHT]),
            float(sums[CORRECT] / sums[COUNT]),
            float(sums[CURVATURE] / sums[WEIGHT]),
        )

    def network_errors(self) -> dict[str, float]:
        """Return a mapping from names to standard errors over samples.

        The names are ``"loss"``, ``"accuracy"``, ``"curvature"``, and those of the measures. For a measure, the
        error is the standard error of its sum over all layers.
        """
        weights = self.outcomes[:, WEIGHT]
        of_loss = sampling_errors(self.outcomes[:, [LOSS, CURVATURE]], weights)
        of_accuracy = sampling_errors(self.outcomes[:, [CORRECT]], self.outcomes[:, COUNT])
        summed = torch.stack(list(self.groups.values())).sum(0)
        of_sums = sampling_errors(summed[:, 1:], weights)
        errors = {"loss": of_loss[0], "accuracy": of_accuracy[0], "curvature": of_loss[1]}
        return {name: float(error) for name, error in errors.items()} | _named(of_sums)

    def layer_errors(self, name: str) -> dict[str, float]:
        """Return a mapping from a layer's measures to their standard errors over samples; NaN if not known."""
        groups = self.groups[name]
        return _named(sampling_errors(groups[:, 1:], groups[:, 0]))

    def largest_tenth(self, name: str) -> float:
        """Return the share of a layer's relative flatness that comes from the largest tenth of the per-sample values.

        The share is NaN if the values of single samples are not known.
        """
        values = self.of_layers.get(name)
        if values is None:
            return math.nan
        of_samples = values[:, min(RELATIVE, values.shape[1] - 1)]
        counts = of_samples.isfinite() if self.of_samples is None else self.of_samples[:, COUNT] > 0
        return largest_tenth(of_samples[counts])

    @property
    def num_groups(self) -> int:
        """Number of groups that have samples."""
        return int((self.outcomes[:, WEIGHT] > 0).sum())

    def values_of_layer(self, name: str) -> dict[str, Tensor]:
        """Return a mapping from a layer's measures to the values of every sample, ``(N,)``.

        Measures without values are left out. The mapping is empty unless all values are kept.
        """
        if self.of_samples is None:
            return {}
        of_samples = _without_weight(self.of_layers[name], self.of_samples[:, WEIGHT])
        values = dict(zip(SAMPLE_MEASURES, of_samples.unbind(1), strict=True))
        return {measure: of_samples for measure, of_samples in values.items() if not bool(of_samples.isnan().all())}

    def values_of_network(self) -> dict[str, Tensor]:
        """Return a dict with loss, curvature, prediction, correctness and weight of every sample, ``(N,)`` each.

        The dict is empty unless all values are kept.
        """
        if self.of_samples is None:
            return {}
        weight = self.of_samples[:, WEIGHT]
        loss, curvature = _without_weight(self.of_samples[:, [LOSS, CURVATURE]], weight).unbind(1)
        return {
            "loss": loss,
            "curvature": curvature,
            "prediction": self.of_samples[:, PREDICTION].long(),
            "correct": self.of_samples[:, CORRECT],
            "weight": weight,
        }


def _without_weight(values: Tensor, weight: Tensor) -> Tensor:
    """Divide the values of samples, ``(N, Q)``, by the weights of the samples, ``(N,)``; NaN where the weight is 0."""
    return torch.where(weight[:, None] > 0, values / weight[:, None], torch.nan)


def _named(errors: Tensor) -> dict[str, float]:
    """Return a dict that maps each name in ``SAMPLE_MEASURES`` to its entry of ``errors``, ``(4,)``."""
    return dict(zip(SAMPLE_MEASURES, errors.tolist(), strict=True))
