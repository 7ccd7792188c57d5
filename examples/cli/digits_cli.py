"""A small CNN on handwritten digits, trained from a YAML file by LightningCLI.

    python digits_cli.py fit --config config.yaml

The images come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split


class Classifier(L.LightningModule):
    """Two convolutions, global average pooling, a linear classifier."""

    def __init__(self, width: int = 16, lr: float = 0.1, momentum: float = 0.9):
        super().__init__()
        self.save_hyperparameters()  # so that a checkpoint knows how to make its network
        self.features = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU()),
        )
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images):
        return self.classifier(self.features(images - 0.5).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.log("val_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=self.hparams.momentum)


class Digits(L.LightningDataModule):
    """1,300 images of 8 x 8 to train on, 497 to validate on."""

    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        digits = load_digits()
        dataset = TensorDataset(torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target))
        # A generator of its own makes the split the same in every run, and when checkpoints are measured later.
        self.train, self.val = random_split(dataset, [1300, 497], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 256)


if __name__ == "__main__":
    # Classes are named in the config, so that a checkpoint knows them.
    LightningCLI(
        L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
    )  # fmt: skip
