"""Families of networks as data: each family is a list of configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One network: its data, its architecture, how it is trained, and its seed."""

    name: str
    arm: str  # in a star, the difference from the centre; empty in a factorial
    train_size: int  # or all training images, if the data have fewer
    label_noise: float  # share of the training labels that are replaced by a random other class
    augment: bool
    network: str  # "plain" or "resnet"
    width: int
    depth: int  # number of convolutions in a plain network, or of blocks in a stage of a ResNet
    kernel: int
    batch_norm: bool
    dropout: float
    optimizer: str  # "sgd" (momentum 0.9), "adam" or "sam" (SGD with momentum, radius 0.05)
    batch_size: int
    learning_rate: float
    weight_decay: float
    epochs: int
    schedule: str  # "constant" or "cosine"
    seed: int

    def row(self) -> dict[str, Any]:
        """Return the configuration as a row of a table."""
        return asdict(self)

    @property
    def stack_key(self) -> tuple[Any, ...]:
        """The values that must be equal in networks that are trained at once.

        They decide on the shapes of tensors and the order of operations.
        """
        differing = {"name", "arm", "label_noise", "learning_rate", "weight_decay", "seed"}
        return tuple(value for key, value in asdict(self).items() if key not in differing)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A list of configurations, and the snapshots (moments in training) at which their networks are measured.

    There are two kinds of families. A factorial has every combination of its factors. A star has a centre, and arms
    that differ from the centre in one hyper-parameter.
    """

    name: str
    data: str  # "digits" or "cifar10"
    configurations: tuple[Configuration, ...]
    epochs: tuple[int, ...]  # take a snapshot at the end of these epochs
    losses: tuple[float, ...]  # take a snapshot when the training loss first is at most one of these
    checks: int  # number of times in an epoch that the training loss is computed
    stack: int  # largest number of networks that are trained at once
    stack_on_cpu: int  # the same on a CPU, where large networks are faster one by one
    factors: tuple[str, ...]  # hyper-parameters that differ between the configurations
    measured_samples: int  # number of training samples that measures are computed on
    costly: tuple[str, ...]  # snapshots at which eigenvalues and the whole network's spectrum are measured

    @property
    def snapshots(self) -> tuple[str, ...]:
        """The names of the snapshots, such as ``"loss 0.05"`` and ``"epoch 120"``."""
        return (*(f"loss {loss:g}" for loss in self.losses), *(f"epoch {epoch}" for epoch in self.epochs))


LOSSES = (0.3, 0.05, 0.01)

DIGITS = Configuration(
    name="", arm="", train_size=200, label_noise=0.0, augment=False, network="plain", width=12, depth=3, kernel=3,
    batch_norm=True, dropout=0.0, optimizer="sgd", batch_size=25, learning_rate=0.05, weight_decay=0.0, epochs=120,
    schedule="constant", seed=0,
)  # fmt: skip

CIFAR = Configuration(
    name="", arm="centre", train_size=1000, label_noise=0.0, augment=False, network="plain", width=16, depth=4,
    kernel=3, batch_norm=True, dropout=0.0, optimizer="sgd", batch_size=50, learning_rate=0.05, weight_decay=0.0,
    epochs=60, schedule="constant", seed=0,
)  # fmt: skip

# Every arm of the star changes one hyper-parameter of the centre.
ARMS: dict[str, tuple[Any, ...]] = {
    "width": (8, 24),
    "depth": (3, 6),
    "kernel": (5,),
    "batch_norm": (False,),
    "dropout": (0.3,),
    "augment": (True,),
    "optimizer": ("adam", "sam"),
    "batch_size": (20, 125),
    "learning_rate": (0.02, 0.1),
    "weight_decay": (1e-3, 5e-3),
    "label_noise": (0.1, 0.2),
    "train_size": (500, 2000),
    "network": ("resnet",),
}
# Some arms need other changes as well, because their networks would not train otherwise.
ALONG: dict[tuple[str, Any], dict[str, Any]] = {
    ("optimizer", "adam"): {"learning_rate": 0.002},
    ("network", "resnet"): {"depth": 1},
    ("batch_norm", False): {"learning_rate": 0.02},
}


def digits(seeds: int = 3) -> Family:
    """Return the factorial of batch size, learning rate, weight decay and label noise on scikit-learn's digits."""
    levels = product((0.0, 0.1, 0.2), (10, 25, 100), (0.02, 0.05, 0.1, 0.2), (0.0, 1e-3), range(seeds))
    keys = ("label_noise", "batch_size", "learning_rate", "weight_decay", "seed")
    found = tuple(
        replace(DIGITS, name=f"digits-{number:03d}", **dict(zip(keys, values, strict=True)))
        for number, values in enumerate(levels)
    )
    return Family(
        name="digits", data="digits", configurations=found, epochs=(30, 120), losses=LOSSES, checks=2, stack=18,
        stack_on_cpu=18, factors=keys[:-1], measured_samples=200, costly=("loss 0.05",),
    )  # fmt: skip


def cifar(seeds: int = 3) -> Family:
    """Return the star on CIFAR-10: a centre, and arms that change one hyper-parameter each."""
    settings = [{"arm": "centre"}]
    settings += [
        {"arm": f"{key} {value}", key: value, **ALONG.get((key, value), {})}
        for key, values in ARMS.items()
        for value in values
    ]
    found = []
    for seed in range(seeds):
        for setting in settings:
            found.append(replace(CIFAR, name=f"cifar-{len(found):03d}", seed=seed, **setting))
    return Family(
        name="cifar", data="cifar10", configurations=tuple(found), epochs=(30, 60), losses=LOSSES, checks=2, stack=9,
        stack_on_cpu=1, factors=tuple(ARMS), measured_samples=256, costly=("loss 0.05",),
    )  # fmt: skip


def accurate(seeds: int = 5) -> Family:
    """Return networks with high accuracy on CIFAR-10: ResNets and plain CNNs, trained on all images, augmented."""
    centre = replace(
        CIFAR, train_size=50_000, augment=True, width=32, batch_size=125, learning_rate=0.1, weight_decay=5e-4,
        epochs=30, schedule="cosine",
    )  # fmt: skip
    kinds = ({"arm": "resnet", "network": "resnet", "depth": 1}, {"arm": "plain", "depth": 6})
    settings = list(product(range(seeds), kinds))
    found = tuple(
        replace(centre, name=f"accurate-{number:03d}", seed=seed, **kind)
        for number, (seed, kind) in enumerate(settings)
    )
    return Family(
        name="accurate", data="cifar10", configurations=found, epochs=(10, 20, 30), losses=LOSSES, checks=1, stack=2,
        stack_on_cpu=1, factors=("network",), measured_samples=256, costly=(),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Family]] = {"digits": digits, "cifar": cifar, "accurate": accurate}


def stacks(family: Family, device: str = "cpu") -> list[tuple[Configuration, ...]]:
    """Divide the configurations into groups of networks that are trained at once.

    The groups are sorted by the position of their first network in ``family.configurations``.
    """
    size = family.stack_on_cpu if device == "cpu" else family.stack
    groups: dict[tuple[Any, ...], list[Configuration]] = {}
    for configuration in family.configurations:
        groups.setdefault(configuration.stack_key, []).append(configuration)
    found = [tuple(group[start : start + size]) for group in groups.values() for start in range(0, len(group), size)]
    order = {configuration.name: number for number, configuration in enumerate(family.configurations)}
    return sorted(found, key=lambda stack: order[stack[0].name])
