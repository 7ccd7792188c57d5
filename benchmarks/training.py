"""What the benchmarks train and validate with: a LightningModule, a quiet Trainer, and loaders of random images."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

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


class Repeated(Dataset[Any]):
    """A data set that repeats some images. Batches are read at once, as views, so that loading takes little time."""

    def __init__(self, images: Tensor, labels: Tensor, length: int) -> None:
        self.images, self.labels, self.length = images, labels, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.images[index % len(self.images)], self.labels[index % len(self.images)]

    def __getitems__(self, indices: list[int]) -> Any:
        start = indices[0] % len(self.images)
        rows: Any = slice(start, start + len(indices))
        if rows.stop > len(self.images) or indices != list(range(indices[0], indices[0] + len(indices))):
            rows = torch.tensor(indices) % len(self.images)
        return self.images[rows], self.labels[rows]


def ready(batch: int, size: int, classes: int, batches: int) -> DataLoader[Any]:
    """Return a loader of ``batches`` batches, pinned if there is a GPU; only eight of them are different."""
    x, y = networks.images(batch * min(8, batches), size, classes)
    if torch.cuda.is_available():
        x, y = x.pin_memory(), y.pin_memory()
    return DataLoader(Repeated(x, y, batch * batches), batch_size=batch, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


def quiet() -> None:
    disable_possible_user_warnings()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
