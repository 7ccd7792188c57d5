"""The data: scikit-learn's digits and CIFAR-10, and label noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

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
    """Return scikit-learn's 1,797 digits (8x8; Alpaydin and Kaynak 1998), in a random split with a fixed seed."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16 - 0.5
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(found.target)[order]
    return Data(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:])


def cifar10(arrays: Path | None = None, root: Path = Path("data"), download: bool = False) -> Data:
    """Load CIFAR-10 from torchvision, or from ``{train,test}_{images,labels}.npy`` in the folder ``arrays``.

    The classes take turns in the order of the images, so that the first images are balanced, however many are used. The
    test images at even places have all classes equally often, and so have those at odd places.
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
        order = with_balanced_halves(order) if part == "test" else order
        scaled = (torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255 - column(MEAN)) / column(STD)
        parts += [scaled[order].contiguous(), torch.as_tensor(labels).long()[order]]
    return Data(*parts)


def black_of(data: str) -> Tensor:
    """Return the value of a black pixel ``(1, C, 1, 1)`` in the normalised images of ``"digits"`` or ``"cifar10"``."""
    return torch.full((1, 1, 1, 1), -0.5) if data == "digits" else -column(MEAN) / column(STD)


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def in_turns(labels: Tensor) -> Tensor:
    """Return indices that sort samples so that the classes take turns; each class keeps the order of its samples."""
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        mine = labels == label
        rank[mine] = torch.arange(int(mine.sum()))
    return torch.argsort(rank * (int(labels.max()) + 1) + labels)


def with_balanced_halves(order: Tensor, classes: int = 10) -> Tensor:
    """Swap neighbours in every second turn of the classes, so that each class is at even and odd places equally often.

    ``order`` has an even number of classes that take turns. Without the swaps, the images at even places would have
    every second class only, and the two halves of the test images would not tell the same of a network.
    """
    places = torch.arange(len(order))
    return order[torch.where(places // classes % 2 == 1, places ^ 1, places)]


def training_part(data: Data, configuration: Configuration) -> tuple[Tensor, Tensor]:
    """Return the images and labels that a network is trained on; with label noise, some labels are wrong.

    The wrong labels depend only on the seed and the noise level. A label that is wrong at one level is wrong at all
    higher levels, too.
    """
    images, labels = data.images[: configuration.train_size], data.labels[: configuration.train_size]
    generator = torch.Generator().manual_seed(2000 + configuration.seed)
    order = torch.randperm(len(labels), generator=generator)
    offsets = torch.randint(1, 10, (len(labels),), generator=generator)
    wrong = order[: round(configuration.label_noise * len(labels))]
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + offsets[wrong]) % 10
    return images, noisy
