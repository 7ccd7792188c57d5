"""A run with the callback ends with the same bits as one without it."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset

import lightning_flatness as lf
from tests.callbacks.lightning_modules import Classifier, dataset, loaders, quiet_trainer


class Augmented(Dataset):
    """Draws from the global generators of torch, numpy and Python."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        x = x.flip(-1) if random.random() < 0.5 else x
        x = x.roll(int(np.random.randint(8)), -2)  # noqa: NPY002
        return x + 0.1 * torch.randn_like(x), y


class WithOwnGenerator(Dataset):
    """Draws from a generator of its own, as is usual with numpy."""

    def __init__(self, data):
        self.data, self.generator = data, np.random.default_rng(0)

    def __len__(self):
        return len(self.data)

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
    if not hasattr(lightning_callbacks, "WeightAveraging"):
        pytest.skip("this Lightning has no WeightAveraging")
    return [lightning_callbacks.WeightAveraging(avg_fn=lambda average, new, n: 0.9 * average + 0.1 * new)]


def end_of(run, folder, *callbacks):
    """Everything that training leaves behind, by name."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    module_class, data, options = RUNS[run]
    module = module_class()
    logger = TensorBoardLogger(folder) if run in WITH_FIGURES else False
    trainer = quiet_trainer(folder, *callbacks, *others(run), max_epochs=3, logger=logger, **options)
    trainer.fit(module, *data())
    moments = {
        f"optimizer.{index}.{key}": value
        for index, moments in trainer.optimizers[0].state_dict()["state"].items()
        for key, value in moments.items()
    }
    assert moments
    return {
        **module.state_dict(),
        **moments,
        "training flags": [part.training for part in module.modules()],
        "training steps": module.training_steps,
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002
        "python": random.getstate(),
    }


def assert_identical(one, other):
    assert one.keys() == other.keys()
    different = [
        key
        for key, value in one.items()
        if not (torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key])
    ]
    assert not different, f"different: {different}"


@pytest.fixture(scope="module")
def end_without(tmp_path_factory):
    """The end of a run without the callback, run once."""
    ends = {}

    def end(run):
        if run not in ends:
            ends[run] = end_of(run, tmp_path_factory.mktemp("without"))
        return ends[run]

    return end


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("run", RUNS)
def test_training_is_bit_identical(tmp_path, end_without, run, data):
    callback = lf.FlatnessCallback(data=data)
    assert_identical(end_of(run, tmp_path, callback), end_without(run))
    assert len(callback.history) >= 3


@pytest.mark.parametrize("max_samples", [6, 1000])
@pytest.mark.parametrize("data", ["val", "train"])
def test_training_is_bit_identical_with_a_subset(tmp_path, end_without, data, max_samples):
    callback = lf.FlatnessCallback(data=data, max_samples=max_samples, every_n_epochs=2)
    assert_identical(end_of("augmentation", tmp_path, callback), end_without("augmentation"))


class DrawsOneNumber(Callback):
    def __init__(self, draw):
        self.draw = draw

    def on_validation_end(self, trainer, pl_module):
        self.draw()


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()), lambda: np.random.rand(), lambda: random.random()],  # noqa: NPY002
    ids=["torch", "numpy", "python"],
)
def test_one_random_number_would_be_seen(tmp_path, end_without, draw):
    with pytest.raises(AssertionError, match="different: .*net.conv2.weight.*optimizer"):
        assert_identical(end_of("augmentation", tmp_path, DrawsOneNumber(draw)), end_without("augmentation"))


class ForwardInTrainingMode(Callback):
    def on_validation_end(self, trainer, pl_module):
        with torch.random.fork_rng():
            pl_module.net.train()(dataset(4).tensors[0])
            pl_module.net.eval()


def test_a_changed_buffer_would_be_seen(tmp_path, end_without):
    with pytest.raises(AssertionError, match=r"different: .*running_mean"):
        assert_identical(end_of("plain", tmp_path, ForwardInTrainingMode()), end_without("plain"))
