"""Train a small CNN on handwritten digits, watch its flatness, and stop when flatness and accuracy have both stalled.

    python examples/digits.py [--max-epochs 60] [--out runs/digits]

The 1,797 images (8x8, Alpaydin and Kaynak 1998) come with scikit-learn, so nothing is downloaded. It takes a
minute on two CPU cores. Afterwards:

    tensorboard --logdir runs/digits
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

import lightning_flatness as lf
from lightning_flatness.plots import plot_history

BURN_IN = 5


class DigitsClassifier(L.LightningModule):
    """Four convolutions, global average pooling, a linear classifier."""

    def __init__(self):
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.features = nn.Sequential(*block(1, 32), *block(32, 32), *block(32, 64, stride=2), *block(64, 64))
        self.classifier = nn.Linear(64, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images):
        return self.classifier(self.features(images).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val_acc", self.accuracy, prog_bar=True)
        self.log("val_loss", cross_entropy(logits, labels))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def load_data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.5
    dataset = TensorDataset(images, torch.tensor(digits.target))
    return random_split(dataset, [1300, 497], generator=torch.Generator().manual_seed(0))


class Digits(L.LightningDataModule):
    """The data, for ``lightning-flatness measure CKPT --model digits.DigitsClassifier --data digits.Digits``."""

    def train_dataloader(self):
        return DataLoader(load_data()[0], batch_size=64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(load_data()[1], batch_size=256)


def row(model, train, val) -> list[str]:
    """Format the accuracy on the validation data, and loss and flatness on the training data."""
    model.eval()
    with torch.no_grad():
        (train_images, train_labels), (val_images, val_labels) = (
            next(iter(DataLoader(d, len(d)))) for d in (train, val)
        )
        accuracy = (model(val_images).argmax(1) == val_labels).double().mean()
        loss = cross_entropy(model(train_images), train_labels)
    report = lf.measure_flatness(model, DataLoader(train, batch_size=256))
    layer = next(iter(report.layers.values()))
    numbers = (report.hessian_trace, report.relative_flatness, layer.weight_norm)
    return [f"{accuracy:.4f}", f"{loss:.4f}", *(f"{number:.3f}" for number in numbers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    options = parser.parse_args()

    L.seed_everything(0)
    train, val = load_data()
    flatness = lf.FlatnessCallback(data="train")
    stopping = lf.FlatnessStopping(accuracy="val_acc", burn_in=BURN_IN, patience=6)
    folder = options.out / "checkpoints"
    flattest = lf.FlatCheckpoint(monitor="val_acc", within=0.005, dirpath=folder, filename="flat-{epoch}")
    most_accurate = ModelCheckpoint(folder, filename="accurate-{epoch}", monitor="val_acc", mode="max")
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        callbacks=[flatness, stopping, flattest, most_accurate],
        logger=TensorBoardLogger(options.out, name=None, default_hp_metric=False),
        log_every_n_steps=10,
        accelerator="cpu",
    )
    model = DigitsClassifier()
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256))

    figure, _ = plot_history(
        flatness.history,
        report=flatness.report,
        accuracy_label="validation accuracy",
        data="train",
        burn_in=BURN_IN,
        stopped=stopping.stopped_epoch or None,
    )
    figure.savefig(options.out / "flatness.png")

    table = Table(title=f"Digits after {trainer.current_epoch} of at most {options.max_epochs} epochs")
    for heading in ("weights", "val acc", "train loss", "Hessian trace", "rel. flatness", "‖W‖"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    table.add_row("initial", *row(initial_model(), train, val))
    table.add_row("last epoch", *row(model, train, val))
    for name, checkpoint in (("best accuracy", most_accurate), ("flattest near it", flattest)):
        table.add_row(name, *row(DigitsClassifier.load_from_checkpoint(checkpoint.best_model_path), train, val))
    console = Console()
    console.print(table)
    if trainer.should_stop:
        console.print(f"Stopped: {stopping.stopping_reason_message}.")
    console.print(f"The picture: {options.out / 'flatness.png'}\nMore: tensorboard --logdir {options.out}")


def initial_model() -> DigitsClassifier:
    L.seed_everything(0, verbose=False)
    return DigitsClassifier()


if __name__ == "__main__":
    main()
