"""Train ten networks on handwritten digits, compare their flatness, and ask whether it goes with the gap.

    python examples/compare.py [--out runs/compare]

Batch size and learning rate differ. All networks are trained to the same training loss, since flatness follows it, and
would else tell little but which network was trained longer. It takes two minutes on two CPU cores; the 1,797 images
(8x8, Alpaydin and Kaynak 1998) come with scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import lightning_flatness as lf
from lightning_flatness.plots import plot_comparison, plot_gap

SETTINGS = [(batch_size, rate) for batch_size in (16, 64) for rate in (0.01, 0.02, 0.04, 0.08, 0.16)]


def network() -> nn.Module:
    """Build three convolutions, global average pooling, and a linear classifier."""

    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    blocks = [*block(1, 16), *block(16, 32, stride=2), *block(32, 32)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def load_data(num_train: int):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.5
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(digits.target)[order]
    return (images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:])


@torch.no_grad()
def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    loss = cross_entropy(model(images), labels).item()
    model.train()
    return loss


def trained(train, batch_size: int, rate: float, target: float, max_steps: int) -> nn.Module:
    """Train a network until its loss on all training data is near the target."""
    images, labels = train
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    recent, is_near = 10.0, False
    for _ in range(max_steps):
        batch = torch.randint(len(labels), (batch_size,))
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent += 0.1 * (loss.item() - recent)
        if not is_near and recent < 3 * target:
            is_near = True
            optimizer.param_groups[0]["lr"] = min(rate / 5, 0.004)  # so that no step leaps over the target
        if is_near and loss_of(model, images, labels) < target:
            break
    return model.eval()


def main(arguments: list[str] | None = None) -> lf.Comparison:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=len(SETTINGS), help="train the first so many only")
    parser.add_argument("--num-train", type=int, default=900)
    parser.add_argument("--target", type=float, default=0.1, help="training loss at which training stops")
    parser.add_argument("--max-steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    options = parser.parse_args(arguments)

    train, test = load_data(options.num_train)
    models, hyperparameters, gaps = {}, {}, {}
    for batch_size, rate in SETTINGS[: options.networks]:
        name = f"b{batch_size} lr{rate:g}"
        model = trained(train, batch_size, rate, options.target, options.max_steps)
        models[name] = model
        hyperparameters[name] = {"batch size": batch_size, "learning rate": rate}
        gaps[name] = loss_of(model, *test) - loss_of(model, *train)
        model.eval()
    comparison = lf.compare(
        models,
        [train],
        data="train",
        outcome=gaps,
        outcome_name="loss gap",
        hyperparameters=hyperparameters,
    )

    options.out.mkdir(parents=True, exist_ok=True)
    comparison.save(options.out / "comparison.npz")
    plot_comparison(comparison)[0].savefig(options.out / "comparison.png")
    plot_gap(comparison)[0].savefig(options.out / "gap.png")
    console = Console()
    console.print(comparison)
    console.print(f"The pictures: {options.out / 'comparison.png'}, {options.out / 'gap.png'}")
    return comparison


if __name__ == "__main__":
    main()
