"""Which samples are trained on: those that samplers leave out are not measured, and looking leaves no trace."""

import random
import warnings
from collections import UserList

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import lightning_flatness as lf
from lightning_flatness.callbacks.data.sampled import MANY_EPOCHS, samples_read
from tests.callbacks.compare import assert_same, end_of, seed_all
from tests.callbacks.epoch_end_runs import KINDS, kinds
from tests.callbacks.epoch_end_runs import fit as fit_at_epochs
from tests.callbacks.flatness_runs import Recorder, expected, fit, flatness_callback
from tests.callbacks.lightning_modules import Classifier, dataset, loaders
from tests.guarding import guards

ALL = list(range(30))
KEPT = [3, 17, 5, 28, 11, 0]
DATA = dataset(30)


DRAWS = {
    "torch": lambda self, number: torch.randperm(number).tolist(),
    "numpy": lambda self, number: np.random.permutation(number).tolist(),  # noqa: NPY002
    "python": lambda self, number: random.sample(range(number), number),
    "own": lambda self, number: torch.randperm(number, generator=self.generator).tolist(),
    "own numpy": lambda self, number: self.numpy.permutation(number).tolist(),
    "of the data": lambda self, number: torch.randperm(number, generator=self.data.generator).tolist(),
    "in place": lambda self, number: self.order_in_place(),
}


class Shuffled(Sampler):
    """Random numbers from one of all kinds of generators, also one that it shares with its data."""

    def __init__(self, kept=KEPT, how="torch", data=None):
        self.kept, self.how, self.data = kept, how, data
        self.generator, self.numpy = torch.Generator().manual_seed(5), np.random.default_rng(5)
        self.order = list(range(len(kept)))

    def order_in_place(self):
        random.shuffle(self.order)
        return self.order

    def __iter__(self):
        return iter([self.kept[index] for index in DRAWS[self.how](self, len(self.kept))])

    def __len__(self):
        return len(self.kept)


class InTurn(Sampler):
    """Some samples in a fixed order; ``sized`` tells its length."""

    def __init__(self, kept=KEPT):
        self.kept = kept

    def __iter__(self):
        return iter(self.kept)


class Endless(InTurn):
    def __iter__(self):
        while True:
            yield from self.kept


class Tenth(Shuffled):
    """In every epoch another tenth."""

    def __iter__(self):
        return iter(list(super().__iter__())[: len(self.kept) // 10])

    def __len__(self):
        return len(self.kept) // 10


class OfEpoch(Sampler):
    """Another sample in every epoch, until all have had their turn."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([KEPT[self.epoch % len(KEPT)]])

    def __len__(self):
        return 1


class Batches(Sampler):
    """Batches of two from a list, in this order or shuffled; no ``batch_size``."""

    def __init__(self, kept=KEPT, shuffle=False, batches=list):
        self.kept, self.shuffle, self.batches = kept, shuffle, batches

    def __iter__(self):
        order = random.sample(self.kept, len(self.kept)) if self.shuffle else self.kept
        return iter([self.batches(order[first : first + 2]) for first in range(0, len(order), 2)])

    def __len__(self):
        return len(self.kept) // 2


class Reordered(BatchSampler):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def by_batches(sampler, **options):
    return DataLoader(DATA, batch_sampler=sampler, **options)


def by_samples(sampler, batch_size=2, **options):
    return DataLoader(DATA, batch_size, sampler=sampler, **options)


SAMPLERS = {
    "in order": (by_samples(None), ALL, ALL[:4]),
    "shuffled": (by_samples(None, shuffle=True), ALL, ALL),
    "SequentialSampler of fewer": (by_samples(SequentialSampler(range(7))), ALL[:7], ALL[:4]),
    "RandomSampler of fewer": (by_samples(RandomSampler(range(7))), ALL[:7], ALL[:7]),
    "with replacement": (by_samples(RandomSampler(DATA, replacement=True, num_samples=5)), ALL, ALL),
    "SubsetRandomSampler": (by_samples(SubsetRandomSampler(KEPT)), KEPT, KEPT),
    "weights of zero": (by_samples(WeightedRandomSampler([float(i in KEPT) for i in ALL], 4)), KEPT, KEPT),
    "DistributedSampler": (by_samples(DistributedSampler(DATA, 2, 0, shuffle=False)), ALL, ALL[:8]),
    "DistributedSampler, shuffled": (by_samples(DistributedSampler(DATA, 2, 0)), ALL, ALL),
    "DistributedSampler, drop_last": (
        by_samples(DistributedSampler(DATA, 4, 0, shuffle=False, drop_last=True)),
        ALL[:28],
        ALL[:16],
    ),
    "list": (by_samples(KEPT), KEPT, KEPT[:4]),
    "tuple": (by_samples(tuple(KEPT)), KEPT, KEPT[:4]),
    "range": (by_samples(range(0, 30, 4)), range(0, 30, 4), [0, 4, 8, 12]),
    "sequence that is no list": (by_samples(UserList(KEPT)), KEPT, KEPT[:4]),
    "tensor": (by_samples(torch.tensor(KEPT)), KEPT, KEPT[:4]),
    "array": (by_samples(np.array(KEPT)), KEPT, KEPT[:4]),
    "repeated": (by_samples([3, 3, 17]), [3, 17], [3, 17]),
    "from the end": (by_samples([-1, -30, 4]), [29, 0, 4], [29, 0, 4]),
    "batch_size=None": (DataLoader(DATA, batch_size=None, sampler=KEPT), KEPT, KEPT[:2]),
    **{f"own, {how}": (by_samples(Shuffled(how=how, data=DATA)), KEPT, KEPT) for how in DRAWS},
    "own, in a fixed order": (by_samples(InTurn()), KEPT, KEPT[:4]),
    "own, of another type": (by_samples(InTurn(np.array(KEPT))), KEPT, KEPT[:4]),
    "BatchSampler": (by_batches(BatchSampler(KEPT, 2, drop_last=False)), KEPT, KEPT[:4]),
    "BatchSampler of an own one": (by_batches(BatchSampler(Shuffled(), 2, drop_last=False)), KEPT, KEPT),
    "own batches": (by_batches(Batches()), KEPT, KEPT[:4]),
    "own batches, shuffled": (by_batches(Batches(shuffle=True)), KEPT, KEPT),
    "own batches, tensors": (by_batches(Batches(batches=torch.tensor)), KEPT, KEPT[:4]),
    "list of batches": (by_batches([[3, 17], [5], [28, 11, 0]]), KEPT, KEPT[:3]),
    "own subclass of BatchSampler": (by_batches(Reordered(KEPT, 2, False)), KEPT, [11, 0, 5, 28]),
    "other epochs": (by_samples(OfEpoch()), KEPT, KEPT),
}
DATA.generator = torch.Generator().manual_seed(7)


@guards("callbacks/data/sampled.py", "weights.nonzero().flatten()", "weights.argsort()", ids="weights of zero")
@guards("callbacks/data/sampled.py", "epoch in range(number)", "epoch in range(1)", ids="other epochs")
@guards("callbacks/data/sampled.py", "set_epoch(epoch)", "pass", ids="other epochs")
@guards("callbacks/data/sampled.py", "if not keeps_order(loader):", "if False:", ids="own batches")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.filterwarnings("ignore:A OfEpoch leaves out")
def test_samples_that_are_trained_on(name):
    loader, kept, in_two_batches = SAMPLERS[name]
    assert samples_read(loader).tolist() == sorted(kept)
    assert samples_read(loader, num_batches=2).tolist() == sorted(in_two_batches)


@guards("callbacks/data/sampled.py", "with random_states_kept(nn.Identity()), ", "with ", ids="numpy")
@guards("callbacks/data/sampled.py", ", generators_kept(drawing(loader)):", ":", ids="of the data")
@guards(
    "callbacks/data/sampled.py", "deepcopy(sampler, {id(loader.dataset): loader.dataset})", "sampler", ids="in place"
)
@pytest.mark.parametrize("how", DRAWS)
def test_looking_leaves_no_trace(how):
    epochs = []
    for looks in (False, True):
        data = dataset(30)
        data.generator = torch.Generator().manual_seed(7)
        loader = DataLoader(data, 2, sampler=Shuffled(how=how, data=data))
        seed_all()
        if looks:
            samples_read(loader)
            assert loader.sampler.data is data
        epochs.append([list(loader.sampler), list(loader.sampler)])
    assert epochs[0] == epochs[1]


@guards("model.generators:seed_generators", returns=None, ids="own numpy")
@pytest.mark.parametrize("how", ["torch", "own", "own numpy"])
def test_a_sampler_with_other_samples_in_every_epoch_is_warned_of(how):
    loader = by_samples(Tenth(ALL, how))
    with pytest.warns(UserWarning, match=rf"A Tenth leaves out different samples in every epoch.*{MANY_EPOCHS} epochs"):
        found = samples_read(loader)
    assert 15 <= len(found) <= 30
    list(loader.sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(samples_read(loader), found), "the same in every epoch of training"


def test_an_endless_sampler():
    assert samples_read(by_samples(Endless()), num_batches=2).tolist() == sorted(KEPT[:4])
    with pytest.raises(lf.FlatnessError, match="the sampler, a Endless, reads: it seems to have no end"):
        samples_read(by_samples(Endless()))


class NotCopied(InTurn):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle a lock")


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (["a", "b"], "not all whole numbers"),
        (InTurn(["a", "b"]), "a copy of it raises TypeError"),
        (InTurn([(3, 224), (5, 192)]), "a copy of it raises TypeError"),
        (NotCopied(), "a copy of it raises TypeError: cannot pickle a lock"),
    ],
    ids=["list of names", "names", "indices with sizes", "no copies"],
)
def test_samplers_that_cannot_be_understood(sampler, reason):
    with pytest.raises(lf.FlatnessError, match=rf"It is not known which samples.*{reason}.*data= with a loader"):
        samples_read(by_samples(sampler))


# ------------------------------------------------------------------------------------------------------ in a Trainer


IN_TRAINER = {
    "list": lambda: {"sampler": KEPT, "batch_size": 4},
    "own sampler": lambda: {"sampler": Shuffled(), "batch_size": 4},
    "own sampler of numpy": lambda: {"sampler": Shuffled(how="own numpy"), "batch_size": 4},
    "weights of zero": lambda: {
        "sampler": WeightedRandomSampler([float(index in KEPT) for index in range(30)], 8),
        "batch_size": 4,
    },
    "own batches": lambda: {"batch_sampler": Batches(shuffle=True)},
}


@pytest.mark.parametrize("name", IN_TRAINER)
def test_the_callback_measures_what_is_trained_on(tmp_path, name):
    ends = []
    for with_callback in (False, True):
        recorder, callback, module = Recorder(), flatness_callback(data="train"), Classifier()
        seed_all()
        train = DataLoader(dataset(30), **IN_TRAINER[name]())
        callbacks = [callback, recorder] if with_callback else []
        ends.append(end_of(fit(tmp_path, *callbacks, module=module, data=(train, loaders()[1])), module))
    assert_same(*ends)
    assert callback.report.num_samples == len(KEPT)
    wanted = expected(recorder.nets[-1], DataLoader(Subset(dataset(30), KEPT), batch_size=4))
    assert recorder.flatness()[-1] == pytest.approx(wanted, rel=1e-5)


@kinds
def test_callbacks_at_epochs_measure_what_is_trained_on(tmp_path, kind):
    callback, module = KINDS[kind](), Classifier()
    fit_at_epochs(
        tmp_path, callback, module=module, data=(DataLoader(dataset(30), 4, sampler=Shuffled()), loaders()[1])
    )
    result = callback.result if kind == "spectrum" else callback.results["kept"]
    assert result.num_samples == len(KEPT)
    x, y = dataset(30)[KEPT]
    module.eval()
    wanted = torch.nn.functional.cross_entropy(module(x), y).item()
    assert (result.loss if kind == "spectrum" else result.origin_loss) == pytest.approx(wanted, rel=1e-5)
