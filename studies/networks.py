"""The networks of the study: plain CNNs and small ResNets, with global average pooling and a linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from studies.families import Configuration


def build(configuration: Configuration, channels: int, classes: int = 10) -> nn.Module:
    """Build a network with initial weights from its seed, without changing the state of the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + configuration.seed)
        kind = {"plain": Plain, "resnet": ResNet}[configuration.network]
        return kind(configuration, channels, classes)


def convolution(inputs: int, outputs: int, kernel: int, stride: int, batch_norm: bool) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not batch_norm)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs)) if batch_norm else nn.Sequential(layer)


class Plain(nn.Module):
    """A plain CNN with ReLU.

    Every second convolution halves the feature map and doubles the channels, up to four times the width.
    """

    def __init__(self, configuration: Configuration, channels: int, classes: int) -> None:
        super().__init__()
        layers, width = [], configuration.width
        for index in range(configuration.depth):
            outputs = min(width * 2 ** ((index + 1) // 2), 4 * width)
            options = configuration.kernel, 1 + index % 2, configuration.batch_norm
            layers += [convolution(channels, outputs, *options), nn.ReLU()]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(configuration.dropout)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(images).mean((2, 3))))


class Block(nn.Module):
    """A residual block of two convolutions; the skip connection is the identity or a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, configuration: Configuration) -> None:
        super().__init__()
        kernel, batch_norm = configuration.kernel, configuration.batch_norm
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else convolution(inputs, outputs, 1, stride, batch_norm)
        self.first = convolution(inputs, outputs, kernel, stride, batch_norm)
        self.second = convolution(outputs, outputs, kernel, 1, batch_norm)

    def forward(self, images: Tensor) -> Tensor:
        around = self.around(images)
        return relu(around + self.second(relu(self.first(images))))


class ResNet(nn.Module):
    """A ResNet: a stem, and three stages of ``depth`` blocks with one, two and four times the width as channels."""

    def __init__(self, configuration: Configuration, channels: int, classes: int) -> None:
        super().__init__()
        width = configuration.width
        self.stem = convolution(channels, width, 3, 1, configuration.batch_norm)
        blocks, inputs = [], width
        for stage in range(3):
            for index in range(configuration.depth):
                stride = 2 if stage and not index else 1
                blocks.append(Block(inputs, width * 2**stage, stride, configuration))
                inputs = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(configuration.dropout)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        images = self.blocks(relu(self.stem(images)))
        return self.classifier(self.dropout(images.mean((2, 3))))
