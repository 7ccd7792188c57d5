"""A fixed choice of samples with every class in its share."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_flatness.callbacks.data.stratified import choose, labels_of
from tests.guarding import guards


@guards("callbacks/data/stratified.py", "if labels is None:", "if True:")
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70))
def test_every_class_has_its_share(labels, chosen):
    labels = torch.tensor(labels)
    total = len(labels)
    found = choose(total, chosen, labels)
    assert len(found) == min(chosen, total)
    assert found.tolist() == sorted(set(found.tolist()))
    for label in labels.unique():
        share = min(chosen, total) * int((labels == label).sum()) / total
        assert abs(int((labels[found] == label).sum()) - share) < 1 + 1e-9


@given(st.integers(1, 40), st.integers(1, 50))
def test_without_labels(total, chosen):
    found = choose(total, chosen)
    assert len(set(found.tolist())) == min(chosen, total)
    assert torch.equal(found, choose(total, chosen))


def test_the_choice_is_random():
    """Within a class, not the first ones."""
    labels = torch.zeros(1000, dtype=torch.long)
    for found in (choose(1000, 100), choose(1000, 100, labels)):
        assert 400 < float(found.double().mean()) < 600
        assert int(found.diff().max()) > 20


class Plain(Dataset):
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise AssertionError("labels are not worth reading samples")


X = torch.zeros(3, 2)
TWO = TensorDataset(X, torch.tensor([5, 6, 7]))


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (TWO, [5, 6, 7]),
        (Subset(TWO, [2, 0]), [7, 5]),
        (Subset(Subset(TWO, torch.tensor([2, 0])), (1,)), [5]),
        (ConcatDataset([TWO, Subset(TWO, [1])]), [5, 6, 7, 6]),
        (Plain(targets=[1, 2, 3]), [1, 2, 3]),
        (Plain(targets=torch.tensor([1, 2, 3], dtype=torch.uint8)), [1, 2, 3]),
        (Plain(labels=torch.tensor([1, 2, 3]).numpy()), [1, 2, 3]),
        (Plain(targets=None, labels=[3, 2, 1]), [3, 2, 1]),
        (Plain(targets=[[1, 0], [0, 1], [1, 1]]), None),
        (Plain(targets=[0.5, 0.1, 0.2]), None),
        (Plain(targets=["a", "b", "c"]), None),
        (Plain(targets=[1, 2]), None),
        (Plain(targets=[1, None, 2]), None),
        (Plain(targets=SimpleNamespace()), None),
        (Plain(), None),
        (TensorDataset(X), None),
        (ConcatDataset([TWO, Plain()]), None),
    ],
)
def test_labels_of_data_sets(dataset, labels):
    found = labels_of(dataset)
    assert labels == (None if found is None else found.tolist())
