"""Compare validation epochs with the callback to validation epochs without it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_flatness as lf
from benchmarks import networks
from benchmarks.rows import Row
from benchmarks.timing import interleaved, peaks_apart

BATCH = 64
BATCHES = 157  # 10,000 images, as in CIFAR-10, so that the trial at the beginning of an epoch has its usual share
NETWORKS: dict[str, tuple[str, float]] = {"ResNet-18": ("resnet18", 0.03), "ResNet-20": ("resnet20", 0.05)}


def rows(device: str) -> list[Row]:
    table = []
    for name, (_, goal) in NETWORKS.items():
        what = f'validation epoch with the callback, {name} on 32x32, batches of {BATCH}, `layers="last"`'
        table.append(Row("callback", f"{what}: time", "the same without", "percent", goal))
        limit = 0.05 if name == "ResNet-18" else None
        table.append(Row("callback", f"{what}: peak memory", "the same without", "percent", limit))
    if device == "cuda":
        what = "validation of 50,000 synthetic images, ResNet-50, bf16-mixed, 224x224, batches of 256"
        table.append(Row("callback", what, "the same without", "percent"))
    return table


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


class Synthetic(Dataset):
    """A data set whose images are all the same, so that the time of loading is not measured."""

    def __init__(self, samples: int):
        self.samples = samples
        self.image = networks.images(1, 224)[0][0]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int):
        return self.image, index % 1000


def validate(model: L.LightningModule, loader: DataLoader, with_callback: bool, device: str, **options: Any) -> None:
    trainer = L.Trainer(
        callbacks=[lf.FlatnessCallback(summary=False, figures=False)] if with_callback else [],
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.validate(model, loader, verbose=False)


def loader_of(batches: int) -> DataLoader:
    return DataLoader(TensorDataset(*networks.images(batches * BATCH)), batch_size=BATCH)


def epoch(device: str, network: str, batches: int, with_callback: bool) -> tuple[Callable[[], None], ...]:
    """Return two functions, a short warm-up and a whole validation epoch, for measuring peak memory."""
    quiet()
    torch.manual_seed(0)
    model, loader = Classifier(getattr(networks, network)()), loader_of(batches)
    small = DataLoader(TensorDataset(*networks.images(2)), batch_size=2)
    return tuple(partial(validate, model, x, with_callback, device) for x in (small, loader))


def measure(device: str, quick: bool) -> list[Row]:
    quiet()
    expected, results = iter(rows(device)), []
    for network, _ in NETWORKS.values():
        batches, repeats = (4, 1) if quick else (BATCHES, 5)
        torch.manual_seed(0)
        model, loader = Classifier(getattr(networks, network)()), loader_of(batches)
        tasks = {name: partial(validate, model, loader, name == "with", device) for name in ("with", "without")}
        times = interleaved(tasks, repeats, device, budget=400)  # whole epochs: times of single batches vary too much
        runs = len(times.wall["with"])
        note = f"{batches} batches, {runs} runs, {times.median('without'):.2f} s without; "
        note += times.spread("with", "without")
        results.append(next(expected).measured(times.ratio("with", "without"), note, times.wall))
        peaks = {
            name: peaks_apart(
                "benchmarks.callback:epoch", device, 1 if quick else 7, network=network, batches=4, with_callback=choice
            )
            for name, choice in {"with": True, "without": False}.items()
        }
        a, b = (statistics.median(peaks[name]) for name in ("with", "without"))
        note = (
            f"{a / 1e6:.0f} and {b / 1e6:.0f} MB above what the idle process has; 4 batches, {len(peaks['with'])} runs"
        )
        results.append(
            next(expected).measured(a / b, note, {f"{name}, MB": [x / 1e6 for x in peaks[name]] for name in peaks})
        )
    if device == "cuda":
        results.append(imagenet(next(expected), 2_560 if quick else 50_000))
    return results


def imagenet(row: Row, samples: int) -> Row:
    model = Classifier(networks.resnet50())
    loader = DataLoader(Synthetic(samples), batch_size=256, num_workers=8, persistent_workers=True)
    tasks = {
        name: partial(validate, model, loader, name == "with", "cuda", precision="bf16-mixed")
        for name in ("with", "without")
    }
    times = interleaved(tasks, 1, "cuda")
    note = f"{samples} images, {times.median('without'):.0f} s without; {times.spread('with', 'without')}"
    return row.measured(times.ratio("with", "without"), note, times.wall)


def quiet() -> None:
    import logging

    disable_possible_user_warnings()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
