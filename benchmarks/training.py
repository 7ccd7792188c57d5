"""What the benchmarks train and validate with: a LightningModule, a quiet Trainer, and loaders of random images."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import networks


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, compiled: bool = False):
        super().__init__()
        self.net = torch.compile(net) if compiled else net

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def trainer_of(device: str, callbacks: list[Any], **options: Any) -> L.Trainer:
    quiet()
    return L.Trainer(
        callbacks=callbacks,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def loader_of(samples: int, batch_size: int = 32, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*networks.images(samples)), batch_size=batch_size, **options)


def ready(batch: int, size: int, classes: int, batches: int) -> DataLoader[Any]:
    """Return a loader of ``batches`` batches in memory, pinned if there is a GPU; only eight of them are different."""
    x, y = networks.images(batch * min(8, batches), size, classes)
    if torch.cuda.is_available():
        x, y = x.pin_memory(), y.pin_memory()
    pairs = list(zip(x.split(batch), y.split(batch), strict=True))
    return DataLoader([pairs[i % len(pairs)] for i in range(batches)], batch_size=None)  # type: ignore[arg-type]


def quiet() -> None:
    disable_possible_user_warnings()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
