"""What every rank logs; the test measures the same weights in one process, every sample once."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, Net, TwoLayerNet, dataset
from tests.distributed.scenarios import ONE_WORKER, SCENARIOS, rank, scenario, trainer_on_ranks

MONITOR = "flatness/relative_flatness"


class WithoutNorm(TwoLayerNet):
    """No buffers: nothing that ranks exchange in a forward."""

    def __init__(self):
        super().__init__()
        self.norm1 = self.norm2 = nn.Identity()


class Backwards(Sampler):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return reversed(self.data)

    def __len__(self):
        return len(self.data)


class Share(Sampler):
    """The user's own way to split some samples over ranks, in another order in every epoch."""

    def __init__(self, kept):
        self.kept = kept[rank() :: int(os.environ["WORLD_SIZE"])]

    def __iter__(self):
        return iter(random.sample(self.kept, len(self.kept)))

    def __len__(self):
        return len(self.kept)


class OnRankZero(IterableDataset):
    """A stream of samples of which rank 1 gets none."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[index] for index in range(len(self.data))] if rank() == 0 else [])


def val(samples, batch_size=4, seed=1, **options):
    return DataLoader(dataset(samples, seed), batch_size, **options)


def own_share(samples):
    """The user's own sampler, whose ranks see the whole set between them; the last one of rank 1 is a repeated one."""
    data = dataset(samples, 1)
    sampler = DistributedSampler(data, num_replicas=2, rank=rank(), shuffle=False)
    return DataLoader(data, 4, sampler=sampler)


@dataclass
class Case:
    """A fit, and the samples of which it is to log the flatness of the weights at its end."""

    loaders: Callable[[], Any]
    measured: Callable[[], Dataset]
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    net: type[nn.Module] = TwoLayerNet
    training_samples: int = 32
    sampler: Callable[[], Any] | None = None


FOLD = list(range(0, 27, 2))


CASES = {
    "11 samples": Case(lambda: val(11), lambda: dataset(11, 1)),
    "13 samples": Case(lambda: val(13), lambda: dataset(13, 1)),
    "12 samples, last batches of 2": Case(lambda: val(12), lambda: dataset(12, 1)),
    "1 sample": Case(lambda: val(1), lambda: dataset(1, 1)),
    "list of loaders": Case(lambda: [val(11), val(13, 3, seed=2)], lambda: dataset(11, 1)),
    "dict of loaders": Case(lambda: {"one": val(11), "other": val(13, 3, seed=2)}, lambda: dataset(11, 1)),
    "list with 1 sample": Case(lambda: [val(1), val(13, 3, seed=2)], lambda: dataset(1, 1)),
    "no distributed sampler": Case(lambda: val(11), lambda: dataset(11, 1), trainer={"use_distributed_sampler": False}),
    "own distributed sampler": Case(lambda: own_share(11), lambda: dataset(11, 1)),
    "own distributed sampler, Lightning's off": Case(
        lambda: own_share(11), lambda: dataset(11, 1), trainer={"use_distributed_sampler": False}
    ),
    "observed forward passes": Case(lambda: val(16), lambda: dataset(16, 1), {"model": "net"}),
    "observed and own forward passes": Case(lambda: val(11), lambda: dataset(11, 1), {"model": "net"}),
    "all layers": Case(lambda: val(11), lambda: dataset(11, 1), {"layers": "all"}),
    "diagonals": Case(lambda: val(11), lambda: dataset(11, 1), {"measures": ("hessian_trace",)}),
    "accumulation": Case(lambda: val(11), lambda: dataset(11, 1), trainer={"accumulate_grad_batches": 2}),
    # Ranks have the samples 0 2 4 .. and 1 3 5 .., and each drops what does not fill a batch.
    "drop_last": Case(lambda: val(11, drop_last=True), lambda: Subset(dataset(11, 1), range(8))),
    "drop_last, padding in a full batch": Case(lambda: val(13, 7, drop_last=True), lambda: dataset(13, 1)),
    "limit_val_batches": Case(
        lambda: val(11), lambda: Subset(dataset(11, 1), range(8)), trainer={"limit_val_batches": 1}
    ),
    "custom sampler": Case(lambda: val(11, sampler=Backwards(range(11))), lambda: dataset(11, 1)),
    "shuffled": Case(lambda: val(11, shuffle=True), lambda: dataset(11, 1)),
    "workers": Case(lambda: val(11, **ONE_WORKER), lambda: dataset(11, 1)),
    "no sanity check": Case(lambda: val(11), lambda: dataset(11, 1), trainer={"num_sanity_val_steps": 0}),
    "rank 1 without samples": Case(
        lambda: DataLoader(OnRankZero(dataset(11, 1)), 4), lambda: dataset(11, 1), net=WithoutNorm
    ),
    "training data": Case(lambda: val(11), lambda: dataset(27), {"data": "train"}, training_samples=27),
    "1 sample of training data": Case(lambda: val(11), lambda: dataset(1), {"data": "train"}, training_samples=1),
    "training data, no validation": Case(
        lambda: None, lambda: dataset(27), {"data": "train"}, net=WithoutNorm, training_samples=27
    ),
    "training data of a sampler": Case(
        lambda: val(11),
        lambda: Subset(dataset(27), FOLD),
        {"data": "train"},
        training_samples=27,
        sampler=lambda: Backwards(FOLD),
    ),
    "training data of a list of indices": Case(
        lambda: val(11), lambda: Subset(dataset(27), FOLD), {"data": "train"}, training_samples=27, sampler=lambda: FOLD
    ),
    "training data of the user's own shares": Case(
        lambda: val(11),
        lambda: Subset(dataset(27), FOLD),
        {"data": "train"},
        trainer={"use_distributed_sampler": False},
        training_samples=27,
        sampler=lambda: Share(FOLD),
    ),
    # The test takes the samples that one process chooses.
    "part of the validation data": Case(lambda: val(22), lambda: dataset(22, 1), {"max_samples": 7}),
    "1 of the validation data": Case(lambda: val(22), lambda: dataset(22, 1), {"max_samples": 1}),
    "part of two loaders": Case(lambda: [val(11), val(13, 3, seed=2)], lambda: dataset(11, 1), {"max_samples": 7}),
    "part of shuffled validation data": Case(lambda: val(11, shuffle=True), lambda: dataset(11, 1), {"max_samples": 7}),
    "more than there is": Case(lambda: val(11), lambda: dataset(11, 1), {"max_samples": 100}),
    "part of the training data": Case(
        lambda: val(11), lambda: dataset(27), {"data": "train", "max_samples": 7}, net=WithoutNorm, training_samples=27
    ),
}


def flatness_of(trainer):
    return {key: value.cpu() for key, value in trainer.callback_metrics.items() if key.startswith("flatness/")}


class KeepsReason(lf.FlatnessCallback):
    """Keeps why it makes forward passes of its own, which it forgets at the end of a run."""

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.why_own_passes = self._passes._told


def fit(case):
    callback = KeepsReason(summary=False, **case.options)
    trainer = trainer_on_ranks(callback, precision="64-true", **case.trainer)
    module = Classifier(case.net())
    sampled = {"shuffle": True} if case.sampler is None else {"sampler": case.sampler()}
    trainer.fit(module, DataLoader(dataset(case.training_samples), 4, **sampled), case.loaders())
    history = [{key: value for key, value in record.items() if key != "accuracy"} for record in callback.history]
    return {
        "logged": flatness_of(trainer),
        "num_samples": {name: layer.num_samples for name, layer in callback.report.layers.items()},
        "history": history,
        "why own passes": callback.why_own_passes,
        "weights": module.net.state_dict(),
    }


SCENARIOS.update({name: partial(fit, case) for name, case in CASES.items()})


@scenario
def validate_with_synchronised_norms():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    module = Classifier(net)
    trainer = trainer_on_ranks(lf.FlatnessCallback(summary=False), precision="64-true")
    trainer.validate(module, val(11), verbose=False)
    return {"logged": flatness_of(trainer), "weights": net.state_dict()}


@scenario
def test_data():
    module = Classifier()
    trainer = trainer_on_ranks(lf.FlatnessCallback(summary=False), precision="64-true")
    trainer.test(module, val(11), verbose=False)
    return {"logged": flatness_of(trainer), "weights": module.net.state_dict()}


@scenario
def checkpoint_on_flatness():
    checkpoint = ModelCheckpoint(monitor=MONITOR, auto_insert_metric_name=False)
    callback = lf.FlatnessCallback(summary=False)
    trainer = trainer_on_ranks(callback, checkpoint, max_epochs=4)
    trainer.fit(Classifier(), DataLoader(dataset(32), 4), val(11))
    return {
        "score": checkpoint.best_model_score,
        "path": checkpoint.best_model_path,
        "history": [record["relative_flatness"] for record in callback.history],
    }


class WithAccuracyOfRanks(Classifier):
    """Logs an accuracy that goes on rising on rank 0, and on rank 1 does not."""

    def __init__(self, sync_dist):
        super().__init__()
        self.sync_dist = sync_dist

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        accuracy = 0.1 * self.current_epoch if rank() == 0 else 0.5
        self.log("val_acc", torch.tensor(accuracy), sync_dist=self.sync_dist)
        self.log("rising", 1.0 + self.current_epoch, sync_dist=True)


def stopping(sync_dist):
    callback = lf.FlatnessStopping(burn_in=1, patience=2, min_delta=0.999)  # flatness has stalled at once
    trainer = trainer_on_ranks(lf.FlatnessCallback(summary=False), callback, max_epochs=6)
    trainer.fit(WithAccuracyOfRanks(sync_dist), DataLoader(dataset(32), 4), val(11))
    return {
        "epoch": trainer.current_epoch,
        "stopped_epoch": callback.stopped_epoch,
        "state": {
            key: value for key, value in callback.state_dict().items() if not isinstance(value, (str, type(None)))
        },
    }


def flat_checkpoint(sync_dist):
    checkpoint = lf.FlatCheckpoint(within=0.12, flatness="rising", dirpath=f"flat-{sync_dist}", filename="{epoch}")
    trainer = trainer_on_ranks(checkpoint, max_epochs=4)
    trainer.fit(WithAccuracyOfRanks(sync_dist), DataLoader(dataset(32), 4), val(11))
    trainer.strategy.barrier()
    return {
        "best": Path(checkpoint.best_model_path).name,
        "flatness": checkpoint.best_flatness,
        "known": sorted(Path(path).name for path in checkpoint.best_k_models),
        "on disk": sorted(path.name for path in Path(checkpoint.dirpath).iterdir()),
    }


SCENARIOS["flat checkpoint, accuracy synced: True"] = partial(flat_checkpoint, sync_dist=True)
SCENARIOS["flat checkpoint, accuracy synced: False"] = partial(flat_checkpoint, sync_dist=False)
SCENARIOS["stopping"] = partial(stopping, sync_dist=True)
SCENARIOS["stopping, accuracy not synced"] = partial(stopping, sync_dist=False)
OTHERS = [
    "validate_with_synchronised_norms",
    "test_data",
    "checkpoint_on_flatness",
    "stopping",
    "stopping, accuracy not synced",
    "flat checkpoint, accuracy synced: True",
    "flat checkpoint, accuracy synced: False",
]
