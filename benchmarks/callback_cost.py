"""What FlatnessCallback adds to a validation epoch: time and peak memory, as ratios within one run.

    python benchmarks/callback_cost.py [--samples 512] [--repeats 5]

Every repeat runs validation with and without the callback in turn, on the same batches and threads; medians are shown,
and all raw times after the table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings

import lightning as L
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v2, resnet18

import lightning_flatness as lf


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


def resnet18_cifar() -> nn.Module:
    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def seconds(model: L.LightningModule, loader: DataLoader, callbacks: list[L.Callback]) -> float:
    trainer = L.Trainer(
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    start = time.perf_counter()
    trainer.validate(model, loader, verbose=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    disable_possible_user_warnings()

    table = Table(title=f"Validation with FlatnessCallback, {options.samples} images, batches of 64")
    for heading in ("network", "without, s", "with, s", "ratio"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    raw = []
    cases = {"ResNet-18, 32x32": (resnet18_cifar, 32), "MobileNetV2, 64x64": (lambda: mobilenet_v2(num_classes=10), 64)}
    for name, (build, size) in cases.items():
        torch.manual_seed(0)
        model = Classifier(build())
        data = TensorDataset(torch.randn(options.samples, 3, size, size), torch.randint(10, (options.samples,)))
        loader = DataLoader(data, batch_size=64)
        seconds(model, loader, [lf.FlatnessCallback()])  # warm-up
        pairs = [
            (seconds(model, loader, []), seconds(model, loader, [lf.FlatnessCallback()]))
            for _ in range(options.repeats)
        ]
        without, with_callback = (statistics.median(times) for times in zip(*pairs, strict=True))
        table.add_row(name, f"{without:.2f}", f"{with_callback:.2f}", f"{with_callback / without:.2f}")
        raw.append(f"{name}: " + ", ".join(f"{a:.3f}/{b:.3f}" for a, b in pairs))
    console = Console()
    console.print(table)
    console.print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, ", end="")
    console.print(f"torch {torch.__version__}, lightning {L.__version__}")
    console.print("All runs, without/with:", *raw, sep="\n")


if __name__ == "__main__":
    main()
