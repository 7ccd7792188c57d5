"""Validation loaders whose length is unknown or is not what it seems, and other rare ways to run."""

import warnings

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.testing import assert_close
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset, SubsetRandomSampler

import lightning_flatness as lf
from lightning_flatness.callbacks.data.loaders import reads_in_order
from lightning_flatness.callbacks.data.stream import ValidationStream
from tests.callbacks.compare import assert_same, end_of, seed_all
from tests.callbacks.flatness_runs import Stream, flatness_callback
from tests.callbacks.lightning_modules import Classifier, WithData, WithoutValidation, dataset, loaders, quiet_trainer
from tests.callbacks.training_runs import Wrapped
from tests.guarding import guards


def fit(folder, callback, val, module=None, **options):
    trainer = quiet_trainer(folder, callback, **options)
    module = Classifier() if module is None else module
    trainer.fit(module, loaders()[0], val)
    return module


def assert_all_training_data_measured(callback, module):
    assert callback.report.num_samples == 32
    expected = lf.measure_flatness(module.net, loaders()[0])
    assert_close(callback.report.relative_flatness, expected.relative_flatness, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 2}, {"limit_val_batches": 50}], ids=str)
@pytest.mark.parametrize("sanity", [0, 2])
def test_training_data_beside_a_validation_stream(tmp_path, options, sanity):
    callback = flatness_callback(data="train")
    module = fit(tmp_path, callback, DataLoader(Stream(), batch_size=8), num_sanity_val_steps=sanity, **options)
    assert_all_training_data_measured(callback, module)


class OfSeveral(Classifier):
    """A validation batch is a list with a batch, or None, of every loader."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        batch = batch[0] if isinstance(batch[0], (list, tuple)) else batch
        if batch[0] is not None:
            super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size_cycle", "max_size"])
def test_training_data_beside_combined_validation_loaders(tmp_path, mode):
    val = CombinedLoader([loaders()[1], DataLoader(dataset(40, seed=3), batch_size=8)], mode)
    callback = flatness_callback(data="train")
    module = fit(tmp_path, callback, val, module=OfSeveral())
    assert_all_training_data_measured(callback, module)


@pytest.mark.parametrize("max_samples", [1, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_max_samples_with_a_sampler_that_leaves_samples_out(tmp_path, max_samples, seed):
    kept = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:9].tolist()
    callback = flatness_callback(max_samples=max_samples)
    fit(tmp_path, callback, DataLoader(dataset(60), batch_size=8, sampler=SubsetRandomSampler(kept)), max_epochs=1)
    assert callback.report.num_samples == max_samples


@pytest.mark.parametrize("every_n_epochs", [1, 2, 3])
def test_accuracy_stays_with_its_measurement_without_validation(tmp_path, every_n_epochs):
    class Late(WithoutValidation):
        def on_train_epoch_end(self):
            self.log("acc", 0.125 * (1 + self.current_epoch))

    callback = flatness_callback(data="train", every_n_epochs=every_n_epochs)
    fit(tmp_path, callback, None, module=Late(), max_epochs=6)
    wanted = {epoch: 0.125 * (1 + epoch) for epoch in range(0, 6, every_n_epochs)}
    assert {record["epoch"]: record["accuracy"] for record in callback.history} == wanted


@pytest.mark.parametrize("data", ["val", "train"])
def test_validation_by_steps_across_epochs(tmp_path, data):
    callback = flatness_callback(data=data)
    fit(tmp_path, callback, loaders()[1], check_val_every_n_epoch=None, val_check_interval=3, max_epochs=3)
    assert [record["step"] for record in callback.history] == [3, 6, 9, 12]


@pytest.mark.parametrize("data", ["val", "train"])
def test_reloaded_loaders(tmp_path, data):
    callback, module = flatness_callback(data=data), WithData()
    quiet_trainer(tmp_path, callback, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module)
    assert len(callback.history) == 3
    expected = lf.measure_flatness(module.net, loaders()[data == "val"])
    assert_close(callback.report.relative_flatness, expected.relative_flatness, rtol=1e-5, atol=0)


@pytest.mark.parametrize("data", ["val", "train"])
def test_overfitting_on_one_batch(tmp_path, data):
    callback = flatness_callback(data=data)
    fit(tmp_path, callback, loaders()[1], overfit_batches=1)
    assert len(callback.history) == 2


@pytest.mark.parametrize("data", ["val", "train"])
def test_going_on_with_the_same_trainer(tmp_path, data):
    callback, module = flatness_callback(data=data), Classifier()
    trainer = quiet_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(module, *loaders())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, *loaders())
    assert [record["epoch"] for record in callback.history][-2:] == [2, 3]


class InBulk(Wrapped):
    """Reads whole batches: is given the list of their indices."""

    def __getitem__(self, indices):
        return self.data[torch.tensor(indices)]


class ByName(Wrapped):
    """Samples have names; only the sampler knows them."""

    def __init__(self, data):
        super().__init__({f"sample {index}": data[index] for index in range(len(data))})

    def __getitem__(self, name):
        return self.data[name]


def in_bulk(data):
    return DataLoader(InBulk(data), batch_size=None, sampler=BatchSampler(SequentialSampler(data), 8, drop_last=False))


def by_name(data):
    named = ByName(data)
    return DataLoader(named, batch_size=8, sampler=list(named.data))


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("kind", [in_bulk, by_name], ids=["in bulk", "by name"])
def test_data_sets_that_are_not_read_by_number(tmp_path, kind, data, sanity):
    callback, module = flatness_callback(data=data), Classifier()
    trainer = quiet_trainer(tmp_path, callback, num_sanity_val_steps=sanity)
    try:
        trainer.fit(module, kind(dataset(32)), kind(dataset(22, seed=1)))
    except lf.FlatnessError as error:
        refused = str(error)
    else:
        refused = None
    if data == "train" and refused:
        assert "data='val'" in refused  # the remedy
        return
    assert refused is None
    expected = lf.measure_flatness(module.net, loaders()[data == "val"])
    assert_close(callback.report.relative_flatness, expected.relative_flatness, rtol=1e-5, atol=0)


class WithOwnGenerator(Wrapped):
    """Draws from a generator of torch of its own."""

    def __init__(self, data):
        super().__init__(data)
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + torch.randn((), generator=self.generator), y


@pytest.mark.parametrize("sanity", [0, 2])
def test_validation_data_that_is_part_of_the_training_data(tmp_path, sanity):
    ends = []
    for callbacks in ([], [flatness_callback()]):
        whole = WithOwnGenerator(dataset(40))
        train, val = (DataLoader(Subset(whole, part), batch_size=8) for part in (range(24), range(24, 40)))
        module = Classifier()
        trainer = quiet_trainer(tmp_path, *callbacks, num_sanity_val_steps=sanity)
        seed_all()
        trainer.fit(module, train, val)
        ends.append(end_of(trainer, module))
    assert_same(*ends)


@pytest.mark.filterwarnings("ignore:.*batch_fn= gives other inputs")
@guards("callbacks.data.loaders:loaders_in_turn", body="return flat_loaders(loaders)")
@pytest.mark.parametrize("max_samples", [None, 7])
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size"])
def test_combined_validation_loaders(tmp_path, mode, sanity, max_samples):
    val = CombinedLoader([loaders()[1], DataLoader(dataset(40, seed=3), batch_size=8)], mode)
    options = {} if mode == "sequential" else {"batch_fn": lambda batch: batch[1]}
    callback = flatness_callback(max_samples=max_samples, **options)
    fit(tmp_path, callback, val, module=OfSeveral(), num_sanity_val_steps=sanity)
    available = {"sequential": 22, "min_size": 24, "max_size": 40}[mode]
    assert callback.report.num_samples == (max_samples or available)


@guards("callbacks/data/stream.py", 'self._warn("the loaders are combined")', "pass")
def test_combined_loaders_on_several_ranks_are_warned_of():
    with pytest.warns(UserWarning, match="the loaders are combined.*repeats count twice"):
        assert ValidationStream(None, 1, num_ranks=2).mask(3, 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ValidationStream(None, 1).mask(3, 0).all()


class Backwards:
    """A batch sampler of the user's own, which reads a data set from its end, and has no sampler in it."""

    def __init__(self, length, batch_size):
        self.length, self.batch_size = length, batch_size
        self.sampler = None  # Lightning 2.5 looks

    def __iter__(self):
        return iter(torch.arange(self.length).flip(0).split(self.batch_size))

    def __len__(self):
        return -(-self.length // self.batch_size)


@guards("callbacks/data/loaders.py", "return keeps_order(loader) and isinstance(", "return isinstance(")
def test_classes_of_batches_in_an_order_of_their_own():
    """Which sample is of which class is not known of them, so that no class can be given its share."""
    data = dataset(22)
    in_order = BatchSampler(SequentialSampler(data), 6, False)
    assert reads_in_order(DataLoader(data, batch_sampler=in_order))
    assert not reads_in_order(DataLoader(data, batch_sampler=Backwards(22, 6)))
    backwards = Backwards(22, 6)
    backwards.sampler = SequentialSampler(data)
    assert not reads_in_order(DataLoader(data, batch_sampler=backwards))


@pytest.mark.parametrize("data", ["val", "train"])
def test_a_batch_sampler_without_a_sampler(tmp_path, data):
    pair = [DataLoader(dataset(length), batch_sampler=Backwards(length, 6)) for length in (32, 22)]
    callback, module = flatness_callback(data=data), Classifier()
    quiet_trainer(tmp_path, callback).fit(module, *pair)
    expected = lf.measure_flatness(module.net, pair[data == "val"])
    assert callback.report.num_samples == expected.num_samples
    assert_close(callback.report.relative_flatness, expected.relative_flatness, rtol=1e-5, atol=0)


class LeavesOut(SequentialSampler):
    """A sampler of the user's own, which leaves out samples that cannot be read."""

    def __iter__(self):
        return iter(range(4, len(self.data_source)))


class ReadsFromTheFifth(Dataset):
    def __init__(self, data):
        self.data, self.wrongly_read = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index < 4:
            self.wrongly_read.append(index)
            raise OSError("a broken file")
        return self.data[index]


@guards("callbacks/data/reading.py", " or type(sampler_of(loader)) not in known", "")
def test_samples_that_an_unknown_sampler_leaves_out_are_not_read(tmp_path):
    data = ReadsFromTheFifth(dataset(22, seed=1))
    callback = flatness_callback()
    fit(tmp_path, callback, DataLoader(data, batch_size=6, sampler=LeavesOut(data)), num_sanity_val_steps=0)
    assert callback.report.num_samples == 18
    assert data.wrongly_read == []
