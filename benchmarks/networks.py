"""The networks and data of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

Batch = tuple[Tensor, Tensor]


def convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        first, second = convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3, 1)
        self.branch = nn.Sequential(*first, nn.ReLU(), *second)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))


def resnet20(classes: int = 10, depth: int = 20, width: int = 16) -> nn.Module:
    """Build the ResNet for CIFAR of He et al. 2016, with 1x1 convolutions as shortcuts where the shape changes."""
    layers = [*convolution(3, width, 3, 1), nn.ReLU()]
    inputs = width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            layers.append(Residual(inputs, outputs, stride=1 if inputs == outputs else 2))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)).eval()


def resnet18(classes: int = 10) -> nn.Module:
    """Build torchvision's ResNet-18 with a 3x3 stem and without max pooling, for small images."""
    from torchvision.models import resnet18 as of_torchvision

    net = of_torchvision(num_classes=classes)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net.eval()


def resnet50() -> nn.Module:
    """Build torchvision's ResNet-50 with a thousand classes."""
    from torchvision.models import resnet50 as of_torchvision

    return of_torchvision().eval()


def images(samples: int, size: int = 32, classes: int = 10, device: str = "cpu") -> Batch:
    """Draw random images and labels with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, size, size, generator=generator)
    return x.to(device), torch.randint(classes, (samples,), generator=generator).to(device)


def digits() -> Batch:
    """Load the 1,797 digits of scikit-learn as images of 32x32 with three equal channels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images).float()[:, None] / 8 - 1
    x = interpolate(x, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    return x, torch.tensor(data.target)


def trained(net: nn.Module, data: Batch, steps: int, batch_size: int = 64) -> nn.Module:
    """Train a network for a few steps, and then compute the running statistics of BatchNorm with the final weights."""
    generator = torch.Generator().manual_seed(0)

    def batches(number: int) -> Iterator[Batch]:
        for _ in range(number):
            rows = torch.randint(len(data[0]), (batch_size,), generator=generator)
            yield data[0][rows], data[1][rows]

    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.05, momentum=0.9)
    for x, y in batches(steps):
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(net(x), y).backward()
        optimizer.step()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # averages over all batches
    with torch.no_grad():
        for x, _ in batches(4):
            net(x)
    optimizer.zero_grad(set_to_none=True)
    return net.eval()
