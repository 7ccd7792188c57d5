"""Training data: which samples are measured, without a trace on the loader."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import BatchSampler, DataLoader, Subset, SubsetRandomSampler

import lightning_flatness as lf
from lightning_flatness.callbacks.data.subset import FixedSubset, training_subset
from tests.callbacks.flatness_runs import Recorder, Stream, expected, fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, Net, WithoutValidation, dataset, loaders, quiet_trainer
from tests.callbacks.training_runs import Augmented
from tests.guarding import guards


@pytest.mark.parametrize("max_samples", [None, 10])
def test_training_data_is_measured_in_evaluation_mode(tmp_path, max_samples):
    recorder, (train, val) = Recorder(), loaders(dtype=torch.float64)
    callback = flatness_callback(data="train", max_samples=max_samples)
    fit(tmp_path, callback, recorder, module=Classifier().double(), data=(train, val), max_epochs=3)
    batches = train if max_samples is None else batches_of(FixedSubset(train, 10))
    assert callback.report.num_samples == (max_samples or 32)
    for logged, net in zip(recorder.flatness(), recorder.nets, strict=True):
        assert logged == pytest.approx(expected(net, batches), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.25}, {"limit_val_batches": 1}], ids=str)
def test_training_data_is_all_measured_however_validation_goes(tmp_path, options):
    recorder, (train, val) = Recorder(), loaders()
    callback = flatness_callback(data="train")
    fit(tmp_path, callback, recorder, data=(train, [val, val]), **options)
    assert callback.report.num_samples == 32
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], train), rel=1e-6)


@pytest.mark.parametrize("how", ["no loader", "no validation_step", "limit_val_batches=0"])
def test_training_data_without_validation(tmp_path, how):
    train, val = loaders()
    module = (WithoutValidation if how == "no validation_step" else Classifier)()
    callback = flatness_callback(data="train", every_n_epochs=2)
    options = {"limit_val_batches": 0} if how.startswith("limit") else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlatnessCallback")
        data = (train,) if how == "no loader" else (train, val)
        fit(tmp_path, callback, module=module, data=data, max_epochs=3, **options)
    assert [record["epoch"] for record in callback.history] == [0, 2]
    assert callback.history[-1]["relative_flatness"] == pytest.approx(expected(module.net, train), rel=1e-6)


def batches_of(subset):
    return list(subset.batches(Net()))


@guards("callbacks/data/reading.py", "seed_all(index)", "pass", ids="0")
@pytest.mark.parametrize("workers", [0, 1])
def test_random_transforms_draw_the_same_in_every_epoch(workers):
    loader = DataLoader(Augmented(dataset(12)), batch_size=4, shuffle=True, num_workers=workers)
    subset = FixedSubset(loader, 10)
    epochs = []
    for _ in range(2):
        epochs.append([x for x, _ in subset.batches(Net())])
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert [len(x) for x in epochs[0]] == [4, 4, 2]
    assert_close(epochs[0], epochs[1], rtol=0, atol=0)


def test_training_data_with_random_transforms(tmp_path):
    train, val = DataLoader(Augmented(dataset(24)), batch_size=8, shuffle=True), loaders()[1]
    recorder = Recorder()
    fit(tmp_path, flatness_callback(data="train"), recorder, data=(train, val))
    batches = batches_of(training_subset(train, None, 0, 1))
    assert recorder.flatness()[-1] == pytest.approx(expected(recorder.nets[-1], batches), rel=1e-6)


@guards("callbacks/data/sampled.py", "sampler.indices, sampler)", "range(32), sampler)", ids="sampler")
@pytest.mark.parametrize("batched", [False, True], ids=["sampler", "batch_sampler"])
def test_samples_that_a_sampler_leaves_out_are_not_measured(tmp_path, batched):
    data, kept = dataset(32), list(range(0, 32, 3))
    sampler = SubsetRandomSampler(kept)
    if batched:
        train = DataLoader(data, batch_sampler=BatchSampler(sampler, 4, drop_last=False))
    else:
        train = DataLoader(data, batch_size=4, sampler=sampler)
    recorder, callback = Recorder(), flatness_callback(data="train")
    fit(tmp_path, callback, recorder, data=(train, loaders()[1]))
    assert callback.report.num_samples == len(kept)
    wanted = expected(recorder.nets[-1], DataLoader(Subset(data, kept), batch_size=4))
    assert recorder.flatness()[-1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("train", "found"),
    [
        (DataLoader(Stream(), batch_size=8), "DataLoader over a Stream"),
        ([loaders()[0], loaders()[0]], "the Trainer has a list"),
        ({"a": loaders()[0], "b": loaders()[0]}, "the Trainer has a dict"),
    ],
    ids=["iterable", "list", "dict"],
)
def test_training_data_that_cannot_be_indexed_is_refused(tmp_path, train, found):
    module = Classifier()
    with pytest.raises(lf.FlatnessError, match=rf"data='train'.*one training DataLoader.*{found}.*data='val'"):
        fit(tmp_path, flatness_callback(data="train"), module=module, data=(train, loaders()[1]))
    assert module.training_steps == 0


@guards("callbacks/data/subset.py", "own_loader(loader, indices.tolist())", "loader")
@pytest.mark.parametrize("data", ["val", "train"])
def test_training_loader_is_iterated_by_the_trainer_alone(tmp_path, data):
    class Counting(DataLoader):
        iterations = 0

        def __iter__(self):
            type(self).iterations += 1
            return super().__iter__()

    counts = []
    for callbacks in [(), (flatness_callback(data=data),)]:
        Counting.iterations = 0
        train = Counting(dataset(16), batch_size=8)
        fit(tmp_path, *callbacks, data=(train, loaders()[1]), val_check_interval=0.5, num_sanity_val_steps=0)
        counts.append(Counting.iterations)
    assert counts[0] == counts[1] > 0


@guards("callbacks/flatness.py", 'self._data_name == "train" and trainer.state.fn != "fit"', "False")
def test_training_data_is_not_measured_by_validate(tmp_path):
    trainer = quiet_trainer(tmp_path, flatness_callback(data="train"))
    with pytest.warns(UserWarning, match="data='train'.*fit only"):
        (logged,) = trainer.validate(Classifier(), loaders()[1], verbose=False)
    assert list(logged) == ["val_acc"]
