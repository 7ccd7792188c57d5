"""Train a ResNet-20 on a few images of CIFAR-10, and compare the relative flatness of all its layers.

    python examples/layers.py --root data --download    # or --arrays folder, as in cifar10.py

It takes two or three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import lightning as L
import torch
from cifar10 import CifarResNet, load_data
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_flatness as lf
from lightning_flatness.plots import plot_layers


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution of kernel size one where the shape changes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet20(num_classes: int = 10) -> nn.Module:
    """Build the ResNet for CIFAR of He et al. 2016."""
    stages = [(16, 16), (16, 32), (32, 64)]
    blocks = [nn.Sequential(Block(a, b), Block(b, b), Block(b, b)) for a, b in stages]
    parts = {"conv": nn.Conv2d(3, 16, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    parts |= {f"stage{number}": block for number, block in enumerate(blocks, start=1)}
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(64, num_classes)}
    return nn.Sequential(OrderedDict(parts))


class CifarResNet20(CifarResNet):
    def __init__(self):
        super().__init__(learning_rate=0.1)
        self.net = resnet20()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision finds the images")
    parser.add_argument("--download", action="store_true", help="let torchvision download them")
    parser.add_argument("--arrays", type=Path, help="folder of .npy files to use instead")
    parser.add_argument("--limit", type=int, default=3000, help="images of each part")
    parser.add_argument("--samples", type=int, default=512, help="test images to measure on")
    parser.add_argument("--max-epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/layers"))
    options = parser.parse_args()

    L.seed_everything(0)
    train, test = load_data(options)
    trainer = L.Trainer(max_epochs=options.max_epochs, logger=False, enable_checkpointing=False, accelerator="cpu")
    model = CifarResNet20()
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True, drop_last=True), DataLoader(test, batch_size=500))
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.net.state_dict(), options.out / "weights.pt")

    measured = torch.utils.data.Subset(test, range(options.samples))
    report = lf.measure_flatness(model.net, DataLoader(measured, batch_size=128), layers="all")
    figure, _ = plot_layers(report, data="CIFAR-10 test")
    figure.savefig(options.out / "layers.png")
    print(report)
    print(
        f"Validation accuracy {float(trainer.callback_metrics['val_acc']):.3f}. The picture: {options.out}/layers.png"
    )


if __name__ == "__main__":
    main()
