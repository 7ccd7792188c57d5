"""Which samples of the validation batches are measured, on any number of ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from lightning_flatness.callbacks.data.stream import ValidationStream
from tests.guarding import guards


def numbered(samples):
    """Every sample is its own number; labels are the number modulo three."""
    values = torch.arange(samples)
    return TensorDataset(values, values % 3)


def sharded(data, batch_size, rank, ranks, drop_last=False, **options):
    sampler = DistributedSampler(data, ranks, rank, shuffle=options.pop("shuffle", False), drop_last=drop_last)
    return DataLoader(data, batch_size, sampler=sampler, **options)


def measured(loader, rank=0, ranks=1, limit=10**6, **options):
    """The numbers of the samples that one rank measures."""
    count = min(limit, len(list(loader)))
    stream = ValidationStream(loader, count, rank=rank, num_ranks=ranks, **options)
    found = []
    for batch_idx, (x, _) in enumerate(loader):
        if batch_idx < count:
            found += x[stream.mask(len(x), batch_idx)].tolist()
    return found


SIZES = st.integers(1, 69)


@guards("callbacks/data/stream.py", "mask &= positions < shard.length", "pass")
@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_all_ranks_together_measure_every_sample_once(size, batch_size, ranks, shuffle):
    data, found = numbered(size), []
    for rank in range(ranks):
        found += measured(sharded(data, batch_size, rank, ranks, shuffle=shuffle), rank, ranks)
    assert sorted(found) == list(range(size))


def test_repeated_samples_would_be_seen():
    """Without the masks, the first sample counts twice."""
    found = [int(x) for rank in range(2) for batch, _ in sharded(numbered(5), 2, rank, 2) for x in batch]
    assert sorted(found) == [0, 0, 1, 2, 3, 4]


@guards("callbacks.data.stream:_Shard.share", body="return chosen")
@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
@pytest.mark.slow
def test_ranks_share_the_samples_that_one_process_measures(size, batch_size, ranks, max_samples):
    data = numbered(size)
    alone = measured(DataLoader(data, batch_size), max_samples=max_samples)
    assert len(alone) == min(max_samples, size)
    together = []
    for rank in range(ranks):
        together += measured(sharded(data, batch_size, rank, ranks), rank, ranks, max_samples=max_samples)
    assert sorted(together) == sorted(alone)
    copies = []
    for rank in range(ranks):  # use_distributed_sampler=False: every rank sees all
        copies += measured(DataLoader(data, batch_size), rank, ranks, max_samples=max_samples)
    assert sorted(copies) == sorted(alone)


def test_every_class_has_its_share():
    found = torch.tensor(measured(DataLoader(numbered(30), 7), max_samples=12))
    assert (found % 3).bincount().tolist() == [4, 4, 4]


@pytest.mark.parametrize("limit", [1, 2])
def test_samples_are_chosen_among_the_batches_that_are_run(limit):
    assert len(measured(DataLoader(numbered(30), 4), limit=limit, max_samples=3)) == 3


def test_dropped_samples_are_not_waited_for():
    assert len(measured(DataLoader(numbered(11), 4, drop_last=True), max_samples=8)) == 8
    assert sorted(measured(sharded(numbered(11), 2, 1, 2, drop_last=True), 1, 2)) == [1, 3, 5, 7, 9]


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*numbered(10).tensors, strict=True)


def test_of_a_stream_the_first_are_measured():
    assert measured(DataLoader(Stream(), 4), max_samples=5) == [0, 1, 2, 3, 4]
    shares = [len(measured(DataLoader(Stream(), 4), rank, 2, max_samples=5)) for rank in range(2)]
    assert shares == [3, 2]


class ReadyBatches(Dataset):
    """Every item is a batch."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.arange(4) + 4 * index, torch.zeros(4)


def test_ready_batches_are_left_out_whole():
    found = []
    for rank in range(2):
        loader = DataLoader(ReadyBatches(), batch_size=None, sampler=DistributedSampler(ReadyBatches(), 2, rank, False))
        found += measured(loader, rank, 2)
    assert sorted(found) == list(range(12))


@guards("callbacks/data/stream.py", "positions * self._ready_rows", "positions")
@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_of_ready_batches_have_the_same_positions_on_any_number_of_ranks(ranks):
    found = {}
    for rank in range(ranks):
        sampler = DistributedSampler(ReadyBatches(), ranks, rank, shuffle=False) if ranks > 1 else None
        loader = DataLoader(ReadyBatches(), batch_size=None, sampler=sampler)
        stream = ValidationStream(loader, len(list(loader)), rank=rank, num_ranks=ranks)
        for index, (x, _) in enumerate(loader):
            mask = stream.mask(len(x), index)
            found |= dict(zip(x[mask].tolist(), stream.order(len(x), index)[mask].tolist(), strict=True))
    assert found == {sample: sample for sample in range(12)}


class Reversed(BatchSampler):
    def __iter__(self):
        return reversed(list(super().__iter__()))


@guards("callbacks.data.stream:ValidationStream._warn", returns=None)
@guards("callbacks/data/stream.py", "if not self.is_in_order:", "if False:", ids="even batches")
@pytest.mark.parametrize(("samples", "of_rank"), [(5, 3), (7, 4)], ids=["uneven batches", "even batches"])
def test_batches_in_an_order_of_their_own_are_all_measured_with_a_warning(samples, of_rank):
    data = numbered(samples)
    loader = DataLoader(data, batch_sampler=Reversed(DistributedSampler(data, 2, 1, shuffle=False), 2, False))
    with pytest.warns(UserWarning, match=r"which samples.*a custom batch sampler chooses them\).*repeats count twice"):
        assert len(measured(loader, 1, 2)) == of_rank


@guards("callbacks/data/stream.py", "if rows != min(self._batch_size, own_length - before):", "if False:")
def test_a_collate_function_that_drops_samples():
    def all_but_the_first(samples):
        return torch.utils.data.default_collate(samples[1:] or samples)

    loader = sharded(numbered(7), 3, 1, 2, collate_fn=all_but_the_first)
    with pytest.warns(UserWarning, match=r".their sizes are not those.*beyond max_samples=[.]$") as caught:
        assert len(measured(loader, 1, 2)) == 2  # the repeated one can be told: its batch is whole
    assert len(caught) == 1


def test_loaders_that_are_combined_are_all_measured():
    stream = ValidationStream(None, 4)
    assert stream.mask(2, 0).tolist() == [True, True]
    stream = ValidationStream(None, 4, max_samples=3)
    assert [stream.mask(2, index).tolist() for index in range(2)] == [[True, True], [True, False]]
