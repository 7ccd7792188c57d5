"""One layer under the closed form: certify it on the first batch, then measure every batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_flatness.capture.observation import ConvolutionCall, LayerObservation, Observation
from lightning_flatness.capture.tail import (
    certify_channels,
    certify_curvatures,
    channel_map,
    tail_curvatures,
    tail_slopes,
)
from lightning_flatness.errors import BatchError, NotClosedFormError
from lightning_flatness.functional import closed_form_block_traces


@dataclass(frozen=True)
class Head:
    """The linear map from features to logits, in one forward pass."""

    name: str | None  # of the classifier; None where the features are the logits
    features: Tensor  # g, (N, m), in the graph of the layers
    weight: Tensor  # V, (K, m)
    bias: Tensor | None  # (K,)


def find_head(name: str | None, classifier: nn.Module | None, seen: Observation, logits: Tensor) -> Head:
    """The head of an observed forward pass.

    Raises:
        NotClosedFormError: the classifier did not run once on one vector for every sample.
    """
    if classifier is None:
        return Head(None, logits, torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device), None)
    if len(seen.features) != 1 or not isinstance(seen.features[0], Tensor):
        raise NotClosedFormError(
            f"The classifier '{name}' is called {len(seen.features)} times, or not with one tensor; the closed form "
            "needs one linear map."
        )
    features = seen.features[0]
    if features.ndim < 2 or (features.ndim > 2 and set(features.shape[2:]) != {1}):
        raise NotClosedFormError(
            f"The classifier's input has shape {tuple(features.shape)}; the closed form needs one vector for every "
            "sample, as global average pooling gives."
        )
    weight, offset = classifier.weight, classifier.bias
    assert isinstance(weight, Tensor)
    bias = offset.detach() if isinstance(offset, Tensor) else None
    return Head(name, features.flatten(1), weight.detach().flatten(1), bias)


@dataclass
class ClosedFormLayer:
    """What is known of one layer: the feature ``c(s)`` that every channel reaches, -1 while no slope was active."""

    name: str
    channels: Tensor | None = field(default=None)

    def pulled_back(self, observed: LayerObservation, head: Head) -> tuple[Tensor, Tensor | None, Tensor, float]:
        """Slopes, curvatures, classifier columns ``V[:, c(s)]``, and the deviation found where the tail was certified.

        The tail is certified until every channel has been active.

        Raises:
            NotClosedFormError: the tail is not what the closed form needs.
        """
        features, output = head.features, observed.output
        slopes = tail_slopes(self.name, features, output)
        known, channels = self.channels, self.channels
        if known is None or bool((known < 0).any()):
            found = channel_map(features, output, slopes)
            channels = found if known is None else torch.where(known >= 0, known, found)
        assert channels is not None
        deviation = 0.0
        if known is not None and torch.equal(channels, known):
            curvatures = tail_curvatures(self.name, slopes, output)
        else:
            deviation = certify_channels(self.name, features, output, slopes, channels)
            curvatures = tail_curvatures(self.name, slopes, output)
            second = certify_curvatures(self.name, features, output, slopes, curvatures, channels)
            deviation = max(deviation, second)
            self.channels = channels
        columns = head.weight[:, channels.clamp_min(0)] * (channels >= 0)
        return slopes.detach(), None if curvatures is None else curvatures.detach(), columns, deviation

    def block_traces(
        self,
        call: ConvolutionCall,
        slopes: Tensor,
        curvatures: Tensor | None,
        columns: Tensor,
        probabilities: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        """Block traces of the batch, ``(G, S/G, S/G)``, summed over samples.

        Raises:
            BatchError: the tail is curved and there are no targets.
        """
        if curvatures is not None and residual is None:
            if bool(curvatures.any()):
                raise BatchError(
                    f"Layer '{self.name}': the activation after it is curved, so its Hessian depends on the targets, "
                    "and this batch has none. Give batches of (inputs, targets)."
                )
            curvatures = None
        return closed_form_block_traces(
            call.inputs, call.geometry, slopes, columns, probabilities, curvatures, residual
        )
