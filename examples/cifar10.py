"""Train a ResNet-18 on CIFAR-10, watch its flatness, and stop when flatness and accuracy have both stalled.

    python examples/cifar10.py --root data --download      # torchvision downloads the images
    python examples/cifar10.py --arrays folder             # with train_images.npy, train_labels.npy, test_images.npy,
                                                           # test_labels.npy; images uint8 (N, 32, 32, 3)

This needs a GPU; on a CPU try --limit 2000 --max-epochs 3. Afterwards:

    tensorboard --logdir runs/cifar10
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18
from torchvision.transforms import v2

import lightning_flatness as lf
from lightning_flatness.plots import plot_history

BURN_IN = 5
NORMALISE = v2.Normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


class CifarResNet(L.LightningModule):
    """torchvision's ResNet-18 with a stem for 32x32 images: a 3x3 convolution of stride 1, no max pooling."""

    def __init__(self, learning_rate: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = resnet18(num_classes=10)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images):
        return self.net(images)

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
        optimizer = torch.optim.SGD(
            self.parameters(), self.hparams.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.learning_rate, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Augmented(Dataset):
    """A data set whose images go through a transform."""

    def __init__(self, dataset: Dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return self.transform(image), label


def load_data(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Load training and test images by torchvision, or from a folder of arrays."""
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), NORMALISE]
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *to_tensor])
    plain = v2.Compose(to_tensor)
    if options.arrays is None:
        train, test = (CIFAR10(options.root, train=part, download=options.download) for part in (True, False))
    else:
        train, test = (from_arrays(options.arrays, part) for part in ("train", "test"))
    if options.limit:
        train, test = (Subset(part, range(min(options.limit, len(part)))) for part in (train, test))
    return Augmented(train, augment), Augmented(test, plain)


def from_arrays(folder: Path, part: str) -> TensorDataset:
    images = torch.from_numpy(np.load(folder / f"{part}_images.npy")).permute(0, 3, 1, 2)
    return TensorDataset(images, torch.from_numpy(np.load(folder / f"{part}_labels.npy")).long())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision finds the images")
    parser.add_argument("--download", action="store_true", help="let torchvision download them")
    parser.add_argument("--arrays", type=Path, help="folder of .npy files to use instead")
    parser.add_argument("--limit", type=int, help="use only so many images of each part")
    parser.add_argument("--max-epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", default="32-true", help="of the Trainer, e.g. bf16-mixed")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    options = parser.parse_args()

    L.seed_everything(0)
    train, test = load_data(options)
    settings = {"batch_size": options.batch_size, "num_workers": options.workers}
    flatness = lf.FlatnessCallback(data="train")
    stopping = lf.FlatnessStopping(accuracy="val_acc", burn_in=BURN_IN, patience=5)
    checkpoint = lf.FlatCheckpoint(
        "val_acc", within=0.005, dirpath=options.out / "checkpoints", filename="flat-{epoch}"
    )
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        callbacks=[flatness, stopping, checkpoint, LearningRateMonitor()],
        logger=TensorBoardLogger(options.out, name=None, default_hp_metric=False),
        precision=options.precision,
    )
    model = CifarResNet()
    trainer.fit(
        model,
        DataLoader(train, shuffle=True, drop_last=True, **settings),
        DataLoader(test, **settings),
    )

    figure, _ = plot_history(
        flatness.history,
        report=flatness.report,
        accuracy_label="validation accuracy",
        data="train",
        burn_in=BURN_IN,
        stopped=stopping.stopped_epoch or None,
    )
    figure.savefig(options.out / "flatness.png")

    best = CifarResNet.load_from_checkpoint(checkpoint.best_model_path)
    report = lf.measure_flatness(best, DataLoader(test, **settings))
    console = Console()
    score = checkpoint.best_model_score
    console.print(f"The flattest network of nearly the best accuracy: {score:.4f}. Its flatness on the test images:")
    console.print(report.table())
    if stopping.stopping_reason_message:
        console.print(f"Stopped: {stopping.stopping_reason_message}.")
    console.print(f"The picture: {options.out / 'flatness.png'}\nMore: tensorboard --logdir {options.out}")


if __name__ == "__main__":
    main()
