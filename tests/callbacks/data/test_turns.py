"""A rank that has failed knows when the other ranks have measured the first samples."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_flatness.callbacks.data.sources import ValidationBatches, Wanted
from lightning_flatness.measure.samples import none_left
from tests.callbacks.lightning_modules import dataset
from tests.guarding import guards


def sources(rank, num_ranks, max_samples):
    """Two sources of the same loader: one for a rank that measures, one for a rank that fails."""
    data = dataset(410)
    sampler = DistributedSampler(data, num_replicas=num_ranks, rank=rank, shuffle=False)
    loader, trainer = DataLoader(data, 6, sampler=sampler), SimpleNamespace(global_rank=rank, world_size=num_ranks)
    pair = [ValidationBatches(trainer, Wanted("val", max_samples, None), loader, len(loader)) for _ in range(2)]
    return loader, *pair


@guards("callbacks/data/sources.py", "order = order[self._stream.mask(rows, batch_idx)]", "pass")
@guards(
    "callbacks/data/sources.py", "rows = self._batch_size or num_rows(batch)", "rows = num_rows(batch)", ids="None-2"
)
@guards("measure/samples.py", "positions // num_ranks * num_ranks", "positions", ids="None-3")
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("max_samples", [None, 20, 150, 300])
def test_failed_ranks_know_when_the_others_are_due(num_ranks, max_samples):
    due = []
    for rank in range(num_ranks):
        loader, measuring, failed = sources(rank, num_ranks, max_samples)
        steps = []
        for index, (x, y) in enumerate(loader):
            mask = measuring.mask((x, y), index)
            is_due = bool(mask.any()) and none_left(measuring.positions, num_ranks)
            batch = [x, y, torch.zeros(1000, 2)]  # with a table that all samples share
            assert measuring.is_last(index) or failed.is_due(batch, index) == is_due
            steps.append(is_due)
        due.append(steps.index(True) if any(steps) else None)
    if max_samples is None:
        assert due == [due[0]] * num_ranks, "the ranks take turns"
    assert (due[0] is None) == (max_samples == 20)
