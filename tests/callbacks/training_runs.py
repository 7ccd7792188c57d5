"""Modules and data that draw random numbers in every way, and what a training run leaves behind."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset

from tests.callbacks.lightning_modules import Classifier, dataset, loaders, quiet_trainer


class Wrapped(Dataset):
    """Another data set, of which samples are made into others."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)


class Augmented(Wrapped):
    """Draws from the global generators of torch, numpy and Python."""

    def __getitem__(self, index):
        x, y = self.data[index]
        x = x.flip(-1) if random.random() < 0.5 else x
        x = x.roll(int(np.random.randint(8)), -2)  # noqa: NPY002
        return x + 0.1 * torch.randn_like(x), y


class WithOwnGenerator(Wrapped):
    """Draws from a generator of its own, as is usual with numpy."""

    def __init__(self, data):
        super().__init__(data)
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + float(self.generator.normal()), y


class WithFrozenNorm(Classifier):
    def train(self, mode=True):
        super().train(mode)
        self.net.norm1.eval()
        return self


class WithoutDropout(Classifier):
    def __init__(self):
        super().__init__()
        self.net.dropout = torch.nn.Identity()


def augmented(workers_in_train=0, workers_in_val=0):
    def loader(data, workers, **options):
        data = Augmented(data)
        return DataLoader(data, 8, num_workers=workers, persistent_workers=workers > 0, **options)

    return loader(dataset(32), workers_in_train, shuffle=True), loader(dataset(22, seed=1), workers_in_val)


def with_one_generator():
    """Shuffling in training and in validation draws from one generator of the user's."""
    generator = torch.Generator().manual_seed(7)
    return [DataLoader(dataset(32, seed), 8, shuffle=True, generator=generator) for seed in (0, 1)]


def with_own_generators():
    return [DataLoader(WithOwnGenerator(dataset(32, seed)), 8) for seed in (0, 1)]


def unshuffled():
    return [DataLoader(dataset(32, seed), 8) for seed in (0, 1)]


def averaged_weights():
    """Weight averaging, where Lightning has it."""
    return lightning_callbacks.WeightAveraging(avg_fn=lambda average, new, n: 0.9 * average + 0.1 * new)


HAS_WEIGHT_AVERAGING = hasattr(lightning_callbacks, "WeightAveraging")


def seed_everything():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002


def end_of_training(trainer, module):
    """Everything that training leaves behind, by name."""
    moments = {
        f"optimizer.{index}.{key}": value
        for index, moments in trainer.optimizers[0].state_dict()["state"].items()
        for key, value in moments.items()
    }
    assert moments
    return {
        **module.state_dict(),
        **moments,
        **{f"gradient.{name}": parameter.grad for name, parameter in module.named_parameters()},
        "training flags": [part.training for part in module.modules()],
        "training steps": module.training_steps,
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002
        "python": random.getstate(),
    }


def differences(one, other):
    """The names of what is not the same, to the bit."""
    assert one.keys() == other.keys()
    return [
        key
        for key, value in one.items()
        if not (
            torch.equal(value, other[key])
            if isinstance(value, torch.Tensor) and isinstance(other[key], torch.Tensor)
            else value is other[key] or value == other[key]
        )
    ]


# name: module, loaders, options of the Trainer
RUNS = {
    "plain": (WithoutDropout, unshuffled, {}),
    "dropout and shuffling": (Classifier, loaders, {}),
    "augmentation": (Classifier, augmented, {}),
    "frozen BatchNorm": (WithFrozenNorm, loaders, {}),
    "accumulation": (Classifier, loaders, {"accumulate_grad_batches": 4, "val_check_interval": 2}),
    "validation in the epoch": (Classifier, augmented, {"val_check_interval": 1}),
    "no sanity check": (Classifier, augmented, {"num_sanity_val_steps": 0}),
    "clipping": (Classifier, loaders, {"gradient_clip_val": 0.1}),
    "workers": (Classifier, lambda: augmented(workers_in_train=1), {"val_check_interval": 2}),
    "workers in validation": (Classifier, lambda: augmented(workers_in_val=1), {}),
    "workers, no sanity check": (Classifier, lambda: augmented(workers_in_val=1), {"num_sanity_val_steps": 0}),
    "one generator": (Classifier, with_one_generator, {}),
    "one generator, no sanity check": (Classifier, with_one_generator, {"num_sanity_val_steps": 0}),
    "data set with a generator": (Classifier, with_own_generators, {}),
    "averaged weights": (Classifier, loaders, {}),
}
WITH_FIGURES = ("dropout and shuffling", "validation in the epoch")


def others(run):
    if run != "averaged weights":
        return []
    if not HAS_WEIGHT_AVERAGING:
        pytest.skip("this Lightning has no WeightAveraging")
    return [averaged_weights()]


def end_of_run(run, folder, *callbacks):
    """Everything that training leaves behind, by name."""
    seed_everything()
    module_class, data, options = RUNS[run]
    module = module_class()
    logger = TensorBoardLogger(folder) if run in WITH_FIGURES else False
    trainer = quiet_trainer(folder, *callbacks, *others(run), max_epochs=3, logger=logger, **options)
    trainer.fit(module, *data())
    return end_of_training(trainer, module)


def assert_identical(one, other):
    different = differences(one, other)
    assert not different, f"different: {different}"


class DrawsOneNumber(lightning_callbacks.Callback):
    def __init__(self, draw):
        self.draw = draw

    def on_validation_end(self, trainer, pl_module):
        self.draw()
