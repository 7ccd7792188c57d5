"""The data: scikit-learn's digits and CIFAR-10, labels with noise, images drawn otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, pad

from studies.families import Configuration

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Data:
    """Training and test images ``(N, C, H, W)`` with their labels ``(N,)``."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Data:
        return Data(*(tensor.to(device) for tensor in (self.images, self.labels, self.test_images, self.test_labels)))


def digits(num_train: int = 200) -> Data:
    """Return scikit-learn's 1,797 digits (8x8; Alpaydin and Kaynak 1998), split at random, the same split always."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16 - 0.5
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(found.target)[order]
    return Data(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:])


def cifar10(arrays: Path | None = None, root: Path = Path("data"), download: bool = False) -> Data:
    """Return CIFAR-10 from torchvision, or from a folder of ``train_images.npy`` and three others.

    Classes take turns, so that the first images of any number are balanced.
    """
    parts = []
    for part in ("train", "test"):
        if arrays is not None:
            images, labels = (np.load(Path(arrays) / f"{part}_{what}.npy") for what in ("images", "labels"))
        else:
            from torchvision.datasets import CIFAR10

            found = CIFAR10(root, train=part == "train", download=download)
            images, labels = found.data, np.array(found.targets)
        order = in_turns(torch.as_tensor(labels).long())
        scaled = (torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255 - column(MEAN)) / column(STD)
        parts += [scaled[order].contiguous(), torch.as_tensor(labels).long()[order]]
    return Data(*parts)


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def in_turns(labels: Tensor) -> Tensor:
    """Return an order of the samples in which the classes take turns, and else stay as they are."""
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        mine = labels == label
        rank[mine] = torch.arange(int(mine.sum()))
    return torch.argsort(rank * (int(labels.max()) + 1) + labels)


def training_part(data: Data, configuration: Configuration) -> tuple[Tensor, Tensor]:
    """Return the images that a network is trained on, and their labels, some of them wrong with label noise.

    Wrong labels depend on the seed and the level of noise alone; those of a lower level are a subset.
    """
    images, labels = data.images[: configuration.train_size], data.labels[: configuration.train_size]
    generator = torch.Generator().manual_seed(2000 + configuration.seed)
    order = torch.randperm(len(labels), generator=generator)
    offsets = torch.randint(1, 10, (len(labels),), generator=generator)
    wrong = order[: round(configuration.label_noise * len(labels))]
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + offsets[wrong]) % 10
    return images, noisy


def shifted(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Return images drawn otherwise, by name: moved, rotated, blurred, noisy, faint, small."""
    generator = torch.Generator().manual_seed(seed)
    dark = float(images.min())
    angle = torch.tensor(np.pi / 9)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return {
        "moved": torch.roll(pad(images, (1, 1, 1, 1), value=dark), (1, 0), (2, 3))[:, :, 1:-1, 1:-1],
        "rotated": warped(images, turn, dark),
        "small": warped(images, 1.3 * torch.eye(2), dark),
        "blurred": avg_pool2d(pad(images, (1, 1, 1, 1), value=dark), 3, 1),
        "noisy": images + 0.25 * images.std() / 0.4 * torch.randn(images.shape, generator=generator),
        "faint": dark + 0.6 * (images - dark),
    }


def warped(images: Tensor, matrix: Tensor, outside: float) -> Tensor:
    """Return images read at linearly mapped coordinates; ``outside`` is the value beyond their border."""
    size = images.shape[-1]
    line = (torch.arange(size) * 2 + 1) / size - 1
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1) @ matrix.T
    grid = points.expand(len(images), *points.shape)
    return grid_sample(images - outside, grid, align_corners=False) + outside
