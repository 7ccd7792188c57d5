"""Train towards flat minima, and away from them: weight decay, FlatnessPenalty and SAM on digits with label noise.

    python examples/train_flat.py [--epochs 20] [--noise 0.2] [--seeds 0 1 2]
    python examples/train_flat.py --data cifar10 --epochs 30   # downloads CIFAR-10; for a GPU, or patience

Some six minutes on one CPU core. Of the 1,797 digits that come with scikit-learn, 1,000 are trained on, and a fifth of
these get another label; the other 797 are the test set, with the right labels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import lightning as L
import torch
from cifar10 import from_arrays
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.datasets import CIFAR10

import lightning_flatness as lf


class Classifier(L.LightningModule):
    """Four convolutions, global average pooling, a linear classifier."""

    def __init__(self, channels: int, width: int, epochs: int, weight_decay: float = 0.0):
        super().__init__()
        self.epochs, self.weight_decay = epochs, weight_decay

        def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.features = nn.Sequential(
            *block(channels, width),
            *block(width, width),
            *block(width, 2 * width, stride=2),
            *block(2 * width, 2 * width),
        )
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images):
        return self.classifier(self.features(images).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=self.weight_decay)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


class SharpnessAware(Classifier):
    """SAM (Foret et al. 2021, arXiv 2010.01412), written out: manual optimization, and two passes for every batch."""

    def __init__(self, *arguments, rho: float, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization, self.rho = False, rho

    def training_step(self, batch, batch_idx):
        images, labels = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(images), labels))
        with torch.no_grad():  # climb to the worst point of a ball of radius rho
            gradients = {p: p.grad.clone() for p in self.parameters()}
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            for parameter, gradient in gradients.items():
                parameter.add_(gradient * (self.rho / norm))
        optimizer.zero_grad()
        statistics = {name: buffer.clone() for name, buffer in self.named_buffers()}
        self.manual_backward(cross_entropy(self(images), labels))
        with torch.no_grad():  # back, and a step along the gradient there; BatchNorm has seen the batch once
            for parameter, gradient in gradients.items():
                parameter.sub_(gradient * (self.rho / norm))
            for name, buffer in self.named_buffers():
                buffer.copy_(statistics[name])
        optimizer.step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


@dataclass(frozen=True)
class Way:
    """One way to train: a module, and callbacks."""

    name: str
    module: Callable[..., Classifier] = Classifier
    weight_decay: float = 0.0
    penalty: dict[str, object] | None = None


def ways(steps: int) -> list[Way]:
    """The strengths are relative to a cross-entropy of one; all rise over the first tenth of the steps."""

    def penalty(strength: float, **options: object) -> dict[str, object]:
        return {"strength": strength, "warmup_steps": steps // 10, **options}

    def sam(rho: float) -> Callable[..., Classifier]:
        return lambda *arguments, **options: SharpnessAware(*arguments, rho=rho, **options)

    return [
        Way("baseline"),
        *(Way(f"weight decay {decay}", weight_decay=decay) for decay in (0.0005, 0.005, 0.02)),
        *(Way(f"penalty, λ = {strength}", penalty=penalty(strength)) for strength in (0.01, 0.1, 0.3)),
        Way("normalised, λ = 0.01", penalty=penalty(0.01, normalize=True)),
        Way("maximised, λ = 0.003", penalty=penalty(0.003, maximize=True)),
        *(Way(f"SAM, ρ = {rho}", sam(rho)) for rho in (0.05, 0.2)),
    ]


def digits(noise: float) -> tuple[TensorDataset, TensorDataset]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16 - 0.5
    labels = torch.tensor(loaded.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    return TensorDataset(images[train], with_noise(labels[train], noise)), TensorDataset(images[test], labels[test])


def cifar10(noise: float, arrays: Path | None, limit: int | None) -> tuple[TensorDataset, TensorDataset]:
    if arrays is None:
        sets = [CIFAR10("data", train=train, download=True) for train in (True, False)]
        parts = [(torch.tensor(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in sets]
    else:
        parts = [from_arrays(arrays, part).tensors for part in ("train", "test")]
    (images, labels), test = [(images.float() / 127.5 - 1, labels) for images, labels in parts]
    return TensorDataset(images[:limit], with_noise(labels[:limit], noise)), TensorDataset(*test)


def with_noise(labels: torch.Tensor, noise: float) -> torch.Tensor:
    """Give some of the labels, always the same ones, another class."""
    generator = torch.Generator().manual_seed(1)
    is_noisy = torch.rand(len(labels), generator=generator) < noise
    return torch.where(is_noisy, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels)


def run(way: Way, train: TensorDataset, test: TensorDataset, width: int, epochs: int, seed: int) -> dict[str, float]:
    L.seed_everything(seed, verbose=False)
    channels = train.tensors[0].shape[1]
    module = way.module(channels, width, epochs, weight_decay=way.weight_decay)
    callbacks = [lf.FlatnessPenalty(**way.penalty)] if way.penalty else []
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, devices=1,
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
    seconds = time.process_time() - start
    module.eval()
    with torch.no_grad():
        logits, train_logits = (
            torch.cat([module(images) for images in data.tensors[0].split(1000)]) for data in (test, train)
        )
    batches = [(images, labels) for images, labels in DataLoader(train, batch_size=250)]
    report = lf.measure_flatness(module, batches, layers=["classifier", "features.9"])
    classifier, convolution = report.layers["classifier"], report.layers["features.9"]
    labels = test.tensors[1]
    return {
        "accuracy": 100 * float((logits.argmax(1) == labels).double().mean()),
        "loss": float(cross_entropy(logits, labels)),
        "ECE": 100 * float(multiclass_calibration_error(logits.softmax(1), labels, 10)),
        "train acc": 100 * float((train_logits.argmax(1) == train.tensors[1]).double().mean()),
        "train loss": float(cross_entropy(train_logits, train.tensors[1])),
        "κ classifier": classifier.relative_flatness,
        "κ last conv": convolution.relative_flatness,
        "‖W‖": classifier.weight_norm,
        "CPU s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--arrays", type=Path, help="folder of .npy files of CIFAR-10 to use instead, as in cifar10.py")
    parser.add_argument("--limit", type=int, help="train on only so many images of CIFAR-10")
    parser.add_argument("--width", type=int, help="channels of the first convolutions; 16 for digits, 64 for CIFAR-10")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.data == "digits":
        train, test = digits(options.noise)
    else:
        train, test = cifar10(options.noise, options.arrays, options.limit)
    width = options.width or (16 if options.data == "digits" else 64)
    console, table = Console(width=140), Table(title=f"{options.data}, {options.noise:.0%} of the labels wrong")
    steps = options.epochs * -(-len(train) // 64)
    for way in ways(steps):
        results = [run(way, train, test, width, options.epochs, seed) for seed in options.seeds]
        if not table.columns:
            table.add_column("")
            for name in results[0]:
                table.add_column(name, justify="right")
        cells = []
        for name in results[0]:
            values = [result[name] for result in results]
            cells.append(f"{mean(values):.3g}" + (f" ± {stdev(values):.1g}" if len(values) > 1 else ""))
        table.add_row(way.name, *cells)
        console.print(way.name, *cells, sep=" | ", markup=False)
    console.print(table)


if __name__ == "__main__":
    main()
