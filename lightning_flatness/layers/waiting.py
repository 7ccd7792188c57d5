"""Keep data of the first samples until the standard deviations of the layers' input channels are known.

Normalised relative flatness divides every input channel by its standard deviation, which the first samples determine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.functional.channels import ChannelSums
from lightning_flatness.layers.certified import Certified, CertifiedPass
from lightning_flatness.layers.closed_form import ClosedForms
from lightning_flatness.layers.gauss_newton import Advance
from lightning_flatness.layers.passes import OwnPasses
from lightning_flatness.layers.recording import LayerCall
from lightning_flatness.layers.sums import outcomes_of_pass
from lightning_flatness.model.rows import num_rows


@dataclass(frozen=True)
class WaitingSamples:
    """The data of one pass that are kept until the standard deviations of the input channels are known.

    The standard deviations are computed from ``channels``. Then all layers are measured. The closed form needs no
    second forward pass: it computes block traces from ``forms``. The Gauss-Newton method needs the autograd graph,
    which is not kept. So if a layer needs backward passes, ``forms`` is None, and the samples must run once more.
    """

    num_samples: int
    channels: Mapping[str, ChannelSums]  # sums of a layer's input channels for every sample, keyed by layer name
    forms: ClosedForms | None

    @classmethod
    def of(cls, certified: CertifiedPass, known: Certified) -> WaitingSamples:
        """Collect the data from a certified pass. ``known`` has the certificates so far."""
        if certified.need_backward:
            return cls.of_calls(certified.calls, 1 if certified.loss.is_pair else len(certified.recorded.logits))
        forms = ClosedForms.of(certified, known, outcomes_of_pass(certified))
        return cls(forms.num_samples, forms.channels(), forms)

    @classmethod
    def of_calls(cls, calls: Mapping[str, Sequence[LayerCall]], samples: int) -> WaitingSamples:
        """Collect the channel sums of the first ``samples`` samples from the recorded calls of layers."""
        sums = {name: channel_sums(of_layer) for name, of_layer in calls.items()}
        of_layers = {name: of_layer[slice(samples)] for name, of_layer in sums.items() if of_layer is not None}
        return cls(samples, of_layers, None)

    @classmethod
    def run(
        cls, passes: OwnPasses, inputs: Any, targets: Tensor | None, rows: slice, advance: Advance | None
    ) -> Iterator[WaitingSamples]:
        """Run the samples ``rows`` of a batch in parts that fit in memory, and yield the data of each part.

        When a layer needs backward passes, all samples will run and be certified once more. So later parts are not
        certified here.
        """
        first_batch = not passes.known.layers
        start, end, _ = rows.indices(num_rows(inputs, targets))
        needs_graph = False
        for part in passes(inputs, targets, lambda certified, known, _: cls.of(certified, known), advance, rows):
            yield part
            start += part.num_samples
            needs_graph = part.forms is None
            if needs_graph:
                break
        if needs_graph:
            rest = slice(start, end)
            yield from passes.recorded(
                inputs, targets, lambda recorded, number: cls.of_calls(recorded.calls, number), rest, first_batch
            )

    @classmethod
    def joined(cls, parts: Sequence[WaitingSamples]) -> dict[str, ChannelSums]:
        """Return the channel sums of all samples of several passes, keyed by layer name.

        A layer is left out if one of the passes has no channel sums for it.
        """
        names = [name for name in parts[0].channels if all(name in part.channels for part in parts)]
        return {name: ChannelSums.joined([part.channels[name] for part in parts]) for name in names}


def channel_sums(calls: Sequence[LayerCall]) -> ChannelSums | None:
    """Return mean and squared deviations of every input channel of every sample, over the positions of all calls.

    Return None if the calls have different numbers of samples or channels.
    """
    inputs = [call.convolution.read for call in calls]
    if len({one.shape[:2] for one in inputs}) > 1:
        return None
    return ChannelSums.of(torch.cat([one.flatten(2) if one.ndim > 2 else one[:, :, None] for one in inputs], dim=2))
